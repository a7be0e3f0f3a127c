"""Keeps two processes from working on the same run.

The lock is a file that its owner keeps locked by `flock`. The system gives the lock up when the
owner ends, however it ends, so a run that was killed is never locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterable, Iterator

from synflow_jax.storage import files


class Busy(ValueError):
    """Another process works on the run."""


@contextlib.contextmanager
def hold(path: pathlib.Path, run_id: str) -> Iterator[None]:
    """Holds the lock of a run. The file is removed on leaving.

    Args:
      path: the file of the lock. It names its owner.
      run_id: of the run, for the message.

    Raises:
      Busy: another process, or another thread of this one, holds it; names the process.
      OSError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock_soon(path)
    except OSError as error:
        raise files.unwritable(path, error) from error
    if descriptor is None:
        raise Busy(
            f"another process{_owner(path)} is working on the run {run_id!r} in this folder. "
            "Nothing was changed. Wait until it has finished, or stop it; then run the same "
            "command again."
        )
    try:
        yield
    finally:
        # Removed while it is locked: nobody can have locked this file in between.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_soon(path: pathlib.Path) -> int | None:
    """Calls `_lock` a few times: `remove_stale` of another process holds a lock for a moment."""
    for _ in range(3):
        descriptor = _lock(path)
        if descriptor is not None:
            return descriptor
        time.sleep(0.02)
    return None


def _lock(path: pathlib.Path) -> int | None:
    """Creates and locks a file. Returns its descriptor, or None if another process holds it."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if _take(path, descriptor):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        # The disk may be full. An open descriptor would keep the lock until the process ends.
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(path: pathlib.Path, descriptor: int) -> bool:
    """Locks an open file and writes its owner. Returns whether it still protects its name.

    Raises:
      BlockingIOError: another process holds the lock.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Its last owner may have removed the file since it was opened; then it protects nothing.
    if not _is_same(path, descriptor):
        return False
    owner = f"pid {os.getpid()} on {socket.gethostname()}"
    os.truncate(descriptor, 0)
    os.write(descriptor, owner.encode())
    return True


def _is_same(path: pathlib.Path, descriptor: int) -> bool:
    """Returns whether an open file still has its name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _owner(path: pathlib.Path) -> str:
    """Returns " (pid PID on HOST)", or nothing if the owner has not written it yet."""
    try:
        owner = path.read_text()
    except OSError:
        return ""
    return f" ({owner})" if owner else ""


def remove_stale(paths: Iterable[pathlib.Path]) -> None:
    """Removes those of some locks that no process holds: their owners were killed."""
    for path in list(paths):
        with contextlib.suppress(OSError):
            descriptor = _lock(path)
            if descriptor is not None:
                path.unlink()
                os.close(descriptor)
