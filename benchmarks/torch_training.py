"""Steps of training in PyTorch, as a PyTorch user would write them: what `train_speed.py` times.

    python benchmarks/torch_training.py --model=vgg16 --steps=4

Prints one line of JSON: the seconds of each step after a first one that is not counted. The images are on the device
as float32, normalised and augmented already, which spares PyTorch what our step does besides. Needs torch and nothing
else, and uses its default number of threads.
"""

from __future__ import annotations

import argparse
import json
import resource
import time

import torch
from measure import peak_mb
from torch.nn import functional
from torch_synflow import VGG16_STAGES, vgg

STAGES = {
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg16": VGG16_STAGES,
}


def run(name: str, steps: int, batch_size: int) -> dict[str, object]:
    """Trains, and returns what each step took."""
    torch.manual_seed(0)
    model = vgg(STAGES[name], 100)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    images, labels = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 100, (batch_size,))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "model": name,
        "seconds": seconds[1:],
        "peak_mb": peak_mb(resource.getrusage(resource.RUSAGE_SELF)),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parses the flags, runs, prints."""
    parser = argparse.ArgumentParser(description="Steps of training in PyTorch; prints one line of JSON.")
    parser.add_argument("--model", choices=sorted(STAGES), default="vgg16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    print(json.dumps(run(args.model, args.steps, args.batch_size)))


if __name__ == "__main__":
    main()
