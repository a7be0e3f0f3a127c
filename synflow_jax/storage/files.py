"""Writes files atomically: after a crash a file is either the old one or the new one, never a part.

A file is written under a temporary name in the same folder, flushed to the disk and then renamed.
All files of this package are written here, except checkpoints, which orbax writes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Functions that users call take either; inside the package paths are `pathlib.Path`.
AnyPath = str | os.PathLike[str]

# The permissions that a plain `open` would give; `mkstemp` lets only the owner read.
_PERMISSIONS = 0o644


def check_folder(folder: pathlib.Path, flag: str = "workdir") -> None:
    """Checks that a path can be that of a folder: neither it nor a parent is a file.

    Args:
      folder: the folder, which need not exist.
      flag: the flag that named it, for the message.

    Raises:
      ValueError: it is a file, or in a file.
    """
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if nearest is not None and not nearest.is_dir():
        where = "" if nearest == folder else f": {str(nearest)!r}"
        raise ValueError(
            f"{flag}={str(folder)!r}{where} is a file, not a folder. Choose another folder: "
            f"--{flag}=DIR."
        )


def check_writable(folder: pathlib.Path, flag: str = "workdir") -> None:
    """Makes a folder and checks that a file can be written there, before a run starts.

    Args:
      folder: the folder.
      flag: the flag that named it, for the message.

    Raises:
      ValueError: no file can be written there.
    """
    check_folder(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permissions alone do not tell: the file system may be full or read-only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag}={str(folder)!r} cannot be written: {error.strerror}. "
            f"Choose another folder: --{flag}=DIR."
        ) from error


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically, and makes its folder if it is missing.

    Raises:
      OSError: the file cannot be written. An older file of this name is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # The name must not reach the disk before the contents do.
            os.fsync(file.fileno())
        os.chmod(temporary, _PERMISSIONS)
        os.replace(temporary, path)
    # BaseException, because an interrupt must not leave the temporary file behind either.
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically; see `to_json` for what changes on the way."""
    text = json.dumps(to_json(value), indent=2)
    content = f"{text}\n".encode()
    write_bytes(path, content)


def to_json(value: Any) -> Any:
    """Converts a value to the types of JSON: arrays become lists, NaN and infinities become null.

    >>> to_json({"kept": np.array([3, 1]), "loss": float("nan"), 4: (1, 2)})
    {'kept': [3, 1], 'loss': None, '4': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        array = np.asarray(value)
        return to_json(array.tolist())
    # JSON has no word for NaN and infinity.
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
