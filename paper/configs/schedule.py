r"""Makes the rows of the schedules (appendix of the paper): prune size over cut size of VGG-19.

    python prune.py --config=paper/configs/schedule.py --workdir=runs/schedule
    python prune.py --config=paper/configs/schedule.py --workdir=runs/schedule \
        --config.grid.schedule=certified --config.grid.num_iterations="()"
    python -m paper schedule --rows=runs/schedule

SynFlow prunes to compression 1000. In 1, 10, 50, 70 and 100 iterations of the exponential schedule
the largest prune is 15.4, 5.6, 1.32, 0.97 and 0.67 of a cut. In 100 iterations of the linear
schedule it is 14.3. The certified schedule stays at 0.5 and takes 94 iterations.

The first command took ten minutes on two idle cores, 1.0 s per iteration, and the second two and a
half.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns VGG-19 on ImageNet input, 1 to 100 iterations of two schedules."""
    iterations = (1, 2, 5, 10, 20, 50, 70, 100)
    return recipes.vgg19(
        PruneConfig(compression=1000.0),
        Grid(num_iterations=iterations, schedule=("exponential", "linear")),
    )
