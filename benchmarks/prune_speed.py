"""Times SynFlow's loop and the whole command against PyTorch, on one machine in one run.

    python benchmarks/prune_speed.py --torch-python=PATH
    python benchmarks/prune_speed.py --models=vgg19 --compression=1024 --iterations=15 --repeats=1

PATH is a Python that has torch; by default it is the one that runs this script. For each network
and each repeat it runs, each in a new process:

  ours      the compiled loop of `synflow_jax.prune`, called a second time
  torch     the loop of `torch_synflow.py`
  command   `python prune.py --config=...` from start to end, first with an empty compilation cache,
            then again

Every other repeat runs them in reverse, so that a machine that slows down or speeds up favours
neither. Prints a table of medians with their range and of the ratios PyTorch / ours, taken repeat
by repeat, and writes `benchmarks/results/prune_speed.json` with every figure. It takes about ten
minutes on two idle cores.

Other work on the machine slows PyTorch's threads down up to ten times, more than ours. The number
of cores that others used during each repeat is in the JSON, and the table reports it above a tenth
of a core.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import (
    ROOT,
    Child,
    machine,
    others_seconds,
    peak_mb,
    print_table,
    run_child,
    spread,
    write_json,
)

DEFAULT_ITERATIONS = 100  # of the configs too
SIDES = {
    "ours": "our loop",
    "torch": "PyTorch loop",
    "command_cold": "prune.py, empty cache",
    "command_warm": "prune.py, warm cache",
}
Record = dict[str, Any]


class Network(NamedTuple):
    """The model and config that a name of `torch_synflow.py` stands for."""

    model: str
    num_classes: int
    config: str
    total: int


NETWORKS = {
    "vgg16": Network("cifar_vgg16_bn", 100, "configs/vgg16_c100.py", 14_761_664),
    "resnet18": Network("tiny_resnet18", 200, "configs/resnet18_tiny.py", 11_261_632),
    "vgg19": Network("imagenet_vgg19", 1000, "configs/vgg19_imagenet.py", 143_652_544),
}


def our_loop(name: str, compression: float, iterations: int) -> Record:
    """Compiles the loop and times its second call, in a new process."""
    # Not at the top: the imports of the parent count towards the memory of its children, see
    # `measure.run_child`.
    import jax

    from synflow_jax import models, pruning, scores

    network = NETWORKS[name]
    model = models.create(network.model, network.num_classes)
    shape = models.default_input_shape(network.model)
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    score_fn = scores.synflow(models.synflow_fn(model, batch_stats), shape)
    mask, seconds = None, []
    for _ in range(2):
        start = time.perf_counter()
        result = pruning.prune(
            score_fn,
            params,
            compression=compression,
            num_iterations=iterations,
            score_dtype="float32",  # as in PyTorch and in the command
        )
        mask, _ = jax.block_until_ready(result)
        seconds.append(time.perf_counter() - start)
    # Read the peak before the checks below, which are not part of the work that is timed.
    peak = peak_mb(resource.getrusage(resource.RUSAGE_SELF))
    return {
        "model": name,
        "compression": compression,
        "iterations": iterations,
        "total": sum(leaf.size for leaf in jax.tree.leaves(mask)),
        "kept": sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask)),
        "seconds": round(seconds[1], 4),
        "compile_seconds": round(seconds[0] - seconds[1], 4),
        "peak_mb": peak,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
    }


def run_or_exit(command: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
    """Executes a command. If it fails, shows its output and exits with status 1."""
    child = run_child(command, env)
    if child.status:
        print(child.stdout + child.stderr, file=sys.stderr)
        print(f"Status {child.status}: {' '.join(command)}", file=sys.stderr)
        raise SystemExit(1)
    return child


def last_json(child: Child) -> Record:
    """Returns the last line that a child printed."""
    return json.loads(child.stdout.splitlines()[-1])


def measure_ours(name: str, compression: float, iterations: int) -> dict[str, Record]:
    """Measures our loop, in a process without a compilation cache, which would hide compiling."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    flags = [f"--worker={name}", f"--compression={compression:g}", f"--iterations={iterations}"]
    command = [sys.executable, str(Path(__file__).resolve()), *flags]
    return {"ours": last_json(run_or_exit(command, env))}


def measure_torch(
    name: str, compression: float, iterations: int, torch_python: str
) -> dict[str, Record]:
    """Measures `torch_synflow.py`, which times itself."""
    script = str(ROOT / "benchmarks" / "torch_synflow.py")
    flags = [f"--model={name}", f"--compression={compression:g}", f"--iterations={iterations}"]
    return {"torch": last_json(run_or_exit([torch_python, script, *flags]))}


def measure_command(name: str, compression: float, iterations: int) -> dict[str, Record]:
    """Measures the command twice: the second run uses the compilation cache of the first."""
    records = {}
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(Path(folder, "cache"))}
        for side in ("command_cold", "command_warm"):
            command = [sys.executable, "prune.py", f"--config={NETWORKS[name].config}"]
            command += [
                f"--workdir={Path(folder, side)}",
                f"--config.prune.compression={compression:g}",
            ]
            if iterations != DEFAULT_ITERATIONS:
                command.append(f"--config.prune.num_iterations={iterations}")
            child = run_or_exit(command, env)
            records[side] = {"seconds": round(child.seconds, 4), "peak_mb": child.peak_mb}
    return records


