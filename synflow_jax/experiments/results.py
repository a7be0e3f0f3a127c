"""Writes and reads the results of a training run: its curve, its row and its times.

The row does not depend on how often the run was stopped, nor on which runs trained at the same
time. Times do, so they have a file of their own.
"""

from __future__ import annotations

import csv
import hashlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from synflow_jax import storage, training, trees
from synflow_jax.experiments.run import Run
from synflow_jax.storage import Workdir
from synflow_jax.training import TrainInfo, TrainState
from synflow_jax.training.forms import Form
from synflow_jax.trees import Mask


class Timing(NamedTuple):
    """The time that a call of `loop.train` took for each of its runs.

    Attributes:
      seconds: of one run. The time of runs that train together is divided evenly among them.
      num_steps: how many steps this call took; fewer than the run has if it was resumed.
      step_seconds: of one step of one run; None if too few were taken to tell.
      num_runs: how many runs trained together.
    """

    seconds: float
    num_steps: int
    step_seconds: float | None
    num_runs: int


class Trained(NamedTuple):
    """The result of a run: the state after its last step, its record, and how long it took."""

    state: TrainState
    info: TrainInfo
    timing: Timing


def write_curve(path: pathlib.Path, info: TrainInfo, num_epochs: int) -> None:
    """Writes the first epochs of a curve, one per line; see `read_curve`.

    Args:
      path: the file.
      info: the record of the run.
      num_epochs: how many epochs are finished.

    Raises:
      OSError: the file cannot be written.
    """
    curve = {name: np.asarray(values) for name, values in info.curve.items()}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *training.CURVE])
    for epoch in range(num_epochs):
        values = [float(curve[name][epoch]) for name in training.CURVE]
        # repr keeps every bit of a float.
        writer.writerow([epoch + 1, *map(repr, values)])
    storage.write_bytes(path, text.getvalue().encode())


def read_curve(path: pathlib.Path) -> list[dict[str, float]]:
    """Reads the curve of a run: per epoch, its values by the names of `training.CURVE`.

    Raises:
      ValueError: the file is missing or damaged; names the line and the cure.
    """
    # Reading a named pipe or a device would never end.
    if not path.is_file():
        raise _damaged_curve(path, "it is not a file" if path.exists() else "it is missing")
    try:
        text = path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise _damaged_curve(path, f"it cannot be read: {error}") from error
    header, *lines = text.split("\n")
    names = header.rstrip("\r").split(",")
    if sorted(names) != sorted(["epoch", *training.CURVE]):
        raise _damaged_curve(path, f"line 1 is {header[:60]!r}, not the names of its columns")
    # The text ends in a newline, unless it was cut off.
    if not lines or lines.pop():
        raise _damaged_curve(path, "its last line is cut off")
    epochs = []
    for number, line in enumerate(lines, 2):
        try:
            values = [float(value) for value in line.split(",")]
            epochs.append(dict(zip(names, values, strict=True)))
        except ValueError as error:
            problem = f"line {number} is {line[:60]!r}, not {len(names)} numbers"
            raise _damaged_curve(path, problem) from error
    return epochs


def finished_curve(row: Mapping[str, Any], workdir: Workdir) -> list[dict[str, float]]:
    """Reads the curve of a finished run, which must end as its row does.

    Args:
      row: of the training run.
      workdir: its folder.

    Raises:
      ValueError: the curve is missing, damaged, or that of another run.
    """
    path = workdir.curve_path(row["run_id"])
    epochs = read_curve(path)
    last = row["last"]
    if not epochs or epochs[-1] != last:
        raise _damaged_curve(path, f"it does not end with epoch {last['epoch']} of the row")
    return epochs


def _damaged_curve(path: pathlib.Path, problem: str) -> ValueError:
    return ValueError(f"curve {str(path)!r}: {problem}. --overwrite trains the run again.")


def write(run: Run, mask: Mask, form: Form, trained: Trained, workdir: Workdir) -> dict[str, Any]:
    """Writes config.json, the times and the row of a finished run, and returns the row.

    Args:
      run: the one that was trained.
      mask: of the full network.
      form: in which the network was trained.
      trained: from `loop.train`.
      workdir: the folder.

    Raises:
      OSError: a file cannot be written.
    """
    row = _row(run, mask, form, trained)
    timing = trained.timing
    num_images = timing.num_steps * run.config.train.batch_size
    storage.write_json(workdir.config_path, row["config"])
    workdir.write_timing(
        {
            "run_id": run.train_id,
            "seconds": timing.seconds,
            "steps": timing.num_steps,
            "step_seconds": timing.step_seconds,
            "images_per_second": num_images / timing.seconds,
            "together": timing.num_runs,
        }
    )
    # Last: a run that has a row is not trained again, so all else must be there.
    workdir.write_row(row)
    return row


def _row(run: Run, mask: Mask, form: Form, trained: Trained) -> dict[str, Any]:
    """Returns the result of a run, as plain values."""
    config = run.config
    state = trained.state
    curve = {name: np.asarray(trained.info.curve[name], np.float64) for name in training.CURVE}

    def at(epoch: int) -> dict[str, float]:
        values = {name: float(values[epoch]) for name, values in curve.items()}
        return {"epoch": epoch + 1, **values}

    last = config.train.num_epochs - 1
    # The best epoch is selected by test accuracy, as in the paper. The row has the last one too.
    best = int(np.nanargmax(curve["test_top1"]))
    masks = map(np.asarray, jax.tree.leaves(mask))
    kept = sum(np.count_nonzero(leaf) for leaf in masks)
    return {
        "run_id": run.train_id,
        "prune_run_id": run.prune_id,
        "model": config.model,
        "dataset": config.dataset,
        "pruner": config.prune.pruner,
        "compression": config.prune.compression,
        "seed": config.seed,
        "width_multiplier": config.width_multiplier,
        "total": sum(trees.sizes(mask)),
        "kept": int(kept),
        "compact": form.compact,
        "size": form.size,
        "num_epochs": config.train.num_epochs,
        "num_steps": int(state.step),
        "last": at(last),
        "best": at(best),
        "mean_squares": _mean_squares(form, state.params),
        "curve": f"curves/{run.train_id}.csv",
        "params_sha256": digest(state.params),
        "config": run.train_dict,
    }


def _mean_squares(form: Form, trained: trees.Tree) -> list[dict[str, Any]]:
    """Returns, for each layer, the mean square of its kept weights before and after training.

    Figure 5b of the paper shows them. They are of the network that was trained, so a compact
    network is measured by its own layers.
    """
    masks = _by_name(form.network.mask)
    before, after = _by_name(form.network.params), _by_name(trained)
    layers = []
    for name, kept in masks.items():
        initial = _mean_square(before[name], kept)
        final = _mean_square(after[name], kept)
        layers.append({"name": name, "size": kept.size, "initial": initial, "final": final})
    return layers


def _mean_square(weights: np.ndarray, kept: np.ndarray) -> float:
    """Returns the mean square of the kept weights; 0 if none is kept."""
    if not kept.any():
        return 0.0
    # In float64, so that the sum over millions of weights is not rounded by its order.
    squares = np.square(weights.astype(np.float64))
    return float(np.mean(squares, where=kept))


def _by_name(tree: trees.Tree) -> dict[str, np.ndarray]:
    leaves = trees.by_name(tree)
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


def digest(tree: trees.Tree) -> str:
    """Returns the sha256, in hex, of all arrays of a tree in order."""
    arrays = map(np.asarray, jax.tree.leaves(tree))
    content = b"".join(array.tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()
