"""Runs steps of training in PyTorch, as a PyTorch user would write them.

    python benchmarks/torch_training.py --model=vgg16 --steps=4

This is what `train_speed.py` times. It prints one line of JSON: the seconds of inference and of
each step, after a first step that is not counted. With --compression each convolution and linear
layer multiplies its weights by a random mask of that density, as simulated sparsity does; the
places of the zeros do not matter to a dense product. The images are on the device as float32,
already normalised and augmented, which our step still has to do. It needs only torch, and uses its
default number of threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from measure import peak_mb
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch_synflow import VGG16_STAGES, vgg

STAGES = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": VGG16_STAGES,
}


class Masked(nn.Module):
    """Multiplies a weight by a fixed mask."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the masked weight."""
        return weight * self.mask


def run(name: str, steps: int, batch_size: int, compression: float | None) -> dict[str, object]:
    """Trains, and returns the seconds of each step."""
    torch.manual_seed(0)
    model = vgg(STAGES[name], 100)
    for module in list(model.modules()):
        if compression is not None and isinstance(module, nn.Conv2d | nn.Linear):
            mask = (torch.rand_like(module.weight) < 1 / compression).float()
            parametrize.register_parametrization(module, "weight", Masked(mask))
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 100, (batch_size,))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    peak = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    model.eval()
    inference_seconds = []
    for _ in range(2 * steps + 1):
        start = time.perf_counter()
        with torch.inference_mode():
            model(images)
        inference_seconds.append(time.perf_counter() - start)
    return {
        "model": name,
        "seconds": seconds[1:],
        "inference_seconds": inference_seconds[1:],
        "peak_mb": peak,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parses the flags, runs and prints the line of JSON."""
    parser = argparse.ArgumentParser(
        description="Steps of training in PyTorch; prints one line of JSON."
    )
    parser.add_argument("--model", choices=sorted(STAGES), default="vgg16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--compression", type=float, help="train masked weights; plain ones by default"
    )
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.steps, args.batch_size, args.compression)))


if __name__ == "__main__":
    main()
