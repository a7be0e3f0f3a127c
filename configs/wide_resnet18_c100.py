"""Prunes wide ResNet-18 on CIFAR-100 with SynFlow to compression 100 (Fig. 6).

    python prune.py --config=configs/wide_resnet18_c100.py --workdir=runs/wide_resnet18_c100
    python train.py --config=configs/wide_resnet18_c100.py --workdir=runs/wide_resnet18_c100

train.py also prunes if the first command has not run.
The stem is the 3x3 convolution of the Tiny ImageNet form.
Keeps 446,687 of 44,668,608 weights in 22 layers. The network does not collapse, but shortcut
convolutions may be empty. The published runs did not widen this network; ours is widened, see
`models.create`.
The duration was not measured.
Training needs CIFAR-100, prepared once for tensorflow-datasets. Without it the run says how.
"""

from configs import recipes
from synflow_jax.experiments.config import Config


def get_config() -> Config:
    """Returns wide ResNet-18 on CIFAR-100, with the published recipe."""
    return Config(model="tiny_wide_resnet18", dataset="cifar100", train=recipes.resnet_cifar())
