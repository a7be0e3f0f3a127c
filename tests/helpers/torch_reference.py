"""Trains two networks in PyTorch for twenty steps, for tests/training/test_training.py.

    python tests/helpers/torch_reference.py

writes tests/helpers/torch_reference.npz. The script needs torch, the tests do not. It was run once,
with torch 2.13.0 on a CPU, in float64: in float32, rounding and the kinks of ReLU separate two runs
of the ResNet by 3 % within 20 steps. NumPy draws weights, masks and batches, so the file holds
results only. Weights and masks have our names and layouts (kernels [height, width, in, out]) and
are transposed for PyTorch here.
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
NUM_STEPS, BATCH, CLASSES = 20, 16, 10
LEARNING_RATE, DROP_AT, DROP_FACTOR = 0.02, 12, 0.1
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
VGG = {
    "conv1_1": 4,
    "conv2_1": 8,
    "conv3_1": 16,
    "conv3_2": 16,
    "conv4_1": 32,
    "conv4_2": 32,
    "conv5_1": 32,
    "conv5_2": 32,
}
VGG_POOLS = ("conv2_1", "conv3_1", "conv4_1", "conv5_1")  # before these
RESNET = (4, 8, 16)  # widths of ResNet-20's stages


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Draws images, float32 [step, batch, 32, 32, 3], and labels, int32 [step, batch].

    A label shifts the mean of its images, so that there is something to learn.
    """
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, (NUM_STEPS, BATCH)).astype(np.int32)
    images = rng.normal(size=(NUM_STEPS, BATCH, 32, 32, 3)) + 0.2 * (
        labels[..., None, None, None] - 4.5
    )
    return images.astype(np.float32), labels


def fill(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draws parameters by name, in the order of the names, and a mask of half of each kernel."""
    rng = np.random.default_rng(2)
    params, mask = {}, {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = rng.normal(size=shape)
        if name.endswith("kernel"):
            params[name] = (values * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32)
            mask[name] = rng.random(shape) < 0.5
        else:  # norms and biases that are not at their initial values, so that a mistake shows
            params[name] = (float(name.endswith("scale")) + 0.1 * values).astype(np.float32)
    return params, mask


def _torch_networks() -> dict[str, Any]:
    import torch
    from torch import nn
    from torch.nn import functional

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            channels = 3
            for name, width in VGG.items():
                setattr(self, name, nn.Conv2d(channels, width, 3, padding=1))
                setattr(self, f"{name}_norm", nn.BatchNorm2d(width))
                channels = width
            self.head = nn.Linear(channels, CLASSES)

        def forward(self, x: Any) -> Any:
            for name in VGG:
                if name in VGG_POOLS:
                    x = functional.max_pool2d(x, 2)
                x = functional.relu(getattr(self, f"{name}_norm")(getattr(self, name)(x)))
            return self.head(x.mean((2, 3)))

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
            self.conv1_norm = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.conv2_norm = nn.BatchNorm2d(width)
            self.short = stride != 1 or channels != width
            if self.short:
                self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)
                self.shortcut_norm = nn.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            y = functional.relu(self.conv1_norm(self.conv1(x)))
            y = self.conv2_norm(self.conv2(y))
            return functional.relu(y + (self.shortcut_norm(self.shortcut(x)) if self.short else x))

    class Resnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, RESNET[0], 3, padding=1, bias=False)
            self.conv1_norm = nn.BatchNorm2d(RESNET[0])
            channels = RESNET[0]
            for stage, width in enumerate(RESNET, 2):
                for block in range(1, 4):
                    stride = 2 if stage > 2 and block == 1 else 1
                    setattr(self, f"conv{stage}_{block}", Block(channels, width, stride))
                    channels = width
            self.head = nn.Linear(channels, CLASSES)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.conv1_norm(self.conv1(x)))
            for stage in range(2, 5):
                for block in range(1, 4):
                    x = getattr(self, f"conv{stage}_{block}")(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    return {"vgg": Vgg(), "resnet": Resnet()}


def _our_name(name: str, ndim: int) -> str:
    parts = name.split(".")
    kinds = {
        "bias": "bias",
        "weight": "kernel" if ndim > 1 else "scale",
        "running_mean": "mean",
        "running_var": "var",
    }
    return "/".join([*parts[:-1], kinds[parts[-1]]])


def _ours(values: np.ndarray) -> np.ndarray:
    return values.transpose(2, 3, 1, 0) if values.ndim == 4 else values.T


def _theirs(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(3, 2, 0, 1) if values.ndim == 4 else values.T)


def main() -> None:
    """Trains both networks and writes the file."""
    import torch

    results = {}
    images, labels = batches()
    for which, model in _torch_networks().items():
        model = model.double()
        named = {_our_name(name, p.ndim): p for name, p in model.named_parameters()}
        params, mask = fill({name: _ours(p.detach().numpy()).shape for name, p in named.items()})
        masks = {name: torch.from_numpy(_theirs(m)) for name, m in mask.items()}
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(_theirs(params[name])))
                if name in masks:
                    parameter.mul_(masks[name])
        optimizer = torch.optim.SGD(
            model.parameters(),
            LEARNING_RATE,
            momentum=MOMENTUM,
            nesterov=True,
            weight_decay=WEIGHT_DECAY,
        )
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [DROP_AT], DROP_FACTOR)
        losses = []
        for step in range(NUM_STEPS):
            x = torch.from_numpy(np.ascontiguousarray(images[step].transpose(0, 3, 1, 2))).double()
            loss = torch.nn.functional.cross_entropy(
                model(x), torch.from_numpy(labels[step]).long()
            )
            optimizer.zero_grad()
            loss.backward()
            for name, m in masks.items():
                named[name].grad.mul_(m)
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        results[f"{which}/losses"] = np.array(losses)
        for name, value in model.state_dict().items():
            if not name.endswith("num_batches_tracked"):
                results[f"{which}/{_our_name(name, value.ndim)}"] = _ours(value.numpy())
    np.savez_compressed(FILE, **results)
    print(FILE, {name: values for name, values in results.items() if name.endswith("losses")})


if __name__ == "__main__":
    main()
