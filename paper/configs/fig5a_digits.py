"""Fig. 5a of the paper on scikit-learn's digits: IMP of the network of fig1_digits in 1, 2 and 4 levels.

    python train.py --config=paper/configs/fig5a_digits.py --workdir=runs/fig5a_digits
    python -m paper fig5a --rows=runs/fig5a_digits

Level k of n prunes to compression^(k/n) and rewinds to initialization; a run of n levels trains n + 1 times.
Trained for twelve epochs with a weight decay of 5e-3, so that trained weights outweigh their initialization.
Expect one level to collapse at compression 100, where two keep 96 % and four 99 %; all have collapsed at 1000.
Measured on two CPU cores that others used as well: 15 minutes.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig


def get_config() -> Config:
    """IMP at four compressions, and the unpruned network; two seeds: 26 runs, of up to five times twelve epochs."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=0.125,
        prune=PruneConfig(num_iterations=1),
        train=TrainConfig(
            num_epochs=12,
            batch_size=64,
            learning_rate=0.1,
            drops=(9,),
            weight_decay=5e-3,
            augment=False,
            compact=False,
            keep_checkpoints=1,
        ),
        grid=Grid(seed=(0, 1)),
        grids=(
            Grid(pruner=("magnitude",), compression=(1.0,)),
            Grid(
                pruner=("imp",),
                num_iterations=(1, 2, 4),
                compression=tuple(10 ** (power / 2) for power in (3, 4, 5, 6)),
            ),
        ),
    )
