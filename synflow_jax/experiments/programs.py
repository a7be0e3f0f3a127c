"""Compiles what the training loop calls: for one run on all devices, or many runs on many devices.

The loop (`loop.train`) knows a single interface, `Programs`. Behind it are three ways to train:

- `OneRun`: the data is on the devices, and each batch is split over them.
- `StreamedRun`: the same, with batches that are read and decoded while the network trains.
- `ManyRuns`: runs of one shape share one program. It is pmapped over the devices, and the runs of a
  device follow one another (`lax.map`) or are computed side by side (`vmap`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from synflow_jax import data, training
from synflow_jax.data import streaming
from synflow_jax.experiments import initialization
from synflow_jax.experiments.config import TrainConfig
from synflow_jax.experiments.run import Run
from synflow_jax.training import Sums, TrainInfo, TrainState
from synflow_jax.trees import Tree

Pair = tuple[TrainState, TrainInfo]


class DataSet:
    """A data set that fits into memory.

    Its copies on devices are made when they are first needed, and shared by all programs there.

    Attributes:
      arrays: on the host.
    """

    def __init__(self, arrays: data.Arrays) -> None:
        self.arrays = arrays
        self._placed: dict[Any, tuple[jax.Array, ...]] = {}

    def replicated(self, sharding: jax.sharding.NamedSharding | None) -> tuple[jax.Array, ...]:
        """Returns the arrays on all devices of a split batch, or on the default device."""
        key = sharding, jnp.empty(()).device
        if key not in self._placed:
            whole = None
            if sharding is not None:
                whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
            self._placed[key] = jax.device_put(tuple(self.arrays), whole)
        return self._placed[key]

    def stacked(self, devices: tuple[jax.Device, ...]) -> tuple[jax.Array, ...]:
        """Returns the arrays with a copy on each device, [device, ...]."""
        if devices not in self._placed:
            copies = []
            for array in self.arrays:
                repeated = np.broadcast_to(array, (len(devices), *array.shape))
                copies.append(jax.device_put(repeated, _over_devices(devices)))
            self._placed[devices] = tuple(copies)
        return self._placed[devices]


class Recipe(NamedTuple):
    """What all runs of one training config share.

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


