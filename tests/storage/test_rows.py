"""Checks that rows are appended, read once, and that damage is named.

- One more row costs the same after 20 rows and after 2,000.
- Writers of other processes, and editors, are noticed.
- A line that was cut off by a kill is no damage; any other line that is no row is.
- A run has one row, however many processes have written before.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import pytest

from synflow_jax import storage
from synflow_jax.storage import Workdir, rows

LINE = '{"run_id": "a", "kept": 1}\n'


def _fill(workdir: Workdir, number: int) -> None:
    lines = [json.dumps({"run_id": f"run-{i}", "kept": i}) for i in range(number)]
    (workdir.path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))


def _be_process(monkeypatch: pytest.MonkeyPatch, index: int, count: int) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: index)


def test_one_more_run_costs_the_same_after_many(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    parse = rows._parse
    monkeypatch.setattr(
        rows, "_parse", lambda line, *args: (parsed.append(len(line)), parse(line, *args))[1]
    )
    costs = {}
    for number in (20, 2000):
        workdir = Workdir(tmp_path / str(number))
        workdir.path.mkdir()
        _fill(workdir, number)
        workdir.check_rows()
        assert len(parsed) == number
        parsed.clear()
        for run_id in ("new-1", "new-2"):
            assert workdir.find_row(run_id) is None
            workdir.write_row({"run_id": run_id})
            assert workdir.find_row(run_id) == {"run_id": run_id}
        costs[number] = list(parsed)
        parsed.clear()
    # What was written, and what was asked for.
    assert costs[20] == costs[2000] and len(costs[20]) == 4


def test_rows_are_appended(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINE)
    inode = path.stat().st_ino
    storage.write_row(path, {"run_id": "b", "loss": float("nan")})
    assert path.read_text() == f'{LINE}{{"run_id": "b", "loss": null}}\n'
    assert path.stat().st_ino == inode
    # A row that is replaced makes the file anew.
    storage.write_row(path, {"run_id": "a"})
    assert path.read_text() == '{"run_id": "b", "loss": null}\n{"run_id": "a"}\n'
    assert path.stat().st_ino != inode


def _append_row(path: pathlib.Path) -> None:
    storage.write_row(path, {"run_id": "new"})


def _replace(path: pathlib.Path) -> None:
    path.unlink()
    path.write_text('{"run_id": "new"}\n')


def _edit(path: pathlib.Path) -> None:
    """Writes into the file itself, as an editor may."""
    path.write_text('{"run_id": "new"}\n' * 3)


@pytest.mark.parametrize("change", [_append_row, _replace, _edit, pathlib.Path.unlink])
def test_changes_by_others_are_noticed(
    tmp_path: pathlib.Path, change: Callable[[pathlib.Path], Any]
) -> None:
    workdir = Workdir(tmp_path)
    _fill(workdir, 5)
    assert workdir.find_row("new") is None and len(workdir.rows()) == 5
    change(tmp_path / "rows.jsonl")
    assert workdir.rows() == Workdir(tmp_path).rows()
    assert workdir.find_row("new") == Workdir(tmp_path).find_row("new")
    workdir.write_row({"run_id": "last"})
    assert workdir.run_ids()[-1] == "last"


@pytest.mark.parametrize(
    "torn", ["{", '{"run_id": "b", "kep', '{"run_id": "b", "kept": "\\ud8', "\0" * 9]
)
def test_a_line_that_was_cut_off_is_left_out(tmp_path: pathlib.Path, torn: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINE + torn)
    workdir = Workdir(tmp_path)
    assert workdir.run_ids() == ["a"] and path.read_text() == LINE + torn
    workdir.write_row({"run_id": "c"})
    assert path.read_text() == f'{LINE}{{"run_id": "c"}}\n'
    assert workdir.run_ids() == ["a", "c"] == Workdir(tmp_path).run_ids()


def test_a_row_without_its_newline_is_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINE.rstrip())
    workdir = Workdir(tmp_path)
    assert workdir.run_ids() == ["a"]
    storage.write_row(path, {"run_id": "b"})
    assert path.read_text() == f'{LINE}{{"run_id": "b"}}\n'
    assert workdir.run_ids() == ["a", "b"] == Workdir(tmp_path).run_ids()


def test_files_of_other_editors_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = '{"run_id": "a", "note": "\u00e9\u2028\u0085"}\r\n{"run_id": "b"}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert storage.read_rows(path) == [
        {"run_id": "a", "note": "\u00e9\u2028\u0085"},
        {"run_id": "b"},
    ]
    Workdir(tmp_path).delete_rows(["b"])
    assert path.read_bytes() == '{"run_id": "a", "note": "\u00e9\u2028\u0085"}\n'.encode()


DAMAGED = {
    "not UTF-8": b"\xff" + LINE.encode(),
    "nested": b'{"run_id": "x", "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "run_id a list": b'{"run_id": [1]}\n',
    "run_id a path": b'{"run_id": "../../evil/x"}\n',
    "run_id empty": b'{"run_id": ""}\n',
    "no run_id": b'{"kept": 3}\n',
    "NaN": b'{"run_id": "x", "loss": NaN}\n',
    "an integer of 5,000 digits": b'{"run_id": "x", "kept": ' + b"9" * 5000 + b"}\n",
    "blank": b"\n",
    "text": b"rows\n",
    "text without a newline": b"these rows are mine",
    "cut off within the file": b'{"run_id": "b", "kep\n' + LINE.encode(),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_names_the_line_and_the_cure(tmp_path: pathlib.Path, case: str) -> None:
    path = tmp_path / "rows.jsonl"
    content = LINE.encode() + DAMAGED[case]
    path.write_bytes(content)
    workdir = Workdir(tmp_path)
    for use in (
        workdir.check_rows,
        workdir.rows,
        lambda: workdir.write_row({"run_id": "c"}),
        lambda: workdir.delete_rows(["a"]),
    ):
        with pytest.raises(ValueError, match=r"rows\.jsonl', line 2: .* Delete that line") as error:
            use()
        assert len(str(error.value)) < 500 + len(str(path))
    assert path.read_bytes() == content


def _folder(path: pathlib.Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_folder, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows-0003.jsonl", "timing.jsonl"])
def test_what_is_no_file_is_refused(
    tmp_path: pathlib.Path, make: Callable[[pathlib.Path], Any], name: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}' is a .*, not a file\. Move it away"):
        Workdir(tmp_path).check_rows()


def test_a_link_to_itself_is_refused_and_a_folder_that_is_a_file_is_empty(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "rows.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(ValueError, match=r"rows\.jsonl' cannot be read: Too many levels"):
        Workdir(tmp_path).check_rows()
    (tmp_path / "file").write_text("")
    assert Workdir(tmp_path / "file").rows() == []


def test_other_files_of_similar_names_are_left_alone(tmp_path: pathlib.Path) -> None:
    for name in ("rows-backup.jsonl", "rows-0001.old.jsonl", "rows-0001.jsonl.bak", "rows-.jsonl"):
        (tmp_path / name).write_text("notes")
    workdir = Workdir(tmp_path)
    workdir.check_rows()
    assert workdir.rows() == [] and not workdir.has_rows()


def test_a_full_disk_leaves_no_part_of_a_row(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(LINE)
    workdir = Workdir(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            workdir.write_row({"run_id": "b"})
    assert path.read_text() == LINE and workdir.run_ids() == ["a"]
    workdir.write_row({"run_id": "b"})
    assert workdir.run_ids() == ["a", "b"]


# Several processes


def test_a_run_that_another_number_of_processes_makes_again_has_one_row(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = Workdir(tmp_path)
    for index in (0, 1):
        _be_process(monkeypatch, index, 2)
        workdir.write_row({"run_id": f"of-{index}", "kept": "old"})
        workdir.write_timing({"run_id": f"of-{index}", "seconds": -1.0})
    _be_process(monkeypatch, 0, 1)
    workdir.write_row({"run_id": "of-1", "kept": "new"})
    workdir.write_timing({"run_id": "of-1", "seconds": 2.0})
    assert (tmp_path / "rows-0001.jsonl").read_text() == ""
    for folder in (workdir, Workdir(tmp_path)):
        assert [(row["run_id"], row["kept"]) for row in folder.rows()] == [
            ("of-1", "new"),
            ("of-0", "old"),
        ]
        assert folder.timing("of-1") == {"run_id": "of-1", "seconds": 2.0}


def test_deleted_rows_are_gone_from_all_files(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = Workdir(tmp_path)
    for index in (0, 1):
        _be_process(monkeypatch, index, 2)
        for run_id in ("shared", f"of-{index}"):
            # Not by the folder, which leaves one row of a run.
            storage.write_row(tmp_path / f"rows-000{index}.jsonl", {"run_id": run_id})
            storage.write_row(tmp_path / f"timing-000{index}.jsonl", {"run_id": run_id})
    workdir.delete_rows(["shared"])
    workdir.delete_rows(["unknown"])
    for folder in (workdir, Workdir(tmp_path)):
        assert folder.run_ids() == ["of-0", "of-1"]
        assert folder.find_row("shared") is None and folder.timing("shared") is None
        assert folder.timing("of-1") == {"run_id": "of-1"}


def _set_time(path: pathlib.Path, seconds: int) -> None:
    os.utime(path, (seconds, seconds))


@pytest.mark.parametrize("newest", ["rows.jsonl", "rows-0000.jsonl", "rows-0001.jsonl"])
def test_of_two_rows_the_one_of_the_newest_file_counts(tmp_path: pathlib.Path, newest: str) -> None:
    """Checks folders of earlier versions, which left old rows in files of other processes."""
    names = ("rows.jsonl", "rows-0000.jsonl", "rows-0001.jsonl")
    for name in names:
        lines = [{"run_id": "a", "of": name}, {"run_id": f"only-{name}"}]
        (tmp_path / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        _set_time(tmp_path / name, 2000 if name == newest else 1000)
    workdir = Workdir(tmp_path)
    (row,) = [row for row in workdir.rows() if row["run_id"] == "a"]
    assert row == workdir.find_row("a") == {"run_id": "a", "of": newest}
    assert newest in workdir.where("a") and workdir.where("a").endswith("line 1")
    assert workdir.run_ids() == ["a", *(f"only-{name}" for name in names)]
    # Neither deleting nor adding another row makes an old row count again.
    workdir.delete_rows(["only-rows.jsonl"])
    workdir.write_row({"run_id": "b"})
    for folder in (workdir, Workdir(tmp_path)):
        assert folder.find_row("a") == {"run_id": "a", "of": newest}
        assert folder.find_row("b") == {"run_id": "b"}


def test_a_lock_that_cannot_be_made_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / ".rows.jsonl.lock").mkdir()
    with pytest.raises(OSError, match=r"rows\.jsonl\.lock' could not be written: Is a directory"):
        Workdir(tmp_path).write_row({"run_id": "a"})
    assert not (tmp_path / "rows.jsonl").exists()
