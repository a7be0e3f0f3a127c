"""VGG-16 with batch norm on CIFAR-100, SynFlow, compression 100 (Figs. 1 and 6 of the paper).

    python prune.py --config=configs/vgg16_c100.py --workdir=runs/vgg16_c100
    python train.py --config=configs/vgg16_c100.py --workdir=runs/vgg16_c100   # prunes too

Expect 147,617 of 14,761,664 weights kept in 14 layers, no layer empty.
Measured on two CPU cores, compilation included: 25 s, 17 s from the compilation cache.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """VGG-16 (BN), CIFAR-100."""
    return Config(model="cifar_vgg16_bn", dataset="cifar100")
