"""Times scaled against plain evaluation: what it costs that SynFlow's scores cannot overflow.

    python benchmarks/scaled.py [--networks=cifar_vgg16_bn,tiny_resnet18]

The script times a pass of scores (forward and gradient, float32) inside a `fori_loop`, as in the
pruning loop, alternately with and without a power of two stored with each value. Compilation is
timed once each. The goal is a ratio of at most 1.1.

Prints a table and writes `benchmarks/results/scaled.json`. It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from measure import ROOT, machine, others_seconds, print_table, spread, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax import models, scores, trees

PASSES = 10  # in each timed call


def measure_network(name: str, repeats: int) -> dict[str, Any]:
    """Returns the seconds per pass and those of compilation."""
    model, shape = models.create(name, 100), models.default_input_shape(name)
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    mask = trees.prunable(params)
    seconds: dict[str, list[float]] = {}
    compiled, compile_seconds = {}, {}
    for label, scaled in (("plain", False), ("scaled", True)):
        score_fn = scores.synflow(models.synflow_fn(model, batch_stats), shape, scaled=scaled)

        def run(
            params: trees.Params, mask: trees.Mask, score_fn: scores.ScoreFn = score_fn
        ) -> trees.Mask:
            # The mask depends on the scores, as in the pruning loop, so XLA cannot remove the
            # scoring. No score is negative, so nothing is pruned.
            keep = lambda m, s: m & (s >= 0)
            body = lambda i, m: jax.tree.map(keep, m, score_fn(params, m, jax.random.key(0)))
            return jax.lax.fori_loop(0, PASSES, body, mask)

        start = time.perf_counter()
        compiled[label] = jax.jit(run).lower(params, mask).compile()
        compile_seconds[label] = time.perf_counter() - start
        seconds[label] = []
    for _ in range(repeats):
        for label, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(params, mask))
            seconds[label].append((time.perf_counter() - start) / PASSES)
    return {"network": name, "seconds": seconds, "compile_seconds": compile_seconds}


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description="Scaled against plain evaluation of SynFlow's scores."
    )
    parser.add_argument("--networks", default="cifar_vgg16_bn,tiny_resnet18")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "scaled.json")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    others = others_seconds()
    rows, table = [], []
    for name in args.networks.split(","):
        row = measure_network(name, args.repeats)
        rows.append(row)
        plain, scaled = row["seconds"]["plain"], row["seconds"]["scaled"]
        milliseconds = [[1e3 * s for s in values] for values in (plain, scaled)]
        ratio = statistics.median(b / a for a, b in zip(plain, scaled, strict=True))
        table.append(
            (
                name,
                *(spread(values, 1) for values in milliseconds),
                f"{ratio:.2f}",
                *(f"{row['compile_seconds'][label]:.1f}" for label in ("plain", "scaled")),
            )
        )
    columns = ("network", "plain: ms", "scaled: ms", "ratio", "compiling plain: s", "scaled: s")
    print_table("A pass of SynFlow's scores", columns, table)
    spent = None if others is None else others_seconds() - others  # type: ignore[operator]
    write_json(args.out, {"machine": machine(), "others_seconds": spent, "rows": rows})


if __name__ == "__main__":
    main()
