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

# Written into every file. The reader refuses any other format.
_FORMAT = "synflow_jax arrays 1"
DAMAGED = "It is damaged or was made by another program: make it again, or take another file."

Arrays = dict[str, np.ndarray]


def save_arrays(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes arrays by name; read them with `load_arrays`.

    The file's own metadata holds `format`, `sha256` (of the arrays) and `run`: `metadata` as JSON.
    """
    header = {
        "format": _FORMAT,
        "sha256": digest(arrays),
        "run": run_json(metadata),
    }
    content = safetensors.numpy.save(dict(arrays), header)
    files.write_bytes(path, content)


def load_arrays(path: pathlib.Path) -> Arrays:
    """Reads arrays that `save_arrays` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged or of another kind.
    """
    arrays, header = read_safetensors(
        path, "state file", "train.py writes it if IMP rewinds to a step."
    )
    has_format = header.get("format") == _FORMAT
    # Safetensors has no checksum. Without one, a run would resume from a flipped bit.
    has_digest = header.get("sha256") == digest(arrays)
    if not (has_format and has_digest):
        raise ValueError(
            f"state file {str(path)!r} does not match its format or its sha256. {DAMAGED}"
        )
    return arrays


def read_safetensors(path: AnyPath, kind: str, hint: str = "") -> tuple[Arrays, dict[str, str]]:
    """Reads any safetensors file.

    Args:
      path: the file.
      kind: what the file is, for messages: "mask file".
      hint: which command writes such a file, for the message about a missing one.

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
            arrays = {}
            names = file.keys()
            for name in names:
                arrays[name] = file.get_tensor(name)
            return arrays, metadata
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{kind} {str(path)!r} cannot be read: {error}. {DAMAGED}") from error


def read_npz(path: AnyPath) -> Arrays:
    """Reads the arrays of an .npz file by name. Refuses pickled objects."""
    # A pickle can run any program, and these files come from other people.
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the sha256 of arrays, in hex: of their bytes, in the order of their names."""
    # Rows and files record this digest, so what it covers cannot change.
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        content = arrays[name].tobytes()
        hashed.update(content)
    return hashed.hexdigest()


def run_json(metadata: Mapping[str, Any] | None) -> str:
    """Encodes the description of a run as JSON."""
    described = dict(metadata or {})
    return json.dumps(files.to_json(described))
