"""Prunes VGG-16 with batch norm on CIFAR-100 with SynFlow to compression 100 (Figs. 1 and 6).

    python prune.py --config=configs/vgg16_c100.py --workdir=runs/vgg16_c100
    python train.py --config=configs/vgg16_c100.py --workdir=runs/vgg16_c100  # prunes too

Keeps 147,617 of 14,761,664 weights in 14 layers and empties no layer.
Pruning took 18 s on two CPU cores, compilation included, and 13 s with a warm compilation cache.
Training needs CIFAR-100, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-16 (BN) on CIFAR-100, with the published recipe, which is the default."""
    return Config(model="cifar_vgg16_bn", dataset="cifar100")
