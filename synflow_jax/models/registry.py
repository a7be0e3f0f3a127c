"""Lists the networks of the paper by name: how each is built, and for images of which shape."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from synflow_jax.models import layers
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG, stage_widths, widen

_VGG_DEPTHS = (11, 13, 16, 19)
# 6 n + 2, from n blocks per stage; see `_cifar_resnet`.
_CIFAR_RESNET_DEPTHS = (20, 32, 44, 56, 110, 1202)
# Blocks in each of the four stages of a ResNet, by depth.
_RESNET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}

# build(num_classes, width_multiplier) -> module
BuildFn = Callable[[int, float], nn.Module]


class _Entry(NamedTuple):
    """A published network.

    Attributes:
      build: builds its module.
      input_shape: (height, width, channels) of the images that it was published for.
    """

    build: BuildFn
    input_shape: tuple[int, int, int]


def create(name: str, num_classes: int, *, width_multiplier: float = 1.0) -> nn.Module:
    """Builds a network of the paper by its name.

    `NAMES` lists all names:

    - `fc`, `conv`: the toy networks of the paper's theory section;
    - `cifar_vgg{11,13,16,19}[_bn]`, `tiny_vgg...`, `imagenet_vgg...`;
    - `cifar_[wide_]resnet{20,32,44,56,110,1202}`;
    - `tiny_[wide_]resnet{18,34,50,101,152}`, also used for ResNet-18 on CIFAR;
    - `imagenet_resnet{18,34,50,101,152}`, `imagenet_wide_resnet{50,101}`.

    Wide CIFAR networks have twice the channels. Wide bottleneck blocks have twice the inner
    channels. The published wide ResNet-18 was never widened, because its basic block ignored its
    width. Ours has twice the channels in every block.

    Args:
      name: see above.
      num_classes: the number of outputs.
      width_multiplier: scales every hidden width.

    Returns:
      A Linen module: `module.apply(variables, x, train=False)` takes x [batch, height, width,
      channels] and returns logits [batch, num_classes].

    Raises:
      ValueError: the name is unknown, or a number is not positive.

    >>> create("fc", 10, width_multiplier=0.5).widths
    (50, 50, 50, 50, 50)
    """
    entry = _find(name)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1.")
    if not 0 < width_multiplier < float("inf"):
        raise ValueError(f"width_multiplier={width_multiplier} must be positive and finite.")
    return entry.build(num_classes, width_multiplier)


def default_input_shape(name: str) -> tuple[int, int, int]:
    """Returns (height, width, channels) of the images that the published network was run on.

    Raises:
      ValueError: the name is unknown.
    """
    return _find(name).input_shape


def _find(name: str) -> _Entry:
    """Returns the entry of a name, or raises ValueError with the names that are close."""
    if name not in _REGISTRY:
        close = _same_family(name) or difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
        listed = " or ".join(close)
        hint = f"Did you mean {listed}? " if close else ""
        raise ValueError(f"model={name!r} is unknown. {hint}The networks are {_families()}.")
    return _REGISTRY[name]


def _same_family(name: str) -> list[str]:
    """Returns the network that differs from a name only in its depth, and least in that.

    >>> _same_family("cifar_resnet21")
    ['cifar_resnet20']
    """
    number = re.compile(r"\d+")
    family = number.sub("{}", name, count=1)
    depths = {}
    for other in NAMES:
        match = number.search(other)
        if match is not None and number.sub("{}", other) == family:
            depths[int(match[0])] = other
    if not depths:
        return []
    wanted = int(number.findall(name)[0])
    return [depths[min(depths, key=lambda depth: abs(depth - wanted))]]


def _families() -> str:
    """Returns `NAMES` in short: "cifar_vgg{11,13}[_bn]" stands for four of them."""
    depths: dict[str, list[str]] = {}
    for name in NAMES:
        # The name without the ending stands for both.
        if name.endswith("_bn"):
            continue
        family = re.sub(r"\d+", "{}", name)
        if f"{name}_bn" in NAMES:
            family += "[_bn]"
        of_family = depths.setdefault(family, [])
        of_family += re.findall(r"\d+", name)
    in_short = []
    for family, found in depths.items():
        listed = ",".join(found)
        in_short.append(family.replace("{}", f"{{{listed}}}"))
    return ", ".join(in_short)


# One function per kind of network. It builds the network, or returns the function that does.


def _fc(num_classes: int, width_multiplier: float) -> nn.Module:
    """Builds the fully connected network."""
    width = widen(100, width_multiplier)
    return MLP(num_classes, widths=(width,) * 5)


def _conv(num_classes: int, width_multiplier: float) -> nn.Module:
    """Builds the small convolutional network."""
    width = widen(32, width_multiplier)
    return ConvNet(num_classes, widths=(width, width))


def _vgg(depth: int, *, batch_norm: bool, hidden: tuple[int, ...]) -> BuildFn:
    """Returns the builder of a VGG.

    Args:
      depth: a key of `vgg.STAGES`, which gives the number of convolutions.
      batch_norm: whether a batch norm follows each convolution.
      hidden: the widths of the dense layers before the head; () for CIFAR.
    """
    # The form with hidden layers is torchvision's, the other one OpenLTH's. They initialize
    # differently, and the published results depend on it.
    kernel_init = layers.KAIMING_FAN_OUT if hidden else layers.KAIMING_FAN_IN
    dense_init = nn.initializers.normal(0.01) if hidden else layers.KAIMING_FAN_IN

    def build(num_classes: int, width_multiplier: float) -> nn.Module:
        return VGG(
            num_classes,
            widths=stage_widths(depth, width_multiplier),
            batch_norm=batch_norm,
            hidden=tuple(widen(width, width_multiplier) for width in hidden),
            kernel_init=kernel_init,
            dense_init=dense_init,
        )

    return build


def _cifar_resnet(depth: int, *, base: int) -> BuildFn:
    """Returns the builder of a ResNet of three stages. `base`: the width of the first stage."""
    bases = (base, 2 * base, 4 * base)
    # A block has two convolutions. The stem and the head are the other two layers.
    num_blocks = (depth - 2) // 6

    def build(num_classes: int, width_multiplier: float) -> nn.Module:
        widths = tuple(widen(base, width_multiplier) for base in bases)
        return ResNet(
            num_classes,
            num_blocks=(num_blocks,) * 3,
            widths=widths,
            stem_width=widths[0],
            kernel_init=layers.KAIMING_FAN_IN,
            torch_head=False,
        )

    return build


def _resnet(depth: int, *, wide: bool, imagenet: bool) -> BuildFn:
    """Returns the builder of a ResNet of four stages."""
    bottleneck = depth >= 50
    # A wide bottleneck block doubles its inner width (torchvision's wide_resnet50_2). A wide basic
    # block has no inner width and doubles both convolutions (WRN-18-2, Zagoruyko & Komodakis 2016).
    inner_factor = 2 if wide and bottleneck else 1
    factor = 2 if wide and not bottleneck else 1
    bases = tuple(factor * base for base in (64, 128, 256, 512))

    def build(num_classes: int, width_multiplier: float) -> nn.Module:
        widths = tuple(widen(base, width_multiplier) for base in bases)
        return ResNet(
            num_classes,
            num_blocks=_RESNET_BLOCKS[depth],
            widths=widths,
            bottleneck=bottleneck,
            bottleneck_multiplier=inner_factor,
            stem_width=widen(64, width_multiplier),
            imagenet_stem=imagenet,
        )

    return build


# One function per family of names.


def _vggs(family: str, side: int, hidden: tuple[int, ...]) -> dict[str, _Entry]:
    """Returns the VGGs of a data set, with and without batch norm."""
    input_shape = (side, side, 3)
    entries = {}
    for depth in _VGG_DEPTHS:
        name = f"{family}_vgg{depth}"
        plain = _vgg(depth, batch_norm=False, hidden=hidden)
        normed = _vgg(depth, batch_norm=True, hidden=hidden)
        entries[name] = _Entry(plain, input_shape)
        entries[f"{name}_bn"] = _Entry(normed, input_shape)
    return entries


def _cifar_resnets() -> dict[str, _Entry]:
    """Returns the ResNets of CIFAR."""
    input_shape = (32, 32, 3)
    entries = {}
    for depth in _CIFAR_RESNET_DEPTHS:
        plain = _cifar_resnet(depth, base=16)
        wide = _cifar_resnet(depth, base=32)
        entries[f"cifar_resnet{depth}"] = _Entry(plain, input_shape)
        entries[f"cifar_wide_resnet{depth}"] = _Entry(wide, input_shape)
    return entries


def _resnets(family: str, side: int, wide_depths: tuple[int, ...]) -> dict[str, _Entry]:
    """Returns the ResNets of a data set with larger images."""
    # For images of 64x64 the published networks have the small stem, which keeps the maps' size.
    imagenet = family == "imagenet"
    input_shape = (side, side, 3)
    entries = {}
    for depth in _RESNET_BLOCKS:
        plain = _resnet(depth, wide=False, imagenet=imagenet)
        entries[f"{family}_resnet{depth}"] = _Entry(plain, input_shape)
    for depth in wide_depths:
        wide = _resnet(depth, wide=True, imagenet=imagenet)
        entries[f"{family}_wide_resnet{depth}"] = _Entry(wide, input_shape)
    return entries


_REGISTRY: dict[str, _Entry] = {
    "fc": _Entry(_fc, (28, 28, 1)),
    "conv": _Entry(_conv, (28, 28, 1)),
    **_vggs("cifar", 32, hidden=()),
    **_vggs("tiny", 64, hidden=(1024, 1024)),
    **_vggs("imagenet", 224, hidden=(4096, 4096)),
    **_cifar_resnets(),
    **_resnets("tiny", 64, wide_depths=(18, 34, 50, 101, 152)),
    **_resnets("imagenet", 224, wide_depths=(50, 101)),
}
NAMES = tuple(_REGISTRY)
