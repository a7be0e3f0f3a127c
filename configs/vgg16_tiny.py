"""Prunes VGG-16 with batch norm on Tiny ImageNet (64x64) with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/vgg16_tiny.py --workdir=runs/vgg16_tiny
    python train.py --config=configs/vgg16_tiny.py --workdir=runs/vgg16_tiny  # prunes too

Keeps 180,610 of 18,060,992 weights in 16 layers and empties no layer.
The duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-16 (BN) on Tiny ImageNet, with the published recipe."""
    return Config(model="tiny_vgg16_bn", dataset="tiny_imagenet", train=recipes.tiny_imagenet())
