"""Wide ResNet-18 on CIFAR-10, SynFlow, compression 100 (Fig. 6). Really widened: see `models.create`.

    python prune.py --config=configs/wide_resnet18_c10.py --workdir=runs/wide_resnet18_c10
    python train.py --config=configs/wide_resnet18_c10.py --workdir=runs/wide_resnet18_c10   # prunes too

Expect 445,765 of 44,576,448 weights kept in 22 layers, not collapsed (shortcut convolutions may be empty).
Its duration was not measured.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """Wide ResNet-18, CIFAR-10."""
    return Config(
        model="tiny_wide_resnet18",
        dataset="cifar10",
        train=TrainConfig(learning_rate=0.01, drop_factor=0.2, weight_decay=5e-4),
    )
