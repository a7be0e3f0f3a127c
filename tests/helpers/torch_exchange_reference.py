"""Computes logits in PyTorch for networks that both libraries name.

tests/storage/test_networks.py compares with them.

    python tests/helpers/torch_exchange_reference.py

writes tests/helpers/torch_exchange_reference.npz. For each network it holds the names and shapes of
the state dict, as PyTorch lists them, and the logits of a few images. The script needs torch. The
tests do not, but where torch is installed they compare with it directly. The script was run once,
with torch 2.13.0 on a CPU, in float64. NumPy draws weights and images, so the file holds names and
results only.

The modules are named as in torchvision (`TorchvisionVgg`, `TorchvisionResnet`) and OpenLTH
(`OpenlthVgg`, `OpenlthResnet`). Their widths are given layer by layer, as compact networks need it.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
CLASSES, BATCH = 7, 3


class Case(NamedTuple):
    """Holds the side of the images and the outputs of the convolutions (and hidden dense layers).

    widths: "M" is a max pool. A ResNet has the width of its stem and then one tuple per block.
    """

    side: int
    widths: tuple[Any, ...]
    hidden: tuple[int, ...] = ()


_VGG11 = (4, "M", 5, "M", 6, 7, "M", 8, 6, "M", 5, 9, "M")
_RESNET18 = (6, (5, 6), (4, 6), (7, 8), (6, 8), (9, 7), (5, 7), (8, 10), (7, 10))
_RESNET50 = (
    5,
    *[(3, 4, 9)] * 3,
    (5, 4, 11),
    *[(3, 5, 11)] * 3,
    (4, 6, 8),
    *[(5, 3, 8)] * 5,
    *[(4, 5, 12)] * 3,
)
CASES = {
    "imagenet_vgg11_bn": Case(64, _VGG11, (12, 10)),
    "imagenet_vgg11": Case(96, _VGG11, (12, 10)),
    "tiny_vgg13_bn": Case(64, (3, 4, "M", 5, 3, "M", 6, 7, "M", 8, 6, "M", 5, 9, "M"), (11, 8)),
    "imagenet_resnet18": Case(48, _RESNET18),
    "tiny_resnet18": Case(24, _RESNET18),
    "imagenet_resnet50": Case(40, _RESNET50),
    "cifar_vgg11_bn": Case(32, _VGG11[:-1]),
    "cifar_vgg13": Case(32, (3, 4, "M", 5, 3, "M", 6, 7, "M", 8, 6, "M", 5, 9)),
    "cifar_resnet20": Case(16, (4, *[(3, 4)] * 3, (5, 6), *[(7, 6)] * 2, (8, 7), *[(6, 7)] * 2)),
}


def images(name: str) -> np.ndarray:
    """Draws images, float32 [batch, height, width, channels]."""
    side = CASES[name].side
    return np.random.default_rng(1).standard_normal((BATCH, side, side, 3)).astype(np.float32)


def fill(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """Draws float32 weights by PyTorch's names. No norm or bias has its initial value."""
    rng = np.random.default_rng(2)
    state = {}
    for name in sorted(shapes):
        values = rng.standard_normal(shapes[name])
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros((), np.int64)
        elif len(shapes[name]) > 1:
            state[name] = (values * np.sqrt(2 / np.prod(shapes[name][1:]))).astype(np.float32)
        elif name.endswith("running_var"):
            state[name] = (0.5 + values**2).astype(np.float32)
        else:
            state[name] = (float(name.endswith("weight")) + 0.1 * values).astype(np.float32)
    return state


