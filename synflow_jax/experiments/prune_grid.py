"""Many pruning runs, one after another: each network is drawn once, and each ranking made once.

Rows that are there already are skipped, so a grid that was stopped goes on; a run that fails is recorded, and the
others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from synflow_jax import pruning, storage
from synflow_jax.experiments import config, prune_run
from synflow_jax.experiments.config import Config
from synflow_jax.experiments.prune_run import Network, Rule


class Outcome(NamedTuple):
    """What became of a run: a row, or else an error. found: the row is from an earlier time."""

    settings: Config
    row: dict[str, Any] | None = None
    error: str | None = None
    found: bool = False


def failed_path(workdir: pathlib.Path) -> pathlib.Path:
    """Where the failed runs of the last grid are listed, with their errors; no such file if none failed."""
    return workdir / "failed.json"


def run(
    runs: Sequence[Config],
    workdir: pathlib.Path,
    *,
    overwrite: bool = False,
    on_progress: pruning.ProgressFn | None = None,
) -> Iterator[Outcome]:
    """Prunes, as `prune_run.prune` does, and yields an outcome a run, in order.

    Args:
      runs: of one config, from `config.expand`: they differ in nothing but the fields of `Grid`, and their order lets
        neighbours share a network, and scores.
      workdir: the folder of all of them.
      overwrite: run again what `workdir` holds.
      on_progress: as `pruning.prune` takes it, for every run anew.

    Raises:
      OSError: something cannot be written.
    """
    failed: list[dict[str, Any]] = []
    failed_path(workdir).unlink(missing_ok=True)
    for outcome in outcomes(runs, workdir, overwrite, on_progress):
        if outcome.error is not None:
            failed.append({"run_id": config.run_id(outcome.settings), "error": outcome.error})
            storage.write_json(failed_path(workdir), failed)
        yield outcome


def outcomes(
    runs: Sequence[Config],
    workdir: pathlib.Path,
    overwrite: bool,
    on_progress: pruning.ProgressFn | None,
) -> Iterator[Outcome]:
    """As `run`, without a list of what failed."""
    for same_network in _groups(runs, network_key):
        # Called when the first run needs it: where all rows are there, nothing is drawn and nothing scored.
        network = functools.cache(functools.partial(prune_run.build, _unbounded(same_network[0])))
        for same_rule in _groups(same_network, _rule_key):
            rule = functools.cache(functools.partial(_rule, same_rule[0], network))
            for settings in same_rule:
                try:
                    row = None if overwrite else prune_run.find_row(settings, workdir)
                    if row is not None:
                        yield Outcome(settings, row, found=True)
                        continue
                    prune_run.check_compression(settings, network())  # before the scores are made
                    row = prune_run.prune(settings, network(), workdir, on_progress, rule())
                except (ValueError, FloatingPointError, jax.errors.JaxRuntimeError) as error:
                    yield Outcome(settings, error=str(error))
                else:
                    yield Outcome(settings, row)


def _rule(settings: Config, network: Callable[[], Network]) -> Rule:
    return prune_run.rule(settings, network())


def _groups(runs: Sequence[Config], key: Callable[[Config], Any]) -> Iterator[list[Config]]:
    return (list(group) for _, group in itertools.groupby(runs, key))


def _unbounded(settings: Config) -> Config:
    """With a network that is built whatever the compression: one run beyond its maximum must not stop the others."""
    return dataclasses.replace(
        settings, prune=dataclasses.replace(settings.prune, beyond_maximum=True)
    )


def network_key(settings: Config) -> tuple[Any, ...]:
    """Runs of equal keys prune one network."""
    return settings.model, settings.dataset, settings.width_multiplier, settings.seed


def _rule_key(settings: Config) -> tuple[Any, ...]:
    prune = settings.prune
    return prune.pruner, prune.mode, prune.ablation == "invert", config.num_iterations(prune) == 1
