"""Writes files atomically: after a crash a file is either the old one or the new one, never a part.

A file is written under a temporary name in the same folder, flushed to the disk and then renamed.
The process that writes it holds a lock on it, so that the temporary files of killed processes can
be told from those of living ones. All files of this package are written here, except checkpoints,
which orbax writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Functions that users call take either; inside the package paths are `pathlib.Path`.
AnyPath = str | os.PathLike[str]

# The names that `_create` and `remove` make, and no other file of a user.
_STALE = re.compile(
    r"\..+\.(csv|jax|jsonl?|md|npz|png|safetensors)\.[a-z0-9_]{8}|\..+\.[a-z0-9_]{8}\.removed"
)

# The errors of folders that cannot be waited for.
_UNSYNCED = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)

# What to do about an error of the file system, by its number.
_FULL = "Free some disk space (make room), then run the same command again to resume."
_FORBIDDEN = "Change its permissions, or choose another folder."
_NO_FOLDER = "Move that file away, or choose another folder."
_CURES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: _FORBIDDEN,
    errno.EPERM: _FORBIDDEN,
    errno.EROFS: _FORBIDDEN,
    errno.ENOTDIR: _NO_FOLDER,
    errno.EEXIST: _NO_FOLDER,
    errno.EISDIR: "A folder has the name of the file: move it away, or choose another folder.",
    errno.ENAMETOOLONG: "Choose a folder with a shorter name.",
}


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

    The file has the permissions that the umask leaves.

    Raises:
      OSError: the file cannot be written; names it, the reason and the cure. An older file of this
        name is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
        # A rename is on the disk only when its folder is.
        sync(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def _write(path: pathlib.Path, data: bytes) -> None:
    """Writes a temporary file and renames it."""
    temporary, descriptor = _create(path)
    with os.fdopen(descriptor, "wb") as file:
        try:
            file.write(data)
            file.flush()
            # The name must not reach the disk before the contents do.
            os.fsync(file.fileno())
            # Under the lock, which closing the file gives up.
            os.replace(temporary, path)
        # BaseException, because an interrupt must not leave the temporary file behind either.
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _create(path: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Creates a temporary file for `path`, locks it, and returns its name and its descriptor."""
    while True:
        temporary = _hidden(path)
        # Not by `tempfile`, whose files only the owner may read, whatever the umask says.
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Before the lock was ours, another process may have taken the file for a stale one.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _hidden(path: pathlib.Path, ending: str = "") -> pathlib.Path:
    """Returns a new hidden name in the folder of `path`, one that `_STALE` matches."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{ending}")


def sync(path: pathlib.Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk.

    A folder is left to the system where it cannot be opened, or where its file system has no such
    operation.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _UNSYNCED):
            raise


def unwritable(path: pathlib.Path, error: Exception) -> OSError:
    """Returns the error for a path that could not be written: one message with the cure.

    >>> full = OSError(errno.ENOSPC, "No space left on device")
    >>> print(unwritable(pathlib.Path("runs/rows.jsonl"), full))
    ... # doctest: +NORMALIZE_WHITESPACE
    'runs/rows.jsonl' could not be written: No space left on device. Free some disk space (make
    room), then run the same command again to resume.
    """
    reason, cure = reason_and_cure(error)
    message = f"{str(path)!r} could not be written: {reason}. {cure}"
    worded = OSError(message.rstrip())
    # Kept for callers: with two arguments, OSError would print the number too.
    worded.errno = getattr(error, "errno", None)
    return worded


def reason_and_cure(error: Exception) -> tuple[str, str]:
    """Returns why something could not be written, and what to do about it, for messages."""
    reason = str(getattr(error, "strerror", None) or error) or repr(error)
    cure = _CURES.get(getattr(error, "errno", None) or 0, "")
    return reason.rstrip("."), cure


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, if it is there. A crash leaves either all of it or nothing.

    Raises:
      OSError: it cannot be removed, or is a symbolic link; names it and the cure.
    """
    if path.is_symlink():
        raise OSError(
            f"{str(path)!r} is a symbolic link, and is not removed. Remove the link, or what it "
            "points to, then run the same command again."
        )
    if not path.exists():
        return
    hidden = _hidden(path, ".removed")
    try:
        # At once, since a folder of which a part is gone would be taken for a damaged one.
        path.rename(hidden)
        _remove_now(hidden)
    except OSError as error:
        raise OSError(
            f"{str(path)!r} cannot be removed: {error.strerror}. Remove it, or change its "
            "permissions, then run the same command again."
        ) from error


def _remove_now(path: pathlib.Path) -> None:
    """Removes a file or a folder, or what another process has left of it."""
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_stale(folder: pathlib.Path) -> None:
    """Removes the temporary files that killed processes have left in a folder.

    Those that a living process writes are left alone, and so is any file with another name. What
    cannot be removed stays.
    """
    if not folder.is_dir():
        return
    stale = [path for path in folder.iterdir() if _STALE.fullmatch(path.name)]
    for path in stale:
        with contextlib.suppress(OSError):
            if path.is_dir() or not _is_owned(path):
                _remove_now(path)


def _is_owned(path: pathlib.Path) -> bool:
    """Returns whether a living process holds the lock of a temporary file."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


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
