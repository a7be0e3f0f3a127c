"""Compiles what the training loop calls: for one run on all devices, or many runs on many devices.

The loop (`loop.train`) calls the functions of a `Programs`. There are three ways to make them:

- One run: the data is on the devices, and each batch is split over them.
- A streamed run: the same, with batches that are read and decoded while the network trains.
- Many runs: runs of one shape share one program. It is pmapped over the devices, and the runs of a
  device follow one another (`lax.map`) or are computed side by side (`vmap`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from synflow_jax import data, training
from synflow_jax.data import streaming
from synflow_jax.experiments import expected, initialization
from synflow_jax.experiments.config import TrainConfig
from synflow_jax.experiments.run import Run
from synflow_jax.training import Sums, TrainInfo, TrainState
from synflow_jax.trees import Tree

Pair = tuple[TrainState, TrainInfo]


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """A data set that fits into memory.

    Attributes:
      arrays: on the host.
      copies: on devices, by where they are. Each is made when a program first needs it, and shared
        by all programs there: copies for every program would fill the devices.
    """

    arrays: data.Arrays
    copies: dict[Any, tuple[jax.Array, ...]] = dataclasses.field(default_factory=dict)


class Recipe(NamedTuple):
    """The optimizer and the data, which all runs of one training config share.

    Attributes:
      optimizer: any optax chain.
      steps_per_epoch: the number of full batches in the training split.
      num_steps: of a whole run.
      input_shape: of one image.
      data_set: None if it is streamed.
    """

    optimizer: optax.GradientTransformation
    steps_per_epoch: int
    num_steps: int
    input_shape: tuple[int, int, int]
    data_set: DataSet | None


class Layout(NamedTuple):
    """Where many runs are trained.

    Attributes:
      devices: the runs are spread over them.
      per_device: how many runs each device trains.
      batching: "map" or "vmap".
    """

    devices: tuple[jax.Device, ...]
    per_device: int
    batching: str


class Programs(NamedTuple):
    """The functions that the loop calls, compiled.

    The loop holds one state and one info. With many runs, their leaves have the leading axes
    [device, run]; with one run there are no such axes. `place` and `fetch` convert between that
    and one (state, info) for each place.

    Attributes:
      num_places: how many runs train together.
      place: `place(pairs)` puts one (state, info) for each place on the devices.
      advance: `advance(state, info, start, stop)` takes the steps `start` to `stop` - 1, which are
        of one epoch, and returns the new (state, info). It uses up the memory of its input.
      finish_epoch: `finish_epoch(state, info, epoch)` evaluates, and returns the info with the
        epoch (from 0) in its curve.
      fetch: `fetch(tree)` returns the tree of each place, without the leading axes.
    """

    num_places: int
    place: Callable[[Sequence[Pair]], Pair]
    advance: Callable[[TrainState, TrainInfo, int, int], Pair]
    finish_epoch: Callable[[TrainState, TrainInfo, int], TrainInfo]
    fetch: Callable[[Tree], list[Tree]]


def make_recipe(run: Run) -> Recipe:
    """Reads the data of a run and builds its optimizer.

    This comes before pruning, so that an error is found before long work.

    Args:
      run: checked by `checks.check_train`.

    Raises:
      ValueError: the data cannot be used, or a batch is larger than the training split.
    """
    config = run.config
    _, input_shape = initialization.architecture(run)
    data_set = None
    if config.dataset in data.STREAMED:
        num_examples = streaming.num_examples(config.dataset, "train", config.data.dir)
    else:
        arrays = data.load(config.dataset, input_shape, config.data.dir)
        data_set = DataSet(arrays)
        num_examples = len(arrays.train_labels)
    # The training wing does not know that its argument is a key of the config.
    try:
        per_epoch = training.steps_per_epoch(num_examples, config.train.batch_size)
    except ValueError as error:
        raise ValueError(f"train.{error}") from error
    optimizer = _optimizer(config.train, per_epoch)
    num_steps = per_epoch * config.train.num_epochs
    # Programs count steps in 32 bits.
    if num_steps > expected.MOST:
        raise ValueError(
            f"train.num_epochs={config.train.num_epochs} of {per_epoch} steps each are {num_steps} "
            f"steps, and at most {expected.MOST} are possible: choose fewer."
        )
    return Recipe(optimizer, per_epoch, num_steps, input_shape, data_set)


def _optimizer(options: TrainConfig, per_epoch: int) -> optax.GradientTransformation:
    if options.make_optimizer is not None:
        return _own_optimizer(options.make_optimizer, per_epoch)
    drops = tuple(options.drops)
    schedule = training.stepwise(options.learning_rate, drops, options.drop_factor, per_epoch)
    return training.sgd(
        schedule,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )


def _own_optimizer(make: Any, per_epoch: int) -> optax.GradientTransformation:
    """Builds the user's own optimizer.

    Raises:
      ValueError: their function fails, or returns anything else.
    """
    key = f"train.make_optimizer={getattr(make, '__name__', expected.shown(make))}"
    try:
        optimizer = make(per_epoch)
    except Exception as error:
        raise ValueError(
            f"{key} fails for {per_epoch} steps per epoch: {error!r}. Mend the function in the "
            "config file; --traceback shows where."
        ) from error
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            f"{key} returns {expected.shown(optimizer)} in place of an "
            "optax.GradientTransformation, e.g. optax.adam(1e-3): mend it in the config file."
        )
    return optimizer


def one(run: Run, model: nn.Module, recipe: Recipe, *, split: bool) -> Programs:
    """Compiles the training of one run.

    Args:
      run: the one that is trained. Another run of the same recipe can be, unless it is streamed.
      model: the network.
      recipe: from `make_recipe`.
      split: whether each batch is split over the devices of this host, if they divide it evenly.
    """
    sharding = training.batch_sharding(run.config.train.batch_size) if split else None
    if recipe.data_set is None:
        return _streamed_run(run, model, recipe, sharding)
    return _one_run(run, model, recipe, recipe.data_set, sharding)


def many(run: Run, model: nn.Module, recipe: Recipe, layout: Layout) -> Programs:
    """Compiles the training of many runs of one network and one recipe.

    Args:
      run: any of them.
      model: the network of all of them.
      recipe: from `make_recipe`; its data is not streamed.
      layout: where they are trained.
    """
    assert recipe.data_set is not None, "one device cannot hold a data set that is streamed"
    return _many_runs(run, model, recipe, recipe.data_set, layout)


# One run


def _one_run(
    run: Run,
    model: nn.Module,
    recipe: Recipe,
    data_set: DataSet,
    sharding: jax.sharding.NamedSharding | None,
) -> Programs:
    """Compiles the training of one run on data that is on the devices."""
    num_examples = len(data_set.arrays.train_labels)
    epoch_fn = _epoch_fn(run, model, recipe, num_examples, sharding)
    # Donation: the new state takes the memory of the old one.
    train_steps = jax.jit(epoch_fn, donate_argnums=(0, 1))
    evaluate = jax.jit(_evaluate_fn(run, model, sharding))
    on_devices = _replicated(data_set, sharding)
    train_split, test_split = on_devices[:2], on_devices[2:]

    def advance(state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        return train_steps(state, info, *train_split, start, stop)

    def finish_epoch(state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        return training.finish_epoch(info, epoch, evaluate(state, *test_split))

    return Programs(1, _place_one, advance, finish_epoch, _fetch_one)


def _place_one(pairs: Sequence[Pair]) -> Pair:
    """Returns the state of the only run, which is already on the devices."""
    (pair,) = pairs
    return pair


def _fetch_one(tree: Tree) -> list[Tree]:
    return [tree]


def _replicated(
    data_set: DataSet, sharding: jax.sharding.NamedSharding | None
) -> tuple[jax.Array, ...]:
    """Returns the arrays on all devices of a split batch, or on the default device."""
    # Threads of a grid have different default devices, and nothing names them but this.
    default_device = jnp.empty(()).device
    key = sharding, default_device
    if key not in data_set.copies:
        whole = None
        if sharding is not None:
            whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        data_set.copies[key] = jax.device_put(tuple(data_set.arrays), whole)
    return data_set.copies[key]


# A streamed run


def _streamed_run(
    run: Run,
    model: nn.Module,
    recipe: Recipe,
    sharding: jax.sharding.NamedSharding | None,
) -> Programs:
    """Compiles the training of one run on batches that are read while it trains."""
    config, options = run.config, run.config.train
    dataset = data.spec(config.dataset)
    step_fn = _step_fn(run, model, recipe)

    def one_step(state: TrainState, info: TrainInfo, images: jax.Array, labels: jax.Array) -> Pair:
        batch = training.prepare_batch(
            state.key, state.step, images, dataset, augment=options.augment
        )
        return training.record_step(step_fn, state, info, batch, labels)

    train_step = jax.jit(one_step, donate_argnums=(0, 1))
    dtype = jnp.dtype(options.compute_dtype)
    evaluate = jax.jit(training.make_evaluate_batch(model, dataset, compute_dtype=dtype))
    where = (config.dataset, recipe.input_shape, config.data.dir)
    # The stream of training batches stays open from one call to the next, since opening it is slow.
    # It is a cache: `next_step` is the step whose batch comes next, and a call for another step
    # opens the stream anew.
    stream: Iterator[Any] = iter(())
    next_step: int | None = None

    def advance(state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        nonlocal stream, next_step
        # The loop's first call takes no step; there is nothing to compile before the first batch.
        if start == stop:
            return state, info
        if next_step != start:
            batches = streaming.train_batches(
                *where, batch_size=options.batch_size, seed=config.seed, first_step=start
            )
            stream = _on_device(batches, sharding)
        for images, labels in itertools.islice(stream, stop - start):
            state, info = train_step(state, info, images, labels)
        next_step = stop
        return state, info

    def finish_epoch(state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        batches = streaming.test_batches(*where, batch_size=options.batch_size)
        padded = (_padded(*batch, options.batch_size) for batch in batches)
        parts = [evaluate(state, *batch) for batch in _on_device(padded, sharding)]
        total = functools.reduce(_add, parts)
        return training.finish_epoch(info, epoch, total)

    return Programs(1, _place_one, advance, finish_epoch, _fetch_one)


def _padded(
    images: np.ndarray, labels: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fills the last batch up, so that all have one shape; the third array says what counts."""
    num_missing = batch_size - len(labels)
    counts = np.arange(batch_size) < len(labels)
    return _pad(images, num_missing), _pad(labels, num_missing), counts


