"""Prunes and trains a narrow VGG-11 with batch norm on Fashion-MNIST.

    python prune.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
    python train.py --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist  # prunes too

SynFlow to compression 10^2.5. Keeps 1,826 of 577,424 weights in 9 layers. The test accuracy after
nine epochs is 89.2 % (92.9 % unpruned).
Training took 28 s per epoch on two CPU cores.
It needs Debian's package dataset-fashion-mnist, or a folder with the four IDX files:
--config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig


def get_config() -> Config:
    """Returns VGG-11 (BN) at a quarter of its width on Fashion-MNIST."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="fashion_mnist",
        width_multiplier=0.25,
        prune=PruneConfig(compression=10**2.5),
        train=TrainConfig(num_epochs=9, drops=(6, 8), augment=False),
    )
