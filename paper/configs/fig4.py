"""Makes the rows of Fig. 4: the average score of each layer of VGG-19 before pruning.

    python prune.py --config=paper/configs/fig4.py --workdir=runs/fig4
    python -m paper fig4 --rows=runs/fig4

The slopes against 1 / layer size are 0.00 for random, 0.20 for magnitude, 0.55 for SNIP, 0.83 for
GraSP and 1.00 for SynFlow. Rows of paper/configs/fig3.py serve as well. SNIP and GraSP score
digits, see `recipes.score_digits`.

This took four minutes and 6.3 GB on two CPU cores that other jobs shared, and 90 MB for the masks.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns VGG-19 on ImageNet input, scored once by every rule."""
    return recipes.vgg19(recipes.score_digits(compression=1.0), Grid(pruner=recipes.RULES))