def _pad(array: np.ndarray, num_missing: int) -> np.ndarray:
    other_axes = [(0, 0)] * (array.ndim - 1)
    return np.pad(array, [(0, num_missing), *other_axes])


def _add(total: Sums, part: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, part)


def _on_device(
    batches: Iterator[Any], sharding: jax.sharding.NamedSharding | None
) -> Iterator[Any]:
    """Yields the batches, each put on the device (in the background) two ahead of its use."""
    # The copy to the device overlaps with the steps before.
    ahead: list[Any] = []
    for batch in batches:
        ahead.append(jax.device_put(batch, sharding))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


# Many runs


def _many_runs(
    run: Run, model: nn.Module, recipe: Recipe, data_set: DataSet, layout: Layout
) -> Programs:
    """Compiles the training of many runs of one program on many devices. The only pmap."""
    num_examples = len(data_set.arrays.train_labels)
    epoch_fn = _epoch_fn(run, model, recipe, num_examples, None)
    evaluate = _evaluate_fn(run, model, None)
    # vmap is faster where a single run leaves the device idle; it needs the memory of all runs.
    map_runs = _vmapped if layout.batching == "vmap" else jax.lax.map

    def advance_device(
        states: TrainState,
        infos: TrainInfo,
        images: jax.Array,
        labels: jax.Array,
        start: jax.Array,
        stop: jax.Array,
    ) -> Pair:
        one_run = lambda pair: epoch_fn(*pair, images, labels, start, stop)
        return map_runs(one_run, (states, infos))

    def finish_device(
        states: TrainState,
        infos: TrainInfo,
        images: jax.Array,
        labels: jax.Array,
        epoch: jax.Array,
    ) -> TrainInfo:
        def one_run(pair: Pair) -> TrainInfo:
            state, info = pair
            return training.finish_epoch(info, epoch, evaluate(state, images, labels))

        return map_runs(one_run, (states, infos))

    devices = layout.devices
    advance_all = jax.pmap(
        advance_device, in_axes=(0, 0, 0, 0, None, None), devices=devices, donate_argnums=(0, 1)
    )
    # The states are not donated: training continues from them.
    finish_all = jax.pmap(
        finish_device, in_axes=(0, 0, 0, 0, None), devices=devices, donate_argnums=(1,)
    )
    copies = _on_each(data_set, devices)
    train_split, test_split = copies[:2], copies[2:]

    def advance(state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        return advance_all(state, info, *train_split, start, stop)

    def finish_epoch(state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        return finish_all(state, info, *test_split, epoch)

    return Programs(
        num_places=len(devices) * layout.per_device,
        place=functools.partial(_place_many, layout),
        advance=advance,
        finish_epoch=finish_epoch,
        fetch=functools.partial(_fetch_many, layout),
    )


def _place_many(layout: Layout, pairs: Sequence[Pair]) -> Pair:
    """Stacks the states of all runs, [device, run, ...], each device with its own."""
    axes = len(layout.devices), layout.per_device
    sharding = _over_devices(layout.devices)

    def stack(*leaves: Any) -> jax.Array:
        if _is_key(leaves[0]):
            return jax.device_put(jnp.stack(leaves).reshape(axes), sharding)
        # On the host, where another shape needs no other program.
        stacked = np.stack([np.asarray(leaf) for leaf in leaves])
        shape = (*axes, *np.shape(leaves[0]))
        return jax.device_put(stacked.reshape(shape), sharding)

    return jax.tree.map(stack, *pairs)


def _fetch_many(layout: Layout, tree: Tree) -> list[Tree]:
    """Copies a tree to the host, and returns the part of each run."""
    # Keys have no form on the host.
    on_host = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), tree)

    def at(place: int) -> Tree:
        index = divmod(place, layout.per_device)
        return jax.tree.map(lambda leaf: leaf[index], on_host)

    num_places = len(layout.devices) * layout.per_device
    return [at(place) for place in range(num_places)]


