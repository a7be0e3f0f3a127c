"""One pruning run: from a config to a mask and a row in a folder."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from synflow_jax import (
    analysis,
    certified,
    data,
    masking,
    models,
    pruning,
    schedules,
    scores,
    storage,
    trees,
    units,
)
from synflow_jax.experiments import config
from synflow_jax.experiments.config import Config
from synflow_jax.parallel import sharded
from synflow_jax.storage import networks
from synflow_jax.trees import Mask, Params


class Network(NamedTuple):
    """A new network and what can be pruned of it."""

    model: nn.Module
    params: Params
    batch_stats: trees.Tree
    mask: Mask
    input_shape: tuple[int, int, int]
    max_compression: float


class Rule(NamedTuple):
    """How a config scores its network.

    initial: the scores before anything is pruned, where there is one iteration: score_fn then returns them, whatever
      the compression and the scope. None where there are more.
    """

    score_fn: scores.Rule
    initial: trees.Scores | None


def build(settings: Config) -> Network:
    """The network of a config, initialized by its seed, or from the file that it names.

    Raises:
      ValueError: a value of the config is out of its range; the compression is above the network's maximum; the file
        does not fit the network.
    """
    config.check(settings)
    model, input_shape = architecture(settings)
    prune = settings.prune
    init = lambda key: models.init(model, input_shape, key)
    patterns = [
        p for p in (prune.exclude, f"^{models.HEAD}/" if prune.dense_classifier else "") if p
    ]
    try:
        shapes, _ = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
        raise ValueError(
            f"model={settings.model!r} does not take {settings.dataset}'s images: {error}"
        ) from error
    # The choice is made on shapes, so that a bad one costs no time.
    trees.prunable(shapes, **_kinds(settings), exclude="|".join(patterns) or None)
    if prune.exclude and not any(re.search(prune.exclude, name) for name in trees.names(shapes)):
        raise ValueError(
            f"prune.exclude={prune.exclude!r} matches none of {trees.names(shapes)}: mend the pattern."
        )
    params, batch_stats = (
        init(jax.random.key(settings.seed)) if settings.init is None else _read(settings)
    )
    mask = trees.prunable(params, **_kinds(settings), exclude="|".join(patterns) or None)
    max_compression = analysis.max_compression(
        models.synflow_fn(model, batch_stats), input_shape, mask, params
    )
    _free_memory()
    network = Network(model, params, batch_stats, mask, input_shape, max_compression)
    check_compression(settings, network)
    return network


def architecture(settings: Config) -> tuple[nn.Module, tuple[int, int, int]]:
    """The model of a config, and the shape of one of its inputs."""
    dataset = data.spec(settings.dataset)
    model = models.create(
        settings.model, dataset.num_classes, width_multiplier=settings.width_multiplier
    )
    return model, dataset.image_shape or models.default_input_shape(settings.model)


def _read(settings: Config) -> tuple[Params, trees.Tree]:
    assert settings.init is not None
    if not pathlib.Path(settings.init).exists():
        raise ValueError(
            f"init={settings.init!r} is what a run knows of the weights that it began from, not where they are: name "
            "the file, --config=CONFIG --config.init=FILE."
        )
    try:
        return networks.read_variables(settings.init, *architecture(settings))
    except ValueError as error:
        raise ValueError(f"init={settings.init!r} cannot be used: {error}") from error


def trained_network(settings: Config, network: Network) -> Network:
    """The network that training begins from: another one, for the ablation that draws the weights anew.

    Args:
      settings: one run.
      network: from `build`, the one that was pruned.
    """
    if settings.prune.ablation != "reinitialize":
        return network
    params, batch_stats = models.init(network.model, network.input_shape, _key(settings, 4))
    return network._replace(params=params, batch_stats=batch_stats)


def check_compression(settings: Config, network: Network) -> None:
    """Raises ValueError for a compression that no network survives, unless the config asks for it."""
    compression, maximum, total = (
        settings.prune.compression,
        network.max_compression,
        sum(trees.sizes(network.mask)),
    )
    # The maximum may be given as it is printed, rounded.
    if compression > maximum * (1 + 1e-5) and not settings.prune.beyond_maximum:
        raise ValueError(
            f"prune.compression={compression:.10g} is above {maximum:.10g}, the maximum of {settings.model}: "
            f"{total} prunable weights over the {round(total / maximum)} of the shortest path from input to output. "
            "Beyond it no network is left: choose a smaller compression."
        )


def _kinds(settings: Config) -> dict[str, bool]:
    return {
        "kernels": settings.prune.kernels,
        "biases": settings.prune.biases,
        "norms": settings.prune.norms,
    }


def rule(settings: Config, network: Network) -> Rule:
    """The rule of a config, for its network and with its data; scores at once where there is one iteration.

    Raises:
      ValueError: the data cannot be used.
    """
    score_fn = _score_function(settings, network)
    if config.num_iterations(settings.prune) > 1 or score_fn.flow is not None:
        return Rule(score_fn, None)
    initial = _first_scores(settings, network, score_fn)
    return Rule(scores.fixed(initial), initial)


def _score_function(settings: Config, network: Network) -> scores.Rule:
    score_fn = _upright_score_function(settings, network)
    return scores.inverted(score_fn) if settings.prune.ablation == "invert" else score_fn


def _upright_score_function(settings: Config, network: Network) -> scores.Rule:
    prune, trains = settings.prune, settings.prune.mode == "train"
    if prune.pruner == config.IMP:
        raise ValueError(
            "prune.pruner='imp' prunes by training: see imp_run.find_or_make_mask, which train.py calls."
        )
    if prune.pruner == "synflow":
        apply_fn = (models.train_fn if trains else models.synflow_fn)(
            network.model, network.batch_stats
        )
        score_fn = scores.synflow(apply_fn, network.input_shape, scaled=prune.scaled)
        # What subtracts a mean has no flow of paths, and so no cut that bounds what may be pruned.
        return dataclasses.replace(score_fn, flow=None) if trains else score_fn
    if prune.pruner not in config.DATA_DRIVEN:
        return scores.magnitude() if prune.pruner == "magnitude" else scores.random()
    try:
        batches = data.prune_batches(
            config.prune_dataset(settings),
            network.input_shape,
            settings.data.dir,
            examples_per_class=prune.examples_per_class,
            batch_size=prune.batch_size,
            seed=settings.seed,
        )
    except ValueError as error:
        raise ValueError(
            f"{'prune.' if str(error).startswith('examples_per_class') else ''}{error}"
        ) from error
    apply_fn = (models.train_fn if trains else models.eval_fn)(network.model, network.batch_stats)
    if prune.pruner == "snip":
        return scores.snip(scores.cross_entropy(apply_fn), batches)
    return scores.grasp(scores.cross_entropy(apply_fn, temperature=prune.temperature), batches)


def _first_scores(settings: Config, network: Network, score_fn: scores.Rule) -> trees.Scores:
    prune = settings.prune
    first_scores: Callable[..., trees.Scores] = pruning.first_scores
    if prune.over_devices:
        first_scores = functools.partial(sharded.first_scores, devices=jax.local_devices())
    return first_scores(
        score_fn,
        network.params,
        key=_key(settings),
        mask=network.mask,
        score_dtype=prune.score_dtype,
    )


def _key(settings: Config, purpose: int = 1) -> jax.Array:
    """The key itself draws the network, 1 prunes it, 2 trains it, 3 shuffles a mask, 4 draws another network."""
    return jax.random.fold_in(jax.random.key(settings.seed), purpose)


def find_row(settings: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The row of an earlier run of the same config in `workdir`, if its files are still there and the mask is whole."""
    wanted = config.run_id(settings)
    for row in storage.read_all_rows(workdir):
        complete = not settings.prune.record_units or units_path(workdir, wanted).exists()
        complete &= not settings.prune.rewind_step or rewind_path(workdir, wanted).exists()
        if row["run_id"] == wanted and mask_path(workdir, wanted).exists() and complete:
            try:
                storage.load_mask(mask_path(workdir, wanted))
            except ValueError as error:
                raise ValueError(f"{error} --overwrite runs it again.") from error
            return row
    return None


