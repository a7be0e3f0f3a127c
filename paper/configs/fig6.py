r"""Makes the rows of Fig. 6: five rules at compression 10^0 to 10^3 on a network and a data set.

    python train.py --config=paper/configs/fig6.py:vgg11_c10 --workdir=runs/fig6/vgg11_c10
    python -m paper fig6 --rows=runs/fig6/vgg11_c10,runs/fig6/vgg16_c10 \
        --published=paper/published/fig6.json

The name after the colon is {vgg11,vgg16,resnet18,wide_resnet18}_{c10,c100,tiny}, one per command.
The figure takes any of their folders. Each name is 195 runs of 160 epochs (100 on Tiny ImageNet),
which take days on a GPU. We have not run them; paper/configs/fig6_digits.py is a variant for two
cores.

Compare with the published curves, drawn behind. The published runs did not widen the wide
ResNet-18; ours is widened.

Needs CIFAR, prepared for tensorflow-datasets, or the folder of Tiny ImageNet
(--config.data.dir=DIR).
"""

from configs import recipes as published
from paper.configs import recipes
from synflow_jax.experiments.config import Config, Grid, TrainConfig

_MODELS = {
    "vgg11": "vgg11_bn",
    "vgg16": "vgg16_bn",
    "resnet18": "resnet18",
    "wide_resnet18": "wide_resnet18",
}
_DATASETS = {"c10": "cifar10", "c100": "cifar100", "tiny": "tiny_imagenet"}


def get_config(name: str = "vgg16_c10") -> Config:
    """Returns the published recipe of a network on a data set.

    Raises:
      ValueError: the name is unknown.
    """
    network, _, dataset = name.rpartition("_")
    if network not in _MODELS or dataset not in _DATASETS:
        raise ValueError(
            f"fig6.py:{name} is unknown: name one of {', '.join(_MODELS)}, then _ and one of "
            f"{', '.join(_DATASETS)}."
        )
    is_vgg = network.startswith("vgg")
    family = "cifar" if is_vgg and dataset != "tiny" else "tiny"
    if dataset == "tiny":
        train = published.tiny_imagenet()
    elif is_vgg:
        train = TrainConfig()
    else:
        train = published.resnet_cifar()
    return Config(
        model=f"{family}_{_MODELS[network]}",
        dataset=_DATASETS[dataset],
        train=train,
        grid=Grid(
            seed=recipes.SEEDS,
            pruner=recipes.RULES,
            compression=recipes.powers_of_ten(0, 3, per_decade=4),
        ),
    )
