"""Prunes ResNet-18 on CIFAR-10 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/resnet18_c10.py --workdir=runs/resnet18_c10
    python train.py --config=configs/resnet18_c10.py --workdir=runs/resnet18_c10  # prunes too

The stem is the 3x3 convolution of the Tiny ImageNet form.
Keeps 111,644 of 11,164,352 weights in 21 layers. The network does not collapse, but shortcut
convolutions may be empty.
Pruning took 22 s on two CPU cores, compilation included.
Training needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns ResNet-18 on CIFAR-10, with the published recipe."""
    return Config(model="tiny_resnet18", dataset="cifar10", train=recipes.resnet_cifar())
