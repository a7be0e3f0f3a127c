"""Prunes ResNet-18 on Tiny ImageNet (64x64) with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/resnet18_tiny.py --workdir=runs/resnet18_tiny
    python train.py --config=configs/resnet18_tiny.py --workdir=runs/resnet18_tiny  # prunes too

Keeps 112,617 of 11,261,632 weights in 21 layers. The network does not collapse, but shortcut
convolutions may be empty.
Pruning took 33 s on two CPU cores, compilation included, and 25 s with a warm compilation cache.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns ResNet-18 on Tiny ImageNet, with the published recipe."""
    return Config(model="tiny_resnet18", dataset="tiny_imagenet", train=recipes.tiny_imagenet())
