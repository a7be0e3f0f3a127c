"""Reads and writes a network as one safetensors file that describes itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import storage, trees
from synflow_jax.models import Network
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG
from synflow_jax.storage import arrays, masks
from synflow_jax.storage.files import AnyPath
from synflow_jax.storage.networks import flat

# Written into every file. Another format would make existing files unreadable.
FORMAT = "synflow_jax network 1"
_MASK = "mask/"
# These names are in the files as well, so the classes cannot be renamed.
_FAMILIES: dict[str, type[nn.Module]] = {
    "VGG": VGG,
    "ResNet": ResNet,
    "MLP": MLP,
    "ConvNet": ConvNet,
}


def save(path: AnyPath, network: Network, run: Mapping[str, Any] | None = None) -> None:
    """Writes a network, full or compact; `load` returns it bit for bit, pruned weights included.

    Tensors are named "params/conv1_1/kernel" (kernels are [height, width, in, out]),
    "batch_stats/conv1_1_norm/mean" and "mask/conv1_1/kernel" (uint8, one bit per weight; see
    `storage.masks.pack`). The file's metadata holds `format`, the `sha256` of the tensors, and as
    JSON: `model` (family and attributes), `widths` (outputs per layer), `input_shape`, `mask`
    (name -> shape and number of kept weights) and `run`.

    Args:
      path: the file.
      network: a network of this package.
      run: anything that the file should say about its origin, such as a config.

    Raises:
      ValueError: the model is not of this package, or variables or mask do not fit it.
    """
    variables = flat.flatten(network.params, network.batch_stats)
    expected = flat.shapes_of(network.model, network.input_shape)
    flat.check_shapes(variables, expected, f"the variables to be written to {str(path)!r}")
    trees.check_mask(network.mask, network.params)

    # Pruned weights are written too, not as zeros: training may have stopped at any value, and a
    # network that is loaded must be equal in every bit.
    kept = _masks_by_name(network)
    packed = {name: masks.pack(mask) for name, mask in kept.items()}
    tensors = variables | packed
    header = {
        "format": FORMAT,
        "model": json.dumps(_describe(network.model)),
        "widths": json.dumps(flat.widths(network.params)),
        "input_shape": json.dumps(network.input_shape),
        "mask": json.dumps(masks.describe(kept)),
        "run": json.dumps(dict(run or {})),
        "sha256": _digest(tensors),
    }
    storage.write_bytes(pathlib.Path(path), arrays.encode(tensors, header))


def load(path: AnyPath) -> Network:
    """Reads a network that `save` wrote.

    A file does not hold the model's initializers. The model that is returned has the default ones
    of its family.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged or of another kind.
    """
    tensors, header = read_safetensors(path)
    where = f"network file {str(path)!r}"
    found_format = header.get("format")
    if found_format != FORMAT:
        raise ValueError(
            f"{where} has format {found_format!r}, not {FORMAT!r}. export.py writes such files; "
            "storage.networks.from_torch reads weights from PyTorch."
        )
    if _digest(tensors) != header.get("sha256"):
        raise ValueError(f"{where} has tensors that do not match its sha256. {arrays.DAMAGED}")
    model, input_shape = _read_model(header, len(tensors), where)
    expected = _shapes_of(model, input_shape, where)
    packed: arrays.Arrays = {}
    variables: arrays.Arrays = {}
    for name, tensor in tensors.items():
        kind = packed if name.startswith(_MASK) else variables
        kind[name] = tensor
    flat.check_shapes(variables, expected, where)
    _check_float(variables, where)
    kept = _read_masks(header, packed, expected, where)
    params, batch_stats = flat.unflatten(variables)

    def mask_of(keys: tuple, leaf: jax.Array) -> jax.Array | None:
        del leaf
        name = trees.path_name(keys)
        mask = kept.get(f"{_MASK}{name}")
        return None if mask is None else jnp.asarray(mask)

    mask = jax.tree_util.tree_map_with_path(mask_of, params)
    return Network(model, params, batch_stats, mask, input_shape)


def _read_model(
    header: arrays.Header, num_tensors: int, where: str
) -> tuple[nn.Module, tuple[int, ...]]:
    """Reads the model and the shape of its input from the metadata of a file."""
    described = arrays.parse_json(header, "model", where)
    input_shape = arrays.parse_json(header, "input_shape", where)
    if not masks.is_shape(input_shape) or not all(input_shape):
        raise ValueError(f"{where} has the input_shape {input_shape!r}. {arrays.DAMAGED}")
    try:
        model = _build(described)
        num_blocks = sum(getattr(model, "num_blocks", ()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where} has metadata that cannot be read: {error!r}. {arrays.DAMAGED}"
        ) from error
    # Every block has tensors. To trace billions of blocks would take for ever.
    if num_blocks > num_tensors:
        raise ValueError(
            f"{where} describes a network of {num_blocks} blocks, but holds {num_tensors} tensors. "
            f"{arrays.DAMAGED}"
        )
    return model, tuple(input_shape)


def _shapes_of(model: nn.Module, input_shape: tuple[int, ...], where: str) -> flat.Shapes:
    """Returns the shapes of a model's variables, or says that a file describes no model."""
    try:
        return flat.shapes_of(model, input_shape)
    # The attributes come from the file, and Flax raises any type of error for wrong ones.
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), repr(error))
        raise ValueError(
            f"{where} describes a network that cannot be built: {first_line[:200]}. "
            f"{arrays.DAMAGED}"
        ) from error


