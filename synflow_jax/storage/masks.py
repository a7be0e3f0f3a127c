"""Reads and writes masks: safetensors files with one bit per weight that describe themselves."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, TypeGuard

import jax
import numpy as np

from synflow_jax import trees
from synflow_jax.storage import arrays, files
from synflow_jax.storage.files import AnyPath
from synflow_jax.trees import Mask, Params

# Written into every file. Another format would make existing masks unreadable.
_FORMAT = "synflow_jax mask 1"

Leaves = Mapping[str, np.ndarray]  # by name
Shapes = Mapping[str, tuple[int, ...]]


def save_mask(path: AnyPath, mask: Mask, metadata: Mapping[str, Any] | None = None) -> str:
    """Writes a mask; read it with `load_mask`.

    One uint8 tensor per prunable leaf, named like the leaf, holds its bits; see `pack`. The file's
    own metadata holds `format`, `layers` (JSON: name -> shape and number of kept weights), `sha256`
    (of the packed bits, in the order of the names) and `run`: `metadata` as JSON.

    Returns:
      The sha256 in hex.

    Raises:
      ValueError: two leaves have the same name, or there is none. Nothing is written.
      OSError: the file cannot be written.
    """
    packed = _packed(mask)
    if not packed:
        raise ValueError("mask has no prunable leaf, only holes. Make one with prunable(params).")
    digest = arrays.digest(packed)
    layers = describe(_by_name(mask))
    header = {
        "format": _FORMAT,
        "layers": json.dumps(layers),
        "sha256": digest,
        "run": arrays.run_json(metadata),
    }
    files.write_bytes(pathlib.Path(path), arrays.encode(packed, header))
    return digest


def load_mask(path: AnyPath, params: Params | None = None) -> Mask:
    """Reads a mask that `save_mask` wrote.

    Args:
      path: the file.
      params: parameters that the mask is for.

    Returns:
      A tree like `params`, with None where the file has no leaf. Without `params`,
      {name: bool array}, with names such as "conv1_1/kernel".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged or of another kind, or does not fit `params`.
    """
    packed, header = arrays.read_safetensors(
        path, "mask file", "prune.py writes masks to WORKDIR/masks/."
    )
    where = f"mask file {str(path)!r}"
    found_format = header.get("format")
    if found_format != _FORMAT:
        raise ValueError(f"{where} has format {found_format!r}, not {_FORMAT!r}. {arrays.DAMAGED}")
    if arrays.digest(packed) != header.get("sha256"):
        raise ValueError(f"{where} has bits that do not match its sha256. {arrays.DAMAGED}")
    shapes = parse_shapes(header, "layers", where)
    described, held = sorted(shapes), sorted(packed)
    if described != held:
        raise ValueError(
            f"{where} describes the layers {described}, but holds the masks of {held}. "
            f"{arrays.DAMAGED}"
        )
    masks = unpack_all(packed, shapes, where)
    if params is None:
        return Mask(masks)
    return _like(params, masks, where)


def parse_shapes(header: arrays.Header, key: str, where: str) -> Shapes:
    """Parses the shapes that a file records for its masks; see `describe`.

    The bytes of a mask do not tell its shape, since their last bits may be padding.

    Args:
      header: the metadata of the file.
      key: of the entry that describes the masks.
      where: the file, for the message.

    Raises:
      ValueError: the entry is missing or holds something else.
    """
    layers = arrays.parse_json(header, key, where)
    if not isinstance(layers, dict):
        raise ValueError(f"{where} has {layers!r} as its {key!r}. {arrays.DAMAGED}")
    shapes = {}
    for name, layer in layers.items():
        shape = layer.get("shape") if isinstance(layer, dict) else None
        if not is_shape(shape):
            raise ValueError(f"{where} has {shape!r} as the shape of {name!r}. {arrays.DAMAGED}")
        shapes[name] = tuple(shape)
    return shapes


def is_shape(value: Any) -> TypeGuard[list[int]]:
    """Returns whether a value of JSON is a shape: a list of whole numbers of at least 0."""
    if not isinstance(value, list):
        return False
    # Not isinstance: to Python, True is a whole number.
    return all(type(side) is int and side >= 0 for side in value)


def unpack_all(packed: Leaves, shapes: Shapes, where: str) -> arrays.Arrays:
    """Unpacks masks by name.

    Args:
      packed: the bytes of each mask; see `unpack`.
      shapes: of the same names.
      where: the file, for the message.

    Raises:
      ValueError: the bytes of a mask do not fit its shape.
    """
    masks = {}
    for name, shape in shapes.items():
        try:
            masks[name] = unpack(packed[name], shape)
        except ValueError as error:
            raise ValueError(f"{where} at {name!r}: {error} {arrays.DAMAGED}") from error
    return masks


def mask_digest(mask: Mask) -> str:
    """Computes the sha256 of a mask, in hex, as `save_mask` returns it."""
    return arrays.digest(_packed(mask))


def describe(masks: Leaves) -> dict[str, dict[str, Any]]:
    """Returns the shape and the number of kept weights of each leaf, as files record them.

    >>> describe({"fc/kernel": np.array([[True, False], [True, True]])})
    {'fc/kernel': {'shape': (2, 2), 'kept': 3}}
    """
    layers = {}
    for name, leaf in masks.items():
        num_kept = int(leaf.sum())
        layers[name] = {"shape": leaf.shape, "kept": num_kept}
    return layers


def pack(mask: jax.Array | np.ndarray) -> np.ndarray:
    """Packs a bool array into bytes, eight weights per byte.

    Bits are in C order. The first weight is the highest bit of the first byte.

    >>> pack(np.array([True, False, True]))
    array([160], dtype=uint8)

    Returns:
      uint8 [ceil(size / 8)].
    """
    bits = np.asarray(mask, bool).reshape(-1)
    return np.packbits(bits)


def unpack(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks a bool array of the given shape that `pack` has packed.

    >>> unpack(np.array([160], np.uint8), (3,))
    array([ True, False,  True])

    Raises:
      ValueError: the type or the number of bytes does not fit the shape.
    """
    size = math.prod(shape)
    num_bytes = -(-size // 8)
    if packed.shape != (num_bytes,) or packed.dtype != np.uint8:
        found = packed.shape
        raise ValueError(
            f"packed has shape {found} and dtype {packed.dtype}, but a mask of shape {shape} takes "
            f"({num_bytes},) of uint8."
        )
    # `count` drops the padding bits of the last byte.
    bits = np.unpackbits(packed, count=size)
    return bits.astype(bool).reshape(shape)


def _by_name(mask: Mask) -> arrays.Arrays:
    """Returns the leaves of a mask by name, on the host."""
    leaves = trees.by_name(mask)
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def _packed(mask: Mask) -> arrays.Arrays:
    """Returns the packed leaves of a mask by name."""
    leaves = _by_name(mask)
    return {name: pack(leaf) for name, leaf in leaves.items()}


def _like(params: Params, masks: Leaves, where: str) -> Mask:
    """Builds a mask with the structure of `params` from leaves by name."""
    leaves = trees.by_name(params)
    found = {name: np.shape(leaf) for name, leaf in leaves.items()}
    # Only the leaves of the file are compared: parameters that cannot be pruned are not in it.
    for name, mask in masks.items():
        shape = found.get(name, "no such leaf")
        if shape != mask.shape:
            raise ValueError(
                f"{where} has {name!r} of shape {mask.shape}; the parameters have {shape} there. "
                "It belongs to another network."
            )

    def leaf_of(path: tuple, leaf: Any) -> jax.Array | None:
        del leaf
        name = trees.path_name(path)
        if name not in masks:
            return None
        return jax.numpy.asarray(masks[name])

    return jax.tree_util.tree_map_with_path(leaf_of, params)
