"""A narrow VGG-11 with batch norm on Fashion-MNIST, SynFlow, compression 10^2.5.

    python prune.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist   # prunes too

Expect 1,826 of 577,424 weights kept in 9 layers, and a test accuracy of 89.2 % after nine epochs (92.9 % unpruned).
Measured on two CPU cores: 28 s an epoch.
Training needs Debian's package dataset-fashion-mnist, or a folder of the four IDX files: --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig


def get_config() -> Config:
    """VGG-11 (BN) at a quarter of its width, Fashion-MNIST."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="fashion_mnist",
        width_multiplier=0.25,
        prune=PruneConfig(compression=10**2.5),
        train=TrainConfig(num_epochs=9, drops=(6, 8), augment=False),
    )
