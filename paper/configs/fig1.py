"""Makes the rows of Fig. 1: test accuracy of VGG-16 (BN) on CIFAR-100 at compression 10^0 to 10^6.

    python train.py --config=paper/configs/fig1.py --workdir=runs/fig1
    python -m paper fig1 --rows=runs/fig1 --published=paper/published/fig1.json

Five rules and three seeds are 375 runs of 160 epochs, and each takes hours on a GPU. We have not
run them; paper/configs/fig1_digits.py is a variant that we have.

Compare with the published curves, drawn behind. There accuracy is at chance (1 %) from 10^2.5 on
for magnitude, 10^3 for random, 10^3.25 for GraSP and 10^3.5 for SNIP. Near the maximum, 10^6.02,
SynFlow is at chance too, but two of its three published runs keep a path.

Needs CIFAR-100, prepared once for tensorflow-datasets. Without it the run says how.
"""

from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid


def get_config() -> Config:
    """Returns VGG-16 (BN) on CIFAR-100 with the published recipe, four compressions per decade."""
    return Config(
        model="cifar_vgg16_bn",
        dataset="cifar100",
        grid=Grid(
            seed=recipes.SEEDS,
            pruner=recipes.RULES,
            compression=recipes.powers_of_ten(0, 6, per_decade=4),
        ),
    )
