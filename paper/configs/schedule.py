r"""The schedules (appendix of the paper): prune size over cut size of VGG-19, SynFlow, compression 1000.

    python prune.py --config=paper/configs/schedule.py --workdir=runs/schedule
    python prune.py --config=paper/configs/schedule.py --workdir=runs/schedule --config.grid.schedule=certified \
        --config.grid.num_iterations="()"
    python -m paper schedule --rows=runs/schedule

Expect for 1, 10, 50, 70 and 100 iterations of the exponential schedule 15.4, 5.6, 1.32, 0.97 and 0.67 of a cut, for 100
of the linear one 14.3, and for the certified one 0.5 in 94 iterations. Ten minutes on two idle cores, 1.0 s an
iteration, and two and a half more for the second command.
"""

from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """VGG-19, 1 to 100 iterations by either schedule."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        prune=PruneConfig(compression=1000.0),
        grid=Grid(
            num_iterations=(1, 2, 5, 10, 20, 50, 70, 100), schedule=("exponential", "linear")
        ),
    )
