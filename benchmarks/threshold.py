"""Times the exact k-th smallest score: our search against a sort and against numpy.

    python benchmarks/threshold.py [--sizes=1e6,1e7,1e8]

All methods work on one array of lognormal float32 scores, with k at 99 % of them:

  separators     `synflow_jax.masking.separators`, which the pruning loop calls
  kth_smallest   `synflow_jax.masking.kth_smallest`, which needs one more pass to find the score
  np.partition   numpy's selection, on one core
  jnp.sort       a full sort
  count          one pass of the search, `masking.sum_of` of a comparison; and the same as `jnp.sum`

Checks that all agree to the last bit, prints a table and writes
`benchmarks/results/threshold.json`. It takes half a minute and 2 GB for the default sizes.
`--sort-all` also sorts above 1e7 scores, for one minute more.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from measure import ROOT, machine, milliseconds, others_seconds, print_table, timings, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax import masking

FRACTION = 0.99
SORT_LIMIT = 10**7
SORT_NOTE = "not run: 5 s at 1.5e7"
COLUMNS = (
    "separators",
    "kth_smallest",
    "np.partition",
    "jnp.sort",
    "count: sum_of",
    "count: jnp.sum",
)


def lognormal(size: int) -> np.ndarray:
    """Returns scores of many magnitudes, like SynFlow's, with a few ties."""
    return np.exp(3 * np.random.default_rng(0).standard_normal(size, dtype=np.float32))


def measure_size(size: int, repeats: int, sort: bool) -> dict[str, list[float]]:
    """Returns the seconds of each call of each method that runs.

    Raises:
      AssertionError: two results differ.
    """
    on_host = lognormal(size)
    scores = jnp.asarray(on_host)
    k = int(FRACTION * size)
    ks = jnp.array([k], jnp.int32)  # traced, as in the pruning loop

    separators, kth_smallest = jax.jit(masking.separators), jax.jit(masking.kth_smallest)
    sort_and_take = jax.jit(lambda scores, k: jnp.sort(scores)[k[0] - 1])
    count = jax.jit(lambda scores, value: masking.sum_of(lambda s: s <= value, scores))
    plain_count = jax.jit(lambda scores, value: jnp.sum(scores <= value, dtype=jnp.int32))

    exact = np.partition(on_host, k - 1)[k - 1]
    np.testing.assert_array_equal(kth_smallest(scores, ks[0]), exact)
    kept = on_host > exact
    np.testing.assert_array_equal(on_host > np.asarray(separators(scores, ks)), kept)
    at_most = size - np.count_nonzero(kept)
    assert count(scores, exact) == plain_count(scores, exact) == at_most
    seconds = {
        "separators": timings(lambda: separators(scores, ks).block_until_ready(), repeats),
        "kth_smallest": timings(lambda: kth_smallest(scores, ks[0]).block_until_ready(), repeats),
        "np.partition": timings(lambda: np.partition(on_host, k - 1), repeats),
        "count: sum_of": timings(lambda: count(scores, exact).block_until_ready(), repeats),
        "count: jnp.sum": timings(lambda: plain_count(scores, exact).block_until_ready(), repeats),
    }
    if sort:
        np.testing.assert_array_equal(sort_and_take(scores, ks), exact)
        seconds["jnp.sort"] = timings(
            lambda: sort_and_take(scores, ks).block_until_ready(), min(repeats, 3)
        )
    return seconds


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="What the exact k-th smallest score costs.")
    parser.add_argument(
        "--sizes", default="1e6,1e7,1e8", help="numbers of scores, separated by commas"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--sort-all", action="store_true", help=f"also run jnp.sort above {SORT_LIMIT:.0e} scores"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "threshold.json"
    )
    args = parser.parse_args()
    try:
        args.sizes = [int(float(size)) for size in args.sizes.split(",")]
    except ValueError:
        parser.error(f"--sizes={args.sizes} must be numbers, separated by commas")
    if min(args.sizes) < 100 or max(args.sizes) >= 2**31 or args.repeats < 1:
        parser.error("--sizes must lie between 100 and 2^31, and --repeats must be at least 1")
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    facts = machine() | {"platform": jax.default_backend()}
    start, others = time.perf_counter(), others_seconds()
    results, rows = [], []
    for size in args.sizes:
        seconds = measure_size(size, args.repeats, args.sort_all or size <= SORT_LIMIT)
        results.append({"size": size, "seconds": seconds})
        rows.append(
            [
                f"{size:,}",
                *(
                    milliseconds(seconds[name]) if name in seconds else SORT_NOTE
                    for name in COLUMNS
                ),
            ]
        )
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratio = medians["np.partition"] / medians["separators"]
        print(f"{size:,} scores: np.partition takes {ratio:.1f} times as long")
    if others is not None:
        facts["others_cores"] = round(
            (others_seconds() - others) / (time.perf_counter() - start), 2
        )
    print_table(
        f"The k-th smallest of n scores, k = {FRACTION:g} n, in ms; {facts['cpu']}, "
        f"{facts['cores']} cores",
        ["scores", *COLUMNS],
        rows,
        caption=f"Medians of {args.repeats} calls; all results agree to the last bit.",
    )
    write_json(
        args.out,
        {"machine": facts, "fraction": FRACTION, "repeats": args.repeats, "results": results},
    )


if __name__ == "__main__":
    main()
