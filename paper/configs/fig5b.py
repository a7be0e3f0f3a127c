"""Makes the rows of Fig. 5b: average squared weight of each layer before and after training.

    python train.py --config=paper/configs/fig5b.py --workdir=runs/fig5b
    python -m paper fig5b --rows=runs/fig5b

The config trains VGG-19 (BN) on CIFAR-10 unpruned, three times for 160 epochs. Each run takes hours
on a GPU. We have not run them; paper/configs/fig5b_digits.py is a variant for two cores. After
training, the averages are expected to be inversely proportional to the sizes of the layers: slope
1.

Needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, PruneConfig


def get_config() -> Config:
    """Returns VGG-19 (BN) on CIFAR-10, unpruned."""
    return Config(
        model="cifar_vgg19_bn",
        dataset="cifar10",
        prune=PruneConfig(pruner="magnitude", compression=1.0),
        grid=Grid(seed=recipes.SEEDS),
    )
