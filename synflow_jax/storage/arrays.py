"""Reads and writes arrays by name as safetensors files that carry their own checksum."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from synflow_jax.storage import files
from synflow_jax.storage.files import AnyPath

_FORMAT = "synflow_jax arrays 1"
DAMAGED = "It is damaged or was made by another program: make it again, or take another file."

Arrays = dict[str, np.ndarray]


def save_arrays(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes arrays by name; read them with `load_arrays`.

    The file's own metadata holds `format`, `sha256` (of the arrays) and `run`: `metadata` as JSON.
    """
    header = {"format": _FORMAT, "sha256": digest(arrays), "run": run_json(metadata)}
    files.write_bytes(path, safetensors.numpy.save(dict(arrays), header))


def load_arrays(path: pathlib.Path) -> Arrays:
    """Reads arrays that `save_arrays` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged or of another kind.
    """
    arrays, header = read_safetensors(
        path, "state file", "train.py writes it if IMP rewinds to a step."
    )
    if header.get("format") != _FORMAT or digest(arrays) != header.get("sha256"):
        raise ValueError(
            f"state file {str(path)!r} does not match its format or its sha256. {DAMAGED}"
        )
    return arrays


def read_safetensors(path: AnyPath, kind: str, hint: str = "") -> tuple[Arrays, dict[str, str]]:
    """Reads any safetensors file.

    Args:
      path: the file.
      kind: what the file is, for messages: "mask file".
      hint: which command makes such a file, for the message that there is none.

    Returns:
      The arrays by name, and the metadata.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{kind} {str(path)!r} does not exist. {hint}".rstrip())
    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, metadata
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{kind} {str(path)!r} cannot be read: {error}. {DAMAGED}") from error


def read_npz(path: AnyPath) -> Arrays:
    """Reads the arrays of an .npz file by name. Pickled objects are refused."""
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the sha256 of arrays, in hex: of their bytes, in the order of their names."""
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(arrays[name].tobytes())
    return hashed.hexdigest()


def run_json(metadata: Mapping[str, Any] | None) -> str:
    """Encodes what a file says about its run, as JSON."""
    return json.dumps(files.to_json(dict(metadata or {})))
