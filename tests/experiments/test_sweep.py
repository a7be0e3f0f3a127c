"""Tests sweeps, in which many runs train together.

- The rows are the same on any layout of devices and processes.
- A run that fails, or that another process has, does not stop the others. The same command repeats
  it.
- A device that runs out of memory gets fewer runs at a time.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import rich.console

from synflow_jax import storage
from synflow_jax.experiments import (
    engine,
    events,
    initialization,
    masks,
    programs,
    starts,
)
from synflow_jax.experiments.config import Config, Grid, PruneConfig, SweepConfig, TrainConfig
from synflow_jax.experiments.events import Failed, Finished, Outcome
from synflow_jax.experiments.report import sweep
from synflow_jax.experiments.run import Run, resolve
from synflow_jax.storage import Workdir, checkpoints

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
    "--config=configs/digits.py",
    "--config.model=fc",
    "--config.width_multiplier=0.2",
    "--config.train.num_epochs=3",
    "--config.train.drops=(2,)",
    "--config.train.compact=False",
    "--config.grid.seed=0,1",
    "--config.grid.pruner=('snip','random')",
    "--config.grid.compression=2,10",
)


def _start(cache: pathlib.Path, workdir: pathlib.Path, *flags: str) -> subprocess.Popen[str]:
    # XLA splits matrix products over its threads, so the number of threads decides how they are
    # rounded. XLA starts one thread per device, and at least NPROC.
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONUNBUFFERED": "1",
        "NPROC": "8",
    }
    return subprocess.Popen(
        [sys.executable, "train.py", *FLAGS, f"--workdir={workdir}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(*processes: subprocess.Popen[str]) -> str:
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        # If one process hangs, the others wait for it.
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return outputs[0][0]


def _rows(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of all processes by name, without the duration of pruning."""
    files = [workdir / "rows.jsonl", *workdir.glob("rows-*.jsonl")]
    rows = [row for file in files for row in storage.read_rows(file)]
    assert len({row["run_id"] for row in rows}) == len(rows), "two rows have the same name"
    return {
        row["run_id"]: {key: value for key, value in row.items() if key != "seconds"}
        for row in rows
    }


