"""Prunes VGG-11 with batch norm on Tiny ImageNet (64x64) with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/vgg11_tiny.py --workdir=runs/vgg11_tiny
    python train.py --config=configs/vgg11_tiny.py --workdir=runs/vgg11_tiny  # prunes too

Keeps 125,683 of 12,568,256 weights in 11 layers and empties no layer.
The duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-11 (BN) on Tiny ImageNet, with the published recipe."""
    return Config(model="tiny_vgg11_bn", dataset="tiny_imagenet", train=recipes.tiny_imagenet())
