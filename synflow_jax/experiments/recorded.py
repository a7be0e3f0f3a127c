"""Reads the files that a row speaks of, and compares them with the row.

A file may have been copied from another run, or be older than its row. The row holds the digests of
the files that its run wrote. Every reader of a mask or of a trained network comes through here.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from synflow_jax import storage
from synflow_jax.experiments.run import Run, from_dict
from synflow_jax.storage import Workdir
from synflow_jax.storage.arrays import Arrays, digest
from synflow_jax.trees import Mask, Params

Row = Mapping[str, Any]

# What readers use of a row.
_IN_PRUNE_ROWS = ("dataset", "config", "mask_sha256")
_IN_TRAIN_ROWS = ("dataset", "config", "num_steps", "params_sha256")


def run_of(row: Row, init: str | None = None) -> Run:
    """Returns the run of a row, whose config must be the one that the run is named after.

    Args:
      row: of a pruning or a training run.
      init: as `run.from_dict` takes it.

    Raises:
      ValueError: the row lacks an entry, or its config is that of another run.
    """
    is_trained = "prune_run_id" in row
    script = "train.py" if is_trained else "prune.py"
    cure = _cure(script)
    run_id = row["run_id"]
    needed = _IN_TRAIN_ROWS if is_trained else _IN_PRUNE_ROWS
    missing = [key for key in needed if key not in row]
    if missing:
        listed = ", ".join(missing)
        raise ValueError(f"the row of run {run_id!r} lacks {listed}. {cure}")
    config = row["config"]
    if not isinstance(config, dict):
        raise ValueError(f"the row of run {run_id!r} has the config {config!r}. {cure}")
    run = from_dict(config, init)
    name = run.train_id if is_trained else run.prune_id
    what = f"the config in the row of run {run_id!r}"
    _compare(what, {"run_id": name}, row, cure)
    return run


def read_mask(row: Row, workdir: Workdir, params: Params | None = None) -> Mask:
    """Reads the mask of a pruning run.

    Args:
      row: of the pruning run.
      workdir: the folder of the run.
      params: as `storage.load_mask` takes them.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: the file is damaged, does not fit `params` or is that of another run.
    """
    path = workdir.mask_path(row["run_id"])
    script = "train.py" if "levels" in row else "prune.py"
    cure = _cure(script)
    with _explained(cure):
        mask = storage.load_mask(path, params)
    found = {"mask_sha256": storage.mask_digest(mask)}
    _compare(f"mask file {str(path)!r}", found, row, cure)
    return mask


def read_checkpoint(row: Row, workdir: Workdir) -> Arrays:
    """Reads the last checkpoint of a training run as it is stored.

    Args:
      row: of the training run.
      workdir: the folder of the run.

    Returns:
      Its arrays by name: those of the training state begin with "0/".

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the checkpoint is damaged, is that of another run, or is older than the row.
    """
    # Orbax takes a second to import, and pruning does without it.
    from synflow_jax.storage import checkpoints

    folder = workdir.checkpoint_path(row["run_id"])
    with _explained(_cure("train.py")):
        arrays, description = checkpoints.read_latest(folder)
    params = part(arrays, "params")
    found = {
        "run_id": description.get("run_id"),
        "num_steps": _number(arrays.get("0/step")),
        "params_sha256": digest(params),
    }
    check_checkpoint(found, row, workdir)
    _check_mask(arrays, row, workdir)
    return arrays


def check_checkpoint(found: Row, row: Row, workdir: Workdir) -> None:
    """Checks that the last checkpoint of a run is the one that its row speaks of.

    Args:
      found: what the checkpoint holds, by the keys of the row.
      row: of the training run.
      workdir: the folder of the run.

    Raises:
      ValueError: the checkpoint is that of another run, or is older than the row.
    """
    _compare(_last_checkpoint(row, workdir), found, row, _cure("train.py"))


def part(arrays: Arrays, field: str) -> Arrays:
    """Returns the arrays of one field of the training state, e.g. "params", sorted by name."""
    prefix = f"0/{field}/"
    found = {}
    for name in sorted(arrays):
        if name.startswith(prefix):
            in_state = name.removeprefix("0/")
            found[in_state] = arrays[name]
    return found


def check_run(path: pathlib.Path, kind: str, wanted: Row, cure: str) -> None:
    """Checks that a file without a row, such as a state that IMP rewinds to, is that of a run.

    Args:
      path: the file.
      kind: what the file is, for messages: "mask file".
      wanted: entries of the description of the run that the file must have.
      cure: which command makes the file again.

    Raises:
      FileNotFoundError: there is no file.
      ValueError: the file describes another run, or none.
    """
    described = storage.read_run(path, kind)
    its = {key: described.get(key) for key in wanted}
    _compare(f"{kind} {str(path)!r}", its, wanted, cure)


def _check_mask(arrays: Arrays, row: Row, workdir: Workdir) -> None:
    """Checks that a checkpoint has the mask of the pruning run."""
    pruned = workdir.find_row(row["prune_run_id"])
    # The mask of a compact network has other shapes. A network may be copied without its pruning.
    # Versions without compact networks had no such key.
    if pruned is None or row.get("compact"):
        return
    mask = Mask(part(arrays, "mask"))
    found = {"mask_sha256": storage.mask_digest(mask)}
    what = f"the mask in {_last_checkpoint(row, workdir)}"
    _compare(what, found, pruned, _cure("train.py"))


def _last_checkpoint(row: Row, workdir: Workdir) -> str:
    """Says which checkpoint is meant, for messages."""
    folder = workdir.checkpoint_path(row["run_id"])
    return f"the last checkpoint in {str(folder)!r}"


@contextlib.contextmanager
def _explained(cure: str) -> Iterator[None]:
    """Adds to the error of a reader how the file is made again."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} {cure}") from error
    except ValueError as error:
        raise ValueError(f"{error} {cure}") from error


def _compare(what: str, found: Row, wanted: Row, cure: str) -> None:
    """Raises ValueError if a file differs from what is recorded about it."""
    for key, value in found.items():
        recorded = wanted.get(key)
        if value == recorded:
            continue
        run_id = wanted.get("run_id")
        raise ValueError(
            f"{what} is not that of run {run_id!r}: its {key} is {value!r}, and the run's is "
            f"{recorded!r}. {cure}"
        )


def _cure(script: str) -> str:
    """Says which command makes a file again."""
    return f"`python {script}` with the run's flags and --overwrite runs it again."


def _number(array: np.ndarray | None) -> int | None:
    """Returns a number that a checkpoint holds, or None if it is not there."""
    return None if array is None else int(array)
