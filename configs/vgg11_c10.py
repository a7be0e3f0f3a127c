"""Prunes VGG-11 with batch norm on CIFAR-10 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/vgg11_c10.py --workdir=runs/vgg11_c10
    python train.py --config=configs/vgg11_c10.py --workdir=runs/vgg11_c10  # prunes too

Keeps 92,229 of 9,222,848 weights in 9 layers and empties no layer.
Pruning took 15 s on two CPU cores, compilation included.
Training needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns VGG-11 (BN) on CIFAR-10, with the published recipe, which is the default."""
    return Config(model="cifar_vgg11_bn", dataset="cifar10")
