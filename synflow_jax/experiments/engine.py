"""Prunes and trains runs: one run on all devices, or the runs of a grid spread over them.

`run` decides which runs are left to do and on which devices; `loop.train` trains them. A run of a
grid ends in the same bits on any layout of devices and processes, whichever runs train at the same
time, and however often it was stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

from synflow_jax import data, storage, training
from synflow_jax.experiments import (
    events,
    failures,
    initialization,
    levels,
    loop,
    masks,
    memory,
    programs,
    results,
    spreading,
    starts,
)
from synflow_jax.experiments.events import Event, EventFn, Failed, Finished, Outcome
from synflow_jax.experiments.initialization import BuildFn
from synflow_jax.experiments.loop import StopFn
from synflow_jax.experiments.programs import Layout, Programs, Recipe
from synflow_jax.experiments.row_schema import find_trained
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

# How many compact networks a device trains before their programs are dropped: each has its own.
_COMPACT_AT_ONCE = 16
# How many runs are locked at a time before their rows are deleted.
_LOCKS_AT_ONCE = 100

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class OutOfMemory(ValueError):
    """A device cannot hold the runs that it was given."""


@dataclasses.dataclass(frozen=True)
class _Task:
    """A run that is ready to be trained.

    mask: of the full network.
    form: in which the network is trained.
    """

    run: Run
    mask: Mask
    form: Form


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The settings of a call, and the caches that its runs share.

    Attributes:
      workdir, devices, split, overwrite, emit, should_stop: as `run` takes them.
      build: returns the network of a run; from `initialization.builder`.
      skips_done: whether a run that has a row is left out.
      recipes: the data and the optimizer, by `_recipe_key`. Filled by `_recipe`.
      programs: the compiled programs, by network, recipe, and device or layout. Filled by
        `_compiled`.
    """

    workdir: Workdir
    devices: tuple[jax.Device, ...]
    split: bool
    overwrite: bool
    emit: EventFn
    should_stop: StopFn
    build: BuildFn
    skips_done: bool
    recipes: dict[str, Recipe] = dataclasses.field(default_factory=dict)
    programs: dict[Any, Programs] = dataclasses.field(default_factory=dict)