def find_mask(
    settings: Config, network: Network, workdir: pathlib.Path
) -> tuple[Mask, dict[str, Any]] | None:
    """The mask and the row that an earlier pruning run of the same config left in `workdir`, if any."""
    row = find_row(settings, workdir)
    if row is None:
        return None
    return storage.load_mask(mask_path(workdir, row["run_id"]), network.params), row


def mask_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where a run's mask lies."""
    return workdir / "masks" / f"{run_id}.safetensors"


def certificate_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where a certified run's certificate lies; see `storage.save_certificate`."""
    return workdir / "certificates" / f"{run_id}.json"


def units_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where the scores of a run's units lie: JSON, {group: {"incoming": a number a unit, "outgoing": the same}}."""
    return workdir / "units" / f"{run_id}.json"


def rewind_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where the state lies that a run of imp rewinds to, unless that is the initialization: one array a leaf."""
    return workdir / "rewind" / f"{run_id}.safetensors"


def prune(
    settings: Config,
    network: Network,
    workdir: pathlib.Path,
    on_progress: pruning.ProgressFn | None = None,
    scored: Rule | None = None,
) -> dict[str, Any]:
    """Prunes, writes config.json, the mask and the row into `workdir`, and returns the row.

    Args:
      settings: one run, without a grid.
      network: from `build`.
      workdir: the folder.
      on_progress: as `pruning.prune` takes it.
      scored: the rule, from `rule`, where several runs share it; its time is then in no row.

    Raises:
      ValueError: the compression is above the network's maximum; the data cannot be used.
      FloatingPointError: the scores are not finite; nothing is written.
    """
    started = time.perf_counter()
    check_compression(settings, network)
    scored = rule(settings, network) if scored is None else scored

    def report_progress(num_done: int, info: pruning.PruneInfo) -> None:
        if num_done == 0:
            _free_memory()
        if on_progress is not None:
            on_progress(num_done, info)

    options = settings.prune
    common: dict[str, Any] = {
        "compression": options.compression,
        "num_iterations": config.num_iterations(options),
        "mask": network.mask,
        "score_dtype": options.score_dtype,
        "on_progress": report_progress,
    }
    if options.schedule == config.CERTIFIED:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", certified.Shortfall)  # the report says it from the row
            mask, info = certified.prune(
                scored.score_fn, network.params, cut_fraction=options.cut_fraction, **common
            )
        return write(settings, network, scored, mask, info, workdir, started=started)
    prune_fn: Callable[..., Any] = pruning.prune
    if options.over_devices:
        prune_fn = functools.partial(sharded.prune, devices=jax.local_devices())
    mask, info = prune_fn(
        scored.score_fn,
        network.params,
        schedule=_schedule(options),
        key=_key(settings),
        nested=options.nested,
        **common,
    )
    return write(settings, network, scored, mask, info, workdir, started=started)


def _schedule(options: config.PruneConfig) -> schedules.Schedule:
    """Turns the words of a config into a schedule."""
    if options.pruner == "erk":
        return schedules.erdos_renyi_kernel
    schedule = config.SCHEDULES[options.schedule]
    return schedules.per_layer(schedule) if config.scope(options) == "local" else schedule


def write(
    settings: Config,
    network: Network,
    scored: Rule,
    mask: Mask,
    info: pruning.PruneInfo,
    workdir: pathlib.Path,
    *,
    started: float,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes what `prune` says of a mask that was made, shuffled if the config asks for it, and returns the row.

    Args:
      settings, network, scored, workdir: as `prune` takes them.
      mask, info: of `pruning.prune`.
      started: by `time.perf_counter`.
      more: of the row.
    """
    options = settings.prune
    if options.ablation == "shuffle":
        mask = masking.shuffle(mask, _key(settings, 3))
    row = {**_row(settings, network, scored, mask, info), **(more or {})}
    run_id = row["run_id"]
    if options.record_units:
        initial = (
            _first_scores(settings, network, scored.score_fn)
            if scored.initial is None
            else scored.initial
        )
        storage.write_json(units_path(workdir, run_id), _unit_scores(network, initial))
        row["units"] = f"units/{run_id}.json"
    row["seconds"] = time.perf_counter() - started
    storage.write_json(storage.own(workdir / "config.json"), row["config"])
    row["mask_sha256"] = storage.save_mask(mask_path(workdir, run_id), mask, row["config"])
    if info.removed_in is not None:
        certificate = _certificate(row, info)
        storage.save_certificate(certificate_path(workdir, run_id), certificate, info.removed_in)
        row["certificate"] = f"certificates/{run_id}.json"
    storage.write_row(storage.own(workdir / "rows.jsonl"), row)
    return row


