"""Times a grid of training runs on the digits: one sweep against one run after another.

    python benchmarks/sweep.py            # 3 rules x 6 compressions x 3 seeds
    python benchmarks/sweep.py --fresh=6  # runs only six of the fresh processes and extrapolates
    python benchmarks/sweep.py --layouts  # one seed: map and vmap; 1, 2, 4 and 8 virtual devices

The grid runs as one sweep, run by run in one process, and run by run in fresh processes. Each
variant starts with an empty compilation cache, which its own runs share. Programs are counted by
JAX's event of a compilation. A program from the cache counts as well, with a short duration.
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
    """Trains the grid in this process, and prints its figures as the last line.

    They are {"seconds", "compilations", "compile_seconds"}.
    """
    import jax

    if devices > 1:
        jax.config.update("jax_num_cpu_devices", devices)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compiled.append(seconds) if event.endswith("backend_compile_duration") else None
        )
    )
    from synflow_jax.experiments import cli, engine, initialization, masks
    from synflow_jax.experiments.config import SweepConfig
    from synflow_jax.experiments.events import Finished
    from synflow_jax.experiments.run import resolve
    from synflow_jax.storage import Workdir

    cli.use_compilation_cache()
    runs = resolve(_config(SEEDS[:num_seeds]))
    started = time.perf_counter()
    if variant == "sweep":
        for run in runs:
            run.config.sweep = SweepConfig(runs_per_device=per_device, batching=batching)
        outcomes = engine.run(runs, Workdir(workdir))
        assert all(isinstance(outcome, Finished) for outcome in outcomes), outcomes
    else:
        for run in runs:
            network = initialization.build(run)
            mask, _ = masks.prune(run, network, Workdir(workdir))
            engine.train(run, network, mask, Workdir(workdir))
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - started,
                "compilations": len(compiled),
                "compile_seconds": sum(compiled),
            }
        )
    )


def measure(
    variant: str,
    *,
    per_device: int = 1,
    batching: str = "map",
    devices: int = 1,
    num_seeds: int = len(SEEDS),
) -> dict[str, Any]:
    """Measures a variant in a new process, and adds its seconds and peak memory to its figures."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        command = [
            sys.executable,
            str(Path(__file__)),
            f"--child={variant}",
            f"--workdir={folder}/work",
            f"--per_device={per_device}",
            f"--batching={batching}",
            f"--devices={devices}",
            f"--num_seeds={num_seeds}",
        ]
        done = run_child(command, environment)
        if done.status:
            raise RuntimeError(done.stderr)
        told = json.loads(done.stdout.splitlines()[-1])
    return {**told, "process_seconds": done.seconds, "peak_mb": done.peak_mb}


def fresh(number: int) -> dict[str, Any]:
    """Times `train.py` for `number` runs spread over the grid, with one compilation cache."""
    runs = [(r, c, s) for s in SEEDS for r in RULES for c in COMPRESSIONS]
    chosen = runs[:: max(1, len(runs) // number)][:number]
    seconds, peak = 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for rule, compression, seed in chosen:
            done = run_child(
                [
                    sys.executable,
                    "train.py",
                    "--config=configs/digits.py",
                    f"--workdir={folder}/work",
                    *SETTINGS,
                    f"--config.prune.pruner={rule}",
                    f"--config.prune.compression={compression}",
                    f"--config.seed={seed}",
                    "--config.train.compact=False",
                ],
                environment,
            )
            if done.status:
                raise RuntimeError(done.stderr)
            seconds, peak = seconds + done.seconds, max(peak, done.peak_mb)
    scale = len(runs) / len(chosen)
    return {"process_seconds": seconds * scale, "peak_mb": peak, "measured": len(chosen)}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fresh", type=int, default=54, help="the number of fresh processes to run, of 54"
    )
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
    num_seeds = 1 if args.layouts else len(SEEDS)
    print_table(
        f"{len(RULES)} rules x {len(COMPRESSIONS)} compressions x {num_seeds} seeds",
        ["", "process, s", "times the first", "grid, s", "programs", "compiling, s", "peak, MB"],
        [
            [
                name,
                f"{found['process_seconds']:.1f}",
                f"{found['process_seconds'] / first:.2f}",
                *("" if found.get(c) is None else f"{found[c]:.4g}" for c in columns[1:]),
            ]
            for name, found in variants.items()
        ],
    )
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"sweep{'_layouts' if args.layouts else ''}.json").write_text(
        json.dumps(variants, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