class Programs(Protocol):
    """What the loop calls.

    The loop holds one state and one info. `ManyRuns` gives their leaves the leading axes
    [device, run]; with one run there are no such axes. `place` and `fetch` convert between that
    and one (state, info) for each place.

    Attributes:
      num_places: how many runs train together.
    """

    num_places: int

    def place(self, pairs: Sequence[Pair]) -> Pair:
        """Puts one (state, info) for each place on the devices."""

    def advance(self, state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        """Takes the steps `start` to `stop` - 1, of one epoch. Uses up the memory of its input."""

    def finish_epoch(self, state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        """Evaluates, and writes the epoch (from 0) into the curves."""

    def fetch(self, tree: Tree) -> list[Tree]:
        """Returns the tree of each place, without the leading axes."""


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
    try:
        per_epoch = training.steps_per_epoch(num_examples, config.train.batch_size)
    except ValueError as error:
        raise ValueError(f"train.{error}") from error
    optimizer = _optimizer(config.train, per_epoch)
    num_steps = per_epoch * config.train.num_epochs
    return Recipe(optimizer, per_epoch, num_steps, input_shape, data_set)


def _optimizer(options: TrainConfig, per_epoch: int) -> optax.GradientTransformation:
    if options.make_optimizer is not None:
        chain: optax.GradientTransformation = options.make_optimizer(per_epoch)
        return chain
    drops = tuple(options.drops)
    schedule = training.stepwise(options.learning_rate, drops, options.drop_factor, per_epoch)
    return training.sgd(
        schedule,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
    )


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
        return StreamedRun(run, model, recipe, sharding)
    return OneRun(run, model, recipe, recipe.data_set, sharding)


def many(run: Run, model: nn.Module, recipe: Recipe, layout: Layout) -> Programs:
    """Compiles the training of many runs of one network and one recipe.

    Args:
      run: any of them.
      model: the network of all of them.
      recipe: from `make_recipe`; its data is not streamed.
      layout: where they are trained.
    """
    assert recipe.data_set is not None, "one device cannot hold a data set that is streamed"
    return ManyRuns(run, model, recipe, recipe.data_set, layout)


class _Single:
    """Places and fetches the state of one run: as it is."""

    num_places = 1

    def place(self, pairs: Sequence[Pair]) -> Pair:
        (pair,) = pairs
        return pair

    def fetch(self, tree: Tree) -> list[Tree]:
        return [tree]


class OneRun(_Single):
    """Trains one run on data that is on the devices; see `Programs`."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        recipe: Recipe,
        data_set: DataSet,
        sharding: jax.sharding.NamedSharding | None,
    ) -> None:
        epoch = _epoch_fn(run, model, recipe, len(data_set.arrays.train_labels), sharding)
        evaluate = _evaluate_fn(run, model, sharding)
        self._epoch = jax.jit(epoch, donate_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)
        on_devices = data_set.replicated(sharding)
        self._train_split, self._test_split = on_devices[:2], on_devices[2:]

    def advance(self, state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        return self._epoch(state, info, *self._train_split, start, stop)

    def finish_epoch(self, state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        test = self._evaluate(state, *self._test_split)
        return training.finish_epoch(info, epoch, test)


class StreamedRun(_Single):
    """Trains one run on batches that are read while it trains; see `Programs`."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        recipe: Recipe,
        sharding: jax.sharding.NamedSharding | None,
    ) -> None:
        config = run.config
        dataset = data.spec(config.dataset)
        step_fn = _step_fn(run, model, recipe)

        def one_step(
            state: TrainState, info: TrainInfo, images: jax.Array, labels: jax.Array
        ) -> Pair:
            batch = training.prepare_batch(
                state.key, state.step, images, dataset, augment=config.train.augment
            )
            return training.record_step(step_fn, state, info, batch, labels)

        dtype = jnp.dtype(config.train.compute_dtype)
        evaluate = training.make_evaluate_batch(model, dataset, compute_dtype=dtype)
        self._one_step = jax.jit(one_step, donate_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)
        self._batch_size = config.train.batch_size
        self._sharding = sharding
        where = (config.dataset, recipe.input_shape, config.data.dir)
        self._open_train = functools.partial(
            streaming.train_batches, *where, batch_size=self._batch_size, seed=config.seed
        )
        self._open_test = functools.partial(
            streaming.test_batches, *where, batch_size=self._batch_size
        )
        # The open stream, and the step whose batch comes next.
        self._stream: Iterator[Any] = iter(())
        self._next_step: int | None = None

    def advance(self, state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        if start == stop:
            return state, info
        if self._next_step != start:
            batches = self._open_train(first_step=start)
            self._stream = _on_device(batches, self._sharding)
        for images, labels in itertools.islice(self._stream, stop - start):
            state, info = self._one_step(state, info, images, labels)
        self._next_step = stop
        return state, info

    def finish_epoch(self, state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        batches = (self._padded(*batch) for batch in self._open_test())
        parts = [self._evaluate(state, *batch) for batch in _on_device(batches, self._sharding)]
        total = functools.reduce(_add, parts)
        return training.finish_epoch(info, epoch, total)

    def _padded(
        self, images: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fills the last batch up, so that all have one shape; the third array says what counts."""
        num_missing = self._batch_size - len(labels)
        counts = np.arange(self._batch_size) < len(labels)
        return _pad(images, num_missing), _pad(labels, num_missing), counts


def _pad(array: np.ndarray, num_missing: int) -> np.ndarray:
    return np.pad(array, [(0, num_missing)] + [(0, 0)] * (array.ndim - 1))


def _add(total: Sums, part: Sums) -> Sums:
    return jax.tree.map(jnp.add, total, part)


def _on_device(
    batches: Iterator[Any], sharding: jax.sharding.NamedSharding | None
) -> Iterator[Any]:
    """Yields the batches, each put on the device (in the background) two ahead of its use."""
    ahead: list[Any] = []
    for batch in batches:
        ahead.append(jax.device_put(batch, sharding))
        if len(ahead) > 2:
            yield ahead.pop(0)
    yield from ahead


class ManyRuns:
    """Trains many runs of one program on many devices; see `Programs`. The only pmap."""

    def __init__(
        self, run: Run, model: nn.Module, recipe: Recipe, data_set: DataSet, layout: Layout
    ) -> None:
        self.num_places = len(layout.devices) * layout.per_device
        self._layout = layout
        epoch_fn = _epoch_fn(run, model, recipe, len(data_set.arrays.train_labels), None)
        evaluate = _evaluate_fn(run, model, None)
        each = _vmapped if layout.batching == "vmap" else jax.lax.map

        def advance(
            states: TrainState,
            infos: TrainInfo,
            images: jax.Array,
            labels: jax.Array,
            start: jax.Array,
            stop: jax.Array,
        ) -> Pair:
            one_run = lambda pair: epoch_fn(*pair, images, labels, start, stop)
            return each(one_run, (states, infos))

        def finish(
            states: TrainState,
            infos: TrainInfo,
            images: jax.Array,
            labels: jax.Array,
            epoch: jax.Array,
        ) -> TrainInfo:
            def one_run(pair: Pair) -> TrainInfo:
                state, info = pair
                return training.finish_epoch(info, epoch, evaluate(state, images, labels))

            return each(one_run, (states, infos))

        self._advance = jax.pmap(
            advance, in_axes=(0, 0, 0, 0, None, None), devices=layout.devices, donate_argnums=(0, 1)
        )
        self._finish = jax.pmap(
            finish, in_axes=(0, 0, 0, 0, None), devices=layout.devices, donate_argnums=(1,)
        )
        copies = data_set.stacked(layout.devices)
        self._train_split, self._test_split = copies[:2], copies[2:]
        self._sharding = _over_devices(layout.devices)

    def place(self, pairs: Sequence[Pair]) -> Pair:
        return jax.tree.map(self._stacked, *pairs)

    def advance(self, state: TrainState, info: TrainInfo, start: int, stop: int) -> Pair:
        return self._advance(state, info, *self._train_split, start, stop)

    def finish_epoch(self, state: TrainState, info: TrainInfo, epoch: int) -> TrainInfo:
        return self._finish(state, info, *self._test_split, epoch)

    def fetch(self, tree: Tree) -> list[Tree]:
        on_host = jax.tree.map(lambda leaf: leaf if _is_key(leaf) else np.asarray(leaf), tree)

        def at(place: int) -> Tree:
            index = divmod(place, self._layout.per_device)
            return jax.tree.map(lambda leaf: leaf[index], on_host)

        return [at(place) for place in range(self.num_places)]

    def _stacked(self, *leaves: Any) -> jax.Array:
        """Stacks a leaf of all runs, [device, run, ...]."""
        axes = len(self._layout.devices), self._layout.per_device
        if _is_key(leaves[0]):
            return jax.device_put(jnp.stack(leaves).reshape(axes), self._sharding)
        # On the host, where another shape needs no other program.
        stacked = np.stack([np.asarray(leaf) for leaf in leaves])
        shape = (*axes, *np.shape(leaves[0]))
        return jax.device_put(stacked.reshape(shape), self._sharding)


def _over_devices(devices: tuple[jax.Device, ...]) -> jax.sharding.NamedSharding:
    """Returns the sharding whose first axis is that of the devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))


def _vmapped(function: Callable[[Any], Any], runs: Any) -> Any:
    """Maps as `jax.lax.map` does, but side by side."""
    return jax.vmap(function)(runs)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


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
