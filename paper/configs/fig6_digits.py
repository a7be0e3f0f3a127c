"""Makes the rows of Fig. 6 on scikit-learn's digits: narrow VGG-16 (BN) and ResNet-20.

    python train.py --config=paper/configs/fig6_digits.py --workdir=runs/fig6_digits
    python -m paper fig6 --rows=runs/fig6_digits,runs/fig1_digits

The rows of fig1_digits add a third panel, VGG-11.

On VGG-16 SynFlow is above the others where they begin to collapse (96 % at 100, where SNIP has
66 %). On ResNet-20 it is behind magnitude. This took 49 minutes on two CPU cores that three other
jobs shared.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns two networks, five rules, five compressions and two seeds: 100 runs."""
    vgg16 = Grid(
        model=("cifar_vgg16_bn",),
        width_multiplier=(0.125,),
        pruner=recipes.RULES,
        compression=(1.0, 10.0, 10**1.5, 100.0, 10**2.5),
    )
    resnet20 = Grid(
        model=("cifar_resnet20",),
        width_multiplier=(0.5,),
        pruner=recipes.RULES,
        compression=(1.0, 10**0.5, 10.0, 10**1.5, 100.0),
    )
    return Config(
        dataset="digits",
        train=recipes.train_digits(),
        grid=Grid(seed=(0, 1)),
        grids=(vgg16, resnet20),
    )
