"""Makes the rows of Fig. 1 on scikit-learn's digits, up to the maximal compression.

    python train.py --config=paper/configs/fig1_digits.py --workdir=runs/fig1_digits
    python -m paper fig1 --rows=runs/fig1_digits

Every rule except SynFlow collapses far below the maximal compression, 16,095 (one weight in each of
nine layers). With seed 0, random collapses at 100, and magnitude, SNIP and GraSP at 316. SynFlow's
networks stay connected for all three seeds, but from 10^4 on, with at most 15 weights, they learn
nothing. The unpruned network reaches 99.3 %.

This took 22 minutes on two CPU cores that other jobs shared (11.5 minutes of processor time).
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns five rules, ten compressions and three seeds: 150 runs of six epochs."""
    maximum = 144_856 / 9
    return recipes.narrow_vgg11(
        train=recipes.train_digits(),
        grid=Grid(
            seed=recipes.SEEDS,
            pruner=recipes.RULES,
            compression=(*recipes.powers_of_ten(0, 4, per_decade=2), maximum),
        ),
    )
