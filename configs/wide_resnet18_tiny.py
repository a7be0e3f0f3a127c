"""Wide ResNet-18 on Tiny ImageNet, SynFlow, compression 100 (Fig. 6). Really widened: see `models.create`.

    python prune.py --config=configs/wide_resnet18_tiny.py --workdir=runs/wide_resnet18_tiny
    python train.py --config=configs/wide_resnet18_tiny.py --workdir=runs/wide_resnet18_tiny   # prunes too

Expect 447,711 of 44,771,008 weights kept in 22 layers, not collapsed (shortcut convolutions may be empty).
Its duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """Wide ResNet-18, Tiny ImageNet."""
    return Config(
        model="tiny_wide_resnet18",
        dataset="tiny_imagenet",
        train=TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80)),
    )
