"""ResNet-18 on Tiny ImageNet (64x64), SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/resnet18_tiny.py --workdir=runs/resnet18_tiny
    python train.py --config=configs/resnet18_tiny.py --workdir=runs/resnet18_tiny   # prunes too

Expect 112,617 of 11,261,632 weights kept in 21 layers, not collapsed (shortcut convolutions may be empty).
Measured on two CPU cores, compilation included: 33 s, 25 s from the compilation cache.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """ResNet-18, Tiny ImageNet."""
    return Config(
        model="tiny_resnet18",
        dataset="tiny_imagenet",
        train=TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80)),
    )
