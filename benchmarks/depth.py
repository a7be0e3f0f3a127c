"""Checks deep networks in float32: masks against those of float64, and conservation by cuts.

    python benchmarks/depth.py [--networks=mlp300,cifar_resnet110] [--compressions=10,100,1000]
    python benchmarks/depth.py --cuts=cifar_resnet1202

The first command prunes twice by SynFlow: in float32 with a power of two stored with each value
(the default of every run), and in float64 without. It compares the masks: the weights kept, in
total and by layer, and the fraction of bits that are equal. `first` is the first iteration whose
masks have different counts by layer. A network is any of `models.NAMES`, or mlp300, a residual MLP
of 300 layers of 16 units.

--rounded adds a run in float64 whose scores are rounded to the 24 bits of float32 before they are
ranked: `rounded` is what an evaluation without any other error would reach. It also prints the
relative error of the scores of one pass in float32.

The second command scores a network of residual blocks once in float32, also where float64
overflows. It compares the flow through every cut between two blocks: the derivative of R with
respect to a factor on the output of a block. By Theorem 2 all of them are R.

Prints a table and writes `benchmarks/results/depth.json`. --cuts takes 12 s of processor time for
ResNet-20 and 32 s for ResNet-56; ResNet-1202 took 17 minutes while other jobs ran. The comparison
of mlp300 and cifar_resnet110 takes five and a half minutes of processor time with --rounded.
imagenet_resnet50 took three minutes for two compressions, and tiny_resnet152 twelve minutes and 5
GB for three.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from measure import ROOT, machine, others_seconds, print_table, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax import models, pruning, scores, trees
from synflow_jax.jaxprs import scaling
from synflow_jax.models.resnet import Block

Network = tuple[scores.ApplyFn, trees.Params, tuple[int, ...]]
COLUMNS = (
    "network",
    "compression",
    "kept: f32",
    "f64",
    "layers alike",
    "bits alike, %",
    "first",
    "rounded: bits",
    "first",
    "s: f32",
    "f64",
)


def residual_mlp(num_layers: int, width: int = 16) -> Network:
    """Returns a residual MLP with one parameter per layer: x + relu(x W)."""
    names = [f"layer{i:03d}" for i in range(num_layers - 1)]

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        for name in names:
            x = x + jax.nn.relu(x @ params[name]["kernel"])
        return x @ params["z_head"]["kernel"]

    keys = jax.random.split(jax.random.key(0), num_layers)
    draw = lambda key, out: {"kernel": jax.random.normal(key, (width, out)) * (2 / width) ** 0.5}
    params = {name: draw(key, width) for name, key in zip(names, keys, strict=False)}
    return apply_fn, {**params, "z_head": draw(keys[-1], 10)}, (width,)


def build(name: str) -> Network:
    """Builds a network, and returns its function, weights and input shape."""
    if name == "mlp300":
        return residual_mlp(300)
    model, shape = (
        models.create(name, 10 if name.startswith("cifar") else 200),
        models.default_input_shape(name),
    )
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    return models.synflow_fn(model, batch_stats), params, shape


def run(
    network: Network, dtype: str, compression: float, iterations: int, rounded: bool = False
) -> tuple[trees.Mask, np.ndarray, float]:
    """Returns the mask, the weights kept by iteration and layer, and the seconds of the loop."""
    apply_fn, params, shape = network
    started: list[float] = []

    def on_progress(num_done: int, info: pruning.PruneInfo) -> None:
        if num_done == 0:  # the loop is compiled by now
            started.append(time.perf_counter())

    score_fn = scores.synflow(apply_fn, shape, scaled=dtype == "float32")

    def to_24_bits(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Params:
        found = score_fn(params, mask, key)
        return jax.tree.map(
            lambda leaf: jax.lax.reduce_precision(leaf, exponent_bits=11, mantissa_bits=23), found
        )

    mask, info = pruning.prune(
        to_24_bits if rounded else score_fn,
        params,
        compression=compression,
        num_iterations=iterations,
        score_dtype=dtype,
        on_progress=on_progress,
    )
    return jax.tree.map(np.asarray, mask), np.asarray(info.kept), time.perf_counter() - started[0]


def errors(network: Network) -> tuple[float, float]:
    """Returns the relative error of scores in float32: root mean square and largest."""
    apply_fn, params, shape = network
    score_fn = jax.jit(scores.synflow(apply_fn, shape))
    found = [jax.tree.map(np.asarray, score_fn(params, trees.prunable(params), jax.random.key(0)))]
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        found.append(
            jax.tree.map(np.asarray, score_fn(wide, trees.prunable(wide), jax.random.key(0)))
        )
    ours, right = (
        np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in found
    )
    ratios = np.log(ours[right > 0].astype(np.float64) / right[right > 0])
    ratios -= np.median(ratios)  # a common factor does not change the ranking
    return float(np.sqrt(np.mean(ratios**2))), float(np.abs(ratios).max())


def alike(mask: trees.Mask, reference: trees.Mask) -> float:
    """Returns the fraction of bits that are equal."""
    same = sum(
        int((a == b).sum())
        for a, b in zip(jax.tree.leaves(mask), jax.tree.leaves(reference), strict=True)
    )
    return same / sum(trees.sizes(reference))


def first_difference(kept: np.ndarray, reference: np.ndarray) -> int | None:
    """Returns the first iteration, from 1, whose numbers of weights by layer differ."""
    differ = (kept != reference).any(axis=1)
    return int(np.argmax(differ)) + 1 if differ.any() else None


def compare(
    name: str, compression: float, iterations: int, network: Network, rounded: bool
) -> dict[str, Any]:
    """Returns a row that compares float32 with float64."""
    (narrow, kept, seconds), (wide, wide_kept, wide_seconds) = (
        run(network, dtype, compression, iterations) for dtype in ("float32", "float64")
    )
    row = {
        "network": name,
        "compression": compression,
        "iterations": iterations,
        "weights": sum(trees.sizes(wide)),
        "kept": [int(kept[-1].sum()), int(wide_kept[-1].sum())],
        "layers": int(kept.shape[1]),
        "layers_alike": int((kept[-1] == wide_kept[-1]).sum()),
        "bits_alike": alike(narrow, wide),
        "first_difference": first_difference(kept, wide_kept),
        "seconds": [seconds, wide_seconds],
    }
    if rounded:
        mask, kept, _ = run(network, "float64", compression, iterations, rounded=True)
        row |= {
            "rounded_bits_alike": alike(mask, wide),
            "rounded_first_difference": first_difference(kept, wide_kept),
        }
    return row


def flows_between_blocks(name: str) -> dict[str, Any]:
    """Returns R, the flow through each cut, and the scores of the first and the last layer.

    Those two layers are cuts as well.
    """
    model, shape = models.create(name, 10), models.default_input_shape(name)
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    params = jax.tree.map(jnp.abs, trees.without_biases(params))
    num_blocks = sum(model.num_blocks)

    def norm(params: trees.Params, factors: jax.Array) -> jax.Array:
        left = iter(range(num_blocks))

        def multiplied(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            found = call(*args, **kwargs)
            is_block = isinstance(context.module, Block) and context.method_name == "__call__"
            return found * factors[next(left)] if is_block else found

        with nn.intercept_methods(multiplied):
            variables = {"params": params, "batch_stats": batch_stats}
            return jnp.sum(model.apply(variables, jnp.ones((1, *shape)), train=False))

    def scaled(
        params: trees.Params, factors: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found = scaling.evaluate(norm, params, factors)
        return found.value, (found.value, found.exponent)

    start = time.perf_counter()
    gradient = jax.jit(jax.grad(scaled, argnums=(0, 1), has_aux=True)).lower(
        params, jnp.ones(num_blocks)
    )
    traced = time.perf_counter()
    # It runs once: the compiler's effort would take longer than what it saves.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    program = gradient.compile(quick)
    compiled = time.perf_counter()
    (found, flows), (value, exponent) = jax.block_until_ready(program(params, jnp.ones(num_blocks)))
    seconds = time.perf_counter() - compiled
    layers = {
        layer: float(
            np.sum(
                np.asarray(found[layer]["kernel"], np.float64) * np.asarray(params[layer]["kernel"])
            )
        )
        for layer in ("conv1", "head")
    }
    cuts = np.array([*np.asarray(flows, np.float64), *layers.values()])
    return {
        "network": name,
        "log10_norm": scaling.log10(scaling.Scaled(value, exponent)),
        "num_cuts": len(cuts),
        "residual": float(np.max(np.abs(cuts / float(value) - 1))),
        "finite": all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found)),
        "trace_seconds": traced - start,
        "compile_seconds": compiled - traced,
        "seconds": seconds,
    }


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="Deep networks in float32.")
    parser.add_argument("--networks", default="mlp300,cifar_resnet110", help="separated by commas")
    parser.add_argument("--compressions", default="10,100,1000")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument(
        "--rounded", action="store_true", help="also float64 with scores rounded to float32"
    )
    parser.add_argument("--cuts", help="compare the flow through the cuts of this network instead")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "depth.json")
    return parser.parse_args()


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    others = others_seconds()
    rows: list[dict[str, Any]] = []
    if args.cuts:
        rows.append(flows_between_blocks(args.cuts))
        columns = (
            "network",
            "log10 R",
            "cuts",
            "largest residual",
            "tracing: s",
            "compiling: s",
            "a pass: s",
        )
        table = [
            (
                r["network"],
                f"{r['log10_norm']:.1f}",
                str(r["num_cuts"]),
                f"{r['residual']:.1e}",
                f"{r['trace_seconds']:.0f}",
                f"{r['compile_seconds']:.0f}",
                f"{r['seconds']:.2f}",
            )
            for r in rows
        ]
        print_table("The flow through every cut between two blocks, float32", columns, table)
    for name in args.networks.split(",") if not args.cuts else []:
        network = build(name)
        if args.rounded:
            rms, largest = errors(network)
            print(
                f"{name}: scores in float32 err by {rms:.1e} (root mean square), "
                f"{largest:.1e} at most"
            )
        for compression in map(float, args.compressions.split(",")):
            rows.append(compare(name, compression, args.iterations, network, args.rounded))
            print(rows[-1], flush=True)
    if not args.cuts:
        table = [
            (
                r["network"],
                f"{r['compression']:g}",
                f"{r['kept'][0]:,}",
                f"{r['kept'][1]:,}",
                f"{r['layers_alike']} of {r['layers']}",
                f"{100 * r['bits_alike']:.4f}",
                str(r["first_difference"]),
                f"{100 * r['rounded_bits_alike']:.4f}" if args.rounded else "",
                str(r["rounded_first_difference"]) if args.rounded else "",
                *(f"{s:.1f}" for s in r["seconds"]),
            )
            for r in rows
        ]
        print_table(f"SynFlow, {args.iterations} iterations", COLUMNS, table)
    spent = None if others is None else others_seconds() - others  # type: ignore[operator]
    write_json(args.out, {"machine": machine(), "others_seconds": spent, "rows": rows})


if __name__ == "__main__":
    main()
