"""Reads published accuracies, to be drawn behind ours: files such as paper/published/fig6.json.

    {"source": TEXT, "log10_compression": [...],
     "panels": [{"model": NAME, "dataset": NAME, "note": TEXT,
                 "top1": {RULE: [[per cent, ...], ...]}}, ...]}

A rule has one list per run, with one accuracy per compression. The note may be missing.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import numpy as np

from synflow_jax.storage import schema


class Published(NamedTuple):
    """Published accuracies of one network on one data set.

    Attributes:
      compression: [num_compressions].
      top1: the mean of each rule's runs, in per cent, [num_compressions].
      note: what a reader has to know.
    """

    compression: np.ndarray
    top1: dict[str, np.ndarray]
    note: str


def read(path: pathlib.Path) -> dict[tuple[str, str], Published]:
    """Reads the published accuracies of a file, by model and data set.

    Raises:
      ValueError: the file is missing or has another form.
    """
    try:
        found = schema.read_object(path)
        compression = 10 ** np.asarray(found["log10_compression"], float)
        return {
            (panel["model"], panel["dataset"]): _panel(panel, compression)
            for panel in found["panels"]
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"--published={str(path)!r} cannot be used: it has another form ({error!r}). Name a "
            "file such as paper/published/fig6.json."
        ) from error


def _panel(panel: dict[str, Any], compression: np.ndarray) -> Published:
    means = {}
    for rule, runs in panel["top1"].items():
        # Raises ValueError unless every run has all compressions.
        means[rule] = np.asarray(runs, float).reshape(-1, len(compression)).mean(axis=0)
    return Published(compression, means, panel.get("note", ""))
