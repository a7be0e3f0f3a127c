"""A narrow VGG-11 with batch norm on Fashion-MNIST, SynFlow, compression 10^2.5.

python train.py --config=configs/fashion_mnist.py
"""

from synflow_jax.config import Config, PruneConfig, TrainConfig


def get_config() -> Config:
    """VGG-11 (BN) at a quarter of its width, Fashion-MNIST."""
    return Config(
        model="cifar_vgg11_bn",
        dataset="fashion_mnist",
        width_multiplier=0.25,
        prune=PruneConfig(compression=10**2.5),
        train=TrainConfig(num_epochs=9, drops=(6, 8), augment=False),
    )
