"""Checks that a run's folder keeps its names, and that the rows of all processes are found."""

from __future__ import annotations

import errno
import os
import pathlib

import jax
import pytest

from synflow_jax import storage
from synflow_jax.storage import Workdir


def test_names_on_the_disk() -> None:
    workdir = Workdir(pathlib.Path("w"))
    paths = {
        "masks/r.safetensors": workdir.mask_path("r"),
        "certificates/r.json": workdir.certificate_path("r"),
        "units/r.json": workdir.units_path("r"),
        "rewind/r.safetensors": workdir.rewind_path("r"),
        "levels/r": workdir.levels_path("r"),
        "levels/r/level-2.json": workdir.level_path("r", 2),
        "levels/r/level-2.safetensors": workdir.level_mask_path("r", 2),
        "curves/r-level-2.csv": workdir.level_curve_path("r", 2),
        "checkpoints/r/level-2": workdir.level_checkpoint_path("r", 2),
        "curves/r.csv": workdir.curve_path("r"),
        "checkpoints/r": workdir.checkpoint_path("r"),
        "config.json": workdir.config_path,
        "failed.json": workdir.failed_path,
        "sweep.json": workdir.sweep_path,
        "layers.png": workdir.layers_picture_path,
        "curve.png": workdir.curve_picture_path,
        "exported": workdir.exported_path,
    }
    assert {name: workdir.relative(path) for name, path in paths.items()} == {n: n for n in paths}
    assert str(workdir) == "w"


def _be_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: index)


def test_rows_of_all_processes_are_found(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks a sweep of several processes, which writes no rows.jsonl."""
    workdir = Workdir(tmp_path)
    assert workdir.rows() == [] and not workdir.has_rows()
    for index in (0, 3):
        _be_process(monkeypatch, index, 4)
        workdir.write_row({"run_id": f"of-{index}", "kept": index})
        workdir.write_timing({"run_id": f"of-{index}", "seconds": 1.0})
        assert workdir.config_path.name == f"config-000{index}.json"
        assert workdir.failed_path.name == f"failed-000{index}.json"
        assert workdir.sweep_path.name == "sweep.json"
    _be_process(monkeypatch, 0, 1)
    names = {path.name for path in tmp_path.glob("*.jsonl")}
    assert {"rows-0000.jsonl", "rows-0003.jsonl"} <= names and "rows.jsonl" not in names
    assert workdir.has_rows() and [row["run_id"] for row in workdir.rows()] == ["of-0", "of-3"]
    assert workdir.find_row("of-3") == {"run_id": "of-3", "kept": 3}
    assert workdir.find_row("of-1") is None
    assert workdir.timing("of-3") == {"run_id": "of-3", "seconds": 1.0}
    assert workdir.timing("of-1") is None


def test_writing_replaces_the_row_of_the_same_run(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    for run_id, kept in (("a", 1), ("b", 2), ("a", 3)):
        workdir.write_row({"run_id": run_id, "kept": kept})
    assert [(row["run_id"], row["kept"]) for row in workdir.rows()] == [("b", 2), ("a", 3)]
    assert storage.read_rows(tmp_path / "rows.jsonl") == workdir.rows()


PATHS = [name for name in vars(Workdir) if name.endswith("_path") and callable(vars(Workdir)[name])]


@pytest.mark.parametrize("name", PATHS)
def test_no_run_id_leads_out_of_the_folder(name: str, tmp_path: pathlib.Path) -> None:
    path_of = getattr(Workdir(tmp_path), name)
    level = (1,) if name.startswith("level_") else ()
    assert tmp_path in path_of("a-c1e+06-s0", *level).parents
    for run_id in (
        "../../x",
        "/x",
        "a/b",
        "a\\b",
        "a\0b",
        "a\n",
        "",
        ".",
        "..",
        ".a",
        "x" * 201,
        1,
    ):
        with pytest.raises(ValueError, match=r"run_id=.* is not the name of a run"):
            path_of(run_id, *level)


def test_a_lock_that_cannot_be_written_is_given_up(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk must not lead to the message that another process has the run."""
    workdir = Workdir(tmp_path)

    def fail(descriptor: int, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", fail)
        with pytest.raises(OSError, match="Free some disk space"), workdir.lock("r"):
            pass
        workdir.clean()
    with workdir.lock("r"):
        pass
    assert not list(tmp_path.iterdir())
