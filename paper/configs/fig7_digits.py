"""Makes the rows of Fig. 7 on scikit-learn's digits: SNIP and GraSP in 100 iterations.

    python train.py --config=paper/configs/fig7_digits.py --workdir=runs/fig7_digits
    python -m paper fig7 --rows=runs/fig7_digits,runs/fig1_digits,runs/fig5a_digits

The network is that of fig1_digits, whose rows give the curves of SynFlow and of one iteration. The
rows of fig5a_digits give IMP's, which trains twice as long.

Iterations keep both rules connected up to 1000, but cost accuracy: at 100, SNIP has 70 % (82 % in
one iteration) and GraSP 15 % (63 %). This took 3.5 minutes on two CPU cores that other jobs shared.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns SNIP and GraSP in 100 iterations at four compressions, two seeds: 16 runs."""
    return recipes.narrow_vgg11(
        prune=PruneConfig(num_iterations=100),
        train=recipes.train_digits(),
        grid=Grid(
            seed=(0, 1),
            pruner=("snip", "grasp"),
            compression=recipes.powers_of_ten(1.5, 3, per_decade=2),
        ),
    )
