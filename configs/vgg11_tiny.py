"""VGG-11 with batch norm on Tiny ImageNet (64x64), SynFlow, compression 100 (Fig. 6 of the paper).

    python prune.py --config=configs/vgg11_tiny.py --workdir=runs/vgg11_tiny
    python train.py --config=configs/vgg11_tiny.py --workdir=runs/vgg11_tiny   # prunes too

Expect 125,683 of 12,568,256 weights kept in 11 layers, no layer empty.
Its duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, TrainConfig


def get_config() -> Config:
    """VGG-11 (BN), Tiny ImageNet."""
    return Config(
        model="tiny_vgg11_bn",
        dataset="tiny_imagenet",
        train=TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80)),
    )
