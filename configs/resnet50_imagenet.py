"""ResNet-50 on ImageNet input (224x224), magnitude, compression 100. SynFlow overflows float32 on it: with
--config.prune.pruner=synflow add --config.prune.score_dtype=float64.

    python prune.py --config=configs/resnet50_imagenet.py
    python train.py --config=configs/resnet50_imagenet.py

Expect 255,030 of 25,502,912 weights kept in 54 layers.
Its duration was not measured.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.config import Config, PruneConfig, TrainConfig


def get_config() -> Config:
    """ResNet-50, ImageNet."""
    return Config(
        model="imagenet_resnet50",
        dataset="imagenet",
        prune=PruneConfig(pruner="magnitude"),
        train=TrainConfig(num_epochs=90, batch_size=256, drops=(30, 60, 80)),
    )
