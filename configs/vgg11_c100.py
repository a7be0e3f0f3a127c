"""Prunes VGG-11 with batch norm on CIFAR-100 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/vgg11_c100.py --workdir=runs/vgg11_c100
    python train.py --config=configs/vgg11_c100.py --workdir=runs/vgg11_c100  # prunes too

Keeps 92,690 of 9,268,928 weights in 9 layers and empties no layer.
Pruning took 14 s on two CPU cores, compilation included.
Training needs CIFAR-100, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-11 (BN) on CIFAR-100, with the published recipe, which is the default."""
    return Config(model="cifar_vgg11_bn", dataset="cifar100")