def run(
    runs: Sequence[Run],
    workdir: Workdir,
    *,
    split: bool = False,
    overwrite: bool = False,
    devices: Sequence[jax.Device] | None = None,
    emit: EventFn = events.ignore,
    should_stop: StopFn = lambda: False,
) -> list[Outcome]:
    """Prunes and trains runs, unless the folder already holds their rows.

    1. Remove what killed processes have left. With `overwrite`, delete the rows of all runs, and
       then their checkpoints: from here on, the same command without it resumes them.
    2. Find the runs that have a row. They are finished.
    3. Read the data, so that an error is found before long work.
    4. Prune the others. Runs of one network follow one another on one device.
    5. Train them; see `_train`. The row of a run is written last of all.

    A run that fails is listed in failed.json, and the others continue. So does a run on which
    another process is working: it fails before any of its files is touched.

    Args:
      runs: those of this process, from `run.resolve`, checked by `checks.check_train`.
      workdir: the folder of all of them.
      split: True trains each run by itself, its batches split over all devices; for a single run.
        False spreads the runs over the devices.
      overwrite: prune and train again, even if the folder holds the row.
      devices: those of a grid; all devices of this process by default.
      emit: gets all events, at times from other threads.
      should_stop: asked every few seconds. True saves all runs and raises `storage.Stopped`.

    Returns:
      The outcomes, in the order of `runs`. They are emitted as they come.

    Raises:
      ValueError: a row file of the folder is damaged.
      OSError: something cannot be written.
      storage.Stopped: see `should_stop`.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    build = initialization.builder(emit)
    shared = _Shared(workdir, devices, split, overwrite, emit, should_stop, build, True)
    outcomes: dict[str, Outcome] = {}
    for outcome in failures.listed(_outcomes(shared, runs), workdir, lambda run: run.train_id):
        outcomes[outcome.run.train_id] = outcome
        emit(outcome)
    return [outcomes[run.train_id] for run in runs]


def train(
    run: Run,
    network: Network,
    mask: Mask,
    workdir: Workdir,
    *,
    form: Form | None = None,
    emit: EventFn = events.ignore,
    should_stop: StopFn = lambda: False,
) -> dict[str, Any]:
    """Trains a network under a mask, writes its files, and returns its row.

    Args:
      run: its config and names.
      network: from `initialization.build`.
      mask: of that network.
      workdir: the folder.
      form: from `starts.choose_form`, which is called by default.
      emit: gets all events.
      should_stop: asked every few seconds. True saves the run and raises `storage.Stopped`.

    Raises:
      ValueError: the data or a checkpoint cannot be used; says why.
      FloatingPointError: a loss is not finite; names the step. The last good checkpoint stays.
      OSError: something cannot be written.
      storage.Stopped: see `should_stop`.
    """
    devices = tuple(jax.local_devices())
    build = initialization.builder(emit)
    shared = _Shared(workdir, devices, True, False, emit, should_stop, build, False)
    form = starts.choose_form(run, network, mask) if form is None else form
    (outcome,) = _train_on_all_devices(shared, _Task(run, mask, form))
    if isinstance(outcome, Failed):
        raise outcome.error
    return dict(outcome.row)


def _outcomes(shared: _Shared, runs: Sequence[Run]) -> Iterator[Outcome]:
    """Yields the outcome of each run as it comes; see `run`."""
    shared.workdir.clean()
    shared.workdir.check_rows()
    if shared.overwrite:
        busy = _begin_anew(shared, runs)
        yield from busy
        taken = {failed.run.train_id for failed in busy}
        runs = [run for run in runs if run.train_id not in taken]
    ready = []
    for run in runs:
        try:
            row = None if shared.overwrite else find_trained(run.train_id, shared.workdir)
        except ValueError as error:
            yield Failed(run, error)
            continue
        if row is not None:
            yield Finished(run, row, found=True)
            continue
        failed = _prepare(shared, run)
        if failed is None:
            ready.append(run)
        else:
            yield failed
    # All are pruned before any is trained: their masks decide which runs train together.
    pruned = []
    for result in _prune(shared, ready):
        if isinstance(result, Failed):
            yield result
        else:
            pruned.append(result.run)
    yield from _train(shared, pruned)


def _begin_anew(shared: _Shared, runs: Sequence[Run]) -> list[Failed]:
    """Deletes the rows and then the checkpoints of runs. The masks are overwritten when it is time.

    Returns:
      The runs that another process has. Nothing of them is deleted.
    """
    busy = []
    # Each lock is an open file, and a process may have about a thousand.
    for start in range(0, len(runs), _LOCKS_AT_ONCE):
        with contextlib.ExitStack() as stack:
            some = runs[start : start + _LOCKS_AT_ONCE]
            free, taken = _lock(shared, some, stack, prunes=True)
            busy += taken
            # The rows of pruning too: a run that is stopped before its mask is made has none.
            run_ids = [name for run in free for name in (run.train_id, run.prune_id)]
            shared.workdir.delete_rows(run_ids)
            for run in free:
                checkpoints.delete(shared.workdir.checkpoint_path(run.train_id))
    return busy


def _lock(
    shared: _Shared, runs: Iterable[Run], stack: contextlib.ExitStack, *, prunes: bool = False
) -> tuple[list[Run], list[Failed]]:
    """Takes the locks of runs, until the stack is closed; with `prunes`, those of their masks too.

    Returns:
      The runs that this process has now, and those that another process has.
    """
    free, busy = [], []
    for run in runs:
        names = [run.train_id, run.prune_id] if prunes else [run.train_id]
        try:
            with contextlib.ExitStack() as locks:
                for name in names:
                    locks.enter_context(shared.workdir.lock(name))
                # Only now: if one of them is taken, the others are given back.
                stack.push(locks.pop_all())
        except storage.Busy as error:
            busy.append(Failed(run, error))
        else:
            free.append(run)
    return free, busy


def _prepare(shared: _Shared, run: Run) -> Failed | None:
    """Reads the data of a run that is to be done. Returns its failure if it cannot be used."""
    try:
        if shared.split:
            # The network of a single run is shown first, even if the folder has its mask.
            shared.build(run)
        _recipe(shared, run)
    except ValueError as error:
        return Failed(run, error)
    return None


# Pruning


def _prune(shared: _Shared, runs: Sequence[Run]) -> Iterator[events.Pruned | Failed]:
    """Prunes runs. A device prunes all runs of one network, or one run of IMP, at a time."""
    for some in _by_shapes(shared, runs):
        yield from _prune_some(shared, some)


def _prune_some(shared: _Shared, runs: Sequence[Run]) -> Iterator[events.Pruned | Failed]:
    """Prunes runs whose programs fit into memory together."""
    at_once = [run for run in runs if not run.pruner.trains]
    by_training = [run for run in runs if run.pruner.trains]
    # Only neighbours share a network: the builder of networks keeps a single one.
    by_network = itertools.groupby(at_once, lambda run: run.network_key)
    groups = [list(group) for _, group in by_network]
    for same_network in _spread(shared, functools.partial(_prune_group, shared), groups):
        yield from same_network
    yield from _spread(shared, functools.partial(_prune_by_training, shared), by_training)


def _prune_group(
    shared: _Shared, runs: list[Run], device: jax.Device | None
) -> list[events.Pruned | Failed]:
    """Prunes runs of one network, one after another."""
    del device  # a mask is the same on every device

    def emit_or_stop(event: Event) -> None:
        shared.emit(event)
        if isinstance(event, events.Pruning) and shared.should_stop():
            raise storage.Stopped(
                "stopped while pruning. Run the same command without --overwrite to resume."
            )

    outcomes = masks.prune_all(
        runs, shared.workdir, overwrite=shared.overwrite, emit=emit_or_stop, build=shared.build
    )
    found: list[events.Pruned | Failed] = []
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            found.append(outcome)
        else:
            found.append(_pruned(shared, outcome.run, outcome.row))
    return found


def _prune_by_training(
    shared: _Shared, run: Run, device: jax.Device | None
) -> events.Pruned | Failed:
    """Prunes a run by IMP."""
    try:
        built = shared.build(run)
        network, recipe = built.network, _recipe(shared, run)
        # Before the levels are trained, which takes time.
        initialization.check_compression(run, network, built.max_compression)
        key = (network.model, _recipe_key(run), device)
        compile_fn = lambda: programs.one(run, network.model, recipe, split=shared.split)
        compiled = _compiled(shared, key, compile_fn)
        _, row = levels.find_or_make_mask(
            run,
            network,
            shared.workdir,
            recipe,
            compiled,
            maximum=built.max_compression,
            overwrite=shared.overwrite,
            emit=shared.emit,
            should_stop=shared.should_stop,
        )
    except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return Failed(run, error)
    return _pruned(shared, run, row)


def _pruned(shared: _Shared, run: Run, row: Mapping[str, Any]) -> events.Pruned:
    event = events.Pruned(run, row)
    shared.emit(event)
    return event


# Training


def _train(shared: _Shared, runs: Sequence[Run]) -> Iterator[Outcome]:
    """Trains runs that are pruned, and yields their outcomes as they come."""
    for some in _by_shapes(shared, runs):
        yield from _train_some(shared, some)


def _train_some(shared: _Shared, runs: Sequence[Run]) -> Iterator[Outcome]:
    """Trains runs of a few networks.

    - With `split`, or if the data is streamed, a run trains alone on all devices.
    - A compact network shares its shape with no other, so it trains alone on one device.
    - Masked networks of one kind share a program, and train together on all devices.
    """
    whole, masked, undecided = [], [], []
    # A form is chosen after pruning, but some configs decide on it before.
    for run in runs:
        if shared.split or run.config.dataset in data.STREAMED:
            whole.append(run)
        elif run.config.train.compact is False:
            masked.append(run)
        else:
            undecided.append(run)

    # Those that may be compact come first, since some of them turn out to train masked.
    for some in _freeing(shared, _chunks(undecided, _COMPACT_AT_ONCE * len(shared.devices))):
        for result in _spread(shared, functools.partial(_train_if_compact, shared), some):
            if isinstance(result, Run):
                masked.append(result)
            else:
                yield from result
    for run in whole:
        task = _task(shared, run)
        if isinstance(task, Failed):
            yield task
        else:
            yield from _train_on_all_devices(shared, task)
    for same_kind in _grouped(masked, functools.partial(_kind, shared)):
        yield from _train_kind(shared, same_kind)


def _train_if_compact(shared: _Shared, run: Run, device: jax.Device | None) -> list[Outcome] | Run:
    """Trains a run whose form is the compact one; returns the run itself if it trains masked."""
    assert device is not None
    task = _task(shared, run)
    if isinstance(task, Failed):
        return [task]
    if not task.form.compact:
        return run
    return _train_together(shared, [task], Layout((device,), 1, run.config.sweep.batching))


def _train_on_all_devices(shared: _Shared, task: _Task) -> list[Outcome]:
    """Trains a run by itself, its batches split over all devices of this process."""
    run, model = task.run, task.form.network.model
    batch_size = run.config.train.batch_size
    is_split = training.batch_sharding(batch_size) is not None
    shared.emit(events.Started(run, task.form, len(shared.devices) if is_split else 1))
    recipe = _recipe(shared, run)
    key = (model, _recipe_key(run), None)
    compile_fn = lambda: programs.one(run, model, recipe, split=True)
    return _train_tasks(shared, [task], key, compile_fn, shared.devices, 1)


def _kind(shared: _Shared, run: Run) -> str:
    """Returns a key that is equal for masked runs that can train together.

    Such runs share a program, and are at the same step.
    """
    config = run.config
    # The holes of a mask are part of a program's input, and these decide where they are.
    names = ("kernels", "biases", "norms", "exclude", "dense_classifier")
    prunable = {name: getattr(config.prune, name) for name in names}
    # The loop counts the steps of a batch once, so runs that resume elsewhere train apart.
    step = checkpoints.latest_step(shared.workdir.checkpoint_path(run.train_id))
    model = (config.model, config.dataset, config.width_multiplier)
    recipe = run.train_dict["train"]
    return json.dumps((*model, prunable, recipe, dataclasses.asdict(config.sweep), step))


def _train_kind(shared: _Shared, runs: Sequence[Run]) -> Iterator[Outcome]:
    """Trains runs of one kind in batches on all devices.

    Where a device has no memory for its runs, it is given half as many.
    """
    options = runs[0].config.sweep
    per_device = min(options.runs_per_device, len(runs))
    # No more devices than have a run: each would train a copy of the last one.
    num_needed = -(-len(runs) // options.runs_per_device)
    num_devices = min(len(shared.devices), num_needed)
    layout = Layout(shared.devices[:num_devices], per_device, options.batching)
    left = list(runs)
    while left:
        batch = left[: num_devices * layout.per_device]
        found = [_task(shared, run) for run in batch]
        failed = [task for task in found if isinstance(task, Failed)]
        tasks = [task for task in found if isinstance(task, _Task)]
        try:
            outcomes = _train_together(shared, tasks, layout) if tasks else []
        except OutOfMemory as error:
            num_left = layout.per_device // 2
            shared.emit(events.Halved(str(error), layout.per_device, num_left))
            # The runs of this batch stay in `left`, and resume from what they have saved.
            layout = layout._replace(per_device=num_left)
            continue
        left = left[len(batch) :]
        yield from failed
        yield from outcomes


def _train_together(shared: _Shared, tasks: Sequence[_Task], layout: Layout) -> list[Outcome]:
    """Trains runs of one kind on some devices.

    Raises:
      OutOfMemory: a device cannot hold its runs. What was saved stays.
    """
    run, model = tasks[0].run, tasks[0].form.network.model
    recipe = _recipe(shared, run)
    for task in tasks:
        shared.emit(events.Started(task.run, task.form, 1))
    key = (model, _recipe_key(run), layout)
    compile_fn = lambda: programs.many(run, model, recipe, layout)
    return _train_tasks(shared, tasks, key, compile_fn, layout.devices, layout.per_device)


def _train_tasks(
    shared: _Shared,
    tasks: Sequence[_Task],
    key: Any,
    compile_fn: Callable[[], Programs],
    devices: tuple[jax.Device, ...],
    per_device: int,
) -> list[Outcome]:
    """Trains runs by one program, unless another process has them.

    Raises:
      OutOfMemory: a device cannot hold its runs, and has more than one.
    """
    left = []
    # The locks are held until the rows are written.
    with contextlib.ExitStack() as stack:
        free, busy = _lock(shared, [task.run for task in tasks], stack)
        outcomes: list[Outcome] = [*busy]
        for task in tasks:
            if task.run not in free:
                continue
            # Another process may have finished it since the rows were read.
            row = shared.workdir.find_row(task.run.train_id) if shared.skips_done else None
            if row is None:
                left.append(task)
            else:
                outcomes.append(Finished(task.run, row, found=True))
        if left:
            outcomes += _train_locked(shared, left, key, compile_fn, devices, per_device)
    return outcomes


def _train_locked(
    shared: _Shared,
    tasks: Sequence[_Task],
    key: Any,
    compile_fn: Callable[[], Programs],
    devices: tuple[jax.Device, ...],
    per_device: int,
) -> list[Outcome]:
    """Trains runs, and writes their rows when all else is on the disk; see `_train_tasks`."""
    run = tasks[0].run
    recipe = _recipe(shared, run)
    jobs = [
        starts.make_job(task.run, task.mask, task.form, recipe, shared.workdir) for task in tasks
    ]
    try:
        compiled = _compiled(shared, key, compile_fn)
        trained = loop.train(
            jobs, recipe, compiled, emit=shared.emit, should_stop=shared.should_stop
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = _out_of_memory(error, run, devices[0], per_device)
        # Fewer runs would not help, and the other runs may be smaller.
        if per_device == 1:
            return [Failed(task.run, problem) for task in tasks]
        raise problem from error
    outcomes: list[Outcome] = []
    for task, result in zip(tasks, trained, strict=True):
        if isinstance(result, Exception):
            outcomes.append(Failed(task.run, result))
        else:
            row = results.write(task.run, task.mask, task.form, result, shared.workdir)
            outcomes.append(Finished(task.run, row))
    return outcomes


def _out_of_memory(error: Exception, run: Run, device: jax.Device, per_device: int) -> OutOfMemory:
    """Returns the error that says which runs do not fit into the memory of a device."""
    first_line = str(error).splitlines()[0][:200]
    runs = "a run" if per_device == 1 else f"{per_device} runs"
    return OutOfMemory(
        f"{runs} of {run.config.model} do not fit into the memory of {device}: {first_line}."
    )


def _task(shared: _Shared, run: Run) -> _Task | Failed:
    """Reads the mask of a pruned run, and chooses the form in which it trains."""
    try:
        network = shared.build(run).network
        found = masks.find_mask(run, network, shared.workdir)
        assert found is not None, "it was pruned before"
        mask, _ = found
        return _Task(run, mask, starts.choose_form(run, network, mask))
    except ValueError as error:
        return Failed(run, error)


# Shared by runs


def _recipe(shared: _Shared, run: Run) -> Recipe:
    """Returns the optimizer and the data of a run, which many runs share."""
    # No lock: `_prepare` fills it before threads begin.
    key = _recipe_key(run)
    if key not in shared.recipes:
        shared.recipes[key] = programs.make_recipe(run)
    return shared.recipes[key]


def _compiled(shared: _Shared, key: Any, compile_fn: Callable[[], Programs]) -> Programs:
    """Returns the programs of a key, compiled when they are first needed."""
    # No lock: keys of different threads name different devices.
    if key not in shared.programs:
        shared.programs[key] = compile_fn()
    return shared.programs[key]


def _spread(
    shared: _Shared, function: Callable[[_Item, jax.Device | None], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Yields function(item, device) of each item as it comes, one at a time on each device.

    With `split` there is one item at a time, and no default device.
    """
    if shared.split:
        return (function(item, None) for item in items)
    return spreading.over_devices(function, items, shared.devices)


