"""Fig. 6 of the paper: five rules at compression 10^0 to 10^3, three seeds; four networks on three data sets.

    python train.py --config=paper/configs/fig6.py:vgg11_c10 --workdir=runs/fig6/vgg11_c10
    python -m paper fig6 --rows=runs/fig6/vgg11_c10,runs/fig6/vgg16_c10 --published=paper/published/fig6.json

The name after the colon is {vgg11,vgg16,resnet18,wide_resnet18}_{c10,c100,tiny}, one a command; the figure takes any of
their folders. 195 runs each, of 160 epochs (100 on Tiny ImageNet): days on a GPU; not run here. paper/configs/fig6_digits.py
is a variant for two cores.
Expect the published curves behind ours, but for the wide ResNet-18, which the published runs did not widen.
Needs CIFAR prepared for tensorflow-datasets, or Tiny ImageNet's folder, --config.data.dir=DIR.
"""

from synflow_jax.experiments.config import Config, Grid, TrainConfig

_MODELS = {
    "vgg11": "vgg11_bn",
    "vgg16": "vgg16_bn",
    "resnet18": "resnet18",
    "wide_resnet18": "wide_resnet18",
}
_DATASETS = {"c10": "cifar10", "c100": "cifar100", "tiny": "tiny_imagenet"}


def get_config(name: str = "vgg16_c10") -> Config:
    """The published recipe of a network on a data set."""
    network, _, dataset = name.rpartition("_")
    if network not in _MODELS or dataset not in _DATASETS:
        raise ValueError(
            f"fig6.py:{name} is unknown: name one of {', '.join(_MODELS)}, then _ and one of {', '.join(_DATASETS)}."
        )
    if dataset == "tiny":
        train = TrainConfig(num_epochs=100, learning_rate=0.01, drops=(30, 60, 80))
    elif "resnet" in network:
        train = TrainConfig(learning_rate=0.01, drop_factor=0.2, weight_decay=5e-4)
    else:
        train = TrainConfig()
    family = "cifar" if network.startswith("vgg") and dataset != "tiny" else "tiny"
    return Config(
        model=f"{family}_{_MODELS[network]}",
        dataset=_DATASETS[dataset],
        train=train,
        grid=Grid(
            seed=(0, 1, 2),
            pruner=("random", "magnitude", "snip", "grasp", "synflow"),
            compression=tuple(10 ** (power / 4) for power in range(13)),
        ),
    )
