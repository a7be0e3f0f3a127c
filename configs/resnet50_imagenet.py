"""Prunes ResNet-50 on ImageNet input (224x224) with SynFlow to compression 100.

    python prune.py --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet
    python train.py --config=configs/resnet50_imagenet.py --workdir=runs/resnet50_imagenet

train.py also prunes if the first command has not run.
Keeps 255,030 of 25,502,912 weights in 54 layers. The network does not collapse. Its path norm
overflows float32 before pruning, so the scores carry a power of two with every value
(`prune.scaled`).
Pruning took 88 s on two CPU cores, compilation included; one core was partly busy.
Training needs ImageNet, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """Returns ResNet-50 on ImageNet."""
    return Config(
        model="imagenet_resnet50",
        dataset="imagenet",
        train=TrainConfig(num_epochs=90, batch_size=256, drops=(30, 60, 80)),
    )
