"""Builds the network that a run starts from, from its seed or from a file of weights."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable

import flax.linen as nn
import jax

from synflow_jax import analysis, data, models, trees
from synflow_jax.experiments import checks, events, memory
from synflow_jax.experiments.events import Built, EventFn
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import networks
from synflow_jax.trees import Mask, Params

BuildFn = Callable[[Run], Built]

# The maximal compression may be asked for as it is printed, rounded.
_ROUNDING = 1e-5


def build(run: Run, *, bounded: bool = True) -> Network:
    """Returns the network of a run, with a mask that says which weights can be pruned.

    Args:
      run: its config decides on the model and on what can be pruned.
      bounded: refuse a compression above the network's maximum (unless prune.beyond_maximum).

    Raises:
      ValueError: a value of the config is out of its range; the model does not fit the data set;
        the compression is above the maximum; the file of weights does not fit the model.
    """
    checks.check(run.config)
    model, input_shape = architecture(run)
    # Shapes are enough to find a bad choice of what can be pruned, and take no time.
    shapes = _shapes(run, model, input_shape)
    name = f"model={run.config.model!r} with width_multiplier={run.config.width_multiplier:g}"
    memory.check_fits(sum(trees.sizes(shapes)), name)
    _prunable(run, shapes)
    _check_exclude(run, shapes)
    if run.config.init is None:
        params, batch_stats = models.init(model, input_shape, run.init_key)
    else:
        params, batch_stats = _read(run)
    network = Network(model, params, batch_stats, _prunable(run, params), input_shape)
    if bounded:
        check_compression(run, network, max_compression(network))
    memory.free()
    return network


def builder(emit: EventFn = events.ignore) -> BuildFn:
    """Returns a function that builds the network of a run and finds its maximal compression.

    It keeps the last network, since neighbouring runs share it, and emits each new one. It does not
    check compressions: a run above the maximum must not stop the others.
    """

    def build_and_emit(run: Run) -> Built:
        network = build(run, bounded=False)
        built = Built(run, network, max_compression(network))
        emit(built)
        return built

    return memory.keep_last(build_and_emit, key=lambda run: run.network_key)


def architecture(run: Run) -> tuple[nn.Module, tuple[int, int, int]]:
    """Returns the model of a run and the shape of one of its inputs."""
    config = run.config
    dataset = data.spec(config.dataset)
    model = models.create(
        config.model, dataset.num_classes, width_multiplier=config.width_multiplier
    )
    return model, dataset.image_shape or models.default_input_shape(config.model)


def for_training(run: Run, network: Network) -> Network:
    """Returns the network that training begins from.

    It is the one that was pruned, unless ablation="reinitialize" draws the weights again.

    Args:
      run: of the network.
      network: from `build`, the one that was pruned.
    """
    if not run.ablation.redraws:
        return network
    params, batch_stats = models.init(network.model, network.input_shape, run.redraw_key)
    return network._replace(params=params, batch_stats=batch_stats)


def max_compression(network: Network) -> float:
    """Returns the largest compression that leaves a path from the input to the output."""
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    return analysis.max_compression(apply_fn, network.params, network.mask, network.input_shape)


def check_compression(run: Run, network: Network, maximum: float) -> None:
    """Checks that a network can survive the compression, unless prune.beyond_maximum is set.

    Args:
      run: its config has the compression.
      network: from `build`.
      maximum: from `max_compression`.

    Raises:
      ValueError: the compression is above the maximum.
    """
    compression = run.config.prune.compression
    if compression <= maximum * (1 + _ROUNDING) or run.config.prune.beyond_maximum:
        return
    total = sum(trees.sizes(network.mask))
    raise ValueError(
        f"prune.compression={compression:.10g} is above {maximum:.10g}, the maximum of "
        f"{run.config.model}: {total} prunable weights divided by the {round(total / maximum)} "
        "on the shortest path from input to output. Beyond it no network is left: choose a smaller "
        "compression."
    )


def _shapes(run: Run, model: nn.Module, input_shape: tuple[int, int, int]) -> Params:
    """Returns the parameters as shapes, without computing them."""
    try:
        params, _ = jax.eval_shape(
            lambda key: models.init(model, input_shape, key), jax.random.key(0)
        )
    except ValueError as error:
        raise ValueError(
            f"model={run.config.model!r} does not take {run.config.dataset}'s images: {error}"
        ) from error
    return params


def _prunable(run: Run, params: Params) -> Mask:
    """Returns the mask of the weights that the config allows to prune.

    Raises:
      ValueError: none is left, or prune.exclude is not a regular expression.
    """
    prune = run.config.prune
    # An empty pattern would match every name.
    patterns = [prune.exclude] if prune.exclude else []
    if prune.dense_classifier:
        patterns.append(f"^{models.HEAD}/")
    return trees.prunable(
        params,
        kernels=prune.kernels,
        biases=prune.biases,
        norms=prune.norms,
        exclude="|".join(patterns) or None,
    )


def _check_exclude(run: Run, params: Params) -> None:
    """Checks that prune.exclude matches a parameter: a pattern of nothing is a mistake."""
    pattern, names = run.config.prune.exclude, trees.names(params)
    if pattern and not any(re.search(pattern, name) for name in names):
        raise ValueError(f"prune.exclude={pattern!r} matches none of {names}: fix the pattern.")


def _read(run: Run) -> tuple[Params, trees.Tree]:
    """Reads the file of weights that the run begins from."""
    path = run.config.init
    assert path is not None
    if not pathlib.Path(path).exists():
        raise ValueError(
            f"init={path!r} is a digest, not a path: name the file of weights that the run began "
            "from, --config=CONFIG --config.init=FILE."
        )
    try:
        return networks.read_variables(path, *architecture(run))
    except ValueError as error:
        raise ValueError(f"init={path!r} cannot be used: {error}") from error
