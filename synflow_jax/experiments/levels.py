"""Prunes a run by iterative magnitude pruning (IMP): trains level after level, and keeps files.

It leaves the files that any pruning run leaves, so that the masked network is then trained like any
other. It can be stopped at any moment: a finished level is known by its files, and an unfinished
one resumes from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, scores, storage, trees
from synflow_jax.experiments import events, loop, masks, programs, rules, starts
from synflow_jax.experiments.events import Event, EventFn
from synflow_jax.experiments.loop import Job, StopFn
from synflow_jax.experiments.programs import Programs, Recipe
from synflow_jax.experiments.results import Trained
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints
from synflow_jax.training import TrainState, forms, imp
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

# The entries of each level's record that are also in the row of the run.
_IN_ROW = ("level", "kept", "compression", "test_top1", "test_loss")


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
      storage.Stopped: `should_stop` returned True, and the level is saved.
    """
    if overwrite:
        _delete(run, workdir)
    else:
        found = masks.find_mask(run, network, workdir)
        if found is not None:
            return found
    options = run.config.prune
    if options.rewind_step >= recipe.num_steps:
        raise ValueError(
            f"prune.rewind_step={options.rewind_step} must be below {recipe.num_steps}, the steps "
            f"of a training: {run.config.train.num_epochs} epochs of {recipe.steps_per_epoch}."
        )
    if compiled is None:
        compiled = programs.one(run, network.model, recipe, split=True)
    levels = _Levels(run, network, workdir, recipe, compiled, emit, should_stop)
    start = levels.start()
    mask: Mask = network.mask
    records: list[dict[str, Any]] = []
    for number, counts in enumerate(_counts(run, mask), 1):
        mask, record = levels.find_or_make(number, start, mask, counts)
        records.append(record)
    _write_run(run, network, mask, records, workdir, maximum)
    checkpoints.delete(workdir.checkpoint_path(run.prune_id))
    made = masks.find_mask(run, network, workdir)
    assert made is not None, "it was written above"
    return made


def _delete(run: Run, workdir: Workdir) -> None:
    """Removes what an earlier command left of a run's levels."""
    shutil.rmtree(workdir.levels_path(run.prune_id), ignore_errors=True)
    checkpoints.delete(workdir.checkpoint_path(run.prune_id))
    workdir.rewind_path(run.prune_id).unlink(missing_ok=True)


