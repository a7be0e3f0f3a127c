"""Prunes a run by iterative magnitude pruning (IMP): trains its levels, and keeps them in files.

It leaves the files that any pruning run leaves, so that the masked network is then trained like any
other. It can be stopped at any moment: a finished level is known by its files, and an unfinished
one resumes from its last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, scores, storage, trees
from synflow_jax.experiments import events, loop, masks, programs, recorded, rules, starts
from synflow_jax.experiments.events import Event, EventFn
from synflow_jax.experiments.loop import Job, StopFn
from synflow_jax.experiments.programs import Programs, Recipe
from synflow_jax.experiments.results import Trained
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints, schema
from synflow_jax.training import TrainState, forms, imp
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

# The entries of each level's record that are also in the row of the run.
_IN_ROW = ("level", "kept", "compression", "test_top1", "test_loss")
# The record of a level, as its file holds it.
_SCHEMA: schema.Schema = {
    "level": schema.POSITIVE,
    "kept": schema.POSITIVE,
    "compression": schema.AT_LEAST_1,
    "test_top1": schema.FRACTION,
    "test_loss": schema.NUMBER,
    "layers": [schema.NATURAL, ...],
    "score_total": [schema.NUMBER, ...],
    "pruned_score": schema.NUMBER,
    "seconds": schema.NUMBER,
    "mask_sha256": schema.TEXT,
}
_KEYS = (*_IN_ROW, "layers", "score_total", "pruned_score", "seconds", "mask_sha256")
_CURE = "--overwrite runs all levels again."


def find_or_make_mask(
    run: Run,
    network: Network,
    workdir: Workdir,
    recipe: Recipe,
    compiled: Programs | None = None,
    *,
    maximum: float | None = None,
    overwrite: bool = False,
    emit: EventFn = events.ignore,
    should_stop: StopFn = lambda: False,
) -> tuple[Mask, dict[str, Any]]:
    """Returns the mask and the row of a run: from `workdir`, or made by training its levels.

    Each level trains the full, masked network by the config's recipe and prunes by magnitude. (A
    compact network would leave the weights of dead units without decay, and so rank them higher.)

    Args:
      run: with prune.pruner="imp".
      network: from `initialization.build`.
      workdir: the folder.
      recipe: from `programs.make_recipe`.
      compiled: from `programs.one`; by default each batch is split over the devices.
      maximum: from `initialization.max_compression`, if it is known.
      overwrite: begins anew.
      emit: gets an `events.Level` for each event of a level's training.
      should_stop: asked after each call of the compiled loop.

    Raises:
      ValueError: the data or a file of an earlier command cannot be used; says why.
      FloatingPointError: a loss or a weight is not finite.
      OSError: something cannot be written.
      storage.Busy: another process prunes this run. It is a ValueError.
      storage.Stopped: `should_stop` returned True, and the level is saved.
    """
    if not overwrite:
        found = masks.find_mask(run, network, workdir)
        if found is not None:
            return found
    if compiled is None:
        compiled = programs.one(run, network.model, recipe, split=True)
    form = forms.choose(network, compact=False)
    levels = _Levels(run, network, form, workdir, recipe, compiled, emit, should_stop)
    with workdir.lock(run.prune_id):
        if overwrite:
            _delete(run, workdir)
        return _find_or_prune(levels, maximum)


def _find_or_prune(levels: _Levels, maximum: float | None) -> tuple[Mask, dict[str, Any]]:
    """Makes the mask of a run that this process has locked; see `find_or_make_mask`."""
    run, network, workdir = levels.run, levels.network, levels.workdir
    # Another process may have made it before the lock was ours.
    found = masks.find_mask(run, network, workdir)
    if found is not None:
        return found
    recipe = levels.recipe
    options = run.config.prune
    # Checked here, since the number of steps is known only when the data has been read.
    if options.rewind_step >= recipe.num_steps:
        raise ValueError(
            f"prune.rewind_step={options.rewind_step} must be below {recipe.num_steps}, the steps "
            f"of a training: {run.config.train.num_epochs} epochs of {recipe.steps_per_epoch}."
        )
    start = _start(levels)
    mask: Mask = network.mask
    records: list[dict[str, Any]] = []
    for number, counts in enumerate(_counts(run, mask), 1):
        mask, record = _find_or_make(levels, number, start, mask, counts)
        records.append(record)
    # No level needs its checkpoints once all are recorded. After the row nobody would delete them.
    checkpoints.delete(workdir.checkpoint_path(run.prune_id))
    _write_run(run, network, mask, records, workdir, maximum)
    made = masks.find_mask(run, network, workdir)
    assert made is not None, "it was written above"
    return made


def _delete(run: Run, workdir: Workdir) -> None:
    """Deletes the row, and then the levels that an earlier command has trained.

    Raises:
      OSError: a file cannot be deleted.
    """
    masks.delete(run, workdir)
    storage.remove(workdir.levels_path(run.prune_id))
    checkpoints.delete(workdir.checkpoint_path(run.prune_id))
    storage.remove(workdir.rewind_path(run.prune_id))


def _counts(run: Run, mask: Mask) -> np.ndarray:
    """Returns how many weights are pruned after each level, [num_levels, 1 or num_leaves]."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(mask)]
    schedule = rules.schedule(run)
    return schedule(shapes, run.config.prune.compression, run.num_iterations)


