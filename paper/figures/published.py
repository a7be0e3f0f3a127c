"""Published accuracies, to be drawn behind ours: JSON files such as paper/published/fig6.json.

    {"source": TEXT, "log10_compression": [...],
     "panels": [{"model": NAME, "dataset": NAME, "note": TEXT, "top1": {RULE: [[per cent, ...], ...]}}, ...]}

There is a list of accuracies for each run of a rule, one for each compression; the note may be left out.
"""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import numpy as np


class Published(NamedTuple):
    """Published accuracies of one network on one data set.

    compression: [num]. top1: per rule, the mean of its runs, per cent [num]. note: what a reader has to know.
    """

    compression: np.ndarray
    top1: dict[str, np.ndarray]
    note: str


def read(path: pathlib.Path) -> dict[tuple[str, str], Published]:
    """What a file holds, by (model, data set).

    Raises:
      ValueError: the file is missing or of another form.
    """
    try:
        found = json.loads(path.read_text())
        compression = 10 ** np.asarray(found["log10_compression"], float)
        panels = {}
        for panel in found["panels"]:
            top1 = {
                rule: np.asarray(runs, float).reshape(-1, len(compression))
                for rule, runs in panel["top1"].items()
            }
            means = {rule: runs.mean(axis=0) for rule, runs in top1.items()}
            panels[panel["model"], panel["dataset"]] = Published(
                compression, means, panel.get("note", "")
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else f"it is of another form ({error!r})"
        )
        raise ValueError(
            f"--published={str(path)!r} cannot be used: {reason}. Name a file such as paper/published/fig6.json."
        ) from error
    return panels
