"""Saves and restores the checkpoints of a training run, by orbax.

Checkpoints are written in the background and appear whole or not at all; the last few are kept. A
tree is stored flat, one array per leaf, under the leaf's name. A JSON file describes the run, so
that a checkpoint of another network or config can be told from a damaged one. It also holds a
digest of everything, because orbax would not notice most bits that flip on the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from synflow_jax.storage import files
from synflow_jax.trees import Tree, by_name, path_name

# Beside the description of the run, in each checkpoint: the digest of the description and of all
# arrays. Checkpoints of earlier versions have none.
_DIGEST = "arrays_sha256"
# The ending of what orbax has not finished.
_UNFINISHED = "orbax-checkpoint-tmp"

# The shape and dtype of each leaf, by name.
_Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


class Checkpoints(NamedTuple):
    """The open folder of a run's checkpoints.

    Attributes:
      folder: holds the checkpoints of this run only.
      manager: the `CheckpointManager` of orbax.
      run: a description of the run, as plain JSON values.
    """

    folder: pathlib.Path
    manager: Any
    run: Mapping[str, Any]


@contextlib.contextmanager
def open_folder(
    folder: pathlib.Path, run: Mapping[str, Any], keep: int | None
) -> Iterator[Checkpoints]:
    """Opens a folder of checkpoints. Leaving it waits until all of them are on the disk.

    Args:
      folder: for the checkpoints of this run only; created if it is missing.
      run: a description of the run, as plain values.
      keep: how many checkpoints to keep. What a killed process has left unfinished is removed, so
        the caller holds the lock of the run. None: only to read.

    Raises:
      OSError: the folder cannot be made; or, on leaving, a checkpoint could not be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise files.unwritable(folder, error) from error
    if keep is not None:
        _clean(folder, keep)
    manager = _manager(folder, keep)
    # Tuples become lists, as in the stored description that this one will be compared with.
    encoded = json.dumps(run)
    opened = Checkpoints(folder, manager, json.loads(encoded))
    with _quiet():
        try:
            yield opened
            _wait(folder, manager)
            if keep is not None:
                _sync(folder)
        finally:
            # Closing repeats an error of writing, which was raised above.
            with contextlib.suppress(Exception):
                manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from printing errors, which reach the caller as one exception.

    Orbax logs an error in each of its threads. It reads and writes many arrays at a time and closes
    its event loop at the first error, so each array that was under way prints a traceback.
    """
    usual, logger = sys.unraisablehook, logging.getLogger("absl")

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    def is_not_of_orbax(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    sys.unraisablehook = hook
    logger.addFilter(is_not_of_orbax)
    try:
        yield
        # It stays after an error, since nobody knows when the last array ends.
        sys.unraisablehook = usual
    finally:
        logger.removeFilter(is_not_of_orbax)


def _manager(folder: pathlib.Path, keep: int | None) -> ocp.CheckpointManager:
    """Returns orbax's manager of a folder."""
    this_process = _this_process(folder)
    # Orbax would create folders in the background and announce them to its writing threads by keys
    # that all processes of a job share. Here each process writes separate checkpoints: it would
    # wait for, or write into, a folder that another process announced.
    at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=False,
        multiprocessing_options=this_process,
        async_options=at_once,
    )
    handlers = {
        "tree": ocp.PyTreeCheckpointHandler(multiprocessing_options=this_process, **_arrays()),
        "run": ocp.JsonCheckpointHandler(multiprocessing_options=this_process),
    }
    return ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)


def _clean(folder: pathlib.Path, keep: int) -> None:
    """Removes what a killed process has left: unfinished checkpoints, and more than `keep`."""
    files.remove_stale(folder)
    for path in list(folder.glob(f"*.{_UNFINISHED}*")):
        files.remove(path)
    # Orbax removes old checkpoints file by file, so that the oldest may be a part of one.
    steps = sorted(ocp.utils.checkpoint_steps(folder))
    for step in steps[:-keep]:
        files.remove(folder / str(step))


def _sync(folder: pathlib.Path) -> None:
    """Waits until the newest checkpoint is on the disk. Orbax leaves that to the system."""
    step = latest_step(folder)
    if step is None:
        return
    newest = folder / str(step)
    try:
        for path in [*newest.rglob("*"), newest, folder]:
            files.sync(path)
    except OSError as error:
        raise _unwritten(folder, error) from error


