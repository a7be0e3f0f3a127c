"""Times the two forms of convolution on a CPU: XLA's own, and patches times a matrix.

    python benchmarks/convolution.py [--batches=1,128]

The result is why `models/layers.py` convolves by patches times a matrix on a CPU. The script times
a 3x3 convolution of stride 1 and its gradients with respect to the inputs and the kernel, in the
shapes of the paper. The forms are `jax.lax.conv_general_dilated` (native) and
`layers._convolution_as_matrices`. Each runs plain, in one jitted call, and as a step of a
`lax.fori_loop`, where XLA on a CPU does not call its fast convolution. SynFlow scores with batch 1,
and training uses batch 128.

The native form runs one step in a loop. If an eighth of the batch shows that the step would take
more than `--limit` seconds (20), it is left out and the table says so.

Prints a table and writes `benchmarks/results/convolution.json`. It takes about five minutes on two
idle cores.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from measure import ROOT, machine, milliseconds, others_seconds, print_table, timings, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax.models import layers

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


class Shape(NamedTuple):
    """The shape of a 3x3 convolution of a square map."""

    network: str
    side: int
    inputs: int
    outputs: int


SHAPES = (
    Shape("VGG-16", 32, 3, 64),
    Shape("VGG-16", 32, 64, 64),
    Shape("VGG-16", 16, 64, 128),
    Shape("VGG-16", 16, 128, 128),
    Shape("VGG-16", 8, 128, 256),
    Shape("VGG-16", 8, 256, 256),
    Shape("VGG-16", 4, 256, 512),
    Shape("VGG-16", 4, 512, 512),
    Shape("VGG-16", 2, 512, 512),
    Shape("ResNet-20", 32, 16, 16),
    Shape("ResNet-20", 16, 32, 32),
    Shape("ResNet-20", 8, 64, 64),
    Shape("ResNet-18, 64x64", 64, 64, 64),
)
PROBE = 8
PADDING = ((1, 1), (1, 1))


def native(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves by XLA's own primitive."""
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), PADDING, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def as_matrices(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves by patches times a matrix, as the networks do on a CPU."""
    return layers._convolution_as_matrices(
        x, kernel, strides=(1, 1), padding=PADDING, precision=None
    )


def with_gradients(
    convolution: Convolution, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a function to the gradients of half the sum of squared outputs.

    They need the forward pass and both backward passes.
    """
    y, transpose = jax.vjp(convolution, x, kernel)
    return transpose(y)


def loop(
    convolution: Convolution, num_steps: jax.Array, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns a loop of steps, each of which reads the output of the step before it.

    The number of steps is traced: XLA unrolls short loops of a known length.
    """

    def step(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gradients = with_gradients(convolution, *state)
        return tuple(
            value - 1e-6 * gradient for value, gradient in zip(state, gradients, strict=True)
        )

    return jax.lax.fori_loop(0, num_steps, step, (x, kernel))


def measure_plain(
    convolution: Convolution, x: jax.Array, kernel: jax.Array, repeats: int
) -> list[float]:
    """Returns the seconds of each of `repeats` single calls."""
    run = jax.jit(lambda x, kernel: with_gradients(convolution, x, kernel))
    return timings(lambda: jax.block_until_ready(run(x, kernel)), repeats)


def measure_loop(
    convolution: Convolution, x: jax.Array, kernel: jax.Array, num_steps: int, repeats: int
) -> list[float]:
    """Returns the seconds per step of each of `repeats` runs of `num_steps`.

    If the first run takes a second per step, it is the only one.
    """
    run = jax.jit(lambda num_steps, x, kernel: loop(convolution, num_steps, x, kernel))
    jax.block_until_ready(run(0, x, kernel))  # compiles only
    seconds = timings(lambda: jax.block_until_ready(run(num_steps, x, kernel)), repeats, limit=1)
    return [value / num_steps for value in seconds]


def random_pair(shape: Shape, batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns inputs and a kernel that keeps their variance."""
    x_key, kernel_key = jax.random.split(jax.random.key(0))
    kernel = (
        jax.random.normal(kernel_key, (3, 3, shape.inputs, shape.outputs))
        * (9 * shape.inputs) ** -0.5
    )
    return jax.random.normal(x_key, (batch, shape.side, shape.side, shape.inputs)), kernel


def measure_shape(shape: Shape, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Returns the seconds of both forms, plain and in a loop.

    Raises:
      AssertionError: the forms differ.
    """
    x, kernel = random_pair(shape, batch)
    difference = jnp.max(jnp.abs(native(x, kernel) - as_matrices(x, kernel)))
    assert difference < 1e-4, f"the two forms differ by {difference} on {shape}"
    record: dict[str, Any] = {
        **shape._asdict(),
        "batch": batch,
        "native": measure_plain(native, x, kernel, args.repeats),
        "matrices": measure_plain(as_matrices, x, kernel, args.repeats),
        "loop_matrices": measure_loop(as_matrices, x, kernel, args.steps, args.repeats),
    }
    # XLA cannot be interrupted, so the time of the whole batch is predicted from an eighth of it.
    predicted = 0.0
    if batch >= PROBE:
        predicted = PROBE * measure_loop(native, *random_pair(shape, batch // PROBE), 1, 1)[0]
    if predicted > args.limit:
        record["loop_native_predicted"] = predicted
    else:
        record["loop_native"] = measure_loop(native, x, kernel, 1, args.repeats)
    return record


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns a record for each shape and batch."""
    records = []
    for shape in SHAPES:
        for batch in args.batches:
            records.append(measure_shape(shape, batch, args))
            progress = f"{len(records)} of {len(SHAPES) * len(args.batches)}"
            print(progress, end="\r", file=sys.stderr, flush=True)
    return records


def table_row(record: dict[str, Any]) -> list[str]:
    """Returns the record as a row of text."""

    def ratio(one: str, other: str) -> str:
        return f"{statistics.median(record[one]) / statistics.median(record[other]):.1f}"

    in_loop = "loop_native" in record
    return [
        record["network"],
        f"{record['side']} x {record['side']}",
        f"{record['inputs']} -> {record['outputs']}",
        str(record["batch"]),
        milliseconds(record["native"]),
        milliseconds(record["matrices"]),
        ratio("native", "matrices"),
        milliseconds(record["loop_native"])
        if in_loop
        else f"not run: about {record['loop_native_predicted']:.0f} s",
        milliseconds(record["loop_matrices"]),
        ratio("loop_native", "loop_matrices") if in_loop else "",
    ]


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description="Convolution on a CPU: XLA's own against patches times a matrix."
    )
    parser.add_argument("--batches", default="1,128", help="separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of the loop, for the form of matrices"
    )
    parser.add_argument(
        "--limit", type=float, default=20, help="seconds that a native step in a loop may take"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "convolution.json"
    )
    args = parser.parse_args()
    try:
        args.batches = [int(batch) for batch in args.batches.split(",")]
    except ValueError:
        parser.error(f"--batches={args.batches} must be whole numbers, separated by commas")
    if min(*args.batches, args.repeats, args.steps) < 1:
        parser.error("--batches, --repeats and --steps must be at least 1")
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    facts = machine() | {"platform": jax.default_backend()}
    start, others = time.perf_counter(), others_seconds()
    records = measure_all(args)
    if others is not None:
        facts["others_cores"] = round(
            (others_seconds() - others) / (time.perf_counter() - start), 2
        )
    print_table(
        f"3x3 convolutions and both gradients, in ms; {facts['cpu']}, {facts['cores']} cores",
        [
            "",
            "map",
            "channels",
            "batch",
            "native",
            "matrices",
            "ratio",
            "loop: native",
            "loop: matrices",
            "ratio",
        ],
        [table_row(record) for record in records],
        caption=f"Medians of {args.repeats}. The ratio is native / matrices: above 1 the form of "
        "matrices is faster.",
    )
    write_json(
        args.out,
        {"machine": facts, "repeats": args.repeats, "steps": args.steps, "results": records},
    )


if __name__ == "__main__":
    main()
