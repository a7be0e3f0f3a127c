"""VGG-16 with batch norm on CIFAR-100, SynFlow, compression 100 (Figs. 1 and 6 of the paper).

    python prune.py --config=configs/vgg16_c100.py

@vgg16_c100@
"""

from synflow_jax.config import Config


def get_config() -> Config:
    """VGG-16 (BN), CIFAR-100."""
    return Config(model="cifar_vgg16_bn", dataset="cifar100")
