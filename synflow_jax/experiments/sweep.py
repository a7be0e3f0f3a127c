"""A grid of training runs over the devices of this process: prune each, train each. The only pmap.

Masked runs of one network have one shape: they share one compiled program, which is pmapped over the devices, with
several runs a device one after another (`lax.map`) or side by side (`vmap`). A compact run has shapes of its own: it
has a device to itself. What a run computes does not depend on which runs are beside it, nor on where the sweep was
stopped: rows that are there are skipped, and a run that was begun goes on from its last checkpoint, which is the one
that train.py writes for a single run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
import queue
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import data, storage, training, trees
from synflow_jax.experiments import config, imp_run, prune_grid, prune_run, train_run
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.prune_grid import Outcome
from synflow_jax.experiments.train_run import Plan
from synflow_jax.storage import checkpoints
from synflow_jax.training import TrainInfo, TrainState
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask

Item = TypeVar("Item")
Result = TypeVar("Result")
# on_progress(settings, what, fraction): "pruned", or "training" and how much of it is done.
ProgressFn = Callable[[Config, str, float], None]


class Job(NamedTuple):
    """A run that is ready to be trained. mask: of the full network; form: what is trained of it."""

    settings: Config
    mask: Mask
    form: Form


class Layout(NamedTuple):
    """Where runs are trained: so many on each of the devices, by "map" or "vmap"."""

    devices: tuple[jax.Device, ...]
    per_device: int
    batching: str


class _Programs(NamedTuple):
    """What is compiled for one kind of run and one layout; states and infos have the axes [device, run, ...].

    advance(states, infos, start, stop) -> the same after those steps; close(states, infos, epoch) -> infos, with the
    epoch evaluated and written into the curves.
    """

    advance: Callable[..., tuple[TrainState, TrainInfo]]
    close: Callable[..., TrainInfo]


class _Sweep(NamedTuple):
    """What all runs of a sweep share. plans and programs are kept from batch to batch, by what decides on them."""

    workdir: pathlib.Path
    devices: tuple[jax.Device, ...]
    overwrite: bool
    on_progress: ProgressFn
    should_stop: Callable[[], bool]
    say: Callable[[str], None]
    plans: dict[Any, Plan]
    programs: dict[Any, _Programs]


def check_workdir(runs: Sequence[Config], workdir: pathlib.Path) -> None:
    """Keeps what the runs of a folder have in common in its sweep.json, and raises ValueError if that has changed.

    What a grid can vary may differ from sweep to sweep: such rows tell themselves apart. Whatever else differs would
    make rows that look alike and are not.

    Args:
      runs: from `config.expand`, of all processes.
      workdir: the folder.
    """
    path = workdir / "sweep.json"
    common = _common(runs[0])
    if path.exists():
        try:
            earlier = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} cannot be read: {error}. Delete it if its rows are to be kept."
            ) from error
        differing = [key for key in common if key in earlier and earlier[key] != common[key]]
        if differing:
            lines = "; ".join(
                f"{key} was {earlier[key]!r} and is {common[key]!r}" for key in differing
            )
            raise ValueError(
                f"workdir={str(workdir)!r} holds a sweep of another config: {lines}. Its rows would not compare with "
                "these: choose another --workdir, or set the config's values back."
            )
    if jax.process_index() == 0:
        storage.write_json(path, common)


def _common(run: Config) -> dict[str, Any]:
    """By key, what no grid varies and what decides on results."""
    values = dataclasses.asdict(run)
    values["train"] = config.train_dict(run)["train"]
    values["init"] = config.init_digest(run)
    flat = {
        f"{part}.{name}" if isinstance(value, dict) else part: item
        for part, value in values.items()
        for name, item in (value.items() if isinstance(value, dict) else [("", value)])
    }
    left_out = {
        *config.grid_keys(run),
        "prune.beyond_maximum",
        "prune.record_units",
        "prune.over_devices",
        "grids",
    }
    kept = {
        key: v
        for key, v in flat.items()
        if key not in left_out and not key.startswith(("data.", "grid.", "sweep."))
    }
    return json.loads(json.dumps(kept))  # tuples as lists: as it will be read


def run(
    runs: Sequence[Config],
    workdir: pathlib.Path,
    *,
    overwrite: bool = False,
    devices: Sequence[jax.Device] | None = None,
    on_progress: ProgressFn = lambda settings, what, fraction: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """Prunes and trains, and yields an outcome a run, as they come. Every file is that of `train_run.train`.

    Args:
      runs: those of this process, from `config.expand`, checked by `config.check` and `config.check_train`.
      workdir: the folder of all of them.
      overwrite: runs again what `workdir` holds.
      devices: where the runs are trained; all of this process by default.
      on_progress: called on the host, at times by other threads.
      should_stop: asked every few seconds; True saves all that is being trained and raises `storage.Stopped`.
      say: told, in a sentence, what a person would want to know of: a device without memory.

    Raises:
      OSError: something cannot be written.
      storage.Stopped: see `should_stop`.
    """
    devices = tuple(jax.local_devices() if devices is None else devices)
    sweep = _Sweep(workdir, devices, overwrite, on_progress, should_stop, say, {}, {})
    failed: list[dict[str, Any]] = []
    path = storage.own(prune_grid.failed_path(workdir))
    path.unlink(missing_ok=True)
    for outcome in _outcomes(sweep, runs):
        if outcome.error is not None:
            failed.append({"run_id": config.train_id(outcome.settings), "error": outcome.error})
            storage.write_json(path, failed)
        yield outcome


def _outcomes(sweep: _Sweep, runs: Sequence[Config]) -> Iterator[Outcome]:
    found = (
        {}
        if sweep.overwrite
        else {row["run_id"]: row for row in storage.read_all_rows(sweep.workdir)}
    )
    missing = []
    for settings in runs:
        run_id = config.train_id(settings)
        if run_id in found:
            yield Outcome(settings, found[run_id], found=True)
        else:
            missing.append(settings)
            if sweep.overwrite:
                checkpoints.delete(train_run.checkpoint_path(sweep.workdir, run_id))
    pruned = []
    for outcome in _prune(sweep, missing):
        if outcome.error is not None:
            yield outcome
        else:
            pruned.append(outcome.settings)
    yield from _train(sweep, pruned)


def _prune(sweep: _Sweep, runs: Sequence[Config]) -> Iterator[Outcome]:
    """The pruning runs, those of one network on one device: a mask is made by the same program on every device."""

    def prune(same_network: list[Config], device: jax.Device) -> list[Outcome]:
        del device
        outcomes = []
        for outcome in prune_grid.outcomes(same_network, sweep.workdir, sweep.overwrite, None):
            if sweep.should_stop():
                raise storage.Stopped(
                    "stopped while pruning. The same command, without --overwrite, goes on."
                )
            if outcome.error is None:
                sweep.on_progress(outcome.settings, "pruned", 0.0)
            outcomes.append(outcome)
        return outcomes

    at_once = [settings for settings in runs if settings.prune.pruner != config.IMP]
    groups = [list(group) for _, group in itertools.groupby(at_once, prune_grid.network_key)]
    for outcomes in _spread(prune, groups, sweep.devices):
        yield from outcomes
    by_training = [settings for settings in runs if settings.prune.pruner == config.IMP]
    yield from _spread(functools.partial(_prune_by_training, sweep), by_training, sweep.devices)


def _prune_by_training(sweep: _Sweep, settings: Config, device: jax.Device) -> Outcome:
    del device
    num_levels = config.num_iterations(settings.prune)

    def report(level: int, now: train_run.Progress) -> None:
        del now
        sweep.on_progress(
            settings, f"level {level} of {num_levels}", 0.0
        )  # its own training is still to come

    try:
        network = prune_run.build(settings)
        plan = train_run.prepare(settings, network.input_shape, split=False)
        _, row = imp_run.find_or_make_mask(
            settings, network, sweep.workdir, plan,
            overwrite=sweep.overwrite, on_progress=report, should_stop=sweep.should_stop,
        )  # fmt: skip
    except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return Outcome(settings, error=str(error))
    sweep.on_progress(settings, "pruned", 0.0)
    return Outcome(settings, row)


def _spread(
    function: Callable[[Item, jax.Device], Result],
    items: Iterable[Item],
    devices: Sequence[jax.Device],
) -> Iterator[Result]:
    """function(item, device) for every item, one at a time on each device; yields the results as they come."""
    if len(devices) == 1:
        with jax.default_device(devices[0]):
            yield from (function(item, devices[0]) for item in items)
        return
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in devices:
        free.put(device)

    def call(item: Item) -> Result:
        device = free.get()
        try:
            with jax.default_device(device):
                return function(item, device)
        finally:
            free.put(device)

    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _train(sweep: _Sweep, runs: Sequence[Config]) -> Iterator[Outcome]:
    together: dict[Any, list[Config]] = {}

    def alone(settings: Config, device: jax.Device) -> Outcome | None:
        """Trains a run that is compact; the others wait to be trained together."""
        job = _job(sweep, settings)
        if isinstance(job, Outcome):
            return job
        if not job.form.compact:
            together.setdefault(_kind(sweep, settings), []).append(settings)
            return None
        (outcome,) = _batch(sweep, [job], Layout((device,), 1, settings.sweep.batching))
        return outcome

    split = [settings for settings in runs if settings.dataset in data.STREAMED]
    masked = [
        settings for settings in runs if settings not in split and settings.train.compact is False
    ]
    for settings in masked:
        together.setdefault(_kind(sweep, settings), []).append(settings)
    rest = [settings for settings in runs if settings not in split and settings not in masked]
    yield from (outcome for outcome in _spread(alone, rest, sweep.devices) if outcome is not None)
    for settings in split:  # each on all devices, since no device holds the data
        yield _one(sweep, settings)
    for same in together.values():
        yield from _same_kind(sweep, same)


def _kind(sweep: _Sweep, settings: Config) -> Any:
    """Masked runs of one kind differ in what they are given, not in their program; and stand at the same step."""
    values = config.train_dict(settings)
    shape = {
        key: values["prune"][key]
        for key in ("kernels", "biases", "norms", "exclude", "dense_classifier")
    }
    at = checkpoints.latest_step(
        train_run.checkpoint_path(sweep.workdir, config.train_id(settings))
    )
    names = (settings.model, settings.dataset, settings.width_multiplier)
    return json.dumps((*names, shape, values["train"], dataclasses.asdict(settings.sweep), at))


def _same_kind(sweep: _Sweep, runs: Sequence[Config]) -> Iterator[Outcome]:
    """Batches of runs on all devices; half as many a device, and again, where a device has no memory for them."""
    options = runs[0].sweep
    num_devices = min(len(sweep.devices), -(-len(runs) // options.runs_per_device))
    layout = Layout(
        sweep.devices[:num_devices], min(options.runs_per_device, len(runs)), options.batching
    )
    left = list(runs)
    while left:
        batch = left[: len(layout.devices) * layout.per_device]
        jobs, outcomes = [], []
        for settings in batch:
            job = _job(sweep, settings)
            if isinstance(job, Outcome):
                outcomes.append(job)
            else:
                jobs.append(job)
        try:
            outcomes += _batch(sweep, jobs, layout) if jobs else []
        except _OutOfMemory as error:
            if layout.per_device == 1:
                outcomes += [Outcome(job.settings, error=str(error)) for job in jobs]
            else:
                layout = layout._replace(per_device=layout.per_device // 2)
                sweep.say(f"{error} Going on with {layout.per_device} of them a device.")
                continue
        left = left[len(batch) :]
        yield from outcomes


def _one(sweep: _Sweep, settings: Config) -> Outcome:
    """One run on all devices, by `train_run.train`."""
    try:
        network = prune_run.build(settings)
        found = prune_run.find_mask(settings, network, sweep.workdir)
        assert found is not None
        row = train_run.train(
            settings, network, found[0], sweep.workdir,
            on_progress=lambda now: sweep.on_progress(settings, "training", now.step / now.num_steps),
            should_stop=sweep.should_stop,
        )  # fmt: skip
    except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
        return Outcome(settings, error=str(error))
    return Outcome(settings, row)


def _job(sweep: _Sweep, settings: Config) -> Job | Outcome:
    try:
        network = prune_run.build(settings)
        found = prune_run.find_mask(settings, network, sweep.workdir)
        assert found is not None, "it was pruned above"
        return Job(settings, found[0], train_run.choose_form(settings, network, found[0]))
    except ValueError as error:
        return Outcome(settings, error=str(error))


class _OutOfMemory(Exception):
    """A device cannot hold the runs that it was given; the message says so."""


def _batch(sweep: _Sweep, jobs: Sequence[Job], layout: Layout) -> list[Outcome]:
    """Trains runs of one program together, from their checkpoints to their rows.

    Raises:
      _OutOfMemory: there was not enough of it; what was saved is there.
      storage.Stopped: the sweep was asked to stop, and has saved.
    """
    outcomes: dict[int, Outcome] = {}
    with contextlib.ExitStack() as stack:
        try:
            _fit(sweep, jobs, layout, stack, outcomes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first_line = str(error).splitlines()[0][:200]
            raise _OutOfMemory(
                f"{layout.per_device} runs of {jobs[0].settings.model} do not fit into the memory of "
                f"{layout.devices[0]}: {first_line}."
            ) from error
    return [outcomes[i] for i in range(len(jobs))]


def _fit(
    sweep: _Sweep,
    jobs: Sequence[Job],
    layout: Layout,
    stack: contextlib.ExitStack,
    outcomes: dict[int, Outcome],
) -> None:
    settings, model = jobs[0].settings, jobs[0].form.model
    plan = _plan(sweep, settings)
    started = time.perf_counter()
    folders, starts = {}, {}
    for i, (run, mask, form) in enumerate(jobs):
        folder = checkpoints.open_folder(
            train_run.checkpoint_path(sweep.workdir, config.train_id(run)),
            train_run.describe(run, mask, form),
            run.train.keep_checkpoints,
        )
        try:
            folders[i] = stack.enter_context(folder)
            train_run.check_form(folders[i], form)
            like = (
                train_run.first_state(run, plan, form, sweep.workdir),
                training.init_info(run.train.num_epochs),
            )
            restored = checkpoints.restore_latest(folders[i], like)
            starts[i] = like if restored is None else restored[1]
        except ValueError as error:
            outcomes[i] = Outcome(run, error=str(error))
    if not starts:
        return
    # Where there are fewer runs than places the last one is trained in several, and one of them is looked at.
    places = list(starts)
    num_places = len(layout.devices) * layout.per_device
    filled = [starts[i] for i in [*places, *places[-1:] * (num_places - len(places))]]
    states, infos = (_on_devices(trees_, layout) for trees_ in zip(*filled, strict=True))
    programs = _programs(sweep, settings, model, plan, layout)
    step = int(starts[places[0]][0].step)
    first, stride, saved_at = step, 0, time.perf_counter()
    del starts, filled

    def alive() -> list[tuple[int, int]]:
        """(place, index of its run) of the runs that have not failed."""
        return [(place, i) for place, i in enumerate(places) if i not in outcomes]

    def save(*, wait: bool = False) -> float:
        host = _on_host((states, infos))
        for place, i in alive():
            checkpoints.save(folders[i], step, _pick(host, place, layout), wait=wait)
        return time.perf_counter()

    def fail(bad: np.ndarray, at: np.ndarray) -> None:
        for place, i in alive():
            if bad[place]:
                error = train_run.not_finite(int(at[place]), plan, jobs[i].settings, folders[i])
                outcomes[i] = Outcome(jobs[i].settings, error=error)

    while step < plan.num_steps and alive():
        end_of_epoch = (step // plan.steps_per_epoch + 1) * plan.steps_per_epoch
        stop = min(step + stride, end_of_epoch)
        before = time.perf_counter()
        states, infos = programs.advance(states, infos, step, stop)
        bad_steps = np.asarray(infos.bad_step).reshape(-1)  # waits for the devices
        seconds = time.perf_counter() - before
        fail(bad_steps >= 0, bad_steps)
        stride = train_run.next_stride(stride, stop - step, seconds)
        step = stop
        if step == end_of_epoch:
            epoch = step // plan.steps_per_epoch - 1
            infos = programs.close(states, infos, epoch)
            host_infos = _on_host(infos)
            test_losses = host_infos.curve["test_loss"].reshape(num_places, -1)[:, epoch]
            fail(~np.isfinite(test_losses), np.full(num_places, step - 1))
            for place, i in alive():
                path = train_run.curve_path(sweep.workdir, config.train_id(jobs[i].settings))
                train_run.write_curve(path, _pick(host_infos, place, layout))
            if (epoch + 1) % settings.train.checkpoint_every == 0 or step == plan.num_steps:
                saved_at = save()
        for _, i in alive():
            sweep.on_progress(jobs[i].settings, "training", step / plan.num_steps)
        if time.perf_counter() - saved_at > train_run.SECONDS_UNSAVED:
            saved_at = save()
        if sweep.should_stop() and step < plan.num_steps:
            save(wait=True)
            raise storage.Stopped(
                f"stopped: {len(alive())} runs stand at step {step} of {plan.num_steps}, and are saved. The same "
                "command, without --overwrite, goes on from there."
            )
    host = _on_host((states, infos))
    seconds = (time.perf_counter() - started) / len(places)
    for place, i in alive():
        run, mask, form = jobs[i]
        row = train_run.make_row(run, mask, form, *_pick(host, place, layout))
        storage.write_row(storage.own(sweep.workdir / "rows.jsonl"), row)
        storage.write_row(
            storage.own(sweep.workdir / "timing.jsonl"),
            {
                "run_id": row["run_id"],
                "seconds": seconds,
                "steps": plan.num_steps - first,
                "together": len(places),
            },
        )
        outcomes[i] = Outcome(run, row)


def _plan(sweep: _Sweep, settings: Config) -> Plan:
    key = json.dumps((settings.model, settings.dataset, config.train_dict(settings)["train"]))
    if key not in sweep.plans:
        _, input_shape = prune_run.architecture(settings)
        sweep.plans[key] = train_run.prepare(settings, input_shape, split=False)
    return sweep.plans[key]


def _programs(sweep: _Sweep, settings: Config, model: Any, plan: Plan, layout: Layout) -> _Programs:
    key = (model, json.dumps((settings.dataset, config.train_dict(settings)["train"])), layout)
    if key not in sweep.programs:
        sweep.programs[key] = make_programs(settings, model, plan, layout)
    return sweep.programs[key]


def make_programs(settings: Config, model: Any, plan: Plan, layout: Layout) -> _Programs:
    """The programs of one kind of run: pmapped over the devices, and over the runs of a device by `layout.batching`."""
    options, dataset = settings.train, data.spec(settings.dataset)
    dtype = jnp.dtype(options.compute_dtype)
    assert plan.arrays is not None, "streamed data sets are trained by train_run.train"
    step = training.make_step(
        model, plan.optimizer, label_smoothing=options.label_smoothing, compute_dtype=dtype
    )
    num_examples = len(plan.arrays.train_labels)
    epoch_fn = training.make_epoch(
        step, dataset, num_examples, options.batch_size, augment=options.augment
    )
    evaluate = training.make_evaluate(model, dataset, options.batch_size, compute_dtype=dtype)

    def each(function: Callable[[Any], Any], runs: Any) -> Any:
        return (
            jax.vmap(function)(runs) if layout.batching == "vmap" else jax.lax.map(function, runs)
        )

    def advance(
        states: TrainState,
        infos: TrainInfo,
        images: jax.Array,
        labels: jax.Array,
        start: jax.Array,
        stop: jax.Array,
    ) -> tuple[TrainState, TrainInfo]:
        return each(lambda run: epoch_fn(*run, images, labels, start, stop), (states, infos))

    def close(
        states: TrainState, infos: TrainInfo, images: jax.Array, labels: jax.Array, epoch: jax.Array
    ) -> TrainInfo:
        finish = lambda run: training.finish_epoch(run[1], epoch, evaluate(run[0], images, labels))
        return each(finish, (states, infos))

    pmapped_advance = jax.pmap(
        advance, in_axes=(0, 0, 0, 0, None, None), devices=layout.devices, donate_argnums=(0, 1)
    )
    pmapped_close = jax.pmap(
        close, in_axes=(0, 0, 0, 0, None), devices=layout.devices, donate_argnums=(1,)
    )
    copies = [_copies(np.asarray(array), layout) for array in plan.arrays]
    return _Programs(
        lambda states, infos, start, stop: pmapped_advance(states, infos, *copies[:2], start, stop),
        lambda states, infos, epoch: pmapped_close(states, infos, *copies[2:], epoch),
    )


def _sharding(layout: Layout) -> jax.sharding.NamedSharding:
    mesh = jax.sharding.Mesh(np.array(layout.devices), ("devices",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))


def _copies(array: np.ndarray, layout: Layout) -> jax.Array:
    """The same on every device: [device, ...]."""
    return jax.device_put(
        np.broadcast_to(array, (len(layout.devices), *array.shape)), _sharding(layout)
    )


def _on_devices(runs: Sequence[trees.Tree], layout: Layout) -> trees.Tree:
    """The trees of all places, stacked: [device, run, ...]."""
    axes = len(layout.devices), layout.per_device

    def stack(*leaves: Any) -> jax.Array:
        if jnp.issubdtype(jnp.result_type(leaves[0]), jax.dtypes.prng_key):
            return jax.device_put(jnp.stack(leaves).reshape(axes), _sharding(layout))
        stacked = np.stack([np.asarray(leaf) for leaf in leaves])  # on the host: no program a shape
        return jax.device_put(stacked.reshape(*axes, *np.shape(leaves[0])), _sharding(layout))

    return jax.tree.map(stack, *runs)


def _on_host(tree: trees.Tree) -> trees.Tree:
    """As NumPy arrays, but for keys."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.tree.map(lambda leaf: leaf if is_key(leaf) else np.asarray(leaf), tree)


def _pick(tree: trees.Tree, place: int, layout: Layout) -> trees.Tree:
    """The tree of one place."""
    return jax.tree.map(lambda leaf: leaf[divmod(place, layout.per_device)], tree)
