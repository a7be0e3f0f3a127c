"""Runs a command and keeps, for each moment at which it could be killed, what would be left.

The operations that change names on the disk are hooked. Before each of them the folder is copied:
the copy is what a process that dies at this point leaves behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Opening and writing files change less than these: a file that is not complete has a temporary
# name, until one of these gives it another.
_HOOKED = ("replace", "rename", "mkdir", "fsync", "unlink", "remove", "rmdir")
# Parts of names that differ from run to run.
_RANDOM = re.compile(r"\.[0-9a-f]{8}(?=$|/|\.removed)")
# A checkpoint of a run or of a level, finished or not, or one that is being removed.
_OF_ORBAX = re.compile(r"checkpoints/[^/]+/(level-\d+/)?\d+[^/]*|checkpoints/.*\.removed")


def points(
    command: Callable[[], Any], folder: pathlib.Path, copies: pathlib.Path
) -> list[tuple[str, pathlib.Path]]:
    """Runs a command that writes to `folder`.

    Returns:
      (name, copy of the folder) for each different state that a kill could leave, in order. The
      name says which operation comes next.
    """
    found: dict[str, tuple[str, pathlib.Path]] = {}
    # Orbax writes in threads. Operations are done one at a time, so that each has its state.
    lock = threading.RLock()

    def note(operation: str, args: Any) -> None:
        copy = copies / str(len(found))
        _copy(folder, copy)
        digest = _digest(copy)
        if digest in found:
            shutil.rmtree(copy)
        else:
            target = str(args[-1] if operation in ("replace", "rename") else args[0])
            found[digest] = f"{len(found)}-{operation}-{_RANDOM.sub('', target)[-60:]}", copy

    with _hooked(note, lock):
        command()
    return list(found.values())


@contextlib.contextmanager
def _hooked(note: Callable[[str, Any], None], lock: Any) -> Iterator[None]:
    """Calls `note` before each operation, except those of `note` itself."""
    is_noting = False

    def hook(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_noting
            with lock:
                if not is_noting:
                    is_noting = True
                    try:
                        note(name, args)
                    finally:
                        is_noting = False
                return real(*args, **kwargs)

        return call

    usual = {name: getattr(os, name) for name in _HOOKED}
    for name, real in usual.items():
        setattr(os, name, hook(name, real))
    try:
        yield
    finally:
        for name, real in usual.items():
            setattr(os, name, real)


def _copy(folder: pathlib.Path, copy: pathlib.Path) -> None:
    """Copies a folder in which threads may be writing."""
    copy.mkdir()
    # A file may be gone by the time that it is copied; then a kill would not have left it.
    with contextlib.suppress(shutil.Error, FileNotFoundError):
        shutil.copytree(folder, copy, dirs_exist_ok=True)


def _digest(folder: pathlib.Path) -> str:
    """Returns a digest of the state of a folder, in which random names and times do not count."""
    seen = set()
    for path in folder.rglob("*"):
        name = _RANDOM.sub("", str(path.relative_to(folder)))
        within = _OF_ORBAX.match(name)
        if within:
            # Orbax's own files: whether a checkpoint is finished, and whether all of it is there.
            step = folder / within.group()
            seen.add(f"{within.group()} {(step / 'tree' / 'manifest.ocdbt').exists()}")
        elif path.is_dir() or name == "timing.jsonl":
            seen.add(name)
        else:
            seen.add(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(seen)).encode()).hexdigest()
