"""Measures the certified schedule against the paper's: iterations, seconds and the path norm left.

    python benchmarks/certified.py [--networks=mlp,vgg16] [--thousand]

SynFlow prunes in float32 to a compression of 1000 and to the maximum (one weight per layer). The
exponential schedule uses 10, 30 and 100 iterations, and 1000 with --thousand. The certified one
uses three fractions of a cut. `R` is the final path norm divided by that of the exponential
schedule with the most iterations. `of a cut` is the most that an iteration pruned: below 1, no path
was in danger. Seconds are those of the loop, without compilation.

Prints a table for each network and writes `benchmarks/results/certified.json`. It takes six and a
half minutes on two cores with --thousand, half of it for its two runs of VGG-16.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from measure import ROOT, machine, others_seconds, print_table, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax import analysis, certified, models, pruning, scores, trees
from synflow_jax.models.mlp import MLP

NETWORKS = {
    "mlp": (MLP(10, widths=(256,) * 5), (128,)),  # 128-256x5-10
    "vgg16": (models.create("cifar_vgg16_bn", 100), (32, 32, 3)),
}
FRACTIONS = (0.99, 0.5, 0.2)
COLUMNS = ("schedule", "iterations", "seconds", "of a cut", "log10 R", "R", "weights", "collapsed")


def measure_network(name: str, exponential: list[int]) -> list[dict[str, Any]]:
    """Returns a row for each schedule and compression."""
    model, shape = NETWORKS[name]
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    params = trees.without_biases(params)  # the bounds of the certified schedule ignore biases
    apply_fn = models.synflow_fn(model, batch_stats)
    score_fn = scores.synflow(apply_fn, shape)
    mask = trees.prunable(params)
    maximum = analysis.max_compression(apply_fn, params, mask, shape)
    schedules = [{"schedule": "exponential", "num_iterations": number} for number in exponential]
    schedules += [{"schedule": "certified", "cut_fraction": fraction} for fraction in FRACTIONS]
    rows = []
    for compression in (1000.0, maximum):
        for options in schedules:
            started: list[float] = []

            def on_progress(
                num_done: int, info: pruning.PruneInfo, started: list[float] = started
            ) -> None:
                if num_done == 0:  # the loop is compiled by now
                    started.append(time.perf_counter())

            prune: Any = certified.prune if "cut_fraction" in options else pruning.prune
            more = {name: value for name, value in options.items() if name != "schedule"}
            found, info = prune(
                score_fn,
                params,
                compression=compression,
                mask=mask,
                score_dtype="float32",
                on_progress=on_progress,
                **more,
            )
            seconds = time.perf_counter() - started[0]
            with np.errstate(divide="ignore", invalid="ignore"):
                fraction = np.asarray(info.pruned_score) / np.asarray(info.cut)
            rows.append(
                {
                    "network": name,
                    "compression": compression,
                    **options,
                    "iterations": int(info.num_done),
                    "seconds": seconds,
                    "largest_cut_fraction": float(np.nanmax(fraction)),
                    "log10_norm": analysis.log10_path_norm(apply_fn, params, found, shape),
                    "kept": int(info.kept[-1].sum()),
                    "collapsed": analysis.collapsed(apply_fn, params, found, shape),
                }
            )
    return rows


def show(rows: list[dict[str, Any]], compression: float) -> None:
    """Prints the table of one network."""
    rows = [row for row in rows if row["compression"] == compression]
    reference = max(
        (row for row in rows if row["schedule"] == "exponential"),
        key=lambda row: row["num_iterations"],
    )
    table = []
    for row in rows:
        fraction = f", {row['cut_fraction']}" if "cut_fraction" in row else ""
        relative = (
            10 ** (row["log10_norm"] - reference["log10_norm"])
            if math.isfinite(row["log10_norm"])
            else 0.0
        )
        table.append(
            (
                f"{row['schedule']}{fraction}",
                str(row["iterations"]),
                f"{row['seconds']:.2f}",
                f"{row['largest_cut_fraction']:.3g}",
                f"{row['log10_norm']:.3f}",
                f"{relative:.2f}",
                f"{row['kept']:,}",
                "yes" if row["collapsed"] else "no",
            )
        )
    print_table(f"{rows[0]['network']}, compression {compression:,.1f}", COLUMNS, table)


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="The certified schedule beside the paper's.")
    parser.add_argument(
        "--networks", default="mlp,vgg16", help=f"of {', '.join(NETWORKS)}, separated by commas"
    )
    parser.add_argument(
        "--thousand", action="store_true", help="also the exponential schedule with 1000 iterations"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "certified.json"
    )
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    others = others_seconds()
    rows = []
    for name in args.networks.split(","):
        rows += measure_network(
            name, [10, 30, 100, *([1000] if args.thousand or name == "mlp" else [])]
        )
        for compression in dict.fromkeys(
            row["compression"] for row in rows if row["network"] == name
        ):
            show([row for row in rows if row["network"] == name], compression)
    spent = None if others is None else others_seconds() - others  # type: ignore[operator]
    write_json(args.out, {"machine": machine(), "others_seconds": spent, "rows": rows})


if __name__ == "__main__":
    main()
