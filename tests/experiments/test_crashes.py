"""Kills commands at every point, runs them again, and compares all that they leave.

A kill is simulated: before each operation on the disk the folder is copied, and the copy is what a
process that dies there leaves (`crashes`). After the same command has run on the copy, its files
must be those of a command that was left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import resource
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import crashes
import pytest
from cases import EXHAUSTIVE

from synflow_jax import storage
from synflow_jax.experiments import engine, initialization, masks, programs
from synflow_jax.experiments.config import Config, Grid, PruneConfig, TrainConfig
from synflow_jax.experiments.events import Finished
from synflow_jax.experiments.run import Run, resolve
from synflow_jax.storage import Workdir, arrays, checkpoints

pytestmark = pytest.mark.filterwarnings("ignore")  # orbax warns
_OF_TIME = ("seconds", "record_sha256")  # the record of an IMP level holds its duration


def _runs(seeds: tuple[int, ...] = (0,), **prune: Any) -> list[Run]:
    train = TrainConfig(
        num_epochs=2,
        batch_size=719,
        learning_rate=0.1,
        drops=(),
        compact=False,
        keep_checkpoints=1,
    )
    config = Config(
        model="fc",
        dataset="digits",
        width_multiplier=0.05,
        prune=PruneConfig(**{"pruner": "random", "compression": 2.0, **prune}),
        train=train,
        grid=Grid(seed=seeds),
    )
    return resolve(config)


class Case(NamedTuple):
    """A command: its runs, and whether it trains them."""

    runs: list[Run]
    trains: bool = True


CASES = {
    "run": Case(_runs()),
    "sweep": Case(_runs((0, 1))),
    "imp": Case(_runs(pruner="imp", num_iterations=2, rewind_step=1)),
    "grid": Case(_runs((0, 1)), trains=False),
    "certified": Case(_runs(pruner="synflow", schedule="certified"), trains=False),
}


def _run(case: Case, folder: pathlib.Path, **options: Any) -> None:
    workdir = Workdir(folder)
    if case.trains:
        split = len(case.runs) == 1
        outcomes = engine.run(case.runs, workdir, split=split, **options)
    else:
        workdir.clean()
        outcomes = list(masks.prune_all(case.runs, workdir, **options))
    for outcome in outcomes:
        assert isinstance(outcome, Finished), outcome


@pytest.fixture(autouse=True, scope="module")
def _compile_once() -> Iterator[None]:
    """Keeps networks, data and compiled programs: a command runs here some hundred times."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("many", "one", "make_recipe"):
            patch.setattr(programs, name, _remembered(getattr(programs, name)))
        patch.setattr(initialization, "build", _remembered(initialization.build))
        # A kill loses nothing of what the system has been given, so nobody waits for the disk.
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def call(run: Run, *args: Any, **options: Any) -> Any:
        layouts = [arg for arg in args if isinstance(arg, programs.Layout)]
        key = (run.train_id, *layouts, *options.items())
        if key not in made:
            made[key] = make(run, *args, **options)
        return made[key]

    return call