def _by_shapes(shared: _Shared, runs: Iterable[Run]) -> Iterator[list[Run]]:
    """Yields the runs of a few shapes at a time, and drops the programs of earlier ones."""
    groups = _grouped(runs, lambda run: run.shapes_key)
    # As many as there are devices, since each may be busy with another network.
    together = _chunks(groups, len(shared.devices))
    return _freeing(shared, (list(itertools.chain(*some)) for some in together))


def _freeing(shared: _Shared, parts: Iterable[_Item]) -> Iterator[_Item]:
    """Yields parts of the work, and drops all compiled programs between two of them."""
    for number, part in enumerate(parts):
        if number:
            shared.programs.clear()
            memory.free_programs()
        yield part


def _chunks(items: Sequence[_Item], size: int) -> list[Sequence[_Item]]:
    """Returns the items in parts of this size; the last one may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[list[Run]]:
    """Returns the runs of each key, in the order in which the keys come first."""
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _recipe_key(run: Run) -> str:
    """Returns a key that is equal for runs of one call that have the same recipe.

    A streamed run has a key for each seed, since the seed decides the order of the stream.
    """
    config = run.config
    seed = config.seed if config.dataset in data.STREAMED else None
    return json.dumps((config.model, config.dataset, seed, run.train_dict["train"]))
