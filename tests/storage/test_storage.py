"""Checks that files are written atomically and read bit for bit, and that damage is found."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import pathlib
import stat

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from synflow_jax import storage, trees


def _params_and_mask() -> tuple[trees.Params, trees.Mask]:
    rng = np.random.default_rng(0)
    params = {
        "conv": {"kernel": jnp.zeros((3, 3, 2, 5)), "bias": jnp.zeros(5)},
        "head": {"kernel": jnp.zeros((5, 3))},
    }
    mask = trees.map_prunable(
        lambda m: jnp.asarray(rng.random(m.shape) < 0.3), trees.prunable(params)
    )
    return params, mask


def test_mask_comes_back(tmp_path: pathlib.Path) -> None:
    params, mask = _params_and_mask()
    digest = storage.save_mask(str(tmp_path / "m.safetensors"), mask, {"seed": 3})
    loaded = storage.load_mask(tmp_path / "m.safetensors", params)
    trees.check_mask(loaded, params)
    assert loaded["conv"]["bias"] is None
    np.testing.assert_array_equal(loaded["conv"]["kernel"], mask["conv"]["kernel"])
    by_name = storage.load_mask(tmp_path / "m.safetensors")
    assert set(by_name) == {"conv/kernel", "head/kernel"}
    np.testing.assert_array_equal(by_name["head/kernel"], mask["head"]["kernel"])
    # The hash is of the bits, not of the file or its metadata.
    assert digest == storage.save_mask(tmp_path / "n.safetensors", mask, {"seed": 4})
    mask["head"]["kernel"] = ~mask["head"]["kernel"]
    assert digest != storage.save_mask(tmp_path / "n.safetensors", mask)


def test_mask_file_describes_itself(tmp_path: pathlib.Path) -> None:
    _, mask = _params_and_mask()
    storage.save_mask(tmp_path / "m.safetensors", mask, {"compression": 10.0})
    with safetensors.safe_open(tmp_path / "m.safetensors", framework="np") as file:
        header = file.metadata()
        bits = file.get_tensor("conv/kernel")
    layers = json.loads(header["layers"])
    assert layers["conv/kernel"] == {
        "shape": [3, 3, 2, 5],
        "kept": int(mask["conv"]["kernel"].sum()),
    }
    assert json.loads(header["run"]) == {"compression": 10.0}
    assert bits.dtype == np.uint8 and bits.size == 12  # 90 bits


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_mask_is_refused(tmp_path: pathlib.Path, keep: int) -> None:
    _, mask = _params_and_mask()
    path = tmp_path / "m.safetensors"
    storage.save_mask(path, mask)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"m\.safetensors.*cannot be read"):
        storage.load_mask(path)


def test_flipped_bit_foreign_file_and_other_network_are_refused(tmp_path: pathlib.Path) -> None:
    params, mask = _params_and_mask()
    path = tmp_path / "m.safetensors"
    storage.save_mask(path, mask)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1 << 7
    path.write_bytes(data)
    with pytest.raises(ValueError, match="sha256"):
        storage.load_mask(path)
    safetensors.numpy.save_file({"w": np.zeros(3, np.uint8)}, path)
    with pytest.raises(ValueError, match="format None"):
        storage.load_mask(path)
    storage.save_mask(path, mask)
    params["conv"]["kernel"] = jnp.zeros((3, 3, 2, 6))
    with pytest.raises(ValueError, match=r"'conv/kernel'.*another network"):
        storage.load_mask(path, params)
    del params["conv"]
    with pytest.raises(ValueError, match="no such leaf"):
        storage.load_mask(path, params)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        storage.load_mask(tmp_path / "none.safetensors")


def test_rows_are_replaced_by_id_and_kept_in_order(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert storage.read_rows(path) == []
    for run_id, kept in (("a", 1), ("b", 2), ("a", np.int64(3))):
        storage.write_row(path, {"run_id": run_id, "kept": kept, "log10_objective": -np.inf})
    assert [(row["run_id"], row["kept"]) for row in storage.read_rows(path)] == [("b", 2), ("a", 3)]
    assert storage.read_rows(path)[0]["log10_objective"] is None


def test_rows_of_several_processes_are_one_list(tmp_path: pathlib.Path) -> None:
    assert storage.Workdir(tmp_path).rows() == []
    for name, run_id, kept in (
        ("rows-1.jsonl", "c", 3),
        ("rows.jsonl", "a", 1),
        ("rows.jsonl", "b", 1),
        ("rows-0.jsonl", "b", 2),
        ("rowsother.jsonl", "d", 1),
    ):
        storage.write_row(tmp_path / name, {"run_id": run_id, "kept": kept})
    found = storage.Workdir(tmp_path).rows()
    assert [(row["run_id"], row["kept"]) for row in found] == [("a", 1), ("b", 2), ("c", 3)]
    (tmp_path / "rows-2.jsonl").write_text('{"run_id": "e"\n')
    with pytest.raises(ValueError, match=r"rows-2.jsonl', line 1"):
        storage.Workdir(tmp_path).rows()


@pytest.mark.parametrize("line", ['{"run_id": "a", "ke', "[]", '{"kept": 3}', ""])
def test_damaged_row_is_named(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    storage.write_row(path, {"run_id": "a"})
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl.*line 2"):
        storage.read_rows(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        storage.write_row(path, {"run_id": "b"})
    assert path.read_bytes() == before


def _write_rows(path: pathlib.Path, name: str) -> None:
    for i in range(20):
        storage.write_row(path, {"run_id": f"{name}{i}"})


def test_two_processes_lose_no_row(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "rows.jsonl"
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    processes = [context.Process(target=_write_rows, args=(path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(storage.read_rows(path)) == 40


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    storage.write_json(path, {"a": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"file\.json' could not be written: No space left.*make room"
    ):
        storage.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(
    tmp_path: pathlib.Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        storage.write_json(tmp_path / "file.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o666 & ~umask


def test_what_cannot_be_written_is_named_with_the_cure(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, cure in (
        (tmp_path / "file" / "a.json", "Move that file away"),
        (tmp_path / "folder", "A folder has the name of the file"),
        (tmp_path / ("a" * 300), "a shorter name"),
    ):
        with pytest.raises(OSError, match=f"{path.name}' could not be written.*{cure}"):
            storage.write_json(path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_only_what_killed_processes_have_left_is_removed(tmp_path: pathlib.Path) -> None:
    """Checks temporary files, half-removed folders and locks, beside those of a living process."""
    keep = ("rows.jsonl", ".rows.jsonl.lock", ".rows.jsonl.swp", ".notes.12345678", ".env.20261127")
    stale = (".rows.jsonl.uvf2rcf3", ".a.safetensors.0123abcd", ".a.run.lock")
    for name in (*keep, *stale):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv.20261127").mkdir()
    (tmp_path / "checkpoints" / ".a.0123abcd.removed" / "3").mkdir(parents=True)
    workdir = storage.Workdir(tmp_path)
    with open(tmp_path / ".b.json.0123abcd", "w") as living, workdir.lock("b"):
        fcntl.flock(living, fcntl.LOCK_EX)
        workdir.clean()
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {*keep, ".venv.20261127", "checkpoints", ".b.json.0123abcd", ".b.run.lock"}
        assert not list((tmp_path / "checkpoints").iterdir())
    workdir.clean()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*keep, ".venv.20261127", "checkpoints"}


def test_removing_leaves_all_or_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link"
    (folder / "sub").mkdir(parents=True)
    link.symlink_to(folder)
    with pytest.raises(OSError, match=r"link' is a symbolic link.*Remove the link"):
        storage.remove(link)
    assert (folder / "sub").is_dir()

    def forbidden(path: pathlib.Path, target: pathlib.Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "rename", forbidden)
    with pytest.raises(OSError, match=r"folder' cannot be removed: Permission denied.*permissions"):
        storage.remove(folder)
    monkeypatch.undo()
    storage.remove(folder)
    storage.remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_run_belongs_to_one_process(tmp_path: pathlib.Path) -> None:
    workdir = storage.Workdir(tmp_path)
    with workdir.lock("a"), workdir.lock("b"):
        owner = rf"pid {os.getpid()} on .*working on the run 'a'.*Nothing was changed"
        with pytest.raises(storage.Busy, match=owner), workdir.lock("a"):
            pass
    # A lock of a process that was killed is free.
    (tmp_path / ".a.run.lock").write_text("pid 1 on nowhere")
    with workdir.lock("a"):
        assert str(os.getpid()) in (tmp_path / ".a.run.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_unwritable_folder_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"workdir='.*file/sub': '.*file' is a file, not a folder"):
        storage.check_writable(tmp_path / "file" / "sub")


def _certificate(path: pathlib.Path) -> None:
    removed_in = {"fc": {"kernel": np.array([[0, 1], [2, 2]], np.uint16), "bias": None}}
    storage.save_certificate(
        path, {"run_id": "x", "iterations": [{"kept": 3}, {"kept": 1}]}, removed_in
    )


def test_certificates_take_no_keyword_of_a_later_numpy(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes the arrays alone. NumPy 2.0 takes every keyword for an array."""
    written: dict[str, object] = {}
    save = np.savez_compressed

    def savez_of_numpy_2_0(file: object, *args: object, **arrays: object) -> None:
        written.update(arrays)
        save(file, *args, **arrays)

    monkeypatch.setattr(np, "savez_compressed", savez_of_numpy_2_0)
    _certificate(tmp_path / "c.json")
    assert list(written) == ["fc/kernel"]


