"""VGG-11 with batch norm on CIFAR-100, SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/vgg11_c100.py --workdir=runs/vgg11_c100
    python train.py --config=configs/vgg11_c100.py --workdir=runs/vgg11_c100   # prunes too

Expect 92,690 of 9,268,928 weights kept in 9 layers, no layer empty.
Measured on two CPU cores, compilation included: 14 s of pruning.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """VGG-11 (BN), CIFAR-100."""
    return Config(model="cifar_vgg11_bn", dataset="cifar100")