def check_same_work(name: str, repeat: Mapping[str, Any]) -> None:
    """Checks that both loops kept the same number of weights, except for ties at a threshold."""
    ours, theirs = repeat["ours"], repeat["torch"]
    if (
        not ours["total"] == theirs["total"] == NETWORKS[name].total
        or abs(ours["kept"] / theirs["kept"] - 1) > 1e-3
    ):
        raise SystemExit(f"The sides did different work on {name}: {ours} against {theirs}.")


def ratios(repeats: Sequence[Mapping[str, Any]], side: str, figure: str) -> list[float]:
    """Returns PyTorch / `side` of each repeat: above 1, PyTorch takes more."""
    return [repeat["torch"][figure] / repeat[side][figure] for repeat in repeats]


def table_rows(name: str, repeats: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a row of text for each side."""
    rows = []
    for side, label in SIDES.items():
        records = [repeat[side] for repeat in repeats]
        compiling = [record["compile_seconds"] for record in records if "compile_seconds" in record]
        rows.append(
            [
                f"{name}: {label}",
                spread([record["seconds"] for record in records]),
                spread(compiling) if compiling else "",
                spread([record["peak_mb"] for record in records], 0),
                "" if side == "torch" else spread(ratios(repeats, side, "seconds")),
                "" if side == "torch" else spread(ratios(repeats, side, "peak_mb")),
            ]
        )
    return rows


def summary(repeats: Sequence[Mapping[str, Any]]) -> Record:
    """Prints the medians of the figures and of the ratios."""
    medians: Record = {}
    for side in SIDES:
        medians[side] = {
            figure: statistics.median(repeat[side][figure] for repeat in repeats)
            for figure in ("seconds", "peak_mb")
        }
        if side != "torch":
            for figure in ("seconds", "peak_mb"):
                medians[side][f"torch_{figure}_ratio"] = round(
                    statistics.median(ratios(repeats, side, figure)), 3
                )
    return medians


def check_before_work(torch_python: str, names: Sequence[str]) -> None:
    """Exits with a message if anything that the run needs is missing."""
    unknown = [name for name in names if name not in NETWORKS]
    if unknown or not names:
        raise SystemExit(
            f"--models={','.join(names)}: choose from {', '.join(NETWORKS)}, separated by commas."
        )
    for file in ("prune.py", *(NETWORKS[name].config for name in names)):
        if not (ROOT / file).exists():
            raise SystemExit(
                f"{file} is missing in this checkout; the whole command cannot be timed without it."
            )
    try:
        found = run_child([torch_python, "-c", "import torch"])
    except OSError as error:
        raise SystemExit(
            f"--torch-python={torch_python} does not start: {error.strerror}."
        ) from None
    if found.status:
        raise SystemExit(
            f"--torch-python={torch_python} cannot import torch:\n{found.stderr.strip()}\n"
            "Install it with `pip install torch`, best into a separate environment (on Linux "
            "without a GPU, from PyTorch's index of CPU wheels: the default brings gigabytes of "
            "CUDA), and pass the Python of that environment."
        )


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description="SynFlow's loop and the whole command against PyTorch."
    )
    parser.add_argument("--torch-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument(
        "--models", default="vgg16,resnet18", help=f"of {', '.join(NETWORKS)}, separated by commas"
    )
    parser.add_argument("--compression", type=float, default=100.0)
    parser.add_argument("--iterations", type=int, default=DEFAULT_ITERATIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "prune_speed.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.iterations < 1 or args.repeats < 1:
        parser.error("--iterations and --repeats must be at least 1")
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    if args.worker:
        print(json.dumps(our_loop(args.worker, args.compression, args.iterations)))
        return
    names = [name for name in args.models.split(",") if name]
    check_before_work(args.torch_python, names)
    facts = machine()
    runs: dict[str, list[Record]] = {name: [] for name in names}
    for name in names:
        for repeat in range(args.repeats):
            record: Record = {}
            start, others = time.perf_counter(), others_seconds()
            sides = [
                lambda name=name: measure_ours(name, args.compression, args.iterations),
                lambda name=name: measure_torch(
                    name, args.compression, args.iterations, args.torch_python
                ),
                lambda name=name: measure_command(name, args.compression, args.iterations),
            ]
            for measure_side in sides[:: -1 if repeat % 2 else 1]:
                new = measure_side()
                record.update(new)
                for side, figures in new.items():
                    progress = f"{name} {repeat + 1}/{args.repeats}, {SIDES[side]}"
                    print(f"{progress}: {figures['seconds']:.2f} s", flush=True)
            if others is not None:
                record["others_cores"] = round(
                    (others_seconds() - others) / (time.perf_counter() - start), 2
                )
            check_same_work(name, record)
            runs[name].append(record)

    others_cores = max(record.get("others_cores", 0) for name in names for record in runs[name])
    caption = (
        "Median (least-greatest). Seconds of prune.py are those of the whole command; MB are 2^20 "
        "bytes."
    )
    if others_cores > 0.1:
        caption += f" DISTURBED: others took up to {others_cores:.1f} cores."
    print_table(
        f"SynFlow, {args.iterations} iterations, compression {args.compression:g}, "
        f"repeats: {args.repeats}; "
        f"{facts['cpu']}, {facts['cores']} cores",
        [
            "",
            "seconds",
            "compiling, s",
            "peak, MB",
            "time: PyTorch / ours",
            "memory: PyTorch / ours",
        ],
        [row for name in names for row in table_rows(name, runs[name])],
        caption=caption,
    )
    settings = {
        "compression": args.compression,
        "iterations": args.iterations,
        "repeats": args.repeats,
    }
    medians = {name: summary(runs[name]) for name in names}
    write_json(args.out, {"machine": facts, "settings": settings, "medians": medians, "runs": runs})


if __name__ == "__main__":
    main()
