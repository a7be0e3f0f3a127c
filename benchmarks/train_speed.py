"""Times a step of training against PyTorch's on one machine, and whole epochs with their input.

    python benchmarks/train_speed.py --torch-python=PATH

PATH is a Python that has torch; by default it is the one that runs this script. The networks are
VGG-11 and VGG-16 with batch norm at batch 128 on 32x32 images. In turn, each in a new process:

  ours   a step of `synflow_jax.training`: crop, flip and normalise uint8 images, masked loss,
         gradient, SGD
  torch  a step of `torch_training.py`, without the augmentation

Every other repeat begins with the other one. Then follows one epoch of configs/digits.py and, if
its files exist, one of configs/fashion_mnist.py. Prints a table and writes
`benchmarks/results/train_speed.json`. It takes four minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from measure import (
    ROOT,
    machine,
    others_seconds,
    peak_mb,
    print_table,
    run_child,
    spread,
    write_json,
)

BATCH = 128
MODELS = {"vgg11": "cifar_vgg11_bn", "vgg16": "cifar_vgg16_bn"}
EPOCHS = ("digits", "fashion_mnist")
Record = dict[str, Any]


def our_steps(name: str, steps: int) -> Record:
    """Times calls of the compiled loop, `steps` steps each, as in train.py, in a new process."""
    import jax
    import numpy as np

    from synflow_jax import data, models, training, trees

    model = models.create(MODELS[name], 100)
    params, batch_stats = models.init(model, (32, 32, 3), jax.random.key(0))
    optimizer = training.sgd(lambda step: 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    state = training.init_state(
        params, batch_stats, trees.prunable(params), optimizer, jax.random.key(1)
    )
    rng = np.random.default_rng(0)
    num = 3 * steps * BATCH
    images = jax.device_put(rng.integers(0, 256, (num, 32, 32, 3)).astype(np.uint8))
    labels = jax.device_put(rng.integers(0, 100, num).astype(np.int32))
    step = training.make_step(model, optimizer)
    epoch = jax.jit(
        training.make_epoch(step, data.spec("cifar100"), num, BATCH), donate_argnums=(0, 1)
    )
    info, seconds = training.init_info(1), []
    for number in range(0, 3 * steps, steps):
        start = time.perf_counter()
        state, info = jax.block_until_ready(
            epoch(state, info, images, labels, number, number + steps)
        )
        seconds.append((time.perf_counter() - start) / steps)
    return {
        "model": name,
        "seconds": seconds[1:],
        "first_seconds": seconds[0],  # includes compilation
        "peak_mb": peak_mb(resource.getrusage(resource.RUSAGE_SELF)),
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def our_epoch(name: str) -> Record:
    """Times one epoch of a config in one call, compiled before, in a new process."""
    import importlib

    import jax

    sys.path.insert(0, str(ROOT))
    from synflow_jax import data, training
    from synflow_jax.experiments import initialization
    from synflow_jax.experiments.run import resolve_one

    settings = importlib.import_module(f"configs.{name}").get_config()
    network = initialization.build(resolve_one(settings))
    arrays = data.load(settings.dataset, network.input_shape)
    optimizer = training.sgd(lambda step: 0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    key = jax.random.key(1)
    state = training.init_state(network.params, network.batch_stats, network.mask, optimizer, key)
    batch_size, num = settings.train.batch_size, len(arrays.train_labels)
    spec, augment = data.spec(settings.dataset), settings.train.augment
    per_epoch = training.steps_per_epoch(num, batch_size)
    step = training.make_step(network.model, optimizer)
    epoch = jax.jit(training.make_epoch(step, spec, num, batch_size, augment=augment))
    images, labels = jax.device_put((arrays.train_images, arrays.train_labels))
    seconds = []
    for stop in (0, per_epoch):
        start = time.perf_counter()
        jax.block_until_ready(epoch(state, training.init_info(1), images, labels, 0, stop))
        seconds.append(time.perf_counter() - start)
    return {
        "config": name,
        "images": per_epoch * batch_size,
        "seconds": seconds[1],
        "images_per_second": per_epoch * batch_size / seconds[1],
        "compile_seconds": seconds[0],
        "peak_mb": peak_mb(resource.getrusage(resource.RUSAGE_SELF)),
    }


def child_json(command: list[str]) -> Record:
    """Returns the last line that a command printed. Exits with its output if it failed."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = run_child(command, env)
    if child.status:
        raise SystemExit(
            f"{child.stdout}{child.stderr}\nStatus {child.status}: {' '.join(command)}"
        )
    return json.loads(child.stdout.splitlines()[-1])


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="A step of training against PyTorch's.")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "train_speed.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--epoch-worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.repeats < 1 or not set(args.models.split(",")) <= set(MODELS):
        parser.error(f"--steps and --repeats must be at least 1, --models from {', '.join(MODELS)}")
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    if args.worker:
        print(json.dumps(our_steps(args.worker, args.steps)))
        return
    if args.epoch_worker:
        print(json.dumps(our_epoch(args.epoch_worker)))
        return
    found = run_child([args.torch_python, "-c", "import torch"])
    if found.status:
        raise SystemExit(
            f"--torch-python={args.torch_python} cannot import torch:\n{found.stderr.strip()}"
        )
    this, torch_script = (
        str(Path(__file__).resolve()),
        str(ROOT / "benchmarks" / "torch_training.py"),
    )
    runs: dict[str, dict[str, list[Record]]] = {}
    start, others = time.perf_counter(), others_seconds()
    for name in args.models.split(","):
        runs[name] = {"ours": [], "torch": []}
        for repeat in range(args.repeats):
            sides = {
                "ours": [sys.executable, this, f"--worker={name}", f"--steps={args.steps}"],
                "torch": [
                    args.torch_python,
                    torch_script,
                    f"--model={name}",
                    f"--steps={args.steps}",
                ],
            }
            for side in list(sides)[:: -1 if repeat % 2 else 1]:
                record = child_json(sides[side])
                runs[name][side].append(record)
                print(
                    f"{name} {side}: {statistics.median(record['seconds']):.3f} s a step",
                    flush=True,
                )
    epochs = []
    for name in EPOCHS:
        if name == "fashion_mnist" and not Path("/usr/share/datasets/fashion-mnist").is_dir():
            print(
                "fashion_mnist is left out: Debian's package dataset-fashion-mnist is not installed"
            )
            continue
        epochs.append(child_json([sys.executable, this, f"--epoch-worker={name}"]))
    disturbed = (
        ""
        if others is None
        else f"{(others_seconds() - others) / (time.perf_counter() - start):.2f}"
    )
    facts = machine()
    rows, medians = [], {}
    for name, sides in runs.items():
        step = {
            side: [statistics.median(record["seconds"]) for record in records]
            for side, records in sides.items()
        }
        ratios = [ours / torch for ours, torch in zip(step["ours"], step["torch"], strict=True)]
        medians[name] = {"ours_over_torch": statistics.median(ratios)}
        for side, records in sides.items():
            rows.append(
                [
                    f"{name}: {side}",
                    spread(step[side], 3),
                    f"{BATCH / statistics.median(step[side]):,.0f}",
                    spread([record["peak_mb"] for record in records], 0),
                    spread(ratios) if side == "ours" else "",
                ]
            )
    for epoch in epochs:
        rows.append(
            [
                f"an epoch of configs/{epoch['config']}.py",
                f"{epoch['seconds']:.1f}",
                f"{epoch['images_per_second']:,.0f}",
                f"{epoch['peak_mb']:.0f}",
                "",
            ]
        )
    print_table(
        f"Training, batch {BATCH}, repeats: {args.repeats}; {facts['cpu']}, {facts['cores']} cores",
        ["", "seconds", "images/s", "peak, MB", "time: ours / PyTorch"],
        rows,
        caption=f"Median (least-greatest). Cores that other processes took meanwhile: {disturbed}.",
    )
    write_json(args.out, {"machine": facts, "medians": medians, "steps": runs, "epochs": epochs})


if __name__ == "__main__":
    main()
