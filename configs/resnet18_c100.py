"""ResNet-18 (the 3x3 stem of the Tiny ImageNet form) on CIFAR-100, SynFlow, compression 100 (Fig. 6).

    python prune.py --config=configs/resnet18_c100.py --workdir=runs/resnet18_c100
    python train.py --config=configs/resnet18_c100.py --workdir=runs/resnet18_c100   # prunes too

Expect 112,105 of 11,210,432 weights kept in 21 layers, not collapsed (shortcut convolutions may be empty).
Its duration was not measured.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """ResNet-18, CIFAR-100."""
    return Config(
        model="tiny_resnet18",
        dataset="cifar100",
        train=TrainConfig(learning_rate=0.01, drop_factor=0.2, weight_decay=5e-4),
    )
