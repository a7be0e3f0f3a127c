"""Times training and inference of a pruned VGG-16: dense, masked, compact, and masked in PyTorch.

    python benchmarks/compaction.py --torch-python=PATH [--quick] [--plot]

PATH is a Python that has torch; by default it is the one that runs this script. The network is
VGG-16 with batch norm at batch 128 on 32x32 images, pruned by SynFlow in 100 iterations to
compressions 10, 100 and 1000. Every variant runs in a new process, and `--repeats` rounds of all
variants follow one another:

  dense    a step of `synflow_jax.training` with a full mask
  masked   the same with a pruned mask: the cost of simulated sparsity
  compact  the smaller dense network of the same mask (`models.compact`)
  torch    a step of `torch_training.py` with masked weights, without the augmentation

A step is crop, flip, masked loss, gradient and SGD. Inference is a batch of
`training.make_evaluate`, which takes eight of them per call (PyTorch's inference has neither
normalisation nor loss). Peaks of memory are those of whole processes: ours hold XLA and what it
compiles, and the full network that was pruned.

The upper limit of the speed-up is the ratio of multiply-adds, `possible` in the table. The goals:
the compact step reaches at least half of that against the masked one, and against PyTorch it is 2.5
times as fast at compression 100 and 10 times at 1000.

Prints a table, writes `benchmarks/results/compaction.json`, and with --plot draws
`docs/compaction.png`; --plot-only draws it from an earlier file of results. It takes four minutes
on two idle cores with --steps=5 --repeats=1, and one and a quarter with --quick (only compression
100, masks of 10 iterations, one round).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
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
    timings,
    write_json,
)

BATCH, SHAPE, CLASSES = 128, (32, 32, 3), 100
Record = dict[str, Any]


def prune(folder: Path, compressions: list[float], num_iterations: int) -> Record:
    """Writes a mask per compression, in a new process."""
    import jax

    from synflow_jax import models, pruning, scores, storage

    model, params, batch_stats = _network()
    score_fn = scores.synflow(models.synflow_fn(model, batch_stats), SHAPE)
    for compression in compressions:
        mask, _ = pruning.prune(
            score_fn,
            params,
            compression=compression,
            num_iterations=num_iterations,
            score_dtype="float32",
        )
        storage.save_mask(_mask_path(folder, compression), mask)
    return {"jax": jax.__version__}


def _network() -> tuple[Any, Any, Any]:
    import jax

    from synflow_jax import models

    model = models.create("cifar_vgg16_bn", CLASSES)
    return model, *models.init(model, SHAPE, jax.random.key(0))


def _mask_path(folder: Path, compression: float) -> Path:
    return folder / f"{compression:g}.safetensors"


def ours(variant: str, compression: float, folder: Path, steps: int) -> Record:
    """Times training in calls of the compiled loop, as train.py does, and inference.

    It runs in a new process. The peak is read between the two.
    """
    import jax
    import numpy as np

    from synflow_jax import data, models, storage, training, trees
    from synflow_jax.training import forms

    model, params, batch_stats = _network()
    mask = trees.prunable(params)
    if variant != "dense":
        mask = storage.load_mask(_mask_path(folder, compression), params)
    network = models.Network(model, params, batch_stats, mask, SHAPE)
    form = forms.choose(network, compact=variant == "compact")
    chosen, size = form.network, form.size
    del form, network, params, batch_stats, mask
    optimizer = training.sgd(lambda step: 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    state = training.init_state(
        chosen.params, chosen.batch_stats, chosen.mask, optimizer, jax.random.key(1)
    )
    rng = np.random.default_rng(0)
    num = 8 * BATCH
    images = jax.device_put(rng.integers(0, 256, (num, *SHAPE)).astype(np.uint8))
    labels = jax.device_put(rng.integers(0, CLASSES, num).astype(np.int32))
    step = training.make_step(chosen.model, optimizer)
    epoch = jax.jit(
        training.make_epoch(step, data.spec("cifar100"), num, BATCH), donate_argnums=(0, 1)
    )
    info = training.init_info(1)
    start = time.perf_counter()
    state, info = jax.block_until_ready(epoch(state, info, images, labels, 0, 1))
    compile_seconds = time.perf_counter() - start

    def train() -> None:
        nonlocal state, info
        state, info = jax.block_until_ready(epoch(state, info, images, labels, 0, steps))

    cpu = time.process_time()
    seconds = [value / steps for value in timings(train, 2)]
    cpu_seconds = (time.process_time() - cpu) / (3 * steps)
    peak = peak_mb(resource.getrusage(resource.RUSAGE_SELF))

    evaluate = jax.jit(training.make_evaluate(chosen.model, data.spec("cifar100"), BATCH))
    infer = lambda: jax.block_until_ready(evaluate(state, images, labels))
    return {
        "variant": variant,
        "compression": compression,
        "seconds": seconds,
        # Time on all cores, which depends less on other jobs than the wall-clock time.
        "cpu_seconds": cpu_seconds,
        "inference_seconds": [value / (num // BATCH) for value in timings(infer, 3)],
        "compile_seconds": compile_seconds,
        "peak_mb": peak,
        "size": size if variant == "compact" else None,
        "platform": jax.default_backend(),
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


def median(records: list[Record], name: str) -> float:
    """Returns the median of the medians of the processes."""
    return statistics.median(statistics.median(record[name]) for record in records)


def find(records: list[Record], variant: str, compression: float | None = None) -> list[Record]:
    """Returns the records of a variant, at a compression if it has several."""
    return [
        r for r in records if r["variant"] == variant and compression in (None, r["compression"])
    ]


def summary(records: list[Record], compressions: list[float]) -> list[Record]:
    """Returns a row per compression: the speed-up of the compact network, and its upper limit."""
    rows = []
    for compression in compressions:
        compact = find(records, "compact", compression)
        masked, torch = find(records, "masked", compression), find(records, "torch")
        size = compact[0]["size"]
        row = {
            "compression": compression,
            "weights": size["compact"]["weights"] / size["full"]["weights"],
            "possible": size["full"]["multiply_adds"] / size["compact"]["multiply_adds"],
            "memory": median_peak(masked) / median_peak(compact),
        }
        for kind in ("seconds", "inference_seconds"):
            name = kind.removesuffix("seconds")
            row[f"{name}over_masked"] = median(masked, kind) / median(compact, kind)
            if torch:
                row[f"{name}over_torch"] = median(torch, kind) / median(compact, kind)
        rows.append(row)
    return rows


def median_peak(records: list[Record]) -> float:
    """Returns the median peak of memory, in MB."""
    return statistics.median(record["peak_mb"] for record in records)


def plot(path: Path, results: Path) -> None:
    """Draws speed against compression, from the file of results."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = json.loads(results.read_text())["summary"]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    x = [row["compression"] for row in rows]
    for axis, prefix, title in zip(
        axes, ("", "inference_"), ("a training step", "inference"), strict=True
    ):
        axis.plot(x, [row["possible"] for row in rows], "k:", label="ratio of multiply-adds")
        lines = (
            ("over_masked", "against our masked network"),
            ("over_torch", "against PyTorch, masked"),
        )
        for name, label in lines:
            if f"{prefix}{name}" in rows[0]:
                axis.plot(x, [row[f"{prefix}{name}"] for row in rows], "o-", label=label)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="compression",
            title=f"VGG-16, batch {BATCH}: {title}",
        )
        axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("times as fast, compact")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}")


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description="A pruned VGG-16: dense, masked, compact, and in PyTorch."
    )
    parser.add_argument(
        "--torch-python",
        default=sys.executable,
        help="a Python that has torch; one without it leaves PyTorch out",
    )
    parser.add_argument("--quick", action="store_true", help="only compression 100, one round")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps per call; a process times two calls"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plot", action="store_true", help="draw docs/compaction.png")
    parser.add_argument(
        "--plot-only", action="store_true", help="draw it from the results of an earlier run"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "compaction.json"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.repeats < 1:
        parser.error("--steps and --repeats must be at least 1")
    return args


def measure_all(
    args: argparse.Namespace, compressions: list[float], torch_works: bool
) -> list[Record]:
    """Returns the records of all processes."""
    this, records = [sys.executable, str(Path(__file__).resolve())], []
    torch_script = str(ROOT / "benchmarks" / "torch_training.py")
    variants = [
        ("dense", 1.0),
        *[(name, c) for c in compressions for name in ("masked", "compact")],
    ]
    if torch_works:
        # PyTorch multiplies masked weights as dense matrices, equally fast at every compression.
        variants.append(("torch", 100.0))
    with tempfile.TemporaryDirectory() as folder:
        print("pruning", flush=True)
        iterations = 10 if args.quick else 100
        child_json([*this, "--worker", "prune", folder, json.dumps([compressions, iterations])])
        for repeat in range(1 if args.quick else args.repeats):
            for variant, compression in variants[:: -1 if repeat % 2 else 1]:
                if variant == "torch":
                    command = [
                        args.torch_python,
                        torch_script,
                        f"--steps={args.steps}",
                        "--compression=100",
                    ]
                    record = {"variant": "torch", "compression": compression, **child_json(command)}
                else:
                    values = json.dumps([compression, args.steps])
                    record = child_json([*this, "--worker", variant, folder, values])
                records.append(record)
                seconds = statistics.median(record["seconds"])
                print(f"{variant} {compression:g}: {seconds:.3f} s a step", flush=True)
    return records


def main() -> None:
    """Measures, prints the table, writes the results and draws."""
    args = parse_args()
    if args.worker:
        what, folder, values = args.worker
        first, number = json.loads(values)
        print(
            json.dumps(
                prune(Path(folder), first, number)
                if what == "prune"
                else ours(what, first, Path(folder), number)
            )
        )
        return
    if args.plot_only:
        plot(ROOT / "docs" / "compaction.png", args.out)
        return
    torch_works = run_child([args.torch_python, "-c", "import torch"]).status == 0
    if not torch_works:
        print(f"--torch-python={args.torch_python} cannot import torch: PyTorch is left out")
    compressions = [100.0] if args.quick else [10.0, 100.0, 1000.0]
    start, others = time.perf_counter(), others_seconds()
    records = measure_all(args, compressions, torch_works)
    disturbed = (
        ""
        if others is None
        else f"{(others_seconds() - others) / (time.perf_counter() - start):.2f}"
    )
    facts = machine() | {"others_cores": disturbed}
    rows = []
    for variant, compression in dict.fromkeys((r["variant"], r["compression"]) for r in records):
        found = find(records, variant, compression)
        rows.append(
            [
                variant if variant in ("dense", "torch") else f"{variant}, {compression:g}",
                spread([statistics.median(r["seconds"]) for r in found], 3),
                spread([statistics.median(r["inference_seconds"]) for r in found], 3),
                spread([r["peak_mb"] for r in found], 0),
            ]
        )
    print_table(
        f"VGG-16 (BN), batch {BATCH}; {facts['cpu']}, {facts['cores']} cores",
        ["", "s a step", "s an inference", "peak of training, MB"],
        rows,
        caption="Median (least-greatest) of processes. Cores that other processes used meanwhile: "
        f"{disturbed}.",
    )
    summed = summary(records, compressions)
    print_table(
        "How many times as fast the compact network is",
        [
            "compression",
            "weights",
            "possible",
            "masked",
            "PyTorch",
            "inference: masked",
            "PyTorch",
            "memory: masked",
        ],
        [
            [
                f"{row['compression']:g}",
                f"{100 * row['weights']:.2g} %",
                *(
                    f"{row[name]:.2f}" if name in row else ""
                    for name in (
                        "possible",
                        "over_masked",
                        "over_torch",
                        "inference_over_masked",
                        "inference_over_torch",
                        "memory",
                    )
                ),
            ]
            for row in summed
        ],
    )
    write_json(args.out, {"machine": facts, "summary": summed, "records": records})
    if args.plot:
        plot(ROOT / "docs" / "compaction.png", args.out)


if __name__ == "__main__":
    main()
