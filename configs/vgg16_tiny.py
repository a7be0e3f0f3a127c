"""VGG-16 with batch norm on Tiny ImageNet (64x64), SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/vgg16_tiny.py --workdir=runs/vgg16_tiny
    python train.py --config=configs/vgg16_tiny.py --workdir=runs/vgg16_tiny   # prunes too

Expect 180,610 of 18,060,992 weights kept in 16 layers, no layer empty.
Its duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """VGG-16 (BN), Tiny ImageNet."""
    return Config(
        model="tiny_vgg16_bn",
        dataset="tiny_imagenet",
        train=TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80)),
    )