def _on_each(data_set: DataSet, devices: tuple[jax.Device, ...]) -> tuple[jax.Array, ...]:
    """Returns the arrays with a copy on each device, [device, ...]."""
    if devices not in data_set.copies:
        copies = []
        for array in data_set.arrays:
            repeated = np.broadcast_to(array, (len(devices), *array.shape))
            copies.append(jax.device_put(repeated, _over_devices(devices)))
        data_set.copies[devices] = tuple(copies)
    return data_set.copies[devices]


def _over_devices(devices: tuple[jax.Device, ...]) -> jax.sharding.NamedSharding:
    """Returns the sharding whose first axis is that of the devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))


def _vmapped(function: Callable[[Any], Any], runs: Any) -> Any:
    """Maps as `jax.lax.map` does, but side by side."""
    return jax.vmap(function)(runs)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


# Shared by all three


def _step_fn(run: Run, model: nn.Module, recipe: Recipe) -> training.StepFn:
    options = run.config.train
    return training.make_step(
        model,
        recipe.optimizer,
        label_smoothing=options.label_smoothing,
        compute_dtype=jnp.dtype(options.compute_dtype),
    )


def _epoch_fn(
    run: Run,
    model: nn.Module,
    recipe: Recipe,
    num_examples: int,
    sharding: jax.sharding.NamedSharding | None,
) -> training.EpochFn:
    options = run.config.train
    return training.make_epoch(
        _step_fn(run, model, recipe),
        data.spec(run.config.dataset),
        num_examples,
        options.batch_size,
        augment=options.augment,
        sharding=sharding,
    )


def _evaluate_fn(
    run: Run, model: nn.Module, sharding: jax.sharding.NamedSharding | None
) -> training.EvaluateFn:
    options = run.config.train
    return training.make_evaluate(
        model,
        data.spec(run.config.dataset),
        options.batch_size,
        compute_dtype=jnp.dtype(options.compute_dtype),
        sharding=sharding,
    )