def _this_process(folder: pathlib.Path) -> ocp.options.MultiprocessingOptions:
    """Restricts orbax to the calling process. By default it waits for all processes."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    # Several folders may be open at a time, and each needs its own barrier. A digest has a fixed
    # length and no characters that a key could not have.
    hashed = hashlib.sha256(str(folder).encode())
    prefix = hashed.hexdigest()[:16]
    return ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f"{prefix}-{index}",
    )


class _NumpyHandler(ocp.type_handlers.NumpyHandler):
    """Writes the NumPy arrays of the calling process.

    Orbax's own handler writes those of process 0 and silently skips those of any other process.
    The files are the same, and orbax reads them.
    """

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        """Starts to write the arrays, and returns a future."""

        async def write() -> None:
            for value, info in zip(values, infos, strict=True):
                store = {"driver": "file", "path": str(info.parent_dir / info.name)}
                spec = {"driver": "zarr", "kvstore": store}
                array = await tensorstore.open(
                    spec,
                    create=True,
                    dtype=value.dtype,
                    shape=value.shape,
                )
                await array.write(value)

        future = ocp.future.CommitFutureAwaitingContractedSignals(write(), name="own_arrays")
        return [future]


def _arrays() -> dict[str, Any]:
    """Returns the options for writing arrays: orbax's defaults, unless there are more processes."""
    if jax.process_count() == 1:
        return {}
    handler = (np.ndarray, _NumpyHandler())
    registry = ocp.type_handlers.create_type_handler_registry(handler)
    # Orbax's format OCDBT would look for the parts of other processes.
    return {"type_handler_registry": registry, "use_ocdbt": False}


def save(checkpoints: Checkpoints, step: int, tree: Tree, *, wait: bool = False) -> None:
    """Starts to write a checkpoint, unless this step already has one.

    Args:
      checkpoints: the open folder.
      step: the number of the training step.
      tree: what to save. It is copied first, because the next training step reuses its memory.
      wait: whether to return only when the checkpoint is on the disk.

    Raises:
      OSError: this checkpoint or the one before could not be written. Complete ones are kept.
    """
    folder, manager, run = checkpoints
    # np.array copies; np.asarray would not.
    flat = {name: np.array(leaf) for name, leaf in flatten(tree).items()}
    # Raises the error of the checkpoint before, if it had one, while no newer one has started.
    _wait(folder, manager)
    if step in manager.all_steps():
        return
    described = {**run, _DIGEST: _digest(run, flat)}
    items = ocp.args.Composite(
        tree=ocp.args.PyTreeSave(flat),
        run=ocp.args.JsonSave(described),
    )
    try:
        manager.save(step, args=items)
    except Exception as error:
        raise _unwritten(folder, error) from error
    if wait:
        _wait(folder, manager)


def _digest(run: Mapping[str, Any], flat: Mapping[str, np.ndarray]) -> str:
    """Computes the sha256, in hex, of a description and of arrays: names, types, shapes, bytes."""
    hashed = hashlib.sha256()
    layout = {name: [str(array.dtype), array.shape] for name, array in flat.items()}
    header = json.dumps([run, layout], sort_keys=True)
    hashed.update(header.encode())
    for name in sorted(flat):
        # The array itself, since `tobytes` would copy it.
        contiguous = np.ascontiguousarray(flat[name])
        hashed.update(contiguous.reshape(-1).view(np.uint8).data)
    return hashed.hexdigest()


def _wait(folder: pathlib.Path, manager: Any) -> None:
    """Waits until all checkpoints are on the disk."""
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _unwritten(folder, error) from error


def _unwritten(folder: pathlib.Path, error: Exception) -> OSError:
    """Returns the error for a checkpoint that could not be written."""
    # TensorStore's own errors are long, and have the system's number at their end.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        number = int(found.group(1))
        error = OSError(number, os.strerror(number))
    reason, cure = files.reason_and_cure(error)
    return OSError(
        f"a checkpoint could not be written to {str(folder)!r}: {reason}. Earlier checkpoints are "
        f"intact. {cure or 'Run the same command again to resume.'}"
    )


def latest_step(folder: pathlib.Path) -> int | None:
    """Returns the step of the newest checkpoint of a folder, or None if there is none."""
    if not folder.is_dir():
        return None
    # Reads names only: opening the folder with a manager would be slower, and would create it.
    steps = ocp.utils.checkpoint_steps(folder)
    return max(steps, default=None)


