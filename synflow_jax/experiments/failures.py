"""Keeps the list of the runs of a grid that failed, failed.json."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from synflow_jax import storage
from synflow_jax.experiments.events import Failed, Finished
from synflow_jax.experiments.run import Run
from synflow_jax.storage import Workdir, files


def listed(
    outcomes: Iterable[Finished | Failed], workdir: Workdir, name: Callable[[Run], str]
) -> Iterator[Finished | Failed]:
    """Yields the outcomes, and lists those that failed in failed.json as they come.

    The list of an earlier command is deleted first.

    Args:
      outcomes: of the runs of a grid.
      workdir: their folder.
      name: returns the id by which a run is listed.

    Raises:
      OSError: failed.json cannot be written.
    """
    failed: list[dict[str, str]] = []
    _delete(workdir.failed_path)
    for outcome in outcomes:
        if isinstance(outcome, Failed):
            failed.append({"run_id": name(outcome.run), "error": str(outcome.error)})
            # At once, so that a grid that is killed leaves the list so far.
            storage.write_json(workdir.failed_path, failed)
        yield outcome


def _delete(path: pathlib.Path) -> None:
    """Deletes the list of an earlier command, if there is one."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise files.unwritable(path, error) from error


def check(failed: Sequence[Failed], num_runs: int, workdir: Workdir) -> None:
    """Checks that no run failed.

    Raises:
      ValueError: some did; says how many of `num_runs`, and why the first one did.
    """
    if failed:
        raise ValueError(
            f"{len(failed)} of {num_runs} runs failed. The first error: {failed[0].error} "
            f"{workdir.failed_path} lists them; the same command tries them again."
        )
