"""Makes the rows of Fig. 3: incoming and outgoing scores of each hidden unit of VGG-19.

    python prune.py --config=paper/configs/fig3.py --workdir=runs/fig3
    python -m paper fig3 --rows=runs/fig3

All 13,696 units of SynFlow are on the line. The ratios of 90 % of GraSP's units are between 0.55
and 1.6, and those of 90 % of SNIP's between 0.02 and 3.7. SNIP and GraSP score digits, see
`recipes.score_digits`.

This took four minutes and 6.3 GB on two CPU cores that other jobs shared, and 90 MB for the masks.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns VGG-19 on ImageNet input, scored once by every rule."""
    prune = recipes.score_digits(compression=1.0, record_units=True)
    return recipes.vgg19(prune, Grid(pruner=recipes.RULES))
