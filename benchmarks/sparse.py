"""Times sparse against dense products: a masked matrix times a few columns, on this machine.

    python benchmarks/sparse.py [--densities=0.001,0.003,0.01,0.03,0.1,0.3] [--repeats=5]

The product is y = W x for a random mask of each density, where W is

  512 x 4608    a 3x3 convolution of 512 channels to 512, as a product of matrices
  4096 x 4096   a dense layer of ImageNet's VGG

and x has 128 columns or 1. The forms are

  dense      `W @ x`, jitted
  BCOO       `jax.experimental.sparse.BCOO`, jitted
  BCSR       `jax.experimental.sparse.BCSR`, jitted
  scipy CSR  `scipy.sparse.csr_array` on the host, one core

Checks that all agree to 1e-4, prints a table, and reports for each shape up to which density each
form is faster than the dense product. Writes `benchmarks/results/sparse.json`. It takes a minute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.experimental import sparse
from measure import ROOT, machine, milliseconds, others_seconds, print_table, timings, write_json

SHAPES = ((512, 4608), (4096, 4096))
COLUMNS = (128, 1)
FORMS = ("dense", "BCOO", "BCSR", "scipy CSR")
# A form whose first call takes longer than this, in seconds, is not repeated.
LIMIT = 2.0


def measure(
    shape: tuple[int, int], columns: int, density: float, repeats: int
) -> dict[str, list[float]]:
    """Returns the seconds of each call of each form.

    Raises:
      AssertionError: two results differ.
    """
    rng = np.random.default_rng(0)
    w = rng.standard_normal(shape, dtype=np.float32) * (rng.random(shape) < density)
    x = rng.standard_normal((shape[1], columns), dtype=np.float32)
    product = jax.jit(lambda w, x: w @ x)
    weights = {
        "dense": jnp.asarray(w),
        "BCOO": sparse.BCOO.fromdense(w),
        "BCSR": sparse.BCSR.fromdense(w),
    }
    on_host = scipy.sparse.csr_array(w)
    on_device = jnp.asarray(x)
    exact = w @ x
    largest = np.abs(exact).max()
    seconds = {}
    for form in FORMS:
        if form == "scipy CSR":
            call = lambda: on_host @ x
        else:
            call = lambda form=form: product(weights[form], on_device).block_until_ready()
        np.testing.assert_allclose(np.asarray(call()) / largest, exact / largest, atol=1e-4)
        seconds[form] = timings(call, repeats, LIMIT)
    return seconds


def break_even(densities: list[float], medians: list[dict[str, float]], form: str) -> str:
    """Returns the largest density up to which a form is always faster than the dense product."""
    faster = "never"
    for density, row in zip(densities, medians, strict=True):
        if row[form] >= row["dense"]:
            break
        faster = f"up to {100 * density:g} %"
    return faster


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description="Where a sparse product is faster than the dense one."
    )
    parser.add_argument(
        "--densities", default="0.001,0.003,0.01,0.03,0.1,0.3", help="separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sparse.json")
    args = parser.parse_args()
    try:
        args.densities = sorted(float(density) for density in args.densities.split(","))
    except ValueError:
        parser.error(f"--densities={args.densities} must be numbers, separated by commas")
    if args.densities[0] <= 0 or args.densities[-1] > 1 or args.repeats < 1:
        parser.error(
            "--densities must lie above 0 and not above 1, and --repeats must be at least 1"
        )
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    facts = machine() | {"platform": jax.default_backend()}
    start, others = time.perf_counter(), others_seconds()
    results, rows, summary = [], [], []
    for shape in SHAPES:
        for columns in COLUMNS:
            name = f"{shape[0]} x {shape[1]}, {columns} column{'s' if columns > 1 else ''}"
            all_medians = []
            for density in args.densities:
                seconds = measure(shape, columns, density, args.repeats)
                results.append(
                    {"shape": shape, "columns": columns, "density": density, "seconds": seconds}
                )
                rows.append(
                    [name, f"{100 * density:g} %", *(milliseconds(seconds[form]) for form in FORMS)]
                )
                all_medians.append(
                    {form: statistics.median(values) for form, values in seconds.items()}
                )
            summary.append(
                [name, *(break_even(args.densities, all_medians, form) for form in FORMS[1:])]
            )
    if others is not None:
        facts["others_cores"] = round(
            (others_seconds() - others) / (time.perf_counter() - start), 2
        )
    title = f"Masked matrix times columns, ms; {facts['cpu']}, {facts['cores']} cores"
    others_cores = facts.get("others_cores", "?")
    caption = f"Medians of {args.repeats} calls. Others kept {others_cores} cores busy meanwhile."
    print_table(title, ["matrix", "density", *FORMS], rows, caption=caption)
    print_table("Faster than the dense product", ["matrix", *FORMS[1:]], summary)
    write_json(args.out, {"machine": facts, "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    main()
