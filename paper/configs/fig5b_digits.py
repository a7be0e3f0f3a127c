"""Makes the rows of Fig. 5b on scikit-learn's digits.

    python train.py --config=paper/configs/fig5b_digits.py --workdir=runs/fig5b_digits
    python -m paper fig5b --rows=runs/fig5b_digits

The network is that of fig1_digits. It trains for longer, with a weight decay that lets the layers
reach their balance in that time. The slope is 0.57 before training and 0.85 after it. The head,
which no batch norm follows, is off the line. This took one minute on two CPU cores.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns VGG-11 (BN) at an eighth of its width, unpruned, with three seeds."""
    return recipes.narrow_vgg11(
        prune=PruneConfig(pruner="magnitude", compression=1.0),
        train=recipes.train_digits(
            60, drop=54, learning_rate=0.1, weight_decay=5e-3, checkpoint_every=20
        ),
        grid=Grid(seed=recipes.SEEDS),
    )
