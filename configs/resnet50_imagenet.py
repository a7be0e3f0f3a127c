"""ResNet-50 on ImageNet input (224x224), SynFlow, compression 100.

    python prune.py --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet
    python train.py --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet   # prunes too

Expect 255,030 of 25,502,912 weights kept in 54 layers, not collapsed. Its path norm overflows float32 at the start, so
that powers of two are carried beside the values (`scaled`).
Measured on two CPU cores, compilation included, one of them partly busy: 88 s.
Training needs the data, prepared once for tensorflow-datasets; without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """ResNet-50, ImageNet."""
    return Config(
        model="imagenet_resnet50",
        dataset="imagenet",
        train=TrainConfig(num_epochs=90, batch_size=256, drops=(30, 60, 80)),
    )
