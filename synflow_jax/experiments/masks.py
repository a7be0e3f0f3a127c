"""Makes the mask of a run, or finds it in the folder of the run.

`prune` does one run and `prune_all` a grid. They write, per run, a mask and a row; and if the run
asks for it a certificate or the scores of its units.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from synflow_jax import certified, masking, pruning, scores, storage
from synflow_jax.experiments import (
    certificates,
    events,
    initialization,
    memory,
    recorded,
    row_schema,
    rows,
    rules,
)
from synflow_jax.experiments.events import Built, EventFn, Failed, Finished
from synflow_jax.experiments.initialization import BuildFn
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.parallel import sharded
from synflow_jax.pruning import ProgressFn, PruneInfo
from synflow_jax.storage import Workdir
from synflow_jax.trees import Mask, Scores

Row = dict[str, Any]


class Scoring(NamedTuple):
    """A score rule, and the scores before pruning if they were computed in advance.

    rule: scores the weights in each iteration.
    initial: the scores before pruning, for a run of one iteration. `rule` then returns them, so
      that runs of other compressions and scopes can share them. None for a run of several.
    """

    rule: scores.Rule
    initial: Scores | None = None


# One run


def prune(
    run: Run,
    network: Network,
    workdir: Workdir,
    *,
    scoring: Scoring | None = None,
    maximum: float | None = None,
    on_progress: ProgressFn | None = None,
) -> tuple[Mask, Row]:
    """Prunes the network of a run, and writes the mask, the row and config.json.

    Args:
      run: the one to prune.
      network: from `initialization.build`.
      workdir: the folder.
      scoring: from `make_scoring`, if several runs share it. The row's time leaves it out.
      maximum: from `initialization.max_compression`, if it is known.
      on_progress: called as `pruning.prune` does.

    Returns:
      The mask and the row.

    Raises:
      ValueError: the compression is above the maximum; the data cannot be used; the rule prunes by
        training.
      FloatingPointError: the scores are not finite. Nothing is written.
      OSError: a file cannot be written.
    """
    started = time.perf_counter()
    if run.pruner.trains:
        raise ValueError(
            f"prune.pruner={run.config.prune.pruner!r} prunes by training: train.py runs it."
        )
    if maximum is None:
        maximum = initialization.max_compression(network)
    initialization.check_compression(run, network, maximum)
    if scoring is None:
        scoring = make_scoring(run, network)
    mask, info = _make_mask(run, network, scoring.rule, on_progress)
    return record(
        run, network, mask, info, workdir, scoring=scoring, maximum=maximum, started=started
    )


def make_scoring(run: Run, network: Network) -> Scoring:
    """Returns the rule of a run, with its scores if there is only one iteration.

    Raises:
      ValueError: the data cannot be used.
    """
    rule = rules.score_rule(run, network)
    # A rule with a flow keeps its cuts only if it is evaluated inside the loop.
    if run.num_iterations > 1 or rule.flow is not None:
        return Scoring(rule)
    initial = _first_scores(run, network, rule)
    return Scoring(scores.fixed(initial), initial)


def _make_mask(
    run: Run, network: Network, rule: scores.Rule, on_progress: ProgressFn | None
) -> tuple[Mask, PruneInfo]:
    """Applies the rule until the compression of the run is reached."""
    options = run.config.prune

    def report(num_done: int, info: PruneInfo) -> None:
        if num_done == 0:  # the program is compiled
            memory.free()
        if on_progress is not None:
            on_progress(num_done, info)

    common: dict[str, Any] = {
        "compression": options.compression,
        "num_iterations": run.num_iterations,
        "mask": network.mask,
        "score_dtype": options.score_dtype,
        "on_progress": report,
    }
    if run.is_certified:
        with warnings.catch_warnings():
            # The report says so, from the row.
            warnings.simplefilter("ignore", certified.Shortfall)
            return certified.prune(
                rule, network.params, cut_fraction=options.cut_fraction, **common
            )
    prune_fn: Callable[..., tuple[Mask, PruneInfo]] = pruning.prune
    if options.over_devices:
        prune_fn = functools.partial(sharded.prune, devices=jax.local_devices())
    with warnings.catch_warnings():
        # The report says so, from the row.
        warnings.simplefilter("ignore", pruning.Overpruned)
        return prune_fn(
            rule,
            network.params,
            schedule=rules.schedule(run),
            key=run.score_key,
            nested=options.nested,
            **common,
        )


def _first_scores(run: Run, network: Network, rule: scores.Rule) -> Scores:
    """Computes the scores before anything is pruned."""
    first_scores: Callable[..., Scores] = pruning.first_scores
    if run.config.prune.over_devices:
        first_scores = functools.partial(sharded.first_scores, devices=jax.local_devices())
    return first_scores(
        rule,
        network.params,
        key=run.score_key,
        mask=network.mask,
        score_dtype=run.config.prune.score_dtype,
    )


def record(
    run: Run,
    network: Network,
    mask: Mask,
    info: PruneInfo,
    workdir: Workdir,
    *,
    scoring: Scoring,
    started: float,
    maximum: float | None = None,
    more: Mapping[str, Any] | None = None,
) -> tuple[Mask, Row]:
    """Writes the files of a mask that was made, shuffled if the run asks for it.

    Args:
      run, network, workdir, maximum: as `prune` takes them.
      mask, info: as `pruning.prune` returns them.
      scoring: the rule that made the mask.
      started: the time of the start, from `time.perf_counter`.
      more: further entries of the row.

    Returns:
      The mask and the row.
    """
    if maximum is None:
        maximum = initialization.max_compression(network)
    # The row and the scores are of the rule; only the places of the kept weights change.
    if run.ablation.shuffles:
        mask = masking.shuffle(mask, run.shuffle_key)
    row = rows.prune_row(run, network, mask, info, initial=scoring.initial, maximum=maximum)
    row |= more or {}
    if run.config.prune.record_units:
        path = workdir.units_path(run.prune_id)
        initial = scoring.initial
        if initial is None:
            initial = _first_scores(run, network, scoring.rule)
        storage.write_json(path, rows.unit_scores(network, initial))
        row["units"] = workdir.relative(path)
    row["seconds"] = time.perf_counter() - started
    storage.write_json(workdir.config_path, row["config"])
    row["mask_sha256"] = storage.save_mask(workdir.mask_path(run.prune_id), mask, row["config"])
    if info.removed_in is not None:
        path = workdir.certificate_path(run.prune_id)
        storage.save_certificate(path, certificates.certificate(row, info), info.removed_in)
        row["certificate"] = workdir.relative(path)
    # Last: a run that has a row is complete.
    workdir.write_row(row)
    return mask, row


# Runs of an earlier command


def find_row(run: Run, workdir: Workdir) -> Row | None:
    """Returns the row of a run from an earlier command, if the files of the run are complete.

    Raises:
      ValueError: the row or the mask is damaged, or the mask is that of another run.
    """
    row = row_schema.find_pruned(run.prune_id, workdir)
    if row is None:
        return None
    # A row is written last, but someone may have deleted or not copied the files.
    needed = [workdir.mask_path(run.prune_id)]
    if run.config.prune.record_units:
        needed.append(workdir.units_path(run.prune_id))
    if run.config.prune.rewind_step:
        needed.append(workdir.rewind_path(run.prune_id))
    if not all(path.exists() for path in needed):
        return None
    # Read, since a damaged mask is better found now than after the training of others.
    recorded.read_mask(row, workdir)
    return row


def find_mask(run: Run, network: Network, workdir: Workdir) -> tuple[Mask, Row] | None:
    """Returns the mask and the row of a run from an earlier command, or None.

    Raises:
      ValueError: the mask is damaged, is that of another run, or does not fit the network.
    """
    row = find_row(run, workdir)
    if row is None:
        return None
    return recorded.read_mask(row, workdir, network.params), row


# Many runs


def prune_all(
    runs: Sequence[Run],
    workdir: Workdir,
    *,
    overwrite: bool = False,
    emit: EventFn = events.ignore,
    build: BuildFn | None = None,
) -> Iterator[Finished | Failed]:
    """Prunes run after run, and yields the outcome of each.

    Each network is drawn once, and scores that several runs share are computed once. Compiled
    programs are dropped when the networks of their shapes are done. Runs that are in the folder are
    skipped, so the same command resumes a grid. A run that fails does not stop the others.

    Args:
      runs: from `run.resolve`, whose order brings runs that share a network next to each other.
      workdir: the folder of all runs.
      overwrite: prune again what the folder holds.
      emit: gets an `events.Built` for each network, and an `events.Pruning` as each run advances.
      build: from `initialization.builder`, if the networks are used elsewhere too.

    Raises:
      OSError: a file cannot be written.
    """
    build = initialization.builder(emit) if build is None else build
    find_scoring = memory.keep_last(make_scoring, key=_scoring_key)

    def make(run: Run) -> Row:
        return _prune_shared(run, build(run), find_scoring, workdir, emit)

    if overwrite:
        # All at once: if this stops half-way, the same command without `overwrite` does the rest.
        workdir.delete_rows([run.prune_id for run in runs])
    for previous, run in zip([None, *runs], runs, strict=False):
        if previous is not None and previous.shapes_key != run.shapes_key:
            memory.free_programs()
        try:
            row, found = find_or_make(run, workdir, make, overwrite=overwrite)
        except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
            yield Failed(run, error)
        else:
            yield Finished(run, row, found=found)


def find_or_make(
    run: Run, workdir: Workdir, make: Callable[[Run], Row], *, overwrite: bool = False
) -> tuple[Row, bool]:
    """Returns the row of a run, and whether it is from an earlier command.

    Args:
      run: the one to prune.
      workdir: the folder.
      make: prunes the run and writes its files. The run is locked meanwhile.
      overwrite: delete what the folder holds first, so that the same command without it resumes.

    Raises:
      storage.Busy: another process prunes this run. It is a ValueError.
    """
    row = None if overwrite else find_row(run, workdir)
    if row is not None:
        return row, True
    with workdir.lock(run.prune_id):
        if overwrite:
            delete(run, workdir)
        # Another process may have made it before the lock was ours.
        row = find_row(run, workdir)
        if row is not None:
            return row, True
        return make(run), False


def delete(run: Run, workdir: Workdir) -> None:
    """Deletes the row of a pruning run and then its files. The caller holds its lock.

    Raises:
      OSError: a file cannot be deleted.
    """
    workdir.delete_rows([run.prune_id])
    certificate = workdir.certificate_path(run.prune_id)
    for path in (
        certificate,
        certificate.with_suffix(".npz"),
        workdir.units_path(run.prune_id),
        workdir.mask_path(run.prune_id),
    ):
        storage.remove(path)


def _scoring_key(run: Run, network: Network) -> tuple[Any, ...]:
    """Returns a key that is equal for runs with the same `make_scoring`."""
    del network  # the run names it
    prune = run.config.prune
    has_scores = run.num_iterations == 1
    return run.network_key, prune.pruner, prune.mode, run.ablation.inverts, has_scores


def _prune_shared(
    run: Run,
    built: Built,
    find_scoring: Callable[[Run, Network], Scoring],
    workdir: Workdir,
    emit: EventFn,
) -> Row:
    """Prunes one run of a grid, and returns its row."""
    network, maximum = built.network, built.max_compression
    # Before the scores are made, which takes time.
    initialization.check_compression(run, network, maximum)
    _, row = prune(
        run,
        network,
        workdir,
        scoring=find_scoring(run, network),
        maximum=maximum,
        on_progress=lambda num_done, info: emit(events.Pruning(run, num_done, info)),
    )
    return row
