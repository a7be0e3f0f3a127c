"""Floor 7. One pruning run: from a config to a mask and a row in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from synflow_jax import analysis, config, data, models, pruning, scores, storage, trees
from synflow_jax.config import Config
from synflow_jax.trees import Mask, Params


class Network(NamedTuple):
    """A new network and what can be pruned of it."""

    model: nn.Module
    params: Params
    batch_stats: trees.Tree
    mask: Mask
    input_shape: tuple[int, int, int]
    max_compression: float


def build(settings: Config) -> Network:
    """The network of a config, initialized by its seed.

    Raises:
      ValueError: a value of the config is out of its range; the compression is above the network's maximum.
    """
    config.check(settings)
    dataset = data.spec(settings.dataset)
    model = models.create(settings.model, dataset.num_classes, width_multiplier=settings.width_multiplier)
    input_shape = dataset.image_shape or models.default_input_shape(settings.model)
    prune = settings.prune
    init = lambda key: models.init(model, input_shape, key)
    patterns = [p for p in (prune.exclude, f"^{models.HEAD}/" if prune.dense_classifier else "") if p]
    try:
        shapes, _ = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
        raise ValueError(f"model={settings.model!r} does not take {settings.dataset}'s images: {error}") from error
    # The choice is made on shapes, so that a bad one costs no time.
    trees.prunable(shapes, **_kinds(settings), exclude="|".join(patterns) or None)
    params, batch_stats = init(jax.random.key(settings.seed))
    mask = trees.prunable(params, **_kinds(settings), exclude="|".join(patterns) or None)
    max_compression = analysis.max_compression(models.synflow_fn(model, batch_stats), input_shape, mask, params)
    _free_memory()
    if prune.compression > max_compression:
        raise ValueError(
            f"prune.compression={prune.compression:g} is above {max_compression:g}, the maximum of {settings.model}: "
            f"{sum(trees.sizes(mask))} prunable weights over the {round(sum(trees.sizes(mask)) / max_compression)} of "
            "the shortest path from input to output. Beyond it no network is left: choose a smaller compression."
        )
    return Network(model, params, batch_stats, mask, input_shape, max_compression)


def _kinds(settings: Config) -> dict[str, bool]:
    return {"kernels": settings.prune.kernels, "biases": settings.prune.biases, "norms": settings.prune.norms}


def score_function(settings: Config, network: Network) -> scores.ScoreFn:
    """The rule of a config, for its network and with its data."""
    prune = settings.prune
    if prune.pruner == "synflow":
        apply_fn = models.synflow_fn(network.model, network.batch_stats)
        return scores.synflow(apply_fn, network.input_shape, scaled=prune.scaled)
    if prune.pruner not in config.DATA_DRIVEN:
        return {"magnitude": scores.magnitude, "random": scores.random}[prune.pruner]()
    try:
        batches = data.prune_batches(
            settings.dataset,
            network.input_shape,
            settings.data.dir,
            examples_per_class=prune.examples_per_class,
            batch_size=prune.batch_size,
            seed=settings.seed,
        )
    except ValueError as error:
        raise ValueError(f"{'prune.' if str(error).startswith('examples_per_class') else ''}{error}") from error
    apply_fn = models.eval_fn(network.model, network.batch_stats)
    if prune.pruner == "snip":
        return scores.snip(scores.cross_entropy(apply_fn), batches)
    return scores.grasp(scores.cross_entropy(apply_fn, temperature=prune.temperature), batches)


def find_row(settings: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The row of an earlier run of the same config in `workdir`, if its mask is still there and whole."""
    wanted = config.run_id(settings)
    for row in storage.read_rows(workdir / "rows.jsonl"):
        if row["run_id"] == wanted and mask_path(workdir, wanted).exists():
            try:
                storage.load_mask(mask_path(workdir, wanted))
            except ValueError as error:
                raise ValueError(f"{error} --overwrite runs it again.") from error
            return row
    return None


def find_mask(settings: Config, network: Network, workdir: pathlib.Path) -> tuple[Mask, dict[str, Any]] | None:
    """The mask and the row that an earlier pruning run of the same config left in `workdir`, if any."""
    row = find_row(settings, workdir)
    if row is None:
        return None
    return storage.load_mask(mask_path(workdir, row["run_id"]), network.params), row


def mask_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where a run's mask lies."""
    return workdir / "masks" / f"{run_id}.safetensors"


def prune(
    settings: Config,
    network: Network,
    workdir: pathlib.Path,
    on_progress: Callable[[int, pruning.PruneInfo], None] | None = None,
) -> dict[str, Any]:
    """Prunes, writes config.json, the mask and the row into `workdir`, and returns the row.

    Raises:
      FloatingPointError: the scores are not finite; nothing is written.
    """
    started = time.perf_counter()

    def report_progress(num_done: int, info: pruning.PruneInfo) -> None:
        if num_done == 0:
            _free_memory()
        if on_progress is not None:
            on_progress(num_done, info)

    options = settings.prune
    mask, info = pruning.prune(
        score_function(settings, network),
        network.params,
        compression=options.compression,
        num_iterations=config.num_iterations(options),
        schedule=options.schedule,
        scope=options.scope,
        key=jax.random.fold_in(jax.random.key(settings.seed), 1),  # apart from the key that drew the network
        mask=network.mask,
        nested=options.nested,
        score_dtype=options.score_dtype,
        on_progress=report_progress,
    )
    row = _row(settings, network, mask, info)
    row["seconds"] = time.perf_counter() - started
    run_id = row["run_id"]
    storage.write_json(workdir / "config.json", row["config"])
    row["mask_sha256"] = storage.save_mask(mask_path(workdir, run_id), mask, row["config"])
    storage.write_row(workdir / "rows.jsonl", row)
    return row


def _free_memory() -> None:
    """Gives back to the system what compiling has left unused in glibc's arenas: a third of the peak of a run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _row(settings: Config, network: Network, mask: Mask, info: pruning.PruneInfo) -> dict[str, Any]:
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    positions = models.output_positions(network.model, network.input_shape)
    kept = np.asarray(info.kept)
    layers = [
        {
            "name": name,
            "shape": list(leaf.shape),
            "size": leaf.size,
            "kept": int(kept[-1, i]),
            "score": float(info.score_total[-1, i]),
            "positions": positions.get(name, 1),
        }
        for i, (name, leaf) in enumerate(zip(trees.names(mask), jax.tree.leaves(mask), strict=True))
    ]
    multiply_adds_kept, multiply_adds = analysis.multiply_adds(mask, positions)
    total = sum(layer["size"] for layer in layers)
    return {
        "run_id": config.run_id(settings),
        "model": settings.model,
        "dataset": settings.dataset,
        "pruner": settings.prune.pruner,
        "compression": settings.prune.compression,
        "seed": settings.seed,
        "num_iterations": config.num_iterations(settings.prune),
        "schedule": settings.prune.schedule,
        "scope": settings.prune.scope,
        "total": total,
        "kept": int(kept[-1].sum()),
        "reached_compression": total / max(1, int(kept[-1].sum())),
        "layers": layers,
        "multiply_adds": multiply_adds,
        "multiply_adds_kept": multiply_adds_kept,
        "collapsed": analysis.collapsed(apply_fn, network.input_shape, network.params, mask),
        "log10_objective": analysis.log10_path_norm(apply_fn, network.input_shape, network.params, mask),
        "max_compression": network.max_compression,
        "iterations": {
            "kept": kept.sum(axis=1).tolist(),
            "min_layer_score": np.asarray(info.score_total, np.float64).min(axis=1).tolist(),
        },
        "config": config.prune_dict(settings),
    }
