"""Prunes VGG-16 with batch norm on CIFAR-10 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/vgg16_c10.py --workdir=runs/vgg16_c10
    python train.py --config=configs/vgg16_c10.py --workdir=runs/vgg16_c10  # prunes too

Keeps 147,156 of 14,715,584 weights in 14 layers and empties no layer.
Pruning took 21 s on two CPU cores, compilation included.
Training needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-16 (BN) on CIFAR-10, with the published recipe, which is the default."""
    return Config(model="cifar_vgg16_bn", dataset="cifar10")
