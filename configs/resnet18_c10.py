"""ResNet-18 (the 3x3 stem of the Tiny ImageNet form) on CIFAR-10, SynFlow, compression 100 (Fig. 6).

    python prune.py --config=configs/resnet18_c10.py --workdir=runs/resnet18_c10
    python train.py --config=configs/resnet18_c10.py --workdir=runs/resnet18_c10   # prunes too

Expect 111,644 of 11,164,352 weights kept in 21 layers, not collapsed (shortcut convolutions may be empty).
Measured on two CPU cores, compilation included: 22 s of pruning.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """ResNet-18, CIFAR-10."""
    return Config(
        model="tiny_resnet18",
        dataset="cifar10",
        train=TrainConfig(learning_rate=0.01, drop_factor=0.2, weight_decay=5e-4),
    )
