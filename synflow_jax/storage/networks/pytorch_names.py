"""Lists the names that the layers of our networks have in PyTorch's published networks.

Names are torchvision's for a VGG with hidden dense layers and a ResNet of four stages (`imagenet_*`
and `tiny_*`), and OpenLTH's for a VGG without hidden layers and a ResNet of three stages
(`cifar_*`). The layers of `fc` and `conv` are numbered as in an `nn.Sequential`, which also counts
its `nn.Flatten` and `nn.ReLU`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn

from synflow_jax import models
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet, block_name
from synflow_jax.models.vgg import VGG

Names = dict[str, str]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_names(model: nn.Module) -> Names:
    """Returns PyTorch's name of each layer, by ours, in the order of the network.

    >>> names = torch_names(models.create("imagenet_vgg11_bn", 1000))
    >>> names["conv2_1"], names["conv2_1_norm"], names["fc1"], names["head"]
    ('features.4', 'features.5', 'classifier.0', 'classifier.6')
    >>> names = torch_names(models.create("cifar_resnet20", 10))
    >>> names["conv1"], names["conv3_1/conv1"], names["conv3_1/shortcut_norm"], names["head"]
    ('conv', 'blocks.3.conv1', 'blocks.3.shortcut.1', 'fc')

    Raises:
      ValueError: the network is not of a family of this package.
    """
    for family, names_of in _FAMILIES.items():
        if isinstance(model, family):
            return names_of(model)
    known = ", ".join(family.__name__ for family in _FAMILIES)
    raise ValueError(f"model is a {type(model).__name__}; PyTorch's names are known for {known}.")


def leaf_names(model: nn.Module, variables: Iterable[str]) -> Names:
    """Returns PyTorch's name of each variable, by ours, in PyTorch's order of layers.

    Args:
      model: a network of this package.
      variables: our names, such as "params/head/kernel", whose PyTorch name is "fc.weight".
    """
    layers = torch_names(model)
    # Our variables come sorted by name. Files list layers as PyTorch does, from input to output.
    by_layer: dict[str, Names] = {layer: {} for layer in layers}
    for name in variables:
        _, _, in_collection = name.partition("/")
        layer, _, leaf = in_collection.rpartition("/")
        theirs = layers[layer]
        by_layer[layer][name] = f"{theirs}.{_LEAVES[leaf]}"
    names: Names = {}
    for of_layer in by_layer.values():
        names |= of_layer
    return names


def _vgg(model: VGG) -> Names:
    """Returns the names of a VGG, in the words of the library that published its form."""
    return _torchvision_vgg(model) if model.hidden else _openlth_vgg(model)


def _torchvision_vgg(model: VGG) -> Names:
    """Returns the names of a VGG with hidden layers: `features` and `classifier` are sequences."""
    names: Names = {}
    index = 0
    for i, widths in enumerate(model.widths, 1):
        for j in range(1, len(widths) + 1):
            layer = f"conv{i}_{j}"
            names[layer] = f"features.{index}"
            index += 1
            if model.batch_norm:
                names[f"{layer}_norm"] = f"features.{index}"
                index += 1
            index += 1  # the ReLU
        index += 1  # the pooling
    dense = [f"fc{i}" for i, _ in enumerate(model.hidden, 1)]
    for i, layer in enumerate([*dense, models.HEAD]):
        # A ReLU and a dropout follow each hidden layer.
        index = 3 * i
        names[layer] = f"classifier.{index}"
    return names


def _openlth_vgg(model: VGG) -> Names:
    """Returns the names of a VGG without hidden layers: blocks of a convolution and its norm."""
    names: Names = {}
    index = 0
    for i, widths in enumerate(model.widths, 1):
        for j in range(1, len(widths) + 1):
            layer = f"conv{i}_{j}"
            names[layer] = f"layers.{index}.conv"
            if model.batch_norm:
                names[f"{layer}_norm"] = f"layers.{index}.bn"
            index += 1
        index += 1  # the pooling
    return names | {models.HEAD: "fc"}


class _ResNetWords(NamedTuple):
    """The names in which the ResNets of two libraries differ.

    Attributes:
      stem, stem_norm: the first convolution and its batch norm.
      block: `block(stage, i, num_before)` names block i of a stage, which has `num_before` blocks
        before it in the whole network. All three count from 0.
      shortcut: the convolution and the norm on the shortcut of a block.
    """

    stem: str
    stem_norm: str
    block: Callable[[int, int, int], str]
    shortcut: str


def _torchvision_block(stage: int, i: int, num_before: int) -> str:
    """Names a block by its place within the stage."""
    del num_before
    return f"layer{stage + 1}.{i}"


def _openlth_block(stage: int, i: int, num_before: int) -> str:
    """Names a block by its place in the network."""
    del stage, i
    return f"blocks.{num_before}"


_TORCHVISION = _ResNetWords(
    stem="conv1",
    stem_norm="bn1",
    block=_torchvision_block,
    shortcut="downsample",
)
_OPENLTH = _ResNetWords(
    stem="conv",
    stem_norm="bn",
    block=_openlth_block,
    shortcut="shortcut",
)


def _resnet(model: ResNet) -> Names:
    """Returns the names of a ResNet: torchvision's have four stages, OpenLTH's three."""
    words = _TORCHVISION if len(model.num_blocks) == 4 else _OPENLTH
    names = {"conv1": words.stem, "conv1_norm": words.stem_norm}
    num_before = 0
    for stage, num_blocks in enumerate(model.num_blocks):
        for i in range(num_blocks):
            ours = block_name(stage, i + 1, num_blocks)
            theirs = words.block(stage, i, num_before)
            names |= _convolutions(model, ours, theirs)
            # The same condition as in the network itself.
            if i == 0 and (stage > 0 or model.has_stem_shortcut()):
                shortcut = f"{theirs}.{words.shortcut}"
                names[f"{ours}/shortcut"] = f"{shortcut}.0"
                names[f"{ours}/shortcut_norm"] = f"{shortcut}.1"
            num_before += 1
    return names | {models.HEAD: "fc"}


def _convolutions(model: ResNet, ours: str, theirs: str) -> Names:
    """Returns the names of the convolutions and the norms on the main branch of a block."""
    num_convolutions = 3 if model.bottleneck else 2
    names: Names = {}
    for k in range(1, num_convolutions + 1):
        names[f"{ours}/conv{k}"] = f"{theirs}.conv{k}"
        names[f"{ours}/conv{k}_norm"] = f"{theirs}.bn{k}"
    return names


def _mlp(model: MLP) -> Names:
    """Returns the names in nn.Sequential(Flatten, Linear, ReLU, Linear, ReLU, ..., Linear)."""
    layers = [f"fc{i}" for i, _ in enumerate(model.widths, 1)]
    names = {}
    for i, layer in enumerate([*layers, models.HEAD]):
        # Flatten has index 0, and a ReLU follows each layer.
        index = 2 * i + 1
        names[layer] = str(index)
    return names


def _conv_net(model: ConvNet) -> Names:
    """Returns the names in nn.Sequential(Conv2d, ReLU, Conv2d, ReLU, ..., Flatten, Linear)."""
    layers = [f"conv{i}" for i, _ in enumerate(model.widths, 1)]
    names = {}
    for i, layer in enumerate(layers):
        # A ReLU follows each convolution.
        index = 2 * i
        names[layer] = str(index)
    # Flatten comes before the head.
    head_index = 2 * len(layers) + 1
    names[models.HEAD] = str(head_index)
    return names


_FAMILIES: dict[type[nn.Module], Callable[[Any], Names]] = {
    VGG: _vgg,
    ResNet: _resnet,
    MLP: _mlp,
    ConvNet: _conv_net,
}
