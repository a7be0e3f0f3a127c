"""Prunes VGG-19 on ImageNet input (224x224) with SynFlow to compression 100 (Fig. 2 of the paper).

    python prune.py --config=configs/vgg19_imagenet.py --workdir=runs/vgg19_imagenet
    python train.py --config=configs/vgg19_imagenet.py --workdir=runs/vgg19_imagenet  # prunes too

Keeps 1,436,526 of 143,652,544 weights in 19 layers and empties no layer.
The duration was not measured.
Training needs ImageNet, prepared once for tensorflow-datasets. Without it the run says how.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """Returns VGG-19 on ImageNet."""
    return Config(
        model="imagenet_vgg19",
        dataset="imagenet",
        train=TrainConfig(num_epochs=90, batch_size=256, learning_rate=0.01, drops=(30, 60)),
    )
