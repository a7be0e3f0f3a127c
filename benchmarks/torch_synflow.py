"""Runs iterative SynFlow in PyTorch, written from the paper (arXiv 2006.05467, Algorithm 1).

    python benchmarks/torch_synflow.py --model=vgg16 --compression=100 --iterations=100

This is what `prune_speed.py` times. It prints one line of JSON. `seconds` is the time of the loop
alone: without imports, without building the network, and after one scoring pass that is not
counted. Expect 30 s or more on two cores, two thirds of it in the threshold. It needs only torch,
and uses its default number of threads.

The code is as simple as a PyTorch user would write it, and does nothing that slows it down: the
absolute value is taken once, since nothing reads the signs; only the prunable weights are
differentiated; pruned weights are zeroed in place.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Sequence

import torch
from measure import peak_mb
from torch import nn
from torch.nn import functional

VGG16_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VGG19_STAGES = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
RESNET18_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # width, stride of the first block
IMAGE_SIDE = {"vgg16": 32, "resnet18": 64, "vgg19": 224}
TOTAL = {"vgg16": 14_761_664, "resnet18": 11_261_632, "vgg19": 143_652_544}  # prunable weights


class Block(nn.Module):
    """A basic residual block: relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [batch, channels, height, width] to the same at 1 / stride of height and width."""
        return functional.relu(self.main(x) + self.shortcut(x))


def vgg(stages: Sequence[Sequence[int]], num_classes: int) -> nn.Module:
    """Returns a VGG with batch norm for 32x32 images.

    It has one convolution per width, a max pool between stages, and one linear layer.
    """
    modules: list[nn.Module] = []
    channels = 3
    for i, stage in enumerate(stages):
        if i:
            modules.append(nn.MaxPool2d(2))
        for width in stage:
            modules += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
    return nn.Sequential(*modules, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(channels, num_classes))


def vgg19(num_classes: int) -> nn.Module:
    """Returns VGG-19 for 224x224 images, without batch norm.

    It has no dropout, since it is only evaluated.
    """
    modules: list[nn.Module] = []
    channels = 3
    for stage in VGG19_STAGES:
        for width in stage:
            modules += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        modules.append(nn.MaxPool2d(2))
    modules += [
        nn.Flatten(),
        nn.Linear(7 * 7 * channels, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
    ]
    return nn.Sequential(*modules, nn.Linear(4096, num_classes))


def resnet18(num_classes: int) -> nn.Module:
    """Returns ResNet-18 for 64x64 images.

    It has a 3x3 stem of stride 1 without pooling, eight blocks and a linear layer.
    """
    modules: list[nn.Module] = [
        nn.Conv2d(3, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
    ]
    channels = 64
    for width, stride in RESNET18_STAGES:
        modules += [Block(channels, width, stride), Block(width, width, 1)]
        channels = width
    return nn.Sequential(
        *modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )


def build(name: str) -> nn.Module:
    """Returns a new network in evaluation mode, with weights drawn like ours and biases 0."""
    builders = {
        "vgg16": lambda: vgg(VGG16_STAGES, 100),
        "resnet18": lambda: resnet18(200),
        "vgg19": lambda: vgg19(1000),
    }
    model = builders[name]()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if name != "vgg19":
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            else:
                nn.init.normal_(module.weight, std=0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.eval()


def prunable(model: nn.Module) -> list[torch.Tensor]:
    """Returns the weights of all convolutions and linear layers."""
    return [
        module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)
    ]


def synflow_scores(
    model: nn.Module, weights: Sequence[torch.Tensor], ones: torch.Tensor
) -> list[torch.Tensor]:
    """Returns |dR/dw * w|, where R is the sum of the outputs.

    All parameters of the model must be at least 0.
    """
    gradients = torch.autograd.grad(model(ones).sum(), list(weights))
    with torch.no_grad():
        return [
            (gradient * weight).abs() for gradient, weight in zip(gradients, weights, strict=True)
        ]


@torch.no_grad()
def prune_below_kth(
    weights: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], k: int
) -> None:
    """Zeroes all weights that do not score above the k-th smallest score of the network."""
    if k < 1:
        return
    threshold = torch.kthvalue(torch.cat([score.flatten() for score in scores]), k).values
    for weight, score in zip(weights, scores, strict=True):
        weight.mul_(score > threshold)


def run(name: str, compression: float, iterations: int) -> dict[str, object]:
    """Prunes a new network and returns the time and the memory that it took."""
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    weights = prunable(model)
    total = sum(weight.numel() for weight in weights)
    assert total == TOTAL[name], f"{name} has {total} prunable weights instead of {TOTAL[name]}"
    ones = torch.ones(1, 3, IMAGE_SIDE[name], IMAGE_SIDE[name])
    synflow_scores(model, weights, ones)

    score_seconds = threshold_seconds = 0.0
    start = time.perf_counter()
    for iteration in range(1, iterations + 1):
        before = time.perf_counter()
        scores = synflow_scores(model, weights, ones)
        between = time.perf_counter()
        density = (1 / compression) ** (iteration / iterations)
        prune_below_kth(weights, scores, int((1 - density) * total))
        score_seconds += between - before
        threshold_seconds += time.perf_counter() - between
    seconds = time.perf_counter() - start

    return {
        "model": name,
        "compression": compression,
        "iterations": iterations,
        "total": total,
        "kept": sum(int(torch.count_nonzero(weight)) for weight in weights),
        "seconds": round(seconds, 4),
        "score_seconds": round(score_seconds, 4),
        "threshold_seconds": round(threshold_seconds, 4),
        "peak_mb": peak_mb(resource.getrusage(resource.RUSAGE_SELF)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parses the flags, runs and prints the line of JSON."""
    parser = argparse.ArgumentParser(
        description="Iterative SynFlow in PyTorch; prints one line of JSON."
    )
    parser.add_argument("--model", choices=sorted(TOTAL), default="vgg16")
    parser.add_argument("--compression", type=float, default=100.0)
    parser.add_argument("--iterations", type=int, default=100)
    args = parser.parse_args()
    if args.compression < 1 or args.iterations < 1:
        parser.error("--compression and --iterations must be at least 1")
    print(json.dumps(run(args.model, args.compression, args.iterations)))


if __name__ == "__main__":
    main()
