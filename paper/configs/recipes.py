"""Holds what the configs of several figures share. This file is not a config itself.

scikit-learn's digits stand in for the paper's data sets where a GPU is missing: a narrow VGG-11
trains on them in seconds on a CPU. Each function returns a new object, because flags change the
config that they are given.
"""

from typing import Any

from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig

# The rules that the paper compares, in the order of its legends.
RULES = ("random", "magnitude", "snip", "grasp", "synflow")
SEEDS = (0, 1, 2)


def powers_of_ten(first: float, last: float, per_decade: int) -> tuple[float, ...]:
    """Returns the compressions from 10^first to 10^last, evenly spaced on a logarithmic axis.

    >>> powers_of_ten(0, 1, 2)
    (1.0, 3.1622776601683795, 10.0)
    """
    numbers = range(round(first * per_decade), round(last * per_decade) + 1)
    return tuple(10 ** (number / per_decade) for number in numbers)


def unpruned() -> Grid:
    """Returns the runs of the unpruned network, which are the same for every rule."""
    return Grid(pruner=("magnitude",), compression=(1.0,))


def narrow_vgg11(**fields: Any) -> Config:
    """Returns VGG-11 (BN) at an eighth of its width on the digits: 144,856 prunable weights.

    Args:
      fields: the other fields of `Config`.
    """
    return Config(model="cifar_vgg11_bn", dataset="digits", width_multiplier=0.125, **fields)


def train_digits(
    num_epochs: int = 6, *, drop: int = 4, learning_rate: float = 0.05, **fields: Any
) -> TrainConfig:
    """Returns a short training on the digits.

    Args:
      num_epochs: six are enough for every rule at a low compression.
      drop: the epoch after which the learning rate drops.
      learning_rate: before the drop.
      fields: the other fields of `TrainConfig`.
    """
    return TrainConfig(
        num_epochs=num_epochs,
        batch_size=64,
        learning_rate=learning_rate,
        drops=(drop,),
        augment=False,
        # Masked runs share one compiled program. Smaller networks would need one each.
        compact=False,
        keep_checkpoints=1,
        **fields,
    )


def vgg19(prune: PruneConfig, grid: Grid) -> Config:
    """Returns VGG-19 on ImageNet input."""
    return Config(model="imagenet_vgg19", dataset="imagenet", prune=prune, grid=grid)


def score_digits(**fields: Any) -> PruneConfig:
    """Returns a pruning in which SNIP and GraSP score ten enlarged digits, one per class.

    The labels of the digits are the first ten classes of ImageNet. If you have ImageNet,
    --config.prune.dataset=imagenet scores one of its images per class instead.

    Args:
      fields: the other fields of `PruneConfig`.
    """
    return PruneConfig(dataset="digits", examples_per_class=1, batch_size=2, **fields)
