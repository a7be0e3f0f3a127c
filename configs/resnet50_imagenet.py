"""ResNet-50 on ImageNet input (224x224), magnitude, compression 100.

    python prune.py --config=configs/resnet50_imagenet.py

@@
"""

from synflow_jax.config import Config


def get_config() -> Config:
    """ResNet-50, ImageNet."""
    return Config(model="imagenet_resnet50", dataset="imagenet")
