"""Prunes and trains runs: one run on all devices, or the runs of a grid spread over them.

`run` decides which runs are left to do and on which devices; `loop.train` trains them. A run of a
grid ends in the same bits on any layout of devices and processes, whichever runs train at the same
time, and however often it was stopped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import queue
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
    programs,
    results,
    starts,
)
from synflow_jax.experiments.events import Event, EventFn, Failed, Finished, Outcome
from synflow_jax.experiments.initialization import Builder
from synflow_jax.experiments.loop import StopFn
from synflow_jax.experiments.programs import Layout, Programs, Recipe
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

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

    1. Find the runs that have a row. They are finished.
    2. Read the data, so that an error is found before long work.
    3. Prune the others. Runs of one network follow one another on one device.
    4. Train them; see `_Engine.train`. The row of a run is written last of all.

    A run that fails is listed in failed.json, and the others continue.

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
    engine = _Engine(workdir, devices, split, overwrite, emit, should_stop)
    outcomes: dict[str, Outcome] = {}
    for outcome in failures.listed(engine.outcomes(runs), workdir, lambda run: run.train_id):
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
    engine = _Engine(workdir, devices, True, False, emit, should_stop)
    form = starts.choose_form(run, network, mask) if form is None else form
    (outcome,) = engine.train_on_all_devices(_Task(run, mask, form))
    if isinstance(outcome, Failed):
        raise outcome.error
    return dict(outcome.row)


class _Engine:
    """Holds what the runs of one call share: devices, networks, recipes and programs."""

    def __init__(
        self,
        workdir: Workdir,
        devices: tuple[jax.Device, ...],
        split: bool,
        overwrite: bool,
        emit: EventFn,
        should_stop: StopFn,
    ) -> None:
        self.workdir = workdir
        self.devices = devices
        self.split = split
        self.overwrite = overwrite
        self.emit = emit
        self.should_stop = should_stop
        self._recipes: dict[Any, Recipe] = {}
        self._programs: dict[Any, Programs] = {}
        self._builder = Builder(emit)

    def outcomes(self, runs: Sequence[Run]) -> Iterator[Outcome]:
        """Yields the outcome of each run as it comes; see `run`."""
        rows: dict[str, Any] = {}
        if not self.overwrite:
            rows = {row["run_id"]: row for row in self.workdir.rows()}
        ready = []
        for run in runs:
            if run.train_id in rows:
                yield Finished(run, rows[run.train_id], found=True)
                continue
            # The mask, and IMP's levels, are overwritten when they are made.
            if self.overwrite:
                checkpoints.delete(self.workdir.checkpoint_path(run.train_id))
            try:
                if self.split:
                    # The network of a single run is shown first, even if the folder has its mask.
                    self._builder(run)
                self.recipe(run)
            except ValueError as error:
                yield Failed(run, error)
            else:
                ready.append(run)
        pruned = []
        for result in self.prune(ready):
            if isinstance(result, Failed):
                yield result
            else:
                pruned.append(result.run)
        yield from self.train(pruned)

    # Pruning

    def prune(self, runs: Sequence[Run]) -> Iterator[events.Pruned | Failed]:
        """Prunes runs: those of one network on one device, IMP's each on a device."""
        at_once = [run for run in runs if not run.pruner.trains]
        by_training = [run for run in runs if run.pruner.trains]
        groups = [
            list(group) for _, group in itertools.groupby(at_once, lambda run: run.network_key)
        ]
        for same_network in self._spread(self._prune_group, groups):
            yield from same_network
        yield from self._spread(self._prune_by_training, by_training)

    def _prune_group(
        self, runs: list[Run], device: jax.Device | None
    ) -> list[events.Pruned | Failed]:
        """Prunes runs of one network, one after another."""
        del device  # a mask is the same on every device

        def emit_or_stop(event: Event) -> None:
            self.emit(event)
            if isinstance(event, events.Pruning) and self.should_stop():
                raise storage.Stopped(
                    "stopped while pruning. Run the same command without --overwrite to resume."
                )

        outcomes = masks.prune_all(
            runs, self.workdir, overwrite=self.overwrite, emit=emit_or_stop, builder=self._builder
        )
        found: list[events.Pruned | Failed] = []
        for outcome in outcomes:
            if isinstance(outcome, Failed):
                found.append(outcome)
            else:
                found.append(self._pruned(outcome.run, outcome.row))
        return found

    def _prune_by_training(self, run: Run, device: jax.Device | None) -> events.Pruned | Failed:
        """Prunes a run by IMP."""
        try:
            built = self._builder(run)
            network, recipe = built.network, self.recipe(run)
            # Before the levels are trained, which takes time.
            initialization.check_compression(run, network, built.max_compression)
            key = (network.model, _recipe_key(run), device)
            compiled = self._compiled(
                key, lambda: programs.one(run, network.model, recipe, split=self.split)
            )
            _, row = levels.find_or_make_mask(
                run,
                network,
                self.workdir,
                recipe,
                compiled,
                maximum=built.max_compression,
                overwrite=self.overwrite,
                emit=self.emit,
                should_stop=self.should_stop,
            )
        except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
            return Failed(run, error)
        return self._pruned(run, row)

    def _pruned(self, run: Run, row: Mapping[str, Any]) -> events.Pruned:
        event = events.Pruned(run, row)
        self.emit(event)
        return event

    # Training

    def train(self, runs: Sequence[Run]) -> Iterator[Outcome]:
        """Trains runs that are pruned, and yields their outcomes as they come.

        - With `split`, or if the data is streamed, a run trains alone on all devices.
        - A compact network shares its shape with no other, so it trains alone on one device.
        - Masked networks of one kind share a program, and train together on all devices.
        """
        whole, masked, undecided = [], [], []
        # A form is chosen after pruning, but some configs decide on it before.
        for run in runs:
            if self.split or run.config.dataset in data.STREAMED:
                whole.append(run)
            elif run.config.train.compact is False:
                masked.append(run)
            else:
                undecided.append(run)

        def train_if_compact(run: Run, device: jax.Device | None) -> list[Outcome]:
            assert device is not None
            task = self._task(run)
            if isinstance(task, Failed):
                return [task]
            if not task.form.compact:
                masked.append(run)
                return []
            return self._train_together([task], Layout((device,), 1, run.config.sweep.batching))

        # Compact ones first: this adds the others to those that train masked.
        for outcomes in self._spread(train_if_compact, undecided):
            yield from outcomes
        for run in whole:
            task = self._task(run)
            yield from [task] if isinstance(task, Failed) else self.train_on_all_devices(task)
        for same_kind in _grouped(masked, self._kind):
            yield from self._train_kind(same_kind)

    def train_on_all_devices(self, task: _Task) -> list[Outcome]:
        """Trains a run by itself, its batches split over all devices of this process."""
        run, model = task.run, task.form.network.model
        batch_size = run.config.train.batch_size
        is_split = training.batch_sharding(batch_size) is not None
        self.emit(events.Started(run, task.form, len(self.devices) if is_split else 1))
        recipe = self.recipe(run)
        key = (model, _recipe_key(run), None)
        compile_fn = lambda: programs.one(run, model, recipe, split=True)
        return self._train_tasks([task], key, compile_fn, self.devices, 1)

    def _kind(self, run: Run) -> str:
        """Returns a key that is equal for masked runs that can train together.

        Such runs share a program, and are at the same step.
        """
        config = run.config
        names = ("kernels", "biases", "norms", "exclude", "dense_classifier")
        prunable = {name: getattr(config.prune, name) for name in names}
        step = checkpoints.latest_step(self.workdir.checkpoint_path(run.train_id))
        model = (config.model, config.dataset, config.width_multiplier)
        recipe = run.train_dict["train"]
        return json.dumps((*model, prunable, recipe, dataclasses.asdict(config.sweep), step))

    def _train_kind(self, runs: Sequence[Run]) -> Iterator[Outcome]:
        """Trains runs of one kind in batches on all devices.

        Where a device has no memory for its runs, it is given half as many.
        """
        options = runs[0].config.sweep
        per_device = min(options.runs_per_device, len(runs))
        num_devices = min(len(self.devices), -(-len(runs) // options.runs_per_device))
        layout = Layout(self.devices[:num_devices], per_device, options.batching)
        left = list(runs)
        while left:
            batch = left[: num_devices * layout.per_device]
            found = [self._task(run) for run in batch]
            failed = [task for task in found if isinstance(task, Failed)]
            tasks = [task for task in found if isinstance(task, _Task)]
            try:
                outcomes = self._train_together(tasks, layout) if tasks else []
            except OutOfMemory as error:
                num_left = layout.per_device // 2
                self.emit(events.Halved(str(error), layout.per_device, num_left))
                layout = layout._replace(per_device=num_left)
                continue
            left = left[len(batch) :]
            yield from failed
            yield from outcomes

    def _train_together(self, tasks: Sequence[_Task], layout: Layout) -> list[Outcome]:
        """Trains runs of one kind on some devices.

        Raises:
          OutOfMemory: a device cannot hold its runs. What was saved stays.
        """
        run, model = tasks[0].run, tasks[0].form.network.model
        recipe = self.recipe(run)
        for task in tasks:
            self.emit(events.Started(task.run, task.form, 1))
        key = (model, _recipe_key(run), layout)
        compile_fn = lambda: programs.many(run, model, recipe, layout)
        return self._train_tasks(tasks, key, compile_fn, layout.devices, layout.per_device)

    def _train_tasks(
        self,
        tasks: Sequence[_Task],
        key: Any,
        compile_fn: Callable[[], Programs],
        devices: tuple[jax.Device, ...],
        per_device: int,
    ) -> list[Outcome]:
        """Trains runs by one program, and writes their rows when all else is on the disk.

        Raises:
          OutOfMemory: a device cannot hold its runs, and has more than one.
        """
        run = tasks[0].run
        recipe = self.recipe(run)
        jobs = [
            starts.make_job(task.run, task.mask, task.form, recipe, self.workdir) for task in tasks
        ]
        try:
            compiled = self._compiled(key, compile_fn)
            trained = loop.train(
                jobs, recipe, compiled, emit=self.emit, should_stop=self.should_stop
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first_line = str(error).splitlines()[0][:200]
            runs = "a run" if per_device == 1 else f"{per_device} runs"
            problem = OutOfMemory(
                f"{runs} of {run.config.model} do not fit into the memory of {devices[0]}: "
                f"{first_line}."
            )
            if per_device == 1:
                return [Failed(task.run, problem) for task in tasks]
            raise problem from error
        outcomes: list[Outcome] = []
        for task, result in zip(tasks, trained, strict=True):
            if isinstance(result, Exception):
                outcomes.append(Failed(task.run, result))
            else:
                row = results.write(task.run, task.mask, task.form, result, self.workdir)
                outcomes.append(Finished(task.run, row))
        return outcomes

    def _task(self, run: Run) -> _Task | Failed:
        """Reads the mask of a pruned run, and chooses the form in which it trains."""
        try:
            network = self._builder(run).network
            found = masks.find_mask(run, network, self.workdir)
            assert found is not None, "it was pruned before"
            mask, _ = found
            return _Task(run, mask, starts.choose_form(run, network, mask))
        except ValueError as error:
            return Failed(run, error)

    # Shared by runs

    def recipe(self, run: Run) -> Recipe:
        """Returns the optimizer and the data of a run, which many runs share."""
        key = _recipe_key(run)
        if key not in self._recipes:
            self._recipes[key] = programs.make_recipe(run)
        return self._recipes[key]

    def _compiled(self, key: Any, compile_fn: Callable[[], Programs]) -> Programs:
        """Returns the programs of a key, compiled when they are first needed."""
        if key not in self._programs:
            self._programs[key] = compile_fn()
        return self._programs[key]

    def _spread(
        self, function: Callable[[_Item, jax.Device | None], _Result], items: Iterable[_Item]
    ) -> Iterator[_Result]:
        """Yields function(item, device) of each item as it comes, one at a time on each device.

        With `split` there is one item at a time, and no default device.
        """
        if self.split:
            yield from (function(item, None) for item in items)
            return
        if len(self.devices) == 1:
            (device,) = self.devices
            with jax.default_device(device):
                yield from (function(item, device) for item in items)
            return
        yield from _on_free_devices(function, items, self.devices)


def _on_free_devices(
    function: Callable[[_Item, jax.Device | None], _Result],
    items: Iterable[_Item],
    devices: Sequence[jax.Device],
) -> Iterator[_Result]:
    """Calls the function in one thread per device, each on the next device that is free."""
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def call(item: _Item) -> _Result:
        device = free.get()
        try:
            with jax.default_device(device):
                return function(item, device)
        finally:
            free.put(device)

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(call, item) for item in items]
        with contextlib.ExitStack() as stack:
            # After an error, the items that have not begun are left out.
            stack.callback(pool.shutdown, cancel_futures=True)
            for future in concurrent.futures.as_completed(futures):
                yield future.result()


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
