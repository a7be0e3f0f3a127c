"""A grid of training runs on the digits: as one sweep, one by one in one process, and one by one in fresh processes.

    python benchmarks/sweep.py                 # 3 rules x 6 compressions x 3 seeds
    python benchmarks/sweep.py --fresh=6       # only so many of the fresh processes, multiplied up; says so
    python benchmarks/sweep.py --layouts       # one seed: runs a device by map and vmap, and 1, 2, 4, 8 virtual devices

Each variant starts with an empty compilation cache, which its own runs share. Programs are counted by JAX's own event
of a compilation; what comes out of the cache is one too, and a short one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import ROOT, machine, print_table, run_child

sys.path.insert(0, str(ROOT))  # the package need not be installed

SETTINGS = [
    "--config.width_multiplier=0.5",
    "--config.train.num_epochs=4",
    "--config.train.drops=(3,)",
]
RULES, COMPRESSIONS, SEEDS = (
    ("synflow", "snip", "magnitude"),
    (2.0, 5.0, 10.0, 20.0, 50.0, 100.0),
    (0, 1, 2),
)


def _config(seeds: tuple[int, ...]) -> Any:
    from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig

    return Config(
        model="conv",
        dataset="digits",
        width_multiplier=0.5,
        prune=PruneConfig(compression=10.0),
        train=TrainConfig(
            num_epochs=4, batch_size=64, learning_rate=0.02, drops=(3,), compact=False
        ),
        grid=Grid(pruner=RULES, compression=COMPRESSIONS, seed=seeds),
    )


def child(
    variant: str, workdir: Path, per_device: int, batching: str, devices: int, num_seeds: int
) -> None:
    """Runs the grid in this process and prints {"seconds", "compilations", "compile_seconds"} as its last line."""
    import jax

    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(seconds) if event.endswith("backend_compile_duration") else None
        )
    )
    from synflow_jax.experiments import cli, config, prune_run, sweep, train_run
    from synflow_jax.experiments.config import SweepConfig

    cli.use_compilation_cache()
    runs = config.expand(_config(SEEDS[:num_seeds]))
    started = time.perf_counter()
    if variant == "sweep":
        for settings in runs:
            settings.sweep = SweepConfig(runs_per_device=per_device, batching=batching)
        outcomes = list(sweep.run(runs, workdir))
        assert all(outcome.row for outcome in outcomes), [outcome.error for outcome in outcomes]
    else:
        for settings in runs:
            network = prune_run.build(settings)
            prune_run.prune(settings, network, workdir)
            found = prune_run.find_mask(settings, network, workdir)
            assert found is not None
            train_run.train(settings, network, found[0], workdir)
    print(json.dumps({
        "seconds": time.perf_counter() - started, "compilations": len(compiled), "compile_seconds": sum(compiled),
    }))  # fmt: skip


def measure(
    variant: str,
    *,
    per_device: int = 1,
    batching: str = "map",
    devices: int = 1,
    num_seeds: int = len(SEEDS),
) -> dict[str, Any]:
    """One variant in a process of its own: what `child` prints, the whole process's seconds and its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [sys.executable, str(Path(__file__)), f"--child={variant}", f"--workdir={folder}/work",
                   f"--per_device={per_device}", f"--batching={batching}", f"--devices={devices}",
                   f"--num_seeds={num_seeds}"]  # fmt: skip
        done = run_child(command, environment)
        if done.status:
            raise RuntimeError(done.stderr)
        told = json.loads(done.stdout.splitlines()[-1])
    return {**told, "process_seconds": done.seconds, "peak_mb": done.peak_mb}


def fresh(number: int) -> dict[str, Any]:
    """`train.py` once a run, `number` of them spread over the grid, with one compilation cache."""
    runs = [(r, c, s) for s in SEEDS for r in RULES for c in COMPRESSIONS]
    chosen = runs[:: max(1, len(runs) // number)][:number]
    seconds, peak = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for rule, compression, seed in chosen:
            done = run_child(
                [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={folder}/work", *SETTINGS,
                 f"--config.prune.pruner={rule}", f"--config.prune.compression={compression}",
                 f"--config.seed={seed}", "--config.train.compact=False"],
                environment,
            )  # fmt: skip
            if done.status:
                raise RuntimeError(done.stderr)
            seconds, peak = seconds + done.seconds, max(peak, done.peak_mb)
    scale = len(runs) / len(chosen)
    return {"process_seconds": seconds * scale, "peak_mb": peak, "measured": len(chosen)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fresh", type=int, default=54, help="fresh processes to run, of 54")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--child")
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--per_device", type=int, default=1)
    parser.add_argument("--batching", default="map")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num_seeds", type=int, default=len(SEEDS))
    args = parser.parse_args()
    if args.child:
        child(
            args.child, args.workdir, args.per_device, args.batching, args.devices, args.num_seeds
        )
        return
    print(json.dumps(machine()), flush=True)
    if args.layouts:
        layouts: list[dict[str, Any]] = [
            {},
            {"per_device": 6},
            *({"devices": n} for n in (2, 4, 8)),
        ]
        variants = {}
        for layout in [*layouts, {"per_device": 6, "batching": "vmap"}]:
            name = ", ".join(f"{key}={value}" for key, value in layout.items()) or "one at a time"
            variants[name] = measure("sweep", num_seeds=1, **layout)
            print(f"{name}: {variants[name]['process_seconds']:.1f} s", flush=True)
    else:
        variants = {"sweep": measure("sweep"), "one by one, one process": measure("loop")}
        more = fresh(args.fresh)
        variants[f"one by one, fresh processes ({more['measured']} of 54 run)"] = more
    columns = ("process_seconds", "seconds", "compilations", "compile_seconds", "peak_mb")
    first = next(iter(variants.values()))["process_seconds"]
    print_table(
        f"{len(RULES)} rules x {len(COMPRESSIONS)} compressions x {1 if args.layouts else len(SEEDS)} seeds",
        ["", "process, s", "times the first", "grid, s", "programs", "compiling, s", "peak, MB"],
        [
            [name, f"{found['process_seconds']:.1f}", f"{found['process_seconds'] / first:.2f}",
             *("" if found.get(c) is None else f"{found[c]:.4g}" for c in columns[1:])]
            for name, found in variants.items()
        ],
    )  # fmt: skip
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"sweep{'_layouts' if args.layouts else ''}.json").write_text(
        json.dumps(variants, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
