"""Fig. 6 of the paper on scikit-learn's digits: five rules, VGG-16 (BN) and ResNet-20, both narrow.

    python train.py --config=paper/configs/fig6_digits.py --workdir=runs/fig6_digits
    python -m paper fig6 --rows=runs/fig6_digits,runs/fig1_digits

The rows of fig1_digits are a third panel, VGG-11.
Expect SynFlow above the others where they begin to collapse on VGG-16 (96 % at 100, where SNIP has 66 %), and behind
magnitude on ResNet-20. Measured on two CPU cores that three other jobs shared: 49 minutes.
"""

from synflow_jax.experiments.config import Config, Grid, TrainConfig


def get_config() -> Config:
    """VGG-16 at an eighth and ResNet-20 at half of their width, five compressions, two seeds: 100 runs."""
    return Config(
        dataset="digits",
        train=TrainConfig(
            num_epochs=6,
            batch_size=64,
            learning_rate=0.05,
            drops=(4,),
            augment=False,
            compact=False,
            keep_checkpoints=1,
        ),
        grid=Grid(seed=(0, 1)),
        grids=tuple(
            Grid(
                model=(model,),
                width_multiplier=(width,),
                pruner=("random", "magnitude", "snip", "grasp", "synflow"),
                compression=compressions,
            )
            for model, width, compressions in (
                ("cifar_vgg16_bn", 0.125, (1.0, 10.0, 10**1.5, 100.0, 10**2.5)),
                ("cifar_resnet20", 0.5, (1.0, 10**0.5, 10.0, 10**1.5, 100.0)),
            )
        ),
    )
