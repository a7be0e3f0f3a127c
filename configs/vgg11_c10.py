"""VGG-11 with batch norm on CIFAR-10, SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/vgg11_c10.py --workdir=runs/vgg11_c10
    python train.py --config=configs/vgg11_c10.py --workdir=runs/vgg11_c10   # prunes too

Expect 92,229 of 9,222,848 weights kept in 9 layers, no layer empty.
Measured on two CPU cores, compilation included: 15 s of pruning.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """VGG-11 (BN), CIFAR-10."""
    return Config(model="cifar_vgg11_bn", dataset="cifar10")
