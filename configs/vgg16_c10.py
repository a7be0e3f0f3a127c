"""VGG-16 with batch norm on CIFAR-10, SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/vgg16_c10.py --workdir=runs/vgg16_c10
    python train.py --config=configs/vgg16_c10.py --workdir=runs/vgg16_c10   # prunes too

Expect 147,156 of 14,715,584 weights kept in 14 layers, no layer empty.
Measured on two CPU cores, compilation included: 21 s of pruning.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """VGG-16 (BN), CIFAR-10."""
    return Config(model="cifar_vgg16_bn", dataset="cifar10")