def latest_run(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Returns the description of the run in the newest checkpoint, or None if there is none.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    step = checkpoints.manager.latest_step()
    if step is None:
        return None
    items = ocp.args.Composite(run=ocp.args.JsonRestore())
    described, _ = _split(checkpoints, step, _restore(checkpoints, step, items)["run"])
    return described


def restore_latest(checkpoints: Checkpoints, like: Tree) -> tuple[int, Tree] | None:
    """Restores the newest checkpoint.

    Args:
      checkpoints: the open folder.
      like: a tree of the structure, shapes and dtypes that were saved.

    Returns:
      (step, tree), or None if there is no checkpoint.

    Raises:
      ValueError: the checkpoint is damaged, or belongs to another network or config; names the
        folder and the difference.
    """
    found_run = latest_run(checkpoints)
    if found_run is None:
        return None
    step = checkpoints.manager.latest_step()
    path = checkpoints.folder / str(step)
    # The description is checked before the arrays are read. Another config explains a difference
    # of the arrays better than their shapes do.
    _check_run(path, found_run, checkpoints.run)
    flat, _ = _read(checkpoints, step)
    _check_layout(path, _layout(flat), _layout(flatten(like)))
    return step, unflatten(flat, like)


def _check_run(path: pathlib.Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if a checkpoint describes another run."""
    # A union of dicts keeps the order of the keys, so the message is the same in each process.
    for key in {**found, **wanted}:
        its, ours = found.get(key), wanted.get(key)
        if its != ours:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another run: its {key} is "
                f"{its!r}, this one's is {ours!r}. Choose another "
                "--workdir, or --overwrite to begin anew."
            )


def _check_layout(path: pathlib.Path, found: _Layout, wanted: _Layout) -> None:
    """Raises ValueError if a checkpoint holds other arrays."""
    for name in {**wanted, **found}:
        there = found.get(name, "missing")
        here = wanted.get(name, "missing")
        if there != here:
            raise ValueError(
                f"checkpoint {str(path)!r} belongs to another network: {name!r} is "
                f"{there} there and {here} here. "
                "Choose another --workdir, or --overwrite to begin anew."
            )


def _layout(flat: Mapping[str, Any]) -> _Layout:
    """Returns the shape and dtype of each leaf."""
    layout = {}
    for name, leaf in flat.items():
        array = np.asarray(leaf)
        layout[name] = (array.shape, array.dtype)
    return layout


def read_latest(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the newest checkpoint of a folder as it is stored.

    Returns:
      Its arrays by name, and the description of the run.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the checkpoint is damaged.
    """
    missing = FileNotFoundError(f"there is no checkpoint in {str(folder)!r}. train.py writes them.")
    # Opening would create the folder.
    if not folder.is_dir():
        raise missing
    with open_folder(folder, {}, None) as opened:
        step = opened.manager.latest_step()
        if step is None:
            raise missing
        return _read(opened, step)


def _read(checkpoints: Checkpoints, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads the arrays of a checkpoint and the description of its run, and compares the digest.

    Raises:
      ValueError: the checkpoint is damaged.
    """
    items = ocp.args.Composite(
        tree=ocp.args.PyTreeRestore(),
        run=ocp.args.JsonRestore(),
    )
    restored = _restore(checkpoints, step, items)
    arrays = {name: np.asarray(leaf) for name, leaf in restored["tree"].items()}
    run, digest = _split(checkpoints, step, restored["run"])
    if digest is not None and digest != _digest(run, arrays):
        raise _damaged(checkpoints, step, "its arrays do not have the digest that was saved")
    return arrays, run


def _split(checkpoints: Checkpoints, step: int, found: Any) -> tuple[dict[str, Any], Any]:
    """Splits what a checkpoint says into the description of the run and the digest, or None."""
    if not isinstance(found, dict):
        raise _damaged(checkpoints, step, "the description of its run is no JSON object")
    run = dict(found)
    digest = run.pop(_DIGEST, None)
    return run, digest


def _restore(checkpoints: Checkpoints, step: int, items: ocp.args.Composite) -> Any:
    """Reads the given items of a checkpoint. Raises ValueError if it is damaged."""
    try:
        return checkpoints.manager.restore(step, args=items)
    # Orbax and TensorStore raise many types of errors for damaged files.
    except Exception as error:
        lines = str(error).splitlines() or [repr(error)]
        raise _damaged(checkpoints, step, lines[0][:200]) from error


def _damaged(checkpoints: Checkpoints, step: int, reason: str) -> ValueError:
    """Returns the error for a checkpoint that cannot be used."""
    path = checkpoints.folder / str(step)
    return ValueError(
        f"checkpoint {str(path)!r} is damaged: {reason.rstrip('.')}. Delete that folder; the run "
        "then resumes from the checkpoint before it, if there is one."
    )


def delete(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a run, if there are any.

    Raises:
      OSError: the folder cannot be removed, or is a symbolic link.
    """
    files.remove(folder)


def flatten(tree: Tree) -> dict[str, Any]:
    """Returns the leaves by name. Random keys are returned as their bits."""
    flat = {}
    for name, leaf in by_name(tree).items():
        # NumPy, and so the disk, has no type for keys.
        flat[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return flat


def unflatten(flat: Mapping[str, Any], like: Tree) -> Tree:
    """Returns the tree of the structure of `like` whose leaves `flatten` has named."""

    def leaf(path: tuple[Any, ...], old: Any) -> jax.Array:
        stored = np.asarray(flat[path_name(path)])
        new = jax.numpy.asarray(stored)
        if not _is_key(old):
            return new
        impl = jax.random.key_impl(old)
        return jax.random.wrap_key_data(new, impl=impl)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _is_key(leaf: Any) -> bool:
    """Returns whether a leaf is a typed random key."""
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