def _check_float(variables: masks.Leaves, where: str) -> None:
    """Checks that all variables are floating point numbers."""
    for name, array in variables.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{where} has {name!r} of dtype {array.dtype}, which is not a floating point "
                f"type. {arrays.DAMAGED}"
            )


def _read_masks(
    header: arrays.Header,
    packed: masks.Leaves,
    expected: flat.Shapes,
    where: str,
) -> arrays.Arrays:
    """Unpacks the masks of a file, and checks that they are those of its parameters.

    Args:
      header: the metadata of the file.
      packed: the bytes of the masks by name; names begin with "mask/".
      expected: the shapes of the model's variables.
      where: the file, for messages.
    """
    shapes = masks.parse_shapes(header, "mask", where)
    described, held = sorted(shapes), sorted(packed)
    if described != held or not held:
        raise ValueError(
            f"{where} describes the masks {described}, but holds {held}. {arrays.DAMAGED}"
        )
    for name, shape in shapes.items():
        variable = f"params/{name.removeprefix(_MASK)}"
        wanted = expected.get(variable)
        if shape != wanted:
            raise ValueError(
                f"{where} has {name!r} of shape {list(shape)}, but {variable!r} has the shape "
                f"{wanted}. {arrays.DAMAGED}"
            )
    return masks.unpack_all(packed, shapes, where)


def read_safetensors(path: AnyPath) -> tuple[arrays.Arrays, arrays.Header]:
    """Reads the tensors and the metadata of a network file, ours or PyTorch's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read.
    """
    return arrays.read_safetensors(path, "network file")


def _masks_by_name(network: Network) -> arrays.Arrays:
    """Returns the leaves of the mask under the names that they have in a file."""
    leaves = trees.by_name(network.mask)
    return {f"{_MASK}{name}": np.asarray(leaf) for name, leaf in leaves.items()}


def _describe(model: nn.Module) -> dict[str, Any]:
    """Returns the family and the attributes of a model, as values that JSON can hold."""
    family = type(model).__name__
    # A subclass may compute something else from the same attributes.
    if type(model) is not _FAMILIES.get(family):
        known = ", ".join(_FAMILIES)
        raise ValueError(f"model is a {family}; a file can describe one of {known}.")
    described = {"family": family}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        # Flax's own fields do not describe the network. Initializers are functions, and have no
        # effect once weights exist.
        is_flax = field.name in ("parent", "name")
        if not is_flax and not callable(value):
            described[field.name] = value
    return described


def _build(described: dict[str, Any]) -> nn.Module:
    """Builds the model that `_describe` described."""
    attributes = _with_tuples(described)
    family = attributes.pop("family")
    return _FAMILIES[family](**attributes)


def _with_tuples(value: Any) -> Any:
    """Turns lists back into tuples: JSON has no tuples."""
    # A Linen module must be hashable, because functions are cached and compiled per module.
    if isinstance(value, list):
        return tuple(_with_tuples(item) for item in value)
    if isinstance(value, dict):
        return {name: _with_tuples(item) for name, item in value.items()}
    return value


def _digest(tensors: masks.Leaves) -> str:
    """Computes the sha256 of tensors and their names, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # The zero byte ends the name, so that no name and content can be read as another pair.
        content = tensors[name].tobytes()
        digest.update(name.encode())
        digest.update(b"\0")
        digest.update(content)
    return digest.hexdigest()