def _left(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what a command has left, by name; checks that the rows speak of what is there."""
    workdir = Workdir(folder)
    left: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = workdir.relative(path)
        if path.is_file() and not name.startswith("checkpoints/") and path.suffix != ".jsonl":
            left[name] = _content(path)
    # Only orbax knows the files within a checkpoint.
    for path in [*folder.glob("checkpoints/*"), *folder.glob("checkpoints/*/*")]:
        left[workdir.relative(path)] = "folder"
    for row in workdir.rows():
        left[row["run_id"]] = _plain(row)
        if "prune_run_id" in row:
            assert workdir.timing(row["run_id"]) is not None
            assert _params_digest(workdir, row) == row["params_sha256"]
        else:
            mask = storage.load_mask(workdir.mask_path(row["run_id"]))
            assert storage.mask_digest(mask) == row["mask_sha256"]
    return left


def _content(path: pathlib.Path) -> Any:
    """Returns the content of a file, without times and without the order of a header."""
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    if path.suffix == ".safetensors":
        found, header = arrays.read_safetensors(path, "file")
        return arrays.digest(found), header
    return path.read_bytes()


def _plain(row: Any) -> Any:
    """Returns a value of JSON without times."""
    if isinstance(row, list):
        return [_plain(item) for item in row]
    if not isinstance(row, dict):
        return row
    return {key: _plain(value) for key, value in row.items() if key not in _OF_TIME}


def _params_digest(workdir: Workdir, row: dict[str, Any]) -> str:
    """Computes the digest of the newest checkpoint's parameters, as the row holds it."""
    found, run = checkpoints.read_latest(workdir.checkpoint_path(row["run_id"]))
    assert run["run_id"] == row["run_id"] and found["0/step"] == row["num_steps"]
    names = sorted(name for name in found if name.startswith("0/params/"))
    return hashlib.sha256(b"".join(found[name].tobytes() for name in names)).hexdigest()


def _points(command: Callable[[], Any], folder: pathlib.Path) -> list[tuple[str, pathlib.Path]]:
    """Runs a command that writes to folder / "whole"; see `crashes.points`."""
    copies = folder / "copies"
    copies.mkdir()
    return crashes.points(command, folder / "whole", copies)


def _check(case: Case, folder: pathlib.Path, part: slice = slice(None)) -> None:
    """Kills a command at its points, or at a part of them, and runs it again."""
    found = _points(lambda: _run(case, folder / "whole"), folder)
    assert len(found) > 10
    expected = _left(folder / "whole")
    for name, copy in found[part]:
        _run(case, copy)
        assert _left(copy) == expected, name


def test_a_command_that_is_killed_ends_as_one_that_was_left_alone(tmp_path: pathlib.Path) -> None:
    """Kills a grid of prunings anywhere, and a training around its last checkpoint and row."""
    for name, part in (("grid", slice(None)), ("run", slice(-8, None))):
        folder = tmp_path / name
        folder.mkdir()
        _check(CASES[name], folder, part)


@pytest.mark.parametrize(
    "name, stride",
    [
        pytest.param("sweep", 1, marks=pytest.mark.slow),
        pytest.param("certified", 1, marks=pytest.mark.slow),
        pytest.param("imp", 3, marks=pytest.mark.slow),
        pytest.param("imp", 1, marks=EXHAUSTIVE),
    ],
)
def test_any_command_that_is_killed_anywhere(
    tmp_path: pathlib.Path, name: str, stride: int
) -> None:
    _check(CASES[name], tmp_path, slice(None, None, stride))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "imp"])
def test_overwriting_that_is_killed_is_resumed_without_the_flag(
    tmp_path: pathlib.Path, name: str
) -> None:
    """Checks that what an earlier command has left is kept whole, or else is made anew."""
    case, whole = CASES[name], tmp_path / "whole"
    _run(case, whole)
    for row in Workdir(whole).rows():
        storage.write_row(whole / "rows.jsonl", {**row, "old": True})
    before = _left(whole)
    found = _points(lambda: _run(case, whole, overwrite=True), tmp_path)
    expected = _left(whole)
    assert expected.keys() == before.keys() and expected != before
    for point, copy in found[::3]:
        _run(case, copy)
        # The first operations only prepare the deletion of the rows.
        assert _left(copy) in (before, expected), point


def test_a_full_disk_is_one_message_and_loses_nothing(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Limits the size of files, each time so that another one is the first that is too large."""
    case = CASES["run"]
    _run(case, tmp_path / "whole")
    expected = _left(tmp_path / "whole")
    failed = {}
    files = {100: "config.json", 1_000: "masks", 2_000: "rows.jsonl", 8_000: "checkpoints"}
    for limit in files:
        folder = tmp_path / str(limit)
        try:
            with _full_disk(limit):
                _run(case, folder)
        except OSError as error:
            message = str(error)
            assert str(folder) in message and "could not be written" in message
            assert message.endswith("then run the same command again to resume.")
            failed[limit] = message.partition(f"{folder}/")[2].split("/")[0].split("'")[0]
        assert capfd.readouterr().err == ""
        _run(case, folder)
        assert _left(folder) == expected, limit
    assert failed == files


@contextlib.contextmanager
def _full_disk(limit: int) -> Iterator[None]:
    """Makes every file that is larger than `limit` bytes too large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