@dataclasses.dataclass(frozen=True)
class _Levels:
    """The arguments that all levels of a run share.

    Attributes:
      run, network, workdir, recipe, compiled, emit, should_stop: as `find_or_make_mask` takes them.
      form: the full, masked network.
    """

    run: Run
    network: Network
    form: Form
    workdir: Workdir
    recipe: Recipe
    compiled: Programs
    emit: EventFn
    should_stop: StopFn


def _start(levels: _Levels) -> TrainState:
    """Returns the state that every level starts from.

    It is the initial state, or the state after the first steps, which are trained here.
    """
    run, workdir = levels.run, levels.workdir
    initial = starts.initial_state(run, levels.recipe, levels.form)
    num_steps = run.config.prune.rewind_step
    if not num_steps:
        return initial
    if not workdir.rewind_path(run.prune_id).exists():
        recipe = levels.recipe._replace(num_steps=num_steps)
        # A copy, since training uses up the memory of its first state.
        copied = jax.tree.map(jnp.copy, initial)
        trained = _train(levels, 0, recipe, copied)
        starts.save_rewind(run, workdir, trained.state)
        checkpoints.delete(workdir.level_checkpoint_path(run.prune_id, 0))
    # From the file even if it was just written, so that a run that resumes has the same state.
    return starts.load_rewind(run, workdir, initial)


def _find_or_make(
    levels: _Levels, number: int, start: TrainState, mask: Mask, counts: np.ndarray
) -> tuple[Mask, dict[str, Any]]:
    """Returns the mask after a level and the record of it.

    Args:
      number: of the level, from 1.
      start: from `_start`.
      mask: from the level before.
      counts: how many weights are pruned after the level.
    """
    found = _read(levels, number)
    if found is not None:
        return found
    began = time.perf_counter()
    score_fn = scores.magnitude()
    if levels.run.ablation.inverts:
        score_fn = scores.inverted(score_fn)
    # `imp.level` wants only the state of a training; its test results are kept here.
    tested: dict[str, float] = {}

    def train(state: TrainState) -> TrainState:
        trained = _train(levels, number, levels.recipe, state)
        for name in ("test_top1", "test_loss"):
            values = trained.info.curve[name]
            tested[name] = float(values[-1])
        return trained.state

    level = imp.level(train, start, mask, counts.tolist(), score_fn=score_fn)
    record = _record(number, level, tested, time.perf_counter() - began)
    _write(levels, number, level.mask, record)
    return level.mask, record


def _train(levels: _Levels, number: int, recipe: Recipe, state: TrainState) -> Trained:
    """Trains a level from its newest checkpoint, or else from `state`."""
    run, workdir = levels.run, levels.workdir
    description = {
        "run_id": run.prune_id,
        "level": number,
        "config": run.prune_dict,
        "mask_sha256": storage.mask_digest(state.mask),
    }
    job = Job(
        run=run,
        form=levels.form,
        first_state=lambda: state,
        folder=workdir.level_checkpoint_path(run.prune_id, number),
        description=description,
        curve=workdir.level_curve_path(run.prune_id, number),
    )

    def emit(event: Event) -> None:
        assert isinstance(event, events.Resumed | events.Progress | events.EpochEnded)
        levels.emit(events.Level(run, number, event))

    (result,) = loop.train(
        [job], recipe, levels.compiled, emit=emit, should_stop=levels.should_stop
    )
    if isinstance(result, Exception):
        raise result
    return result


