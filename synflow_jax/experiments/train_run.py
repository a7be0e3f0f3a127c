"""One training run: from a config and a mask to a trained network, its curve and a row in a folder.

It can be stopped at any moment and goes on where its last checkpoint stands; what it computes does not depend on where
it was stopped, nor on how many steps each call of the compiled loop takes.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from synflow_jax import data, storage, training, trees
from synflow_jax.data import streaming
from synflow_jax.experiments import config, prune_run
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.prune_run import Network
from synflow_jax.storage import checkpoints
from synflow_jax.training import Sums, TrainInfo, TrainState, forms, imp
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask
from synflow_jax.units import compaction

_SECONDS_A_CALL = (
    5.0  # of one call of the compiled loop: between them progress is shown and signals are heard
)
SECONDS_UNSAVED = 600.0  # after which a checkpoint is written within an epoch

AdvanceFn = Callable[[TrainState, TrainInfo, int, int], tuple[TrainState, TrainInfo]]
EvaluateFn = Callable[[TrainState], Sums]


class Progress(NamedTuple):
    """What is shown while a network trains. loss and top1: means over the present epoch so far."""

    step: int
    num_steps: int
    epoch: int
    loss: float
    top1: float
    images_per_second: float
    finished: Mapping[str, float] | None  # the curve's values of an epoch that has just ended


class Plan(NamedTuple):
    """A run's optimizer, its length, its data, and what trains and tests a network on it: `bind(model)`.

    arrays: the data as `bind` has it on the device; None where it is streamed.
    """

    optimizer: optax.GradientTransformation
    bind: Callable[[Any], tuple[AdvanceFn, EvaluateFn]]
    steps_per_epoch: int
    num_steps: int
    arrays: data.Arrays | None


def curve_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where the curve of a training run lies."""
    return workdir / "curves" / f"{run_id}.csv"


def checkpoint_path(workdir: pathlib.Path, run_id: str) -> pathlib.Path:
    """Where the checkpoints of a training run lie."""
    return workdir / "checkpoints" / run_id


def find_row(settings: Config, workdir: pathlib.Path) -> dict[str, Any] | None:
    """The row of an earlier, finished run of the same config in `workdir`."""
    wanted = config.train_id(settings)
    return next((row for row in storage.read_all_rows(workdir) if row["run_id"] == wanted), None)


def find_timing(workdir: pathlib.Path, run_id: str) -> dict[str, Any] | None:
    """What a finished run took, as it was measured by the command that finished it."""
    return next(
        (row for row in storage.read_rows(workdir / "timing.jsonl") if row["run_id"] == run_id),
        None,
    )