def _certificate(row: Mapping[str, Any], info: pruning.PruneInfo) -> dict[str, Any]:
    return {
        "run_id": row["run_id"],
        "claim": "no iteration pruned weights of a total score of a cut or more, so that none can have disconnected "
        "the network (Theorem 3); prune.py --verify looks at every iteration again",
        "kept": row["kept"],
        "largest_cut_fraction": row["largest_cut_fraction"],
        "mask_sha256": row["mask_sha256"],
        "iterations": [
            {"kept": kept, "cut_fraction": fraction, "log10_cut": log10_cut}
            for kept, fraction, log10_cut in zip(
                row["iterations"]["kept"],
                _cut_fractions(info),
                row["iterations"]["log10_cut"],
                strict=True,
            )
        ],
        "config": row["config"],
    }


def _cut_fractions(info: pruning.PruneInfo) -> list[float]:
    """Per iteration, what it pruned of the smallest cut; NaN where no cut is known, inf where none was left."""
    with np.errstate(divide="ignore", invalid="ignore"):
        pruned, cut = np.asarray(info.pruned_score, np.float64), np.asarray(info.cut, np.float64)
        return np.where(cut == 0, np.inf, pruned / cut).tolist()


def _largest(fractions: list[float]) -> float | None:
    """Of the iterations before which there was a cut; None for a rule that knows of none."""
    return max((f for f in fractions if math.isfinite(f)), default=None)


