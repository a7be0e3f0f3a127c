"""Checkpoints of a training run by orbax: asynchronous, atomic, the last few kept.

A tree is stored flat, one array a leaf under the leaf's name, beside a JSON of what the run is, so that a checkpoint
of another network or config is told from a damaged one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from synflow_jax.trees import Tree, path_name


class Checkpoints(NamedTuple):
    """An open folder of checkpoints of one run."""

    folder: pathlib.Path
    manager: Any
    run: Mapping[str, Any]


@contextlib.contextmanager
def open_folder(folder: pathlib.Path, run: Mapping[str, Any], keep: int) -> Iterator[Checkpoints]:
    """A folder of checkpoints, made where it is missing; on leaving, waits until all are written.

    Args:
      folder: of this run alone.
      run: what the run is, as plain values.
      keep: how many checkpoints stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    alone = _alone(folder)
    # Made in the background, directories are announced to the threads that write by keys which the processes of a job
    # share, though each has checkpoints of its own: one would wait for, or write into, what another one has announced.
    at_once = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=False, multiprocessing_options=alone, async_options=at_once
    )
    manager = ocp.CheckpointManager(
        folder.absolute(),
        options=options,
        item_handlers={
            "tree": ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, **_arrays()),
            "run": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        },
    )
    as_read = json.loads(
        json.dumps(run)
    )  # tuples as lists: what a stored one will be compared with
    try:
        yield Checkpoints(folder, manager, as_read)
        _wait(folder, manager)
    finally:
        with contextlib.suppress(Exception):  # what went wrong in writing has been raised above
            manager.close()


