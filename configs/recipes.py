"""Holds the training recipes that several configs share. This file is not a config itself.

Each function returns a new `TrainConfig`, because flags change the config that they are given. The
recipes are those of the published runs; the defaults of `TrainConfig` are the VGGs' on CIFAR.
"""

from synflow_jax.experiments.config import TrainConfig


def resnet_cifar() -> TrainConfig:
    """Returns the recipe of ResNet-18 and wide ResNet-18 on CIFAR-10 and CIFAR-100."""
    return TrainConfig(learning_rate=0.01, drop_factor=0.2, weight_decay=5e-4)


def tiny_imagenet() -> TrainConfig:
    """Returns the recipe of every network on Tiny ImageNet."""
    return TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80))