def module(
    name: str,
    widths: Sequence[Any],
    hidden: Sequence[int] = (),
    classes: int = CLASSES,
    maps: int = 1,
) -> Any:
    """Returns the PyTorch module of a network.

    maps: height and width of the maps that a VGG flattens.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    def features(batch_norm: bool) -> nn.Sequential:
        layers, channels = [], 3
        for width in widths:
            if width == "M":
                layers.append(nn.MaxPool2d(2, 2))
                continue
            norm = [nn.BatchNorm2d(width)] if batch_norm else []
            layers += [nn.Conv2d(channels, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
            channels = width
        return nn.Sequential(*layers)

    class TorchvisionVgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = features(name.endswith("_bn"))
            self.avgpool = nn.AdaptiveAvgPool2d((maps, maps))
            channels = [width for width in widths if width != "M"][-1]
            first, second = hidden
            self.classifier = nn.Sequential(
                nn.Linear(channels * maps * maps, first), nn.ReLU(True), nn.Dropout(),
                nn.Linear(first, second), nn.ReLU(True), nn.Dropout(),
                nn.Linear(second, classes),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    class ConvModule(nn.Module):
        def __init__(self, channels: int, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, width, 3, padding=1)
            self.bn = nn.BatchNorm2d(width) if name.endswith("_bn") else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.relu(self.bn(self.conv(x)))

    class OpenlthVgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers, channels = [], 3
            for width in widths:
                layers.append(nn.MaxPool2d(2) if width == "M" else ConvModule(channels, width))
                channels = channels if width == "M" else width
            self.layers = nn.Sequential(*layers)
            self.fc = nn.Linear(channels, classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(functional.adaptive_avg_pool2d(self.layers(x), 1).flatten(1))

    class Block(nn.Module):
        def __init__(self, channels: int, widths: Sequence[int], stride: int, short: str) -> None:
            super().__init__()
            self.num, self.short = len(widths), short
            sizes, strides = ((1, 3, 1), (1, stride, 1)) if self.num == 3 else ((3, 3), (stride, 1))
            before = channels
            for i, (width, size, step) in enumerate(zip(widths, sizes, strides, strict=True), 1):
                setattr(
                    self,
                    f"conv{i}",
                    nn.Conv2d(before, width, size, step, padding=size // 2, bias=False),
                )
                setattr(self, f"bn{i}", nn.BatchNorm2d(width))
                before = width
            identity = stride == 1 and channels == before
            shortcut = [nn.Conv2d(channels, before, 1, stride, bias=False), nn.BatchNorm2d(before)]
            setattr(self, short, nn.Sequential(*([] if identity else shortcut)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for i in range(1, self.num + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = functional.relu(y) if i < self.num else y
            return functional.relu(y + getattr(self, self.short)(x))

    num_blocks = {"18": (2, 2, 2, 2), "50": (3, 4, 6, 3), "20": (3, 3, 3)}.get(name[-2:], ())

    def stages(short: str) -> list[list[Block]]:
        channels, found, blocks = widths[0], [], iter(widths[1:])
        for i, num in enumerate(num_blocks):
            found.append([])
            for j in range(num):
                block = next(blocks)
                found[-1].append(Block(channels, block, 2 if i and not j else 1, short))
                channels = block[-1]
        return found

    class TorchvisionResnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            large = name.startswith("imagenet")
            self.conv1 = nn.Conv2d(
                3, widths[0], 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False
            )
            self.bn1 = nn.BatchNorm2d(widths[0])
            self.maxpool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
            for i, blocks in enumerate(stages("downsample"), 1):
                setattr(self, f"layer{i}", nn.Sequential(*blocks))
            self.fc = nn.Linear(widths[-1][-1], classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))

    class OpenlthResnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(widths[0])
            self.blocks = nn.Sequential(
                *[block for blocks in stages("shortcut") for block in blocks]
            )
            self.fc = nn.Linear(widths[-1][-1], classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.blocks(functional.relu(self.bn(self.conv(x))))
            return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))

    if "resnet" in name:
        return OpenlthResnet() if name.startswith("cifar") else TorchvisionResnet()
    return OpenlthVgg() if name.startswith("cifar") else TorchvisionVgg()


def logits(net: Any, state: Mapping[str, np.ndarray], inputs: np.ndarray) -> np.ndarray:
    """Returns logits, float64 [batch, classes], in evaluation mode. inputs: NHWC.

    The state dict must fit the module strictly.
    """
    import torch

    net.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in state.items()}, strict=True
    )
    x = torch.from_numpy(np.ascontiguousarray(inputs.transpose(0, 3, 1, 2))).double()
    with torch.no_grad():
        return net.double().eval()(x).numpy()


def main() -> None:
    """Computes the logits of all networks and writes the file."""
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        net = module(name, case.widths, case.hidden, maps=case.side // 32)
        shapes = {key: list(value.shape) for key, value in net.state_dict().items()}
        results[f"{name}/shapes"] = np.array(json.dumps(shapes))
        results[f"{name}/logits"] = logits(net, fill(shapes), images(name))
        print(name, len(shapes), results[f"{name}/logits"][0])
    np.savez_compressed(FILE, **results)


if __name__ == "__main__":
    main()
