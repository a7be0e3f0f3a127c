"""Prunes ResNet-18 on CIFAR-100 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/resnet18_c100.py --workdir=runs/resnet18_c100
    python train.py --config=configs/resnet18_c100.py --workdir=runs/resnet18_c100  # prunes too

The stem is the 3x3 convolution of the Tiny ImageNet form.
Keeps 112,105 of 11,210,432 weights in 21 layers. The network does not collapse, but shortcut
convolutions may be empty.
The duration was not measured.
Training needs CIFAR-100, prepared once for tensorflow-datasets. Without it the run says how.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns ResNet-18 on CIFAR-100, with the published recipe."""
    return Config(model="tiny_resnet18", dataset="cifar100", train=recipes.resnet_cifar())
