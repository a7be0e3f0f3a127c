"""Converts networks to PyTorch's state dicts and back. PyTorch itself is not needed."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from synflow_jax import models, storage, trees
from synflow_jax.models import Network
from synflow_jax.storage.arrays import encode
from synflow_jax.storage.files import AnyPath
from synflow_jax.storage.networks import (
    fitting,
    flat,
    native,
    pytorch_layout,
    pytorch_names,
    pytorch_state,
)
from synflow_jax.storage.networks.pytorch_state import State
from synflow_jax.trees import Params, Tree


def to_torch(network: Network) -> dict[str, np.ndarray]:
    """Returns a network as PyTorch's state dict: masked weights and running statistics.

    Kernels are OIHW or [out, in]. A dense layer on flattened maps reads them channel by channel, as
    PyTorch flattens. PyTorch loads the result with strict=True:

        module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})

    >>> import jax
    >>> from synflow_jax import models, trees
    >>> model = models.create("cifar_vgg11_bn", 10, width_multiplier=0.1)
    >>> params, batch_stats = models.init(model, (32, 32, 3), jax.random.key(0))
    >>> mask = trees.prunable(params)
    >>> state = to_torch(models.Network(model, params, batch_stats, mask, (32, 32, 3)))
    >>> state["layers.0.conv.weight"].shape, state["layers.2.bn.running_mean"].shape
    ((6, 3, 3, 3), (13,))

    Raises:
      ValueError: the model is not of a known family, or variables or mask do not fit it.
    """
    model, params, batch_stats, mask, input_shape = network
    trees.check_mask(mask, params)
    # A state dict has no place for a mask, so the pruned weights are written as 0.
    weights = trees.apply_mask(params, mask)
    variables = flat.flatten(weights, batch_stats)
    expected = flat.shapes_of(model, input_shape)
    flat.check_shapes(variables, expected, "the variables")

    maps = pytorch_layout.flattened(model, input_shape)
    names = pytorch_names.leaf_names(model, variables)
    state = {}
    for ours, theirs in names.items():
        variable = variables[ours]
        state[theirs] = pytorch_layout.to_torch(variable, maps.get(ours))
    # PyTorch refuses a state dict without the counters of its batch norms.
    ending = "running_var"
    norms = [name.removesuffix(ending) for name in state if name.endswith(f".{ending}")]
    for norm in norms:
        state[f"{norm}{fitting.COUNTER}"] = np.zeros((), np.int64)
    return state


def save_torch(path: AnyPath, network: Network, run: Mapping[str, Any] | None = None) -> None:
    """Writes `to_torch` as safetensors, which `safetensors.torch.load_file` reads.

    The metadata holds as JSON `widths` (the outputs of each layer by PyTorch's name: those of a
    compact network are narrower than published), `input_shape` (channels, height, width) and `run`.
    The shapes alone are enough to build the module. This does it for a CIFAR VGG of any widths:

        import torch
        from collections import OrderedDict
        from torch import nn

        def vgg(state):
            layers = []
            places = [int(name.split(".")[1]) for name in state if name.startswith("layers.")]
            for i in range(1 + max(places)):
                if f"layers.{i}.conv.weight" in state:
                    width, channels = state[f"layers.{i}.conv.weight"].shape[:2]
                    parts = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=1))
                    if f"layers.{i}.bn.weight" in state:
                        parts["bn"] = nn.BatchNorm2d(width)
                    parts["relu"] = nn.ReLU()
                    layers.append(nn.Sequential(parts))
                else:
                    layers.append(nn.MaxPool2d(2))
            parts = OrderedDict(layers=nn.Sequential(*layers))
            parts |= {"mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
            classes, channels = state["fc.weight"].shape
            module = nn.Sequential(OrderedDict(parts, fc=nn.Linear(channels, classes)))
            module.load_state_dict(state)
            return module.eval()

    Raises:
      ValueError: as `to_torch`.
    """
    state = to_torch(network)
    names = pytorch_names.torch_names(network.model)
    widths = {}
    for layer, width in flat.widths(network.params).items():
        widths[names[layer]] = width
    *image, channels = network.input_shape
    header = {
        "format": "pt",  # libraries that read safetensors look for this word
        "widths": json.dumps(widths),
        "input_shape": json.dumps([channels, *image]),
        "run": json.dumps(dict(run or {})),
    }
    storage.write_bytes(pathlib.Path(path), encode(state, header))


def from_torch(
    state: AnyPath | State, model: str | nn.Module, input_shape: tuple[int, ...] | None = None
) -> Network:
    """Builds a network from PyTorch's weights, such as a published checkpoint. Nothing is pruned.

    Values become float32. Wrappers such as `nn.DataParallel` and `torch.compile` may have changed
    the names, and `torch.nn.utils.prune` may have split the weights; see `pytorch_state`. Weights
    that PyTorch has pruned are 0. The mask of the network still has all weights.

    Args:
      state: a .safetensors or .npz file; or a dict of arrays or tensors, or a checkpoint that holds
        one. This turns PyTorch's own files into an .npz file: `python -c "import numpy, torch;
        s = torch.load('net.pt', map_location='cpu', weights_only=True); numpy.savez('net.npz',
        **{k: (v.float() if v.is_floating_point() else v).numpy() for k, v in s.items()})"`.
        It runs no code of the file.
      model: a name of `models.NAMES`, or a network. A name takes its widths and its number of
        classes from the weights, so that narrower and compact networks of that form can be read.
        A network must fit the weights exactly.
      input_shape: the shape of one example; by default that of the published network. It decides
        the order of the inputs of a dense layer on flattened maps.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or the weights do not fit; lists all arrays that are
        missing, unknown, of a wrong shape or not finite.

    >>> import jax
    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> network = Network(model, params, batch_stats, trees.prunable(params), (8, 8, 1))
    >>> again = from_torch(to_torch(network), "conv", (8, 8, 1))
    >>> bool((again.params["head"]["kernel"] == params["head"]["kernel"]).all())
    True
    """
    built, shape = _model_and_shape(model, input_shape)
    expected = flat.shapes_of(built, shape)
    names = pytorch_names.leaf_names(built, expected)
    what = "the state dict" if isinstance(state, Mapping) else f"file {str(state)!r}"
    arrays = pytorch_state.read(state)
    try:
        arrays = pytorch_state.plain(arrays, names.values())
    except ValueError as error:
        raise ValueError(f"{what} cannot be used: {error}") from error
    match = fitting.match_state(names, arrays)

    wanted = model if isinstance(model, str) else type(model).__name__
    # One message reports as many problems as possible. Shapes can be compared only once the names
    # and the numbers of axes fit.
    refuse = functools.partial(fitting.refuse, f"{what} does not fit {wanted}")
    problems = [*fitting.wrong_names(match), *fitting.not_float(match)]
    if isinstance(model, str):
        # Widths can be read off the weights only if every array has the right number of axes.
        other_rank = fitting.other_rank(match, expected)
        refuse([*problems, *other_rank])
        built = _with_widths_of(built, match.found)
        expected = flat.shapes_of(built, shape)
    other_shape = fitting.other_shape(match, expected)
    refuse([*problems, *other_shape])
    refuse(fitting.not_finite(match))

    maps = pytorch_layout.flattened(built, shape)
    variables = {}
    for name, array in match.found.items():
        single = np.asarray(array, np.float32)
        variables[name] = pytorch_layout.from_torch(single, maps.get(name))
    params, batch_stats = flat.unflatten(variables)
    nothing_pruned = trees.prunable(params)
    return Network(built, params, batch_stats, nothing_pruned, shape)


def read_variables(
    path: AnyPath, model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[Params, Tree]:
    """Reads (params, batch_stats) of a model from a file of `networks.save` or PyTorch's weights.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or its variables do not fit the model.
    """
    if _is_native(path):
        network = native.load(path)
        variables = flat.flatten(network.params, network.batch_stats)
        expected = flat.shapes_of(model, input_shape)
        flat.check_shapes(variables, expected, f"the variables of {str(path)!r}")
        return trees.apply_mask(network.params, network.mask), network.batch_stats
    network = from_torch(path, model, input_shape)
    return network.params, network.batch_stats


def _is_native(path: AnyPath) -> bool:
    """Returns whether a file has our own format."""
    if pathlib.Path(path).suffix != ".safetensors":
        return False
    _, header = native.read_safetensors(path)
    return header.get("format") == native.FORMAT


def _model_and_shape(
    model: str | nn.Module, input_shape: tuple[int, ...] | None
) -> tuple[nn.Module, tuple[int, ...]]:
    """Returns the model to fill, with provisional widths if only its name is known."""
    if isinstance(model, str):
        shape = models.default_input_shape(model) if input_shape is None else input_shape
        # The number of classes is provisional as well: `_with_widths_of` reads it off the head.
        return models.create(model, 1), shape
    if input_shape is None:
        raise ValueError(
            "input_shape=None needs the name of a network: with a module, give the shape of one "
            "example."
        )
    return model, input_shape


def _with_widths_of(model: Any, found: Mapping[str, np.ndarray]) -> nn.Module:
    """Returns the model whose layers have as many outputs as PyTorch's weights."""
    # `resized` reads only the last axis of kernels, so arrays of zeros stand in for them.
    kernels = {}
    for name, array in found.items():
        if name.endswith("/kernel"):
            num_outputs = array.shape[0]
            kernels[name] = np.zeros((1, num_outputs), np.float32)
    params, _ = flat.unflatten(kernels)
    num_classes = params[models.HEAD]["kernel"].shape[-1]
    resized = model.resized(params)
    return resized.clone(num_classes=num_classes)
