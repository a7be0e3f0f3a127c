"""Reads the network of a run from its folder, and writes it as files for others.

The run may be one of pruning or of training. Its row may be that of any process of a sweep.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import data, models, storage, trees
from synflow_jax.experiments import initialization, recorded
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, networks
from synflow_jax.storage.networks import flat
from synflow_jax.trees import Mask, Params

# The formats, and how the names of their files end.
FORMATS = {
    "safetensors": "safetensors",
    "jax": "jax",
    "torch": "torch.safetensors",
}

_MAX_SHOWN = 20  # more names do not help to find the right one


def find_row(workdir: Workdir, run: Run | None, run_id: str | None) -> dict[str, Any]:
    """Returns the row of a run by its id, or by its config.

    By its config, it is the row of the trained network if there is one, and else of the pruned one.

    Raises:
      ValueError: neither is given, `run_id` is not the name of a run, or there is no such run
        in `workdir`.
    """
    if run_id is not None:
        # Files are named by it, so it is checked before anything is read or written.
        wanted = [storage.check_run_id(run_id)]
    elif run is not None:
        wanted = [run.train_id, run.prune_id]
    else:
        raise ValueError(
            "--config and --run are missing: give the config of the run, or its run_id, "
            "--run=RUN_ID."
        )
    for name in wanted:
        row = workdir.find_row(name)
        if row is not None:
            return row
    run_ids = workdir.run_ids()
    known = f"its runs are {_some(run_ids)}" if run_ids else "it has no runs"
    raise ValueError(
        f"workdir={str(workdir)!r} has no run {wanted[-1]!r}; {known}. Name one by --run=RUN_ID, "
        "or make it with prune.py or train.py."
    )


def _some(run_ids: Sequence[str]) -> str:
    """Returns the first names of a list, which may have thousands, and how many more there are."""
    shown = ", ".join(run_ids[:_MAX_SHOWN])
    num_more = len(run_ids) - _MAX_SHOWN
    return f"{shown} and {num_more:,} more" if num_more > 0 else shown


def is_trained(row: Mapping[str, Any]) -> bool:
    """Returns whether a row is that of a training run."""
    return "prune_run_id" in row


def read(row: Mapping[str, Any], workdir: Workdir, init: str | None = None) -> Network:
    """Returns the network of a row, its pruned weights set to 0.

    A trained network comes from its last checkpoint, a pruned one from its initialization.

    Args:
      row: from `find_row`.
      workdir: its folder.
      init: the file that a pruning run began from, if it did: the row has only its digest.

    Raises:
      FileNotFoundError: the checkpoint or the mask is missing.
      ValueError: a file is damaged, or is that of another run.
    """
    if is_trained(row):
        network = _read_trained(row, workdir)
    else:
        network = _read_pruned(row, workdir, init)
    return network._replace(params=trees.apply_mask(network.params, network.mask))


def _read_pruned(row: Mapping[str, Any], workdir: Workdir, init: str | None) -> Network:
    """Draws the network of a pruning run again, and reads its mask."""
    run = recorded.run_of(row, init)
    # The run has pruned it, so its compression was accepted.
    network = initialization.build(run, bounded=False)
    mask = recorded.read_mask(row, workdir, network.params)
    return initialization.for_training(run, network)._replace(mask=mask)


def _read_trained(row: Mapping[str, Any], workdir: Workdir) -> Network:
    """Reads the network of a training run from its last checkpoint."""
    run = recorded.run_of(row)
    arrays = recorded.read_checkpoint(row, workdir)
    parameters = recorded.part(arrays, "params")
    statistics = recorded.part(arrays, "batch_stats")
    params, batch_stats = flat.unflatten({**parameters, **statistics})
    mask = _unflatten_mask(recorded.part(arrays, "mask"), params)
    model: Any
    model, input_shape = initialization.architecture(run)
    arrays_by_name = flat.flatten(params, batch_stats)
    found = {name: array.shape for name, array in arrays_by_name.items()}
    if flat.shapes_of(model, input_shape) != found:
        # It was trained in its compact form.
        model = model.resized(params)
    return Network(model, params, batch_stats, mask, input_shape)


def _unflatten_mask(masks: Mapping[str, np.ndarray], params: Params) -> Mask:
    """Returns the mask in the structure of the parameters, with holes where it has no array."""

    def find(path: Any, _: Any) -> jax.Array | None:
        array = masks.get(f"mask/{trees.path_name(path)}")
        return None if array is None else jnp.asarray(array)

    return jax.tree_util.tree_map_with_path(find, params)


def compact(network: Network, *, trained: bool) -> Network:
    """Returns the network without its useless units.

    Args:
      network: from `read`.
      trained: whether it is trained. Then constants are folded into biases, which changes how it
        would train, but not its outputs.
    """
    return models.compact(network, fold=trained).network


def write(
    network: Network,
    row: Mapping[str, Any],
    folder: pathlib.Path,
    name: str,
    formats: Sequence[str],
) -> list[str]:
    """Writes a network in the formats that are asked for, and returns the names of the files.

    The metadata has the run and the mean and deviation of the channels, by which an image is
    normalized.

    Args:
      network: from `read` or `compact`.
      row: from `find_row`.
      folder: for the files.
      name: of the files, without the ending.
      formats: from `check_formats`.

    Raises:
      OSError: a file cannot be written.
    """
    spec = data.spec(row["dataset"])
    run = {
        "run_id": row["run_id"],
        "config": row["config"],
        "mean": spec.mean,
        "deviation": spec.deviation,
    }
    names = [f"{name}.{FORMATS[kind]}" for kind in formats]
    for kind, file in zip(formats, names, strict=True):
        path = folder / file
        if kind == "jax":
            storage.write_bytes(path, networks.to_jax(network))
        elif kind == "torch":
            networks.save_torch(path, network, run)
        else:
            networks.save(path, network, run)
    return names


def check_formats(formats: Sequence[str]) -> list[str]:
    """Returns the formats without duplicates.

    Raises:
      ValueError: one is unknown, or there is none.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ValueError(
            f"format={','.join(formats)!r} must be some of {','.join(FORMATS)}, separated by "
            "commas."
        )
    return list(dict.fromkeys(formats))
