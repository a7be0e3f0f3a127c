"""Makes the rows of Fig. 2: the fraction kept in each layer of VGG-19 at compression 2^0 to 2^24.

    python prune.py --config=paper/configs/fig2.py --workdir=runs/fig2
    python -m paper fig2 --rows=runs/fig2

Every rule except SynFlow empties a layer far below the maximal compression, 7,560,660. The largest
compression, 2^24, is above it.

The whole was not timed. SynFlow's 13 runs of 100 iterations take about 22 minutes at 1.0 s per
iteration (paper/configs/schedule.py, two idle cores). The other rules score once each
(paper/configs/fig4.py: four minutes). SNIP and GraSP score digits, see `recipes.score_digits`.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns VGG-19 on ImageNet input, five rules at 13 compressions."""
    compressions = tuple(2.0**power for power in range(0, 25, 2))
    return recipes.vgg19(
        recipes.score_digits(beyond_maximum=True),
        Grid(pruner=recipes.RULES, compression=compressions),
    )