def read_curve(path: pathlib.Path) -> list[dict[str, float]]:
    """The curve of a run, an epoch a row."""
    with open(path, newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def train(
    settings: Config,
    network: Network,
    mask: Mask,
    workdir: pathlib.Path,
    *,
    plan: Plan | None = None,
    form: Form | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Trains the masked network, or its compact form; writes checkpoints, curve and row, and returns the row.

    Args:
      settings: checked by `config.check` and `config.check_train`.
      network: from `prune_run.build`.
      mask: of the network.
      workdir: the folder.
      plan: from `prepare`, which is called if it is not given.
      form: from `choose_form`, likewise.
      on_progress: called on the host after every call of the compiled loop, and at the end of every epoch.
      should_stop: asked as often; True saves and raises `storage.Stopped`.

    Raises:
      ValueError: the data or a checkpoint cannot be used; says why.
      FloatingPointError: a loss is not finite; names the step. The last good checkpoint stays.
      OSError: something cannot be written.
      storage.Stopped: see `should_stop`.
    """
    run_id = config.train_id(settings)
    plan = prepare(settings, network.input_shape) if plan is None else plan
    form = choose_form(settings, network, mask) if form is None else form
    started = time.perf_counter()
    state, info, first, step_seconds = train_from(
        settings, plan, form, first_state(settings, plan, form, workdir),
        folder=checkpoint_path(workdir, run_id), run=describe(settings, mask, form),
        curve=curve_path(workdir, run_id), on_progress=on_progress, should_stop=should_stop,
    )  # fmt: skip
    row = make_row(settings, mask, form, state, info)
    seconds = time.perf_counter() - started
    storage.write_json(storage.own(workdir / "config.json"), row["config"])
    storage.write_row(storage.own(workdir / "rows.jsonl"), row)
    # Apart from the row, which is the same however often the run was stopped.
    storage.write_row(
        storage.own(workdir / "timing.jsonl"),
        {"run_id": run_id, "seconds": seconds, "steps": plan.num_steps - first, "step_seconds": step_seconds,
         "images_per_second": (plan.num_steps - first) * settings.train.batch_size / seconds},
    )  # fmt: skip
    return row


def train_from(
    settings: Config,
    plan: Plan,
    form: Form,
    state: TrainState,
    *,
    folder: pathlib.Path,
    run: Mapping[str, Any],
    curve: pathlib.Path,
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool],
) -> tuple[TrainState, TrainInfo, int, float | None]:
    """Trains from a state to the plan's last step, or from the last checkpoint; writes checkpoints and the curve.

    Args:
      settings, plan, form, on_progress, should_stop: as `train` takes them.
      state: whose memory is used up.
      folder: of the checkpoints.
      run: what they say of themselves.
      curve: its file.

    Returns:
      The state, the info, the step that this call went on from, and the seconds of a step, if they are known.
    """
    info = training.init_info(settings.train.num_epochs)
    with checkpoints.open_folder(folder, run, settings.train.keep_checkpoints) as opened:
        check_form(opened, form)
        restored = checkpoints.restore_latest(opened, (state, info))
        if restored is not None:
            state, info = restored[1]
        first = int(state.step)
        state, info, seconds = _loop(
            settings, plan, form, state, info, opened, on_progress, should_stop, curve
        )
    return state, info, first, seconds


def choose_form(settings: Config, network: Network, mask: Mask) -> Form:
    """Whether the masked network is trained or its compact form, by `train.compact`; see `forms.choose`.

    A rewound network is trained masked: its biases have moved, and with them what leaving out a unit would change.

    Raises:
      ValueError: train.compact is True, and the network has collapsed.
    """
    options = settings.train
    network = prune_run.trained_network(settings, network)
    if settings.prune.rewind_step:
        form = forms.choose(*network[:3], mask, network.input_shape, compact=False)
        return form._replace(reason="it was rewound to a state after initialization")
    return forms.choose(
        network.model,
        network.params,
        network.batch_stats,
        mask,
        network.input_shape,
        options.compact,
        own_optimizer=options.make_optimizer is not None,
    )


def restore_full(
    settings: Config, network: Network, mask: Mask, workdir: pathlib.Path
) -> TrainState:
    """The last checkpoint of a run as the state of the full, masked network, whichever form was trained.

    What the compact network trained lies in its places; the rest is as the full network was initialized (and its
    momentum is 0), which no output sees. Training can go on from it.

        network = prune_run.build(settings)
        mask, _ = prune_run.find_mask(settings, network, workdir)
        state = train_run.restore_full(settings, network, mask, workdir)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = network.model.apply(variables, images)

    Args:
      settings: of the run.
      network: from `prune_run.build`.
      mask: of the full network, from `prune_run.find_mask`.
      workdir: the folder of the run.

    Raises:
      ValueError: there is no checkpoint, or it is damaged or that of another run.
    """
    path = checkpoint_path(workdir, config.train_id(settings))
    plan = prepare(settings, network.input_shape)
    missing = ValueError(
        f"{str(path)!r} holds no checkpoint of this run: train it first, by train.py."
    )
    if not path.is_dir():
        raise missing
    with checkpoints.open_folder(path, {}, settings.train.keep_checkpoints) as folder:
        found = checkpoints.latest_run(folder)
    if found is None:
        raise missing
    network = prune_run.trained_network(settings, network)
    masked = forms.choose(*network[:3], mask, network.input_shape, compact=False)
    form = (
        forms.choose(*network[:3], mask, network.input_shape, compact=True)
        if found.get("compact")
        else masked
    )
    with checkpoints.open_folder(
        path, describe(settings, mask, form), settings.train.keep_checkpoints
    ) as folder:
        like = (
            first_state(settings, plan, form, workdir),
            training.init_info(settings.train.num_epochs),
        )
        restored = checkpoints.restore_latest(folder, like)
    assert restored is not None
    state = restored[1][0]
    if form.plan is None:
        return state
    return compaction.expand_tree(form.plan, state, first_state(settings, plan, masked, workdir))


def first_state(settings: Config, plan: Plan, form: Form, workdir: pathlib.Path) -> TrainState:
    """The state of a run before its first step: initial, or what imp rewinds to, from the folder of its mask.

    Raises:
      ValueError, FileNotFoundError: the file of that state is damaged or missing.
    """
    initial = initial_state(settings, plan, form)
    return load_rewind(settings, workdir, initial) if settings.prune.rewind_step else initial


def save_rewind(settings: Config, workdir: pathlib.Path, state: TrainState) -> None:
    """Writes what `load_rewind` reads: all but the key and the mask, which a config and a mask file tell."""
    path = prune_run.rewind_path(workdir, config.run_id(settings))
    flat = {
        name: np.asarray(leaf)
        for name, leaf in checkpoints.flatten(state._replace(key=None, mask=None)).items()
    }
    storage.save_arrays(
        path, flat, {"run_id": config.run_id(settings), "config": config.prune_dict(settings)}
    )


def load_rewind(settings: Config, workdir: pathlib.Path, initial: TrainState) -> TrainState:
    """The state that imp rewinds to, under the mask of the initial one.

    Raises:
      ValueError: the file is damaged or of another network.
      FileNotFoundError: there is none.
    """
    path = prune_run.rewind_path(workdir, config.run_id(settings))
    flat = storage.load_arrays(path)
    like = initial._replace(key=None, mask=None)
    wanted = {
        name: (np.shape(leaf), np.asarray(leaf).dtype)
        for name, leaf in checkpoints.flatten(like).items()
    }
    if {name: (array.shape, array.dtype) for name, array in flat.items()} != wanted:
        raise ValueError(f"{str(path)!r} is the state of another network. --overwrite begins anew.")
    state = checkpoints.unflatten(flat, like)._replace(key=initial.key)
    return imp.rewind(state, initial.mask)


def initial_state(settings: Config, plan: Plan, form: Form) -> TrainState:
    """The state of a network that was just initialized."""
    key = jax.random.fold_in(
        jax.random.key(settings.seed), 2
    )  # the key itself draws the network, 1 prunes it
    # Copies, since the loop reuses the memory of the state that it is given.
    params, batch_stats, mask = jax.tree.map(jnp.copy, (form.params, form.batch_stats, form.mask))
    return training.init_state(params, batch_stats, mask, plan.optimizer, key)


def describe(settings: Config, mask: Mask, form: Form) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "run_id": config.train_id(settings),
        "config": config.train_dict(settings),
        "mask_sha256": _sha256(mask),
        "compact": form.compact,
        "size": form.size,
    }


def check_form(folder: checkpoints.Checkpoints, form: Form) -> None:
    """Raises ValueError where the checkpoints of a run are of its other form."""
    found = checkpoints.latest_run(folder)
    if found is None or bool(found.get("compact")) == form.compact:
        return
    kind = {True: "the compact network", False: "the full, masked network"}
    raise ValueError(
        f"checkpoint {str(folder.folder)!r} holds {kind[not form.compact]}, and this command trains "
        f"{kind[form.compact]} ({form.reason}). To go on from it give --config.train.compact={not form.compact}; "
        "--overwrite begins anew, and so does another --workdir."
    )


def prepare(settings: Config, input_shape: tuple[int, int, int], *, split: bool = True) -> Plan:
    """Reads the data, and builds what trains on it: before the pruning, so that what is wrong is found first.

    Args:
      settings: checked by `config.check_train`.
      input_shape: of one image.
      split: whether each batch is split over the devices of this host, where it can be.

    Raises:
      ValueError: the data cannot be used, or a batch is larger than the training split.
    """
    options, dataset = settings.train, data.spec(settings.dataset)
    dtype = jnp.dtype(options.compute_dtype)
    streamed = settings.dataset in data.STREAMED
    if streamed:
        arrays = None
        num_examples = streaming.num_examples(settings.dataset, "train", settings.data.dir)
    else:
        arrays = data.load(settings.dataset, input_shape, settings.data.dir)
        num_examples = len(arrays.train_labels)
    try:
        per_epoch = training.steps_per_epoch(num_examples, options.batch_size)
    except ValueError as error:
        raise ValueError(f"train.{error}") from error
    optimizer = _optimizer(options, per_epoch)
    sharding = training.batch_sharding(options.batch_size) if split else None
    num_steps = per_epoch * options.num_epochs
    if arrays is not None:
        arrays = data.Arrays(*jax.device_put(tuple(arrays), _replicated(sharding)))

    def bind(model: Any) -> tuple[AdvanceFn, EvaluateFn]:
        step = training.make_step(
            model, optimizer, label_smoothing=options.label_smoothing, compute_dtype=dtype
        )
        if arrays is None:
            return _streamed(settings, input_shape, model, step, sharding)
        train_images, train_labels, test_images, test_labels = arrays
        epoch = jax.jit(
            training.make_epoch(
                step,
                dataset,
                num_examples,
                options.batch_size,
                augment=options.augment,
                sharding=sharding,
            ),
            donate_argnums=(0, 1),
        )
        evaluate = jax.jit(
            training.make_evaluate(
                model, dataset, options.batch_size, compute_dtype=dtype, sharding=sharding
            )
        )
        return (
            lambda state, info, start, stop: epoch(
                state, info, train_images, train_labels, start, stop
            ),
            lambda state: evaluate(state, test_images, test_labels),
        )

    # Cached, so that trainings of one model one after another are compiled once.
    return Plan(optimizer, functools.cache(bind), per_epoch, num_steps, arrays)


def _replicated(sharding: jax.sharding.NamedSharding | None) -> Any:
    if sharding is None:
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def _optimizer(options: config.TrainConfig, per_epoch: int) -> optax.GradientTransformation:
    if options.make_optimizer is not None:
        return options.make_optimizer(per_epoch)
    schedule = training.stepwise(
        options.learning_rate, tuple(options.drops), options.drop_factor, per_epoch
    )
    return training.sgd(
        schedule,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )


def _streamed(
    settings: Config,
    shape: tuple[int, int, int],
    model: Any,
    step: training.StepFn,
    sharding: jax.sharding.NamedSharding | None,
) -> tuple[AdvanceFn, EvaluateFn]:
    """As `Plan.bind`, with batches that are read while the network trains."""
    options, dataset = settings.train, data.spec(settings.dataset)
    where = (settings.dataset, shape, settings.data.dir)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def one(
        state: TrainState, info: TrainInfo, images: jax.Array, labels: jax.Array
    ) -> tuple[TrainState, TrainInfo]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)
        batch = (
            data.augment(key, images, dataset)
            if options.augment
            else data.normalise(images, dataset)
        )
        return training.record_step(step, state, info, batch, labels)

    batches: list[tuple[int, Iterator[Any]]] = []  # the open stream and the step that it stands at

    def advance(
        state: TrainState, info: TrainInfo, start: int, stop: int
    ) -> tuple[TrainState, TrainInfo]:
        if start == stop:
            return state, info
        if not batches or batches[0][0] != start:
            stream = streaming.train_batches(
                *where, batch_size=options.batch_size, seed=settings.seed, first_step=start
            )
            batches[:] = [(start, _on_device(stream, sharding))]
        for images, labels in itertools.islice(batches[0][1], stop - start):
            state, info = one(state, info, images, labels)
        batches[:] = [(stop, batches[0][1])]
        return state, info

    evaluate_batch = jax.jit(
        training.make_evaluate_batch(model, dataset, compute_dtype=jnp.dtype(options.compute_dtype))
    )

    def evaluate(state: TrainState) -> Sums:
        def padded() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            for images, labels in streaming.test_batches(*where, batch_size=options.batch_size):
                missing = options.batch_size - len(labels)
                counts = np.arange(options.batch_size) < len(labels)
                pad = lambda array, missing=missing: np.pad(
                    array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)
                )
                yield pad(images), pad(labels), counts

        sums = [evaluate_batch(state, *batch) for batch in _on_device(padded(), sharding)]
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *sums)

    return advance, evaluate


def _on_device(
    batches: Iterator[Any], sharding: jax.sharding.NamedSharding | None
) -> Iterator[Any]:
    """The batches, each put on the device (in the background) two ahead of its use."""
    ahead: list[Any] = []
    for batch in batches:
        ahead.append(jax.device_put(batch, sharding))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


def _loop(
    settings: Config,
    plan: Plan,
    form: Form,
    state: TrainState,
    info: TrainInfo,
    folder: checkpoints.Checkpoints,
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool],
    curve: pathlib.Path,
) -> tuple[TrainState, TrainInfo, float | None]:
    """Trains to the end; returns also the seconds of a step, or None where too few were taken to tell."""
    advance, evaluate = plan.bind(form.model)
    step, stride, saved_at, rate = int(state.step), 0, time.perf_counter(), 0.0
    begun = step  # the first call compiles, and says nothing of the speed
    batch_size = settings.train.batch_size
    measured_steps, measured_seconds = 0, 0.0

    def report(finished: Mapping[str, float] | None = None) -> None:
        if on_progress is not None:
            running = {name: float(value) for name, value in training.means(info.running).items()}
            epoch = min(step // plan.steps_per_epoch, settings.train.num_epochs - 1)
            on_progress(
                Progress(
                    step, plan.num_steps, epoch, running["loss"], running["top1"], rate, finished
                )
            )

    def save(wait: bool = False) -> float:
        checkpoints.save(folder, step, (state, info), wait=wait)
        return time.perf_counter()

    while step < plan.num_steps:
        end_of_epoch = (step // plan.steps_per_epoch + 1) * plan.steps_per_epoch
        stop = min(step + stride, end_of_epoch, plan.num_steps)
        before = time.perf_counter()
        state, info = advance(state, info, step, stop)
        bad_step = int(info.bad_step)  # waits for the device
        seconds = time.perf_counter() - before
        if bad_step >= 0:
            raise FloatingPointError(not_finite(bad_step, plan, settings, folder))
        if stride and step > begun:
            rate = (stop - step) * batch_size / seconds
            measured_steps, measured_seconds = (
                measured_steps + stop - step,
                measured_seconds + seconds,
            )
        stride = next_stride(stride, stop - step, seconds)
        step = stop
        finished = None
        if step == end_of_epoch:
            epoch = step // plan.steps_per_epoch - 1
            info = training.finish_epoch(info, epoch, evaluate(state))
            finished = {name: float(values[epoch]) for name, values in info.curve.items()}
            if not np.isfinite(finished["test_loss"]):
                raise FloatingPointError(not_finite(step - 1, plan, settings, folder))
            write_curve(curve, info)
            if (epoch + 1) % settings.train.checkpoint_every == 0 or step == plan.num_steps:
                saved_at = save()
        report(finished)
        if time.perf_counter() - saved_at > SECONDS_UNSAVED:
            saved_at = save()
        if should_stop() and step < plan.num_steps:
            save(wait=True)
            raise storage.Stopped(
                f"stopped after step {step} of {plan.num_steps}, and saved. The same command, without --overwrite, "
                "goes on from there."
            )
    return state, info, measured_seconds / measured_steps if measured_steps else None


def next_stride(stride: int, num_steps: int, seconds: float) -> int:
    """How many steps the next call of the compiled loop takes, after one of `num_steps` took so long.

    0 steps compile; then one, and four times as many until a call takes a few seconds.
    """
    return (
        1
        if num_steps == 0
        else max(1, min(4 * stride, round(_SECONDS_A_CALL * num_steps / max(seconds, 1e-6))))
    )


def not_finite(step: int, plan: Plan, settings: Config, folder: checkpoints.Checkpoints) -> str:
    """What to tell of a loss that is not finite at a step, from 0."""
    last = folder.manager.latest_step()
    kept = (
        "No checkpoint was written yet"
        if last is None
        else f"The checkpoint after step {last} stays"
    )
    return (
        f"the loss is not finite at step {step + 1} (epoch {step // plan.steps_per_epoch + 1} of "
        f"{settings.train.num_epochs}). {kept}. Lower train.learning_rate={settings.train.learning_rate}, or clip the "
        "gradient: --config.train.clip_norm=1."
    )


def write_curve(path: pathlib.Path, info: TrainInfo) -> None:
    """Writes the curve up to where it is known, an epoch a row; see `read_curve`."""
    curve = {name: np.asarray(values) for name, values in info.curve.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *training.CURVE])
    for epoch in range(len(curve["test_loss"])):
        if not np.isnan(curve["test_loss"][epoch]):
            writer.writerow(
                [epoch + 1, *(repr(float(curve[name][epoch])) for name in training.CURVE)]
            )
    storage.write_bytes(path, text.getvalue().encode())


def make_row(
    settings: Config, mask: Mask, form: Form, state: TrainState, info: TrainInfo
) -> dict[str, Any]:
    """What is said of a finished run; it is the same however often the run was stopped."""
    curve = {name: np.asarray(info.curve[name], np.float64) for name in training.CURVE}
    at = lambda epoch: {
        "epoch": epoch + 1,
        **{name: float(values[epoch]) for name, values in curve.items()},
    }
    run_id = config.train_id(settings)
    kept = [int(np.count_nonzero(np.asarray(leaf))) for leaf in jax.tree.leaves(mask)]
    return {
        "run_id": run_id,
        "prune_run_id": config.run_id(settings),
        "model": settings.model,
        "dataset": settings.dataset,
        "pruner": settings.prune.pruner,
        "compression": settings.prune.compression,
        "seed": settings.seed,
        "width_multiplier": settings.width_multiplier,
        "total": sum(trees.sizes(mask)),
        "kept": sum(kept),
        "compact": form.compact,
        "size": form.size,
        "num_epochs": settings.train.num_epochs,
        "num_steps": int(state.step),
        "last": at(settings.train.num_epochs - 1),
        "best": at(int(np.nanargmax(curve["test_top1"]))),
        "mean_squares": _mean_squares(form, state),
        "curve": f"curves/{run_id}.csv",
        "params_sha256": _sha256(state.params),
        "config": config.train_dict(settings),
    }


def _mean_squares(form: Form, state: TrainState) -> list[dict[str, Any]]:
    """Per layer, its size and the mean square of its kept weights before and after training (Fig. 5b), as trained."""
    before, after = (
        dict(zip(trees.names(p), jax.tree.leaves(p), strict=True))
        for p in (form.params, state.params)
    )
    mean = lambda leaf, kept: (
        float(np.mean(np.square(np.asarray(leaf, np.float64)), where=kept)) if kept.any() else 0.0
    )
    return [
        {
            "name": name,
            "size": kept.size,
            "initial": mean(before[name], kept),
            "final": mean(after[name], kept),
        }
        for name, kept in zip(
            trees.names(form.mask), map(np.asarray, jax.tree.leaves(form.mask)), strict=True
        )
    ]


def _sha256(tree: trees.Tree) -> str:
    return hashlib.sha256(
        b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))
    ).hexdigest()
