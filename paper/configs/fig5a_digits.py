"""Makes the rows of Fig. 5a on scikit-learn's digits: IMP in 1, 2 and 4 levels.

    python train.py --config=paper/configs/fig5a_digits.py --workdir=runs/fig5a_digits
    python -m paper fig5a --rows=runs/fig5a_digits

Level k of n prunes to compression^(k/n) and rewinds to the initialization. A run of n levels trains
n + 1 times. The network is that of fig1_digits. It trains for twelve epochs with a weight decay of
5e-3, so that the weights move far from their initialization.

At compression 100, one level collapses, two levels keep an accuracy of 96 % and four 99 %. At 1000
all have collapsed. This took 15 minutes on two CPU cores that other jobs shared.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns IMP at four compressions and the unpruned network, two seeds: 26 runs."""
    return recipes.narrow_vgg11(
        prune=PruneConfig(num_iterations=1),
        train=recipes.train_digits(12, drop=9, learning_rate=0.1, weight_decay=5e-3),
        grid=Grid(seed=(0, 1)),
        grids=(
            recipes.unpruned(),
            Grid(
                pruner=("imp",),
                num_iterations=(1, 2, 4),
                compression=recipes.powers_of_ten(1.5, 3, per_decade=2),
            ),
        ),
    )
