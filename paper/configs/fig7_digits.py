"""Fig. 7 of the paper on scikit-learn's digits: SNIP and GraSP in 100 iterations, beside SynFlow and IMP.

    python train.py --config=paper/configs/fig7_digits.py --workdir=runs/fig7_digits
    python -m paper fig7 --rows=runs/fig7_digits,runs/fig1_digits,runs/fig5a_digits

The network of fig1_digits, whose rows are the curves of SynFlow and of a single iteration; those of fig5a_digits are
IMP's, which trains twice as long.
Expect iterations to keep both connected up to 1000 and to cost accuracy: at 100 SNIP 70 % (82 % in one
iteration), GraSP 15 % (63 %). Measured on two CPU cores that others used as well: 3.5 minutes.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig


def get_config() -> Config:
    """SNIP and GraSP in 100 iterations, four compressions, two seeds: 16 runs."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=0.125,
        prune=PruneConfig(num_iterations=100),
        train=TrainConfig(
            num_epochs=6,
            batch_size=64,
            learning_rate=0.05,
            drops=(4,),
            augment=False,
            compact=False,
            keep_checkpoints=1,
        ),
        grid=Grid(
            seed=(0, 1),
            pruner=("snip", "grasp"),
            compression=tuple(10 ** (power / 2) for power in (3, 4, 5, 6)),
        ),
    )