@pytest.fixture(scope="module")
def undisturbed(cache: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Returns the folder of a sweep of one process with one device."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    output = _finish(_start(cache, workdir))
    assert "8 of 8 runs finished" in output
    return workdir


@pytest.mark.slow
def test_layouts_of_devices_and_processes(
    cache: pathlib.Path, undisturbed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Compares the rows of 1 process x 1 device, 1 x 8 and 2 x 4: they hash masks and weights."""
    expected = _rows(undisturbed)
    masks_of_runs = {row["mask_sha256"] for row in expected.values() if "layers" in row}
    assert len(expected) == 16 and len(masks_of_runs) == 8
    _finish(_start(cache, tmp_path / "1x8", "--cpu_devices=8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--cpu_devices=4", f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    _finish(*(_start(cache, tmp_path / "2x4", *flags, f"--process_id={i}") for i in range(2)))
    assert _rows(tmp_path / "1x8") == expected
    assert _rows(tmp_path / "2x4") == expected
    for index in range(2):  # each process has its own file
        assert len(storage.read_rows(tmp_path / "2x4" / f"rows-{index:04d}.jsonl")) == 8
    assert not (tmp_path / "2x4" / "rows.jsonl").exists()
    # Any process can read the checkpoints of every other.
    for folder in (undisturbed / "checkpoints").iterdir():
        arrays = checkpoints.read_latest(folder)[0]
        others = checkpoints.read_latest(tmp_path / "2x4" / "checkpoints" / folder.name)[0]
        jax.tree.map(np.testing.assert_array_equal, arrays, others)


@pytest.mark.slow
def test_changed_config_and_damaged_rows(cache: pathlib.Path, undisturbed: pathlib.Path) -> None:
    process = _start(cache, undisturbed, "--config.train.num_epochs=4", "--config.grid.seed=0,1,2")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "train.num_epochs was 3 and is 4" in stderr and "--workdir" in stderr
    runs = resolve(_grid(seed=(0, 1)))
    rows = undisturbed / "rows-0007.jsonl"
    rows.write_text('{"run_id": "x"}\n{"run_id": \n')
    try:
        with pytest.raises(ValueError, match=r"rows-0007.jsonl', line 2.*Delete that line"):
            engine.run(runs, Workdir(undisturbed))
    finally:
        rows.unlink()


def _grid(**values: Any) -> Config:
    return Config(
        model="fc",
        dataset="digits",
        width_multiplier=0.1,
        prune=PruneConfig(pruner="random", compression=2.0),
        train=TrainConfig(num_epochs=2, batch_size=128, learning_rate=0.1, drops=(), compact=False),
        grid=Grid(**values),
    )


def _sweep(runs: Sequence[Run], workdir: pathlib.Path, **options: Any) -> list[Outcome]:
    for run in runs:
        run.config.sweep = SweepConfig(**options)
    return engine.run(runs, Workdir(workdir))


def _mask_hashes(folder: pathlib.Path) -> dict[str, str]:
    rows = Workdir(folder).rows()
    return {row["run_id"]: row["mask_sha256"] for row in rows if "layers" in row}


@pytest.mark.slow
def test_loops_and_batches_agree(tmp_path: pathlib.Path) -> None:
    """Compares a Python loop over runs, `pmap` alone, and `pmap` over `lax.map` or `vmap`.

    The masks are the same, and the losses agree up to rounding.
    """
    runs = resolve(_grid(seed=(0, 1, 2)))
    alone = _sweep(runs, tmp_path / "alone")
    results = {
        name: _sweep(runs, tmp_path / name, runs_per_device=2, batching=name)
        for name in ("map", "vmap")
    }
    results["loop"] = []
    for run in runs:
        network = initialization.build(run)
        mask, _ = masks.prune(run, network, Workdir(tmp_path / "loop"))
        row = engine.train(run, network, mask, Workdir(tmp_path / "loop"))
        results["loop"].append(Finished(run, row))
    for name, outcomes in results.items():
        assert len(outcomes) == 3
        for expected, outcome in zip(alone, outcomes, strict=True):
            hashes = _mask_hashes(tmp_path / "alone")
            assert hashes == _mask_hashes(tmp_path / name) and len(hashes) == 3
            for split in ("train_loss", "test_loss"):
                np.testing.assert_allclose(
                    outcome.row["last"][split], expected.row["last"][split], rtol=1e-4
                )


@pytest.mark.slow
def test_a_run_that_fails_stops_no_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trains four runs together: one has weights that are not finite, one has a damaged mask."""
    runs = resolve(_grid(seed=(0, 1, 2, 3)))
    first_state = starts.first_state

    def poisoned(run: Run, *args: Any) -> Any:
        state = first_state(run, *args)
        spoil = lambda leaf: leaf * float("inf") if run.config.seed == 1 else leaf
        return state._replace(params=jax.tree.map(spoil, state.params))

    monkeypatch.setattr(starts, "first_state", poisoned)
    pruned = list(masks.prune_all(runs, Workdir(tmp_path)))
    (tmp_path / "masks" / f"{pruned[3].row['run_id']}.safetensors").write_bytes(b"damaged")
    outcomes = _sweep(runs, tmp_path, runs_per_device=4)
    assert [outcome.run for outcome in outcomes] == runs
    assert isinstance(outcomes[0], Finished) and isinstance(outcomes[2], Finished)
    assert isinstance(outcomes[1], Failed) and isinstance(outcomes[3], Failed)
    assert "not finite at step 1 " in str(outcomes[1].error)
    assert "cannot be read" in str(outcomes[3].error)
    failed = {entry["run_id"] for entry in json.loads((tmp_path / "failed.json").read_text())}
    assert failed == {runs[seed].train_id for seed in (1, 3)}
    monkeypatch.undo()
    again = _sweep(runs[:3], tmp_path, runs_per_device=4)
    assert all(isinstance(outcome, Finished) for outcome in again)
    assert [outcome.found for outcome in again] == [True, False, True]
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.slow
def test_a_device_without_memory_gets_fewer_runs(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = resolve(_grid(seed=(0, 1, 2)))
    many, asked, seen = programs.many, [], []

    def small_device(run: Run, model: Any, recipe: Any, layout: programs.Layout) -> Any:
        asked.append(layout.per_device)
        if layout.per_device > 1:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."
            )
        return many(run, model, recipe, layout)

    monkeypatch.setattr(programs, "many", small_device)
    for run in runs:
        run.config.sweep = SweepConfig(runs_per_device=3)
    outcomes = engine.run(runs, Workdir(tmp_path), emit=seen.append)
    assert asked == [3, 1] and len(outcomes) == 3
    assert all(isinstance(outcome, Finished) for outcome in outcomes)
    (halved,) = [event for event in seen if isinstance(event, events.Halved)]
    assert "3 runs of fc do not fit into the memory of" in halved.problem
    assert (halved.num_runs, halved.num_left) == (3, 1)


@pytest.mark.slow
def test_two_sweeps_side_by_side_share_the_runs(tmp_path: pathlib.Path) -> None:
    """Holds one run as another process would: the sweep leaves it alone, and does the others."""
    runs, workdir = resolve(_grid(seed=(0, 1))), Workdir(tmp_path)
    list(masks.prune_all(runs, workdir))
    kept = workdir.checkpoint_path(runs[0].train_id) / "of-another"
    kept.mkdir(parents=True)
    with workdir.lock(runs[0].train_id):
        for overwrite in (False, True):
            busy, done = engine.run(runs, workdir, overwrite=overwrite)
            assert isinstance(busy, Failed) and isinstance(busy.error, storage.Busy)
            assert isinstance(done, Finished) and not done.found
            assert kept.is_dir() and workdir.find_row(runs[0].train_id) is None
    with workdir.lock(runs[0].prune_id):
        busy, _ = engine.run(runs, workdir, overwrite=True)
        assert isinstance(busy, Failed) and isinstance(busy.error, storage.Busy)
        assert kept.is_dir()
        busy, done = masks.prune_all(runs, workdir, overwrite=True)
        assert isinstance(busy, Failed) and isinstance(busy.error, storage.Busy)
        assert isinstance(done, Finished)


@pytest.mark.slow
def test_compact_runs_train_by_themselves(tmp_path: pathlib.Path) -> None:
    """Trains a compact run, and a collapsed one that stays masked."""
    grid = _grid(compression=(30.0, 1000.0))
    grid.train.compact = None
    compact, collapsed = _sweep(resolve(grid), tmp_path)
    assert isinstance(compact, Finished) and isinstance(collapsed, Finished)
    assert compact.row["compact"] and not collapsed.row["compact"]


@pytest.mark.slow
def test_the_table_of_a_sweep() -> None:
    runs = resolve(_grid(seed=(0, 1), compression=(2.0, 10.0), pruner=("random", "snip")))
    text = io.StringIO()
    output = rich.console.Console(file=text, width=100)
    state = sweep.start(runs)
    row = {"kept": 1, "total": 2, "last": {"test_top1": 0.5}}
    sweep.show(output, state, Finished(runs[0], row))
    sweep.show(output, state, Failed(runs[4], ValueError("no")))
    progress = events.Progress(
        runs[1], step=5, num_steps=10, epoch=0, loss=1.0, top1=0.1, images_per_second=9.0
    )
    sweep.show(output, state, progress)
    output.print(sweep.table(state))
    lines = text.getvalue().splitlines()
    line = next(line for line in lines if line.strip().startswith("random"))
    assert line.split() == ["random", "50.0", "1", "failed", "25", "%"], line
    assert "2 of 8 runs finished, 1 failed" in text.getvalue()