def test_iterations_are_unsigned_integers(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "c.json"
    for dtype in (np.uint16, np.uint32):
        removed_in = {"fc": {"kernel": np.array([[0, 1]], dtype)}}
        storage.save_certificate(path, {}, removed_in)
        _, found = storage.load_certificate(path)
        assert found["fc/kernel"].dtype == dtype
    for signed in (np.int32, np.float32, bool):
        storage.save_certificate(path, {}, {"fc": {"kernel": np.array([[0, 1]], signed)}})
        with pytest.raises(ValueError, match="numbers of iterations are unsigned integers"):
            storage.load_certificate(path)


def test_a_certificate_comes_back(tmp_path: pathlib.Path) -> None:
    _certificate(tmp_path / "c.json")
    certificate, removed_in = storage.load_certificate(tmp_path / "c.json")
    assert certificate["run_id"] == "x" and [
        step["kept"] for step in certificate["iterations"]
    ] == [3, 1]
    assert list(removed_in) == ["fc/kernel"] and removed_in["fc/kernel"].tolist() == [
        [0, 1],
        [2, 2],
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["c.json", "c.npz"]


def test_a_damaged_certificate_is_refused(tmp_path: pathlib.Path) -> None:
    path, arrays = tmp_path / "c.json", tmp_path / "c.npz"
    for damage, message in (
        (lambda: path.write_text(path.read_text()[:-5]), "cannot be read"),
        (lambda: path.write_text("[]"), "is not a certificate"),
        (lambda: path.write_text('{"format": "another"}'), "is not a certificate"),
        (lambda: arrays.write_bytes(arrays.read_bytes()[:50]), "cannot be read"),
        (
            lambda: np.savez(arrays, **{"fc/kernel": np.zeros((2, 2), np.uint16)}),
            "does not belong to 'c.npz'",
        ),
    ):
        _certificate(path)
        damage()
        with pytest.raises(ValueError, match=message):
            storage.load_certificate(path)
    arrays.unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.npz' does not exist"):
        storage.load_certificate(path)
