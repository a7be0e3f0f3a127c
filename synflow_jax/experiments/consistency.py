"""Checks that all runs of a folder can be compared with each other."""

from __future__ import annotations

import json
from collections.abc import Sequence

import jax

from synflow_jax import storage
from synflow_jax.experiments.run import Run
from synflow_jax.storage import Workdir, schema


def check_workdir(runs: Sequence[Run], workdir: Workdir) -> None:
    """Checks that the runs agree with those of the folder in all that no grid varies.

    The folder's sweep.json holds these settings, and process 0 writes it. Settings that a grid can
    vary may differ from one sweep to the next, since rows are told apart by them. Any other
    difference would produce rows that look comparable and are not.

    Args:
      runs: from `run.resolve`, of all processes.
      workdir: the folder.

    Raises:
      ValueError: a setting differs, or sweep.json is damaged.
      OSError: it cannot be written.
    """
    path = workdir.sweep_path
    # Through JSON, which turns tuples into lists, to compare like with like.
    common = json.loads(json.dumps(runs[0].deciding_values()))
    if path.exists():
        try:
            earlier = schema.read_object(path)
        except ValueError as error:
            raise ValueError(f"{error}. Delete it if its rows are to be kept.") from error
        differing = [key for key in common if key in earlier and earlier[key] != common[key]]
        if differing:
            lines = [f"{key} was {earlier[key]!r} and is {common[key]!r}" for key in differing]
            raise ValueError(
                f"workdir={str(workdir)!r} holds a sweep of another config: {'; '.join(lines)}. "
                "Its rows would not compare with these: choose another --workdir, or set the "
                "config's values back."
            )
    if jax.process_index() == 0:
        storage.write_json(path, common)