def _counts(run: Run, mask: Mask) -> np.ndarray:
    """Returns how many weights are pruned after each level, [num_levels, 1 or num_leaves]."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(mask)]
    schedule = rules.schedule(run)
    return schedule(shapes, run.config.prune.compression, run.num_iterations)


class _Levels:
    """The levels of a run: each one is found in its files, or made by training."""

    def __init__(
        self,
        run: Run,
        network: Network,
        workdir: Workdir,
        recipe: Recipe,
        compiled: Programs,
        emit: EventFn,
        should_stop: StopFn,
    ) -> None:
        self.run, self.network, self.workdir = run, network, workdir
        self.recipe, self.compiled = recipe, compiled
        self.emit, self.should_stop = emit, should_stop
        self.form: Form = forms.choose(network, compact=False)

    def start(self) -> TrainState:
        """Returns the state that every level starts from.

        It is the initial state, or the state after the first steps, which are trained here.
        """
        initial = starts.initial_state(self.run, self.recipe, self.form)
        num_steps = self.run.config.prune.rewind_step
        if not num_steps:
            return initial
        if not self.workdir.rewind_path(self.run.prune_id).exists():
            recipe = self.recipe._replace(num_steps=num_steps)
            # A copy, since training uses up the memory of its first state.
            trained = self._train(0, recipe, jax.tree.map(jnp.copy, initial))
            starts.save_rewind(self.run, self.workdir, trained.state)
            checkpoints.delete(self.workdir.level_checkpoint_path(self.run.prune_id, 0))
        return starts.load_rewind(self.run, self.workdir, initial)

    def find_or_make(
        self, number: int, start: TrainState, mask: Mask, counts: np.ndarray
    ) -> tuple[Mask, dict[str, Any]]:
        """Returns the mask after a level and the record of it.

        Args:
          number: of the level, from 1.
          start: from `start`.
          mask: from the level before.
          counts: how many weights are pruned after the level.
        """
        found = self._read(number)
        if found is not None:
            return found
        began = time.perf_counter()
        score_fn = scores.magnitude()
        if self.run.ablation.inverts:
            score_fn = scores.inverted(score_fn)
        tested: dict[str, float] = {}

        def train(state: TrainState) -> TrainState:
            trained = self._train(number, self.recipe, state)
            for name in ("top1", "loss"):
                tested[f"test_{name}"] = float(trained.info.curve[f"test_{name}"][-1])
            return trained.state

        level = imp.level(train, start, mask, counts.tolist(), score_fn=score_fn)
        record = _record(number, level, tested, time.perf_counter() - began)
        self._write(number, level.mask, record)
        return level.mask, record

    def _train(self, number: int, recipe: Recipe, state: TrainState) -> Trained:
        """Trains a level from its newest checkpoint, or else from `state`."""
        run_id = self.run.prune_id
        job = Job(
            run=self.run,
            form=self.form,
            first_state=lambda: state,
            folder=self.workdir.level_checkpoint_path(run_id, number),
            description={
                "run_id": run_id,
                "level": number,
                "config": self.run.prune_dict,
                "mask_sha256": storage.mask_digest(state.mask),
            },
            curve=self.workdir.level_curve_path(run_id, number),
        )

        def emit(event: Event) -> None:
            assert isinstance(event, events.Resumed | events.Progress | events.EpochEnded)
            self.emit(events.Level(self.run, number, event))

        (result,) = loop.train(
            [job], recipe, self.compiled, emit=emit, should_stop=self.should_stop
        )
        if isinstance(result, Exception):
            raise result
        return result

    def _write(self, number: int, mask: Mask, record: Mapping[str, Any]) -> None:
        """Writes the files of a level, and removes its checkpoints."""
        run_id = self.run.prune_id
        metadata = {"run_id": run_id, "level": number}
        digest = storage.save_mask(self.workdir.level_mask_path(run_id, number), mask, metadata)
        # After the mask: this file says that the level is finished.
        path = self.workdir.level_path(run_id, number)
        storage.write_json(path, {**record, "mask_sha256": digest})
        checkpoints.delete(self.workdir.level_checkpoint_path(run_id, number))

    def _read(self, number: int) -> tuple[Mask, dict[str, Any]] | None:
        """Reads the files of a finished level, or returns None if it is not finished.

        Raises:
          ValueError: a file is damaged, or the two do not belong together.
        """
        path = self.workdir.level_path(self.run.prune_id, number)
        if not path.exists():
            return None
        mask_path = self.workdir.level_mask_path(self.run.prune_id, number)
        try:
            record = dict(json.loads(path.read_text()))
            mask = storage.load_mask(mask_path, self.network.params)
            is_whole = record["mask_sha256"] == storage.mask_digest(mask)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
            raise ValueError(
                f"{str(path)!r} or its mask {mask_path.name!r} is damaged: {error!r}. --overwrite "
                "runs all levels again."
            ) from error
        if not is_whole:
            raise ValueError(
                f"{str(path)!r} does not belong to its mask {mask_path.name!r}. --overwrite runs "
                "all levels again."
            )
        return mask, record


def _record(
    number: int, level: imp.Level, tested: Mapping[str, float], seconds: float
) -> dict[str, Any]:
    """Returns what is recorded of a level, as plain values."""
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
        cut=jnp.full(num_levels, jnp.nan, jnp.float32),
        exponent=jnp.zeros(num_levels, jnp.int32),
    )
