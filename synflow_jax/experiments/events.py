"""Defines what happens during runs, as values. The engine emits them, and a reporter prints them.

The events of one run come in this order; those in brackets may be missing:

    [Built]                            the network; runs that share it emit one event
    [Pruning, ...] or [Level, ...]     unless the folder has the mask
    Pruned
    Started
    [Resumed]                          if there is a checkpoint
    [EpochEnded,] Progress, ...
    Finished or Failed

A run that an earlier command finished emits Finished alone, with `found`. Events of runs that train
at the same time are interleaved, and may come from several threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from synflow_jax.experiments.run import Run
from synflow_jax.pruning import PruneInfo

if TYPE_CHECKING:  # training takes a second to import, and prune.py does without it
    from synflow_jax.models import Network
    from synflow_jax.training.forms import Form


@dataclasses.dataclass(frozen=True)
class Built:
    """The network was initialized. max_compression: the largest that leaves a path through it."""

    run: Run
    network: Network
    max_compression: float


@dataclasses.dataclass(frozen=True)
class Pruning:
    """Some iterations of pruning are done, counted from the start. 0: the program is compiled."""

    run: Run
    num_done: int
    info: PruneInfo


@dataclasses.dataclass(frozen=True)
class Level:
    """Something happened in the training of a level of IMP.

    level: from 1, or 0 for the steps before the state that is rewound to.
    """

    run: Run
    level: int
    event: Resumed | Progress | EpochEnded


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The run has its mask. row: of the pruning run; it may be from an earlier command."""

    run: Run
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Started:
    """Training begins. num_devices: over which each batch is split."""

    run: Run
    form: Form
    num_devices: int


@dataclasses.dataclass(frozen=True)
class Resumed:
    """Training resumes from the checkpoint after a step."""

    run: Run
    step: int
    num_steps: int


@dataclasses.dataclass(frozen=True)
class Progress:
    """A call of the compiled loop has returned.

    Attributes:
      run: the one that trains.
      step: how many steps are done.
      num_steps: how many the run has.
      epoch: the present one, from 0.
      loss, top1: means over the present epoch so far; NaN before its first step.
      images_per_second: of this run; 0 until it is measured.
    """

    run: Run
    step: int
    num_steps: int
    epoch: int
    loss: float
    top1: float
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class EpochEnded:
    """An epoch was evaluated. means: by the names of `training.CURVE`; epoch: from 0."""

    run: Run
    step: int
    num_steps: int
    epoch: int
    means: Mapping[str, float]
    images_per_second: float


@dataclasses.dataclass(frozen=True)
class Halved:
    """Runs did not fit into the memory of a device, and fewer are tried. problem: says which."""

    problem: str
    num_runs: int
    num_left: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run is trained. found: its row is from an earlier command."""

    run: Run
    row: Mapping[str, Any]
    found: bool = False


@dataclasses.dataclass(frozen=True)
class Failed:
    """A run failed. The others continue."""

    run: Run
    error: Exception


Outcome = Finished | Failed
Event = (
    Built | Pruning | Level | Pruned | Started | Resumed | Progress | EpochEnded | Halved | Outcome
)
EventFn = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Does nothing with an event."""
    del event