def _write(levels: _Levels, number: int, mask: Mask, record: Mapping[str, Any]) -> None:
    """Writes the files of a level, and removes its checkpoints."""
    run_id, workdir = levels.run.prune_id, levels.workdir
    metadata = {"run_id": run_id, "level": number}
    digest = storage.save_mask(workdir.level_mask_path(run_id, number), mask, metadata)
    # After the mask: this file says that the level is finished.
    path = workdir.level_path(run_id, number)
    contents = {**record, "mask_sha256": digest}
    storage.write_json(path, {**contents, "record_sha256": _digest(contents)})
    # Last of all: until the level is finished, it resumes from these.
    checkpoints.delete(workdir.level_checkpoint_path(run_id, number))


def _read(levels: _Levels, number: int) -> tuple[Mask, dict[str, Any]] | None:
    """Reads the files of a finished level, or returns None if it is not finished.

    Raises:
      ValueError: a file is damaged, or the two do not belong together.
    """
    run_id, workdir = levels.run.prune_id, levels.workdir
    path = workdir.level_path(run_id, number)
    if not path.exists():
        return None
    mask_path = workdir.level_mask_path(run_id, number)
    name = repr(str(path))
    try:
        record = schema.read_object(path)
        mask = storage.load_mask(mask_path, levels.network.params)
    except (ValueError, FileNotFoundError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{name} or its mask {mask_path.name!r} is damaged: {reason}. {_CURE}"
        ) from error
    schema.check(record, _SCHEMA, _KEYS, lambda: name, _CURE)
    # Earlier versions wrote no digest of the record.
    digest = record.pop("record_sha256", None)
    if digest not in (None, _digest(record)):
        raise ValueError(f"{name} does not match its record_sha256: it was edited. {_CURE}")
    wanted = {"run_id": run_id, "level": number}
    recorded.check_run(mask_path, "mask file", wanted, _CURE)
    kept = [int(np.count_nonzero(leaf)) for leaf in jax.tree.leaves(mask)]
    found = (record["mask_sha256"], record["layers"], record["kept"])
    if found != (storage.mask_digest(mask), kept, sum(kept)):
        raise ValueError(f"{name} does not belong to its mask {mask_path.name!r}. {_CURE}")
    return mask, record


def _digest(record: Mapping[str, Any]) -> str:
    """Returns the sha256 of a record, in hex."""
    text = json.dumps(record, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _record(
    number: int, level: imp.Level, tested: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Returns the record of a level, as plain values."""
    kept = np.asarray(level.info.kept[0])
    num_kept = int(kept.sum())
    return {
        "level": number,
        "kept": num_kept,
        "compression": sum(trees.sizes(level.mask)) / max(1, num_kept),
        # Of the network that was trained, before this level pruned it.
        "test_top1": tested["test_top1"],
        "test_loss": tested["test_loss"],
        "layers": kept.tolist(),
        "score_total": np.asarray(level.info.score_total[0]).tolist(),
        "pruned_score": float(level.info.pruned_score[0]),
        "seconds": seconds,
    }


def _write_run(
    run: Run,
    network: Network,
    mask: Mask,
    records: Sequence[Mapping[str, Any]],
    workdir: Workdir,
    maximum: float | None,
) -> None:
    """Writes the mask and the row of the run, as any pruning run does."""
    levels = [{name: record[name] for name in _IN_ROW} for record in records]
    seconds = sum(record["seconds"] for record in records)
    masks.record(
        run,
        network,
        mask,
        _info(records),
        workdir,
        scoring=masks.Scoring(scores.magnitude()),
        started=time.perf_counter() - seconds,
        maximum=maximum,
        more={"rewind_step": run.config.prune.rewind_step, "levels": levels},
    )


def _info(records: Sequence[Mapping[str, Any]]) -> pruning.PruneInfo:
    """Returns all levels as the iterations of one run."""
    num_levels = len(records)

    def column(name: str, dtype: Any) -> jax.Array:
        return jnp.asarray([record[name] for record in records], dtype)

    return pruning.PruneInfo(
        num_done=jnp.int32(num_levels),
        kept=column("layers", jnp.int32),
        score_total=column("score_total", jnp.float32),
        pruned_score=column("pruned_score", jnp.float32),
        cut=jnp.zeros(num_levels, jnp.float32),
        exponent=jnp.zeros(num_levels, jnp.int32),
        objective=jnp.zeros(num_levels, jnp.float32),
    )
