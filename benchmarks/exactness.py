"""Checks that compact networks have the logits of masked ones: every family, rule and compression.

    python benchmarks/exactness.py [--families=vgg,resnet] [--steps=60]

The script prunes a network of each family on scikit-learn's digits by each rule at each
compression, trains it masked for --steps steps, and compares its logits with those of its compact
form. It compares at initialization and after training, in evaluation mode and with the statistics
of the batch, in float32 without dropout. A difference is the largest over 64 images and all logits,
divided by the largest logit. Where a mask leaves no path, the compact form must be refused.

Prints a table of the largest differences and writes all of them to
`benchmarks/results/exactness.json`. The status is 1 if a difference is above 1e-5, or if a
collapsed mask was not refused. It took 35 minutes of processor time, nearly all of it compilation:
376 differences of at most 2.1e-6, and 41 masks refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from measure import ROOT, machine, print_table, write_json

sys.path.insert(0, str(ROOT))
from synflow_jax import analysis, data, models, pruning, scores, training, trees
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG

RULES = ("random", "magnitude", "snip", "grasp", "synflow")
COMPRESSIONS = (10.0, 100.0, 1000.0)
TOLERANCE = 1e-5
CLASSES = 10
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "fc": lambda: models.create("fc", CLASSES),
    "conv": lambda: models.create("conv", CLASSES),
    "vgg": lambda: VGG(CLASSES, ((8,), (16,), (32, 32), (32, 32), (32, 32)), batch_norm=False),
    "vgg_bn": lambda: models.create("cifar_vgg16_bn", CLASSES, width_multiplier=0.25),
    "vgg_hidden": lambda: VGG(CLASSES, ((16,), (32, 32)), hidden=(128, 128)),
    "resnet": lambda: models.create("cifar_resnet20", CLASSES),
    "resnet_stem": lambda: models.create("imagenet_resnet18", CLASSES, width_multiplier=0.125),
    "bottleneck": lambda: ResNet(CLASSES, (2, 2, 2), (16, 32, 64), bottleneck=True, stem_width=16),
    "wide_bottleneck": lambda: ResNet(
        CLASSES, (1, 1), (16, 32), bottleneck=True, bottleneck_multiplier=2, imagenet_stem=True
    ),
}
# Most of these programs run once, so nearly all their time is compilation.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
Row = dict[str, Any]


def both_modes(
    model: nn.Module,
) -> Callable[[trees.Tree, trees.Tree, trees.Mask, jax.Array], dict[str, jax.Array]]:
    """Returns the logits in evaluation mode and with the statistics of the batch."""

    def apply(
        params: trees.Tree, stats: trees.Tree, mask: trees.Mask, x: jax.Array
    ) -> dict[str, jax.Array]:
        variables = {"params": trees.apply_mask(params, mask), "batch_stats": stats}
        # The random bits of dropout depend on the shape of its input, so both do without dropout.
        with nn.intercept_methods(
            lambda f, a, k, c: a[0] if isinstance(c.module, nn.Dropout) else f(*a, **k)
        ):
            train, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return {"eval": model.apply(variables, x, train=False), "train": train}

    return jax.jit(apply, compiler_options=QUICK)


def measure_family(
    name: str, arrays: data.Arrays, num_steps: int, report: Callable[[Row], None]
) -> None:
    """Reports a row for each rule, compression, state and mode."""
    model = FAMILIES[name]()
    images = data.normalise(jnp.asarray(arrays.train_images[:512]), data.spec("digits"))
    labels = jnp.asarray(arrays.train_labels[:512])
    if name == "fc":
        images = images[..., :1]
    shape = images.shape[1:]
    params, stats = models.init(model, shape, jax.random.key(0))
    loss_fn = scores.cross_entropy(models.eval_fn(model, stats))
    batch = (images[:100], labels[:100])
    score_fns = {
        "random": scores.random(),
        "magnitude": scores.magnitude(),
        "snip": scores.snip(loss_fn, [batch]),
        "grasp": scores.grasp(loss_fn, [batch]),
        "synflow": scores.synflow(models.synflow_fn(model, stats), shape),
    }
    optimizer = training.sgd(lambda step: 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4)
    step = training.make_step(model, optimizer)

    @jax.jit
    def train(state: training.TrainState) -> training.TrainState:
        take = lambda i, leaf: jax.lax.dynamic_slice_in_dim(leaf, 64 * (i % 8), 64)
        return jax.lax.fori_loop(
            0, num_steps, lambda i, s: step(s, take(i, images), take(i, labels))[0], state
        )

    full, x = both_modes(model), images[-64:]
    for rule in RULES:
        for compression in COMPRESSIONS:
            mask, _ = pruning.prune(
                score_fns[rule],
                params,
                compression=compression,
                num_iterations=100 if rule == "synflow" else 1,
                key=jax.random.key(1),
                score_dtype="float32",
            )
            row = {"family": name, "rule": rule, "compression": compression}
            if analysis.collapsed(models.synflow_fn(model, stats), params, mask, shape):
                report(
                    {
                        **row,
                        "collapsed": True,
                        "refused": is_refused(model, params, stats, mask, shape),
                    }
                )
                continue
            state = train(training.init_state(params, stats, mask, optimizer, jax.random.key(2)))
            for when, values in (
                ("start", (params, stats)),
                ("trained", (state.params, state.batch_stats)),
            ):
                small = models.compact(models.Network(model, *values, mask, shape)).network
                ours = both_modes(small.model)(small.params, small.batch_stats, small.mask, x)
                for mode, theirs in full(*values, mask, x).items():
                    largest = float(jnp.max(jnp.abs(theirs)))
                    row |= {
                        "collapsed": False,
                        "when": when,
                        "mode": mode,
                        "largest_logit": largest,
                    }
                    row["weights"] = [sum(trees.sizes(params)), sum(trees.sizes(small.params))]
                    row["difference"] = float(jnp.max(jnp.abs(ours[mode] - theirs))) / max(
                        largest, 1e-30
                    )
                    report(dict(row))


def is_refused(
    model: nn.Module, params: trees.Tree, stats: trees.Tree, mask: trees.Mask, shape: Any
) -> bool:
    """Returns whether `compact` refuses the network because it has collapsed."""
    try:
        models.compact(models.Network(model, params, stats, mask, shape))
    except ValueError as error:
        return "collapsed" in str(error)
    return False


def show(rows: list[Row]) -> None:
    """Prints a line per family and rule: the largest difference at each compression."""
    table = []
    for family in dict.fromkeys(row["family"] for row in rows):
        for rule in RULES:
            cells = []
            for compression in COMPRESSIONS:
                here = [
                    r
                    for r in rows
                    if (r["family"], r["rule"], r["compression"]) == (family, rule, compression)
                ]
                if here[0]["collapsed"]:
                    cells.append("refused" if here[0]["refused"] else "NOT REFUSED")
                else:
                    cells.append(f"{max(row['difference'] for row in here):.1e}")
            table.append((family, rule, *cells))
    columns = ("family", "rule", *(f"at {compression:g}" for compression in COMPRESSIONS))
    print_table("The largest relative difference of compact and masked logits", columns, table)


def parse_args() -> argparse.Namespace:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description="Compact against masked logits.")
    parser.add_argument("--families", default=",".join(FAMILIES), help="separated by commas")
    parser.add_argument("--steps", type=int, default=60, help="steps of training, in batches of 64")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "exactness.json"
    )
    args = parser.parse_args()
    unknown = set(args.families.split(",")) - set(FAMILIES)
    if unknown:
        parser.error(
            f"--families={args.families}: choose from {', '.join(FAMILIES)}, separated by commas"
        )
    return args


def main() -> None:
    """Measures, prints the table and writes the file of results."""
    args = parse_args()
    rows: list[Row] = []
    arrays = data.load("digits", (32, 32, 3))

    for name in args.families.split(","):
        print(f"{name} ...", flush=True)
        measure_family(name, arrays, args.steps, rows.append)
        write_json(args.out, {"machine": machine(), "rows": rows})
    show(rows)
    wrong = [
        r for r in rows if not (r["refused"] if r["collapsed"] else r["difference"] <= TOLERANCE)
    ]
    measured = [row["difference"] for row in rows if not row["collapsed"]]
    print(
        f"{len(measured)} differences, the largest {np.max(measured):.1e}; "
        f"{len(rows) - len(measured)} masks refused."
    )
    if wrong:
        raise SystemExit(f"{len(wrong)} are wrong, the first: {wrong[0]}")


if __name__ == "__main__":
    main()
