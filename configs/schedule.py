r"""The schedules (appendix of the paper): prune size over cut size of VGG-19, SynFlow, compression 1000.

    python prune.py --config=configs/schedule.py --workdir=runs/schedule
    python prune.py --config=configs/schedule.py --workdir=runs/schedule --config.grid.schedule=certified \
        --config.grid.num_iterations="()"
    python -m synflow_jax.figures schedule --rows=runs/schedule

Not timed as a whole: its 516 iterations are 15 minutes at the 1.7 s an iteration that benchmarks/prune_speed.py has
measured on two cores. On CIFAR's VGG-19 (--config.model=cifar_vgg19_bn --config.dataset=cifar100) it takes five minutes
on two CPU cores that others used as well.
"""

from synflow_jax.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19, 1 to 100 iterations by either schedule."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        prune=PruneConfig(compression=1000.0),
        grid=Grid(num_iterations=(1, 2, 5, 10, 20, 50, 70, 100), schedule=("exponential", "linear")),
    )