def _alone(folder: pathlib.Path) -> ocp.options.MultiprocessingOptions:
    """Of several processes, the one that calls: orbax would wait for all of them, and each has runs of its own."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    index = jax.process_index()
    prefix = hashlib.sha256(str(folder).encode()).hexdigest()[
        :16
    ]  # several folders may be open at a time
    return ocp.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"{prefix}-{index}"
    )


class _OwnArrays(ocp.type_handlers.NumpyHandler):
    """Writes the NumPy arrays of the process that calls. Orbax's own writes those of process 0 and, silently, no other.

    What it writes is what orbax's writes, and is read by it.
    """

    async def serialize(
        self, values: Sequence[np.ndarray], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> list[Any]:
        async def write() -> None:
            for value, info in zip(values, infos, strict=True):
                store = {"driver": "file", "path": str(info.parent_dir / info.name)}
                array = await tensorstore.open(
                    {"driver": "zarr", "kvstore": store},
                    create=True,
                    dtype=value.dtype,
                    shape=value.shape,
                )
                await array.write(value)

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="own_arrays")]


def _arrays() -> dict[str, Any]:
    if jax.process_count() == 1:
        return {}
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _OwnArrays()))
    return {
        "type_handler_registry": registry,
        "use_ocdbt": False,
    }  # OCDBT would look for the parts of other processes


def save(checkpoints: Checkpoints, step: int, tree: Tree, *, wait: bool = False) -> None:
    """Starts to write a checkpoint, unless this step has one; `wait` returns when it is on the disk.

    Raises:
      OSError: it could not be written, or the one before could not; those that are complete stay.
    """
    # Copies, since the next step of training reuses the memory of this one.
    flat = {name: np.array(leaf) for name, leaf in flatten(tree).items()}
    _wait(checkpoints.folder, checkpoints.manager)
    if step in checkpoints.manager.all_steps():
        return
    try:
        checkpoints.manager.save(
            step,
            args=ocp.args.Composite(
                tree=ocp.args.PyTreeSave(flat), run=ocp.args.JsonSave(dict(checkpoints.run))
            ),
        )
    except Exception as error:
        raise _unwritten(checkpoints.folder, error) from error
    if wait:
        _wait(checkpoints.folder, checkpoints.manager)


def _wait(folder: pathlib.Path, manager: Any) -> None:
    try:
        manager.wait_until_finished()
    except Exception as error:
        raise _unwritten(folder, error) from error


def _unwritten(folder: pathlib.Path, error: Exception) -> OSError:
    return OSError(
        f"a checkpoint could not be written to {str(folder)!r}: {error}. Those before it are whole: make room, and "
        "give the same command again to go on from the last one."
    )


def latest_step(folder: pathlib.Path) -> int | None:
    """The step of the newest checkpoint of a folder, or None if there is none."""
    return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def latest_run(checkpoints: Checkpoints) -> dict[str, Any] | None:
    """What the newest checkpoint says of its run, or None if there is none.

    Raises:
      ValueError: it is damaged.
    """
    step = checkpoints.manager.latest_step()
    if step is None:
        return None
    try:
        return checkpoints.manager.restore(
            step, args=ocp.args.Composite(run=ocp.args.JsonRestore())
        )["run"]
    except Exception as error:
        raise _damaged(checkpoints.folder / str(step), error) from error


def restore_latest(checkpoints: Checkpoints, like: Tree) -> tuple[int, Tree] | None:
    """The newest checkpoint as (step, tree of the structure, shapes and dtypes of `like`), or None if there is none.

    Raises:
      ValueError: it is damaged, or is that of another network or config; names the folder and what differs.
    """
    found_run = latest_run(checkpoints)
    if found_run is None:
        return None
    step = checkpoints.manager.latest_step()
    path = checkpoints.folder / str(step)
    differing = [
        key
        for key in {**found_run, **checkpoints.run}
        if found_run.get(key) != checkpoints.run.get(key)
    ]
    if differing:
        key = differing[0]
        raise ValueError(
            f"checkpoint {str(path)!r} belongs to another run: its {key} is {found_run.get(key)!r}, this one's is "
            f"{checkpoints.run.get(key)!r}. Choose another --workdir, or --overwrite to begin anew."
        )
    wanted = {
        name: (np.shape(leaf), np.asarray(leaf).dtype) for name, leaf in flatten(like).items()
    }
    try:
        flat = checkpoints.manager.restore(
            step, args=ocp.args.Composite(tree=ocp.args.PyTreeRestore())
        )["tree"]
    except Exception as error:
        raise _damaged(path, error) from error
    found = {name: (np.shape(leaf), np.asarray(leaf).dtype) for name, leaf in flat.items()}
    if found != wanted:
        name = next(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise ValueError(
            f"checkpoint {str(path)!r} belongs to another network: {name!r} is {found.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here. Choose another --workdir, or --overwrite to begin anew."
        )
    return step, unflatten(flat, like)


def read_latest(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The newest checkpoint of a folder as it lies there: its arrays by name, and what the run is.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged.
    """
    with contextlib.ExitStack() as stack:
        found = stack.enter_context(open_folder(folder, {}, 1)) if folder.is_dir() else None
        step = None if found is None else found.manager.latest_step()
        if found is None or step is None:
            raise FileNotFoundError(
                f"there is no checkpoint in {str(folder)!r}. train.py writes them."
            )
        items = ocp.args.Composite(tree=ocp.args.PyTreeRestore(), run=ocp.args.JsonRestore())
        try:
            restored = found.manager.restore(step, args=items)
        except Exception as error:
            raise _damaged(folder / str(step), error) from error
    return {name: np.asarray(leaf) for name, leaf in restored["tree"].items()}, restored["run"]


def _damaged(path: pathlib.Path, error: Exception) -> ValueError:
    first_line = (str(error).splitlines() or [repr(error)])[0]
    return ValueError(
        f"checkpoint {str(path)!r} is damaged: {first_line[:200]} Delete that folder, and the run goes on from the "
        "checkpoint before it, if there is one."
    )


def delete(folder: pathlib.Path) -> None:
    """Removes the checkpoints of a run."""
    shutil.rmtree(folder, ignore_errors=True)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaf name -> array; random keys as their bits."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        path_name(path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in leaves
    }


def unflatten(flat: Mapping[str, Any], like: Tree) -> Tree:
    """The tree of the structure of `like` whose leaves `flatten` has named."""

    def leaf(path: tuple, old: Any) -> jax.Array:
        new = jax.numpy.asarray(np.asarray(flat[path_name(path)]))
        return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new

    return jax.tree_util.tree_map_with_path(leaf, like)
