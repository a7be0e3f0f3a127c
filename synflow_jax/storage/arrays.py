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

_SIZE_BYTES = 8

Arrays = dict[str, np.ndarray]
Header = Mapping[str, str]  # the metadata of a file


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
    files.write_bytes(path, encode(arrays, header))


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


def encode(arrays: Mapping[str, np.ndarray], metadata: Header) -> bytes:
    """Returns the bytes of a safetensors file: equal bytes for equal arrays and metadata.

    >>> content = encode({"w": np.zeros(2, np.float32)}, {"b": "1", "a": "2"})
    >>> content[8:48]
    b'{"__metadata__":{"a":"2","b":"1"},"w":{"'
    """
    content = safetensors.numpy.save(dict(arrays), dict(metadata))
    # A file is the size of its header in 8 bytes, the header as JSON, and the arrays.
    size_bytes = content[:_SIZE_BYTES]
    start = _SIZE_BYTES + int.from_bytes(size_bytes, "little")
    header_bytes = content[_SIZE_BYTES:start]
    header = json.loads(header_bytes)
    # The library keeps metadata in a hash map, whose order differs from process to process. A run
    # that begins from a network file is named by the bytes of that file.
    in_order = sorted(metadata.items())
    header["__metadata__"] = dict(in_order)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    encoded = text.encode()
    # Spaces keep the arrays aligned to 8 bytes, as the library writes them.
    num_spaces = -len(encoded) % _SIZE_BYTES
    padded = encoded + b" " * num_spaces
    size_bytes = len(padded).to_bytes(_SIZE_BYTES, "little")
    return size_bytes + padded + content[start:]


def read_safetensors(path: AnyPath, kind: str, hint: str = "") -> tuple[Arrays, Header]:
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
    # NumPy lacks some types that a file may hold, such as the 8-bit floats: AttributeError.
    except (safetensors.SafetensorError, OSError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{kind} {str(path)!r} cannot be read: {error}. {DAMAGED}") from error


def read_npz(path: AnyPath) -> Arrays:
    """Reads the arrays of an .npz file by name. Refuses pickled objects.

    Raises:
      ValueError: the file cannot be read.
    """
    try:
        # A pickle can run any program, and these files come from other people.
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    # NumPy and zipfile raise many types of errors for damaged files, MemoryError among them.
    except Exception as error:
        raise ValueError(str(error) or repr(error)) from error


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Computes the sha256 of arrays, in hex: of their bytes, in the order of their names."""
    # Rows and files record this digest, so what it covers cannot change.
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        content = arrays[name].tobytes()
        hashed.update(content)
    return hashed.hexdigest()


def parse_json(header: Header, key: str, where: str) -> Any:
    """Parses one entry of a file's metadata as JSON.

    Args:
      header: the metadata.
      key: of the entry.
      where: the file, for the message.

    Raises:
      ValueError: there is no such entry, or it is not JSON.
    """
    try:
        return json.loads(header[key])
    # JSON that is nested too deep raises RecursionError.
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} has no readable {key!r} in its metadata: {error!r}. {DAMAGED}"
        ) from error


def read_run(path: AnyPath, kind: str) -> dict[str, Any]:
    """Reads the description of a run from the metadata of a mask, a state or a network.

    Args:
      path: the file.
      kind: as `read_safetensors` takes it.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or describes no run.
    """
    _, header = read_safetensors(path, kind)
    where = f"{kind} {str(path)!r}"
    run = parse_json(header, "run", where)
    if not isinstance(run, dict):
        raise ValueError(f"{where} has the run {run!r}, which is not a JSON object. {DAMAGED}")
    return run


def run_json(metadata: Mapping[str, Any] | None) -> str:
    """Encodes the description of a run as JSON."""
    described = dict(metadata or {})
    return json.dumps(files.to_json(described))
