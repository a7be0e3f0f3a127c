"""Prunes wide ResNet-18 on CIFAR-10 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/wide_resnet18_c10.py --workdir=runs/wide_resnet18_c10
    python train.py --config=configs/wide_resnet18_c10.py --workdir=runs/wide_resnet18_c10

train.py also prunes if the first command has not run.
The stem is the 3x3 convolution of the Tiny ImageNet form.
Keeps 445,765 of 44,576,448 weights in 22 layers. The network does not collapse, but shortcut
convolutions may be empty. The published runs did not widen this network; ours is widened, see
`models.create`.
The duration was not measured.
Training needs CIFAR-10, prepared once for tensorflow-datasets. Without it the run says how.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns wide ResNet-18 on CIFAR-10, with the published recipe."""
    return Config(model="tiny_wide_resnet18", dataset="cifar10", train=recipes.resnet_cifar())
