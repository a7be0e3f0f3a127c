"""Prunes wide ResNet-18 on Tiny ImageNet (64x64) with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/wide_resnet18_tiny.py --workdir=runs/wide_resnet18_tiny
    python train.py --config=configs/wide_resnet18_tiny.py --workdir=runs/wide_resnet18_tiny

train.py also prunes if the first command has not run.
Keeps 447,711 of 44,771,008 weights in 22 layers. The network does not collapse, but shortcut
convolutions may be empty. The published runs did not widen this network; ours is widened, see
`models.create`.
The duration was not measured.
Training needs the unpacked folder of Tiny ImageNet: --config.data.dir=DIR.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns wide ResNet-18 on Tiny ImageNet, with the published recipe."""
    return Config(
        model="tiny_wide_resnet18", dataset="tiny_imagenet", train=recipes.tiny_imagenet()
    )
