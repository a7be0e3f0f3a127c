"""A run's network, pruned or trained, from its folder to the files of `exchange`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from synflow_jax import data, models, storage, trees
from synflow_jax.experiments import config, prune_run, train_run
from synflow_jax.experiments.config import Config
from synflow_jax.storage import checkpoints, networks
from synflow_jax.storage.networks import Bundle, bundle

FORMATS = {
    "safetensors": "safetensors",
    "jax": "jax",
    "torch": "torch.safetensors",
}  # and how their files end


def find_row(workdir: pathlib.Path, settings: Config | None, run_id: str | None) -> dict[str, Any]:
    """The row of a run by its id, or by its config: the trained network where there is one, else the pruned one.

    Raises:
      ValueError: neither is given, or there is no such run in `workdir`.
    """
    if run_id is None and settings is None:
        raise ValueError(
            "--config and --run are missing: give the config of the run, or its run_id, --run=RUN_ID."
        )
    rows = {row["run_id"]: row for row in storage.read_rows(workdir / "rows.jsonl")}
    if run_id is not None:
        wanted = [run_id]
    else:
        assert settings is not None
        wanted = [config.train_id(settings), config.run_id(settings)]
    for name in wanted:
        if name in rows:
            return rows[name]
    raise ValueError(
        f"workdir={str(workdir)!r} has no run {wanted[-1]!r}; its runs are {', '.join(rows) or 'none'}. Name one by "
        "--run=RUN_ID, or make it with prune.py or train.py."
    )


def read(row: Mapping[str, Any], workdir: pathlib.Path, init: str | None = None) -> Bundle:
    """The network of a row: of a training run its last checkpoint, of a pruning run its first weights, masked.

    Args:
      row: of `find_row`.
      workdir: where it lies.
      init: the file that a pruning run began from, if any: the row knows its content alone.

    Raises:
      FileNotFoundError, ValueError: what belongs to the row is missing or damaged.
    """
    settings = config.from_dict(row["config"])
    if "prune_run_id" in row:
        return _trained(settings, train_run.checkpoint_path(workdir, row["run_id"]))
    settings.init = init if settings.init is not None and init is not None else settings.init
    settings.prune.beyond_maximum = True  # it has been pruned
    if config.run_id(settings) != row["run_id"]:
        raise ValueError(f"init={init!r} is not the file that run {row['run_id']!r} began from.")
    network = prune_run.build(settings)
    mask = storage.load_mask(prune_run.mask_path(workdir, row["run_id"]), network.params)
    network = prune_run.trained_network(settings, network)
    params = trees.apply_mask(network.params, mask)
    return Bundle(network.model, params, network.batch_stats, mask, network.input_shape)


def _trained(settings: Config, folder: pathlib.Path) -> Bundle:
    arrays, _ = checkpoints.read_latest(folder)
    part = lambda name: {
        key.removeprefix("0/"): leaf for key, leaf in arrays.items() if key.startswith(f"0/{name}/")
    }
    params, batch_stats = bundle.unflatten(part("params") | part("batch_stats"))
    masks = part("mask")
    mask = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            jnp.asarray(masks[key]) if (key := f"mask/{trees.path_name(path)}") in masks else None
        ),
        params,
    )
    model: Any
    model, input_shape = prune_run.architecture(settings)
    if bundle.shapes_of(model, input_shape) != {
        name: a.shape for name, a in bundle.flatten(params, batch_stats).items()
    }:
        model = model.resized(params)  # it was trained without its dead channels
    return Bundle(model, trees.apply_mask(params, mask), batch_stats, mask, input_shape)


def compact(network: Bundle, *, trained: bool) -> Bundle:
    """The network without what the mask has left without use; of a trained one, constants are folded into biases."""
    return Bundle(*models.compact(*network, fold=trained)[:4], network.input_shape)


def write(
    network: Bundle, row: Mapping[str, Any], folder: pathlib.Path, name: str, formats: Sequence[str]
) -> list[str]:
    """Writes NAME.safetensors, .jax and .torch.safetensors into `folder`, as asked for, and returns their names.

    The metadata says which run it was, and by which mean and deviation of its channels an image is normalised.

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
        if kind == "jax":
            storage.write_bytes(folder / file, networks.to_jax(*network))
        else:
            (networks.save if kind == "safetensors" else networks.save_torch)(
                folder / file, *network, run
            )
    return names


def check_formats(value: Sequence[str]) -> list[str]:
    """The formats, without duplicates. Raises ValueError for an unknown one, or none."""
    unknown = [name for name in value if name not in FORMATS]
    if unknown or not value:
        raise ValueError(
            f"format={','.join(value)!r} must be some of {','.join(FORMATS)}, separated by commas."
        )
    return list(dict.fromkeys(value))
