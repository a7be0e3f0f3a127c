"""A network as one safetensors file that describes itself: what kind, how wide, its variables, its mask, its run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from synflow_jax import masking, models, storage, trees
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG
from synflow_jax.trees import Mask, Params, Tree

FORMAT = "synflow_jax network 1"
_FAMILIES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (VGG, ResNet, MLP, ConvNet)
}
_HINT = "It is damaged or was made by another program: export it again, or take another file."


class Bundle(NamedTuple):
    """A network, full or compact: `save(path, *bundle)`.

    Attributes:
      model: of this package.
      params, batch_stats: its variables; {} where there is no batch norm.
      mask: bool arrays beside the prunable parameters, holes elsewhere.
      input_shape: (height, width, channels) of one example.
    """

    model: nn.Module
    params: Params
    batch_stats: Tree
    mask: Mask
    input_shape: tuple[int, ...]


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    input_shape: tuple[int, ...],
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network, atomically; `load` gives it back bit for bit, with whatever weights the mask has pruned.

    Tensors are called "params/conv1_1/kernel" (kernels [height, width, in, out]), "batch_stats/conv1_1_norm/mean" and
    "mask/conv1_1/kernel" (uint8, a bit a weight: `masking.pack`). The metadata holds `format`, and as JSON `model`
    (family and attributes), `widths` (the outputs of each layer), `input_shape`, `mask` (name -> shape, kept), `run`
    (what is given here, such as a config), and `sha256` of the tensors.

    Raises:
      ValueError: the model is not of this package, or variables or mask do not fit.
    """
    expected = shapes_of(model, input_shape)
    variables = flatten(params, batch_stats)
    check_shapes(variables, expected, f"the variables to be written to {str(path)!r}")
    trees.check_mask(mask, params)
    masks = {
        f"mask/{name}": leaf
        for name, leaf in zip(trees.names(mask), jax.tree.leaves(mask), strict=True)
    }
    tensors = variables | {name: masking.pack(leaf) for name, leaf in masks.items()}
    header = {
        "format": FORMAT,
        "model": json.dumps(_describe(model)),
        "widths": json.dumps(widths(params)),
        "input_shape": json.dumps(input_shape),
        "mask": json.dumps(
            {name: {"shape": np.shape(m), "kept": int(np.sum(m))} for name, m in masks.items()}
        ),
        "run": json.dumps(dict(run or {})),
        "sha256": _digest(tensors),
    }
    storage.write_bytes(pathlib.Path(path), safetensors.numpy.save(tensors, header))


def load(path: str | os.PathLike[str]) -> Bundle:
    """Reads what `save` wrote. The model's initializers, which draw new weights only, are its family's.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated, damaged, or of another kind.
    """
    tensors, header = read_safetensors(path)
    if header.get("format") != FORMAT:
        raise ValueError(
            f"network file {str(path)!r} has format {header.get('format')!r}, not {FORMAT!r}. export.py writes such "
            "files; weights from PyTorch are read by exchange.from_torch."
        )
    if _digest(tensors) != header.get("sha256"):
        raise ValueError(
            f"network file {str(path)!r} has tensors that do not match its sha256. {_HINT}"
        )
    try:
        model = _build(json.loads(header["model"]))
        input_shape = tuple(json.loads(header["input_shape"]))
        masks = {
            name: jnp.asarray(masking.unpack(tensors.pop(name), tuple(layer["shape"])))
            for name, layer in json.loads(header["mask"]).items()
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"network file {str(path)!r} has metadata that cannot be read: {error!r}. {_HINT}"
        ) from error
    check_shapes(tensors, shapes_of(model, input_shape), f"network file {str(path)!r}")
    params, batch_stats = unflatten(tensors)
    mask = jax.tree_util.tree_map_with_path(
        lambda keys, _: masks.get(f"mask/{trees.path_name(keys)}"), params
    )
    trees.check_mask(mask, params)
    return Bundle(model, params, batch_stats, mask, input_shape)


def widths(params: Params) -> dict[str, int]:
    """The number of outputs of each layer of a network, by its name."""
    leaves = dict(zip(trees.names(params), jax.tree.leaves(params), strict=True))
    return {
        name.removesuffix("/kernel"): int(leaf.shape[-1])
        for name, leaf in leaves.items()
        if name.endswith("/kernel")
    }


def _describe(model: nn.Module) -> dict[str, Any]:
    if type(model) not in _FAMILIES.values():
        raise ValueError(
            f"model is a {type(model).__name__}; a file can describe one of {', '.join(_FAMILIES)}."
        )
    fields = [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    # Initializers are functions; they decide on nothing once there are weights.
    return {"family": type(model).__name__} | {
        name: getattr(model, name) for name in fields if not callable(getattr(model, name))
    }


def _build(values: dict[str, Any]) -> nn.Module:
    return _FAMILIES[values.pop("family")](
        **{name: _tuples(value) for name, value in values.items()}
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


# What the other formats share


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises FileNotFoundError, or ValueError if it cannot be read."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"network file {str(path)!r} does not exist.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"network file {str(path)!r} cannot be read: {error}. {_HINT}") from error


def flatten(params: Params, batch_stats: Tree) -> dict[str, np.ndarray]:
    """{"params/layer/kernel": array, ..., "batch_stats/layer/mean": array}, on the host."""
    variables = {"params": params, "batch_stats": batch_stats}
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {trees.path_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(flat: Mapping[str, np.ndarray]) -> tuple[Params, Tree]:
    """(params, batch_stats) of what `flatten` gives."""
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name in sorted(flat):
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.asarray(flat[name])
    return tree["params"], tree["batch_stats"]


@functools.cache
def shapes_of(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every variable of a network, by the names of `flatten`."""
    params, batch_stats = jax.eval_shape(
        lambda key: models.init(model, input_shape, key), jax.random.key(0)
    )
    leaves = jax.tree_util.tree_leaves_with_path({"params": params, "batch_stats": batch_stats})
    return {trees.path_name(path): leaf.shape for path, leaf in leaves}


def check_shapes(
    found: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises ValueError, naming the first variable that differs, unless all are there in their shapes."""
    for name in {**expected, **found}:
        shape = np.shape(found[name]) if name in found else None
        if shape != expected.get(name):
            say = lambda shape: "missing" if shape is None else str(list(shape))
            raise ValueError(
                f"{what} do not fit the model: {name!r} is {say(shape)}, and of the model {say(expected.get(name))}."
            )