def _log10_cut(info: pruning.PruneInfo) -> list[float]:
    with np.errstate(divide="ignore"):
        return (
            np.log10(np.asarray(info.cut, np.float64)) + np.log10(2) * np.asarray(info.exponent)
        ).tolist()


def _unit_scores(network: Network, initial: trees.Scores) -> dict[str, dict[str, list[float]]]:
    """Per group of hidden units, in the order of the network, what enters and what leaves each; six digits."""
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    groups = units.groups(apply_fn, network.params, network.input_shape)
    hidden = [group for group in groups if not (group.is_input or group.is_output)]
    rounded = lambda values: [float(f"{value:.6g}") for value in values]
    return {
        name: {"incoming": rounded(incoming), "outgoing": rounded(outgoing)}
        for name, (incoming, outgoing) in units.unit_scores(hidden, initial).items()
    }


def _free_memory() -> None:
    """Gives back to the system what compiling has left unused in glibc's arenas: a third of the peak of a run."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _initial_magnitudes(
    settings: Config, scored: Rule, info: pruning.PruneInfo
) -> list[float | None]:
    """Per layer, the sum of |score| before anything is pruned; None where only the sums of signed scores are known."""
    if settings.prune.pruner in config.NON_NEGATIVE and settings.prune.mode == "eval":
        return [
            abs(float(total)) for total in info.score_total[0]
        ]  # all of one sign, also inverted
    if scored.initial is None:
        return [None] * info.score_total.shape[1]
    return [
        float(np.sum(np.abs(leaf), dtype=np.float64))
        for leaf in map(np.asarray, jax.tree.leaves(scored.initial))
    ]


def _row(
    settings: Config, network: Network, scored: Rule, mask: Mask, info: pruning.PruneInfo
) -> dict[str, Any]:
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    magnitudes = _initial_magnitudes(settings, scored, info)
    positions = models.output_positions(network.model, network.input_shape)
    kept = np.asarray(info.kept)
    layers = [
        {
            "name": name,
            "shape": list(leaf.shape),
            "size": leaf.size,
            "kept": int(kept[-1, i]),
            "initial_score": float(info.score_total[0, i]),
            "initial_magnitude": magnitudes[i],
            "score": float(info.score_total[-1, i]),  # of what the last iteration found kept
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
        "scored_dataset": config.prune_dataset(settings)
        if settings.prune.pruner in config.DATA_DRIVEN
        else None,
        "pruner": settings.prune.pruner,
        "compression": settings.prune.compression,
        "seed": settings.seed,
        "num_iterations": config.num_iterations(settings.prune),
        "schedule": settings.prune.schedule,
        "scope": config.scope(settings.prune),
        "mode": config.mode(settings.prune),
        "nested": settings.prune.nested,
        "ablation": settings.prune.ablation,
        "total": total,
        "kept": int(kept[-1].sum()),
        "reached_compression": total / max(1, int(kept[-1].sum())),
        "layers": layers,
        "multiply_adds": multiply_adds,
        "multiply_adds_kept": multiply_adds_kept,
        "collapsed": analysis.collapsed(apply_fn, network.input_shape, network.params, mask),
        "log10_objective": analysis.log10_path_norm(
            apply_fn, network.input_shape, network.params, mask
        ),
        "max_compression": network.max_compression,
        "largest_cut_fraction": _largest(_cut_fractions(info)),
        "iterations": {
            "kept": kept.sum(axis=1).tolist(),
            "min_layer_score": np.asarray(info.score_total, np.float64).min(axis=1).tolist(),
            "pruned_score": np.asarray(info.pruned_score, np.float64).tolist(),
            "log10_cut": _log10_cut(info),
            # What an iteration's scores are to be multiplied by, as a power of two; a layer's score is the last one's.
            "log2_unit": np.asarray(info.exponent).tolist(),
        },
        "config": config.prune_dict(settings),
    }
