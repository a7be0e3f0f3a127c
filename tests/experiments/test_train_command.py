"""Tests `python train.py` as a user runs it.

- A run writes rows, a curve and checkpoints. The same command then finds them and does nothing.
- A stopped run resumes and ends in the same bits as one that was left alone.
- Bad input, a loss that is not finite and another process each end in one message with the cure.
- No damage to a checkpoint passes unnoticed.
- Masks hold under every option of training.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

from synflow_jax import data, storage, training
from synflow_jax.data import prepared
from synflow_jax.experiments import engine, initialization, masks, results
from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig
from synflow_jax.experiments.events import EpochEnded, Event
from synflow_jax.experiments.run import resolve_one
from synflow_jax.storage import Workdir, checkpoints

ROOT = pathlib.Path(__file__).parents[2]
Train = Callable[..., commands.Result]

QUICK = ("--config=configs/digits.py", "--config.model=fc", "--config.train.batch_size=128")


def _start(cache: pathlib.Path, *flags: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "train.py", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def train(cache: pathlib.Path) -> Iterator[Train]:
    """Returns a function that runs `python train.py FLAGS`."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with commands.serve("train", environment) as run:
        yield run


def _train_row(workdir: pathlib.Path) -> dict[str, Any]:
    (row,) = [
        row
        for row in storage.read_rows(workdir / "rows.jsonl")
        if row["run_id"].startswith("train-")
    ]
    return row


def _read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.communicate()[1]}")


def test_a_run_and_a_second_one(tmp_path: pathlib.Path, train: Train) -> None:
    flags = ("--config=configs/digits.py", f"--workdir={tmp_path}", "--config.train.num_epochs=3")
    first = train(*flags)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    for text in (
        "pruned by synflow to compression 10",
        "epoch 1/3",
        "epoch 3/3",
        "images/s",
        "last",
        "best",
    ):
        assert text in first.stdout
    row = _train_row(tmp_path)
    assert row["num_steps"] == 66 and row["last"]["epoch"] == 3 and row["kept"] == 26_039
    assert row["best"]["test_top1"] >= row["last"]["test_top1"] > 0.9
    curve = results.read_curve(tmp_path / row["curve"])
    assert [point["epoch"] for point in curve] == [1, 2, 3] and set(curve[0]) == {
        "epoch",
        *training.CURVE,
    }
    assert {name: curve[-1][name] for name in training.CURVE} == {
        name: row["last"][name] for name in training.CURVE
    }
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    pruned = storage.read_rows(tmp_path / "rows.jsonl")[0]
    assert pruned["run_id"] == row["prune_run_id"]
    # Two checkpoints are kept: those of the last two epochs.
    kept = sorted(path.name for path in (tmp_path / "checkpoints" / row["run_id"]).iterdir())
    assert kept == ["44", "66"]

    written = (tmp_path / "rows.jsonl").read_bytes()
    second = train(*flags)
    assert second.returncode == 0 and "already in" in second.stdout
    assert (tmp_path / "rows.jsonl").read_bytes() == written

    # A run of another recipe uses the same mask.
    other = train(*flags, "--config.train.num_epochs=1", "--config.train.label_smoothing=0.1")
    assert other.returncode == 0
    assert "iterations" not in other.stdout and "26,039 weights kept" not in other.stdout


def test_help_lists_every_key_that_a_flag_can_set(cache: pathlib.Path) -> None:
    text, _ = _start(cache, "--help").communicate(timeout=300)
    text = text.partition("The keys are ")[2].partition("(default")[0]
    listed = set(re.split(r",\s+", text.strip()))
    values = dataclasses.asdict(Config())
    parts = ("data", "prune", "train", "sweep", "grid")
    keys = {f"{part}.{key}" for part in parts for key in values[part]} | (values.keys() - {*parts})
    # Only a config file can hold a function or several grids.
    beyond = {"train.make_optimizer", "grids"}
    assert keys == listed | beyond and not listed & beyond


@pytest.mark.slow
def test_a_stopped_run_is_resumed_even_if_it_was_overwriting(
    tmp_path: pathlib.Path, cache: pathlib.Path, train: Train
) -> None:
    """Stops --overwrite half-way. Kills at every other moment are in test_crashes.py."""
    flags = (*QUICK, "--config.train.num_epochs=20", f"--workdir={tmp_path}")
    whole = train(*flags)
    assert whole.returncode == 0, whole.stderr
    row = _train_row(tmp_path)
    curve = (tmp_path / row["curve"]).read_bytes()
    # While this process has the run, no other one may touch it.
    with Workdir(tmp_path).lock(row["run_id"]):
        other = train(*flags, "--overwrite")
    assert other.returncode == 2 and other.stderr.count("\n") == 1, other.stderr
    assert f"another process (pid {os.getpid()} on " in other.stderr
    assert _train_row(tmp_path) == row
    process = _start(cache, *flags, "--overwrite")
    _read_until(process, "epoch 3/20")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "without --overwrite to resume" in stderr
    rows = storage.read_rows(tmp_path / "rows.jsonl")
    assert [each["run_id"] for each in rows] == [row["prune_run_id"]]
    last = train(*flags)
    assert last.returncode == 0 and "already in" not in last.stdout, last.stderr
    assert _train_row(tmp_path) == row and (tmp_path / row["curve"]).read_bytes() == curve


BAD = {
    "data that is not here": (
        ["--config.dataset=cifar10"],
        "dataset='cifar10'",
        "--config.dataset=digits",
    ),
    "folder": (
        ["--config.dataset=mnist", "--config.data.dir=/nowhere"],
        "data.dir='/nowhere'",
        "IDX",
    ),
    "epochs": (["--config.train.num_epochs=0"], "train.num_epochs=0", "at least 1"),
    "batch": (["--config.train.batch_size=2000"], "batch_size=2000", "1438"),
    "rate": (["--config.train.learning_rate=nan"], "train.learning_rate=nan", "at least 0"),
    "drops": (["--config.train.drops=(3,2)"], "train.drops=(3, 2)", "in increasing order"),
    "dtype": (
        ["--config.train.compute_dtype=float16"],
        "train.compute_dtype='float16'",
        "bfloat16",
    ),
    "key": (["--config.train.lr=1"], "--config.train.lr", "train.learning_rate"),
}


@pytest.fixture(scope="module")
def bad(
    tmp_path_factory: pytest.TempPathFactory, cache: pathlib.Path
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the folder that holds each command's folder, and the results of the commands."""
    folder = tmp_path_factory.mktemp("bad")
    cases = {
        case: [*QUICK, f"--workdir={folder / case}", *flags] for case, (flags, *_) in BAD.items()
    }
    return folder, commands.run_all(
        "train", cases, {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_bad_values(bad: tuple[pathlib.Path, dict[str, Any]], case: str) -> None:
    (_, argument, cure), workdir, result = BAD[case], bad[0] / case, bad[1][case]
    assert result.returncode != 0
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert argument in result.stderr and cure in result.stderr
    assert not list(workdir.glob("checkpoints/*/*"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_the_step(tmp_path: pathlib.Path, train: Train) -> None:
    # After one epoch of 11 steps the learning rate becomes so large that the loss overflows.
    flags = (
        "--config.train.drops=(1,)",
        "--config.train.drop_factor=1e30",
        "--config.train.num_epochs=9",
    )
    result = train(*QUICK, f"--workdir={tmp_path}", *flags)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "the loss is not finite at step 1" in result.stderr and "(epoch 2 of 9)" in result.stderr
    assert "The checkpoint after step 11 stays" in result.stderr
    assert "train.learning_rate=0.02" in result.stderr
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["11"]
    assert not any(
        row["run_id"].startswith("train-") for row in storage.read_rows(tmp_path / "rows.jsonl")
    )


RUN = {"run_id": "a", "config": {"model": "fc", "drops": (3, 4)}}
RUN_READ = {"run_id": "a", "config": {"model": "fc", "drops": [3, 4]}}


def _tree(value: float = 1.0) -> Any:
    return {
        "w": jnp.full((2, 3), value),
        "hole": None,
        "key": jax.random.key(7),
        "step": jnp.int32(3),
    }


@pytest.mark.filterwarnings("ignore")  # orbax warns
def test_checkpoints_come_back_and_know_their_run(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "checkpoints"
    with checkpoints.open_folder(folder, RUN, 2) as opened:
        assert checkpoints.restore_latest(opened, _tree()) is None
        for step in (1, 2, 3):
            checkpoints.save(opened, step, _tree(float(step)))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    with checkpoints.open_folder(folder, RUN, 2) as opened:
        restored = checkpoints.restore_latest(opened, _tree())
        assert restored is not None
        step, tree = restored
        assert step == 3 and tree["hole"] is None
        assert tree["step"] == 3 and tree["step"].dtype == jnp.int32
        np.testing.assert_array_equal(tree["w"], np.full((2, 3), 3.0))
        assert jax.random.bits(tree["key"]) == jax.random.bits(jax.random.key(7))
        for like, message in (
            ({**_tree(), "w": jnp.ones((2, 4))}, r"another network: 'w' is \(\(2, 3\)"),
            ({**_tree(), "more": jnp.ones(1)}, "'more' is missing there"),
        ):
            with pytest.raises(ValueError, match=message):
                checkpoints.restore_latest(opened, like)
    with (
        checkpoints.open_folder(folder, {**RUN, "config": {"model": "conv"}}, 2) as opened,
        pytest.raises(ValueError, match=r"belongs to another run: its config is .*'fc'"),
    ):
        checkpoints.restore_latest(opened, _tree())
    for path in (folder / "3").rglob("*"):
        if path.is_file() and path.stat().st_size:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        checkpoints.open_folder(folder, RUN, 2) as opened,
        pytest.raises(
            ValueError, match=r"checkpoints/3' is damaged.*resumes from the checkpoint before"
        ),
    ):
        checkpoints.restore_latest(opened, _tree())


@pytest.mark.filterwarnings("ignore")  # orbax warns
def test_no_bit_of_a_checkpoint_flips_unnoticed(
    tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tree = {"w": np.random.default_rng(0).random((20, 30), np.float32)}
    with checkpoints.open_folder(tmp_path, RUN, 1) as opened:
        checkpoints.save(opened, 5, tree)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    data = max(files, key=lambda path: path.stat().st_size)
    good = data.read_bytes()
    assert len(good) > tree["w"].nbytes
    refused = 0
    for place in range(7, len(good), 97):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        data.write_bytes(bad)
        try:
            found, run = checkpoints.read_latest(tmp_path)
        except ValueError:
            refused += 1
        else:  # the bit is of padding
            assert found["w"].tobytes() == tree["w"].tobytes() and run == RUN_READ
    assert refused > 20
    assert "Traceback" not in capfd.readouterr().err
    data.write_bytes(good)
    # The description has the digest too, and a checkpoint of an earlier version has none.
    description = tmp_path / "5" / "run" / "metadata"
    text = description.read_text()
    description.write_text(text.replace('"fc"', '"fd"'))
    with pytest.raises(ValueError, match=r"5' is damaged.*digest"):
        checkpoints.read_latest(tmp_path)
    older = {key: value for key, value in json.loads(text).items() if key in RUN}
    description.write_text(json.dumps(older))
    found, run = checkpoints.read_latest(tmp_path)
    assert run == RUN_READ
    np.testing.assert_array_equal(found["w"], tree["w"])


@pytest.mark.filterwarnings("ignore")  # orbax warns
def test_opening_to_train_removes_what_a_killed_process_has_left(tmp_path: pathlib.Path) -> None:
    with checkpoints.open_folder(tmp_path, RUN, 3) as opened:
        for step in (1, 2, 3):
            checkpoints.save(opened, step, _tree())
    unfinished = tmp_path / "4.orbax-checkpoint-tmp" / "tree"
    unfinished.mkdir(parents=True)
    checkpoints.read_latest(tmp_path)
    assert unfinished.exists(), "a reader does not know whether a living process writes it"
    with checkpoints.open_folder(tmp_path, RUN, 2):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # grain and orbax warn
def test_streamed_runs_go_on_as_others_do(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(i: int) -> dict[str, Any]:
        content = io.BytesIO()
        PIL.Image.fromarray(np.full((40, 44, 3), 20 * (i % 10), np.uint8)).save(content, "PNG")
        return {"image": content.getvalue(), "label": i % 10}

    splits = {"train": [record(i) for i in range(50)], "test": [record(i) for i in range(21)]}
    monkeypatch.setattr(prepared, "source", lambda dataset, split, directory, decode: splits[split])
    small = data.DATASETS["imagenet"]._replace(num_classes=10, image_shape=(32, 32, 3))
    monkeypatch.setitem(data.DATASETS, "imagenet", small)
    settings = Config(
        model="conv",
        dataset="imagenet",
        width_multiplier=1 / 16,
        prune=PruneConfig(compression=1.0),
        train=TrainConfig(num_epochs=3, batch_size=8, learning_rate=0.05, drops=()),
    )
    run = resolve_one(settings)
    network = initialization.build(run)
    whole = engine.train(run, network, network.mask, Workdir(tmp_path / "whole"))
    assert whole["num_steps"] == 18 and whole["last"]["epoch"] == 3
    asked: list[int] = []

    def stop_at_the_fourth() -> bool:
        asked.append(0)
        return len(asked) == 4

    with pytest.raises(storage.Stopped):
        engine.train(
            run,
            network,
            network.mask,
            Workdir(tmp_path / "parts"),
            should_stop=stop_at_the_fourth,
        )
    parts = engine.train(run, network, network.mask, Workdir(tmp_path / "parts"))
    assert parts == whole


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_masks_hold_in_a_run_with_every_option(tmp_path: pathlib.Path) -> None:
    settings = Config(
        model="cifar_vgg11_bn",
        dataset="digits",
        width_multiplier=1 / 16,
        prune=PruneConfig(pruner="snip", compression=5.0, biases=True, norms=True),
        train=TrainConfig(
            num_epochs=2,
            batch_size=719,
            learning_rate=0.05,
            drops=(1,),
            label_smoothing=0.1,
            clip_norm=1.0,
            compute_dtype="bfloat16",
            weight_decay=1e-3,
        ),
    )
    run = resolve_one(settings)
    network = initialization.build(run)
    _, row = masks.prune(run, network, Workdir(tmp_path))
    found = masks.find_mask(run, network, Workdir(tmp_path))
    assert found is not None and found[1]["run_id"] == row["run_id"]
    seen: list[Event] = []
    trained = engine.train(
        resolve_one(settings), network, found[0], Workdir(tmp_path), emit=seen.append
    )
    assert trained["num_steps"] == 4 and trained["kept"] == row["kept"]
    assert [event.step for event in seen if isinstance(event, EpochEnded)] == [2, 4]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["label_smoothing"] == 0.1
    # A run with a user's own optimizer is another run.
    chain = lambda steps_per_epoch: optax.adamw(
        optax.cosine_decay_schedule(1e-3, 2 * steps_per_epoch)
    )
    other = Config(
        **{
            **vars(settings),
            "train": TrainConfig(num_epochs=2, batch_size=719, make_optimizer=chain),
        }
    )
    assert resolve_one(other).train_id != resolve_one(settings).train_id
    assert resolve_one(other).prune_id == resolve_one(settings).prune_id
    small = Config(**{**vars(other), "model": "fc", "prune": PruneConfig()})
    network = initialization.build(resolve_one(small))
    with pytest.raises(storage.Stopped, match="after step"):
        engine.train(
            resolve_one(small),
            network,
            network.mask,
            Workdir(tmp_path),
            should_stop=lambda: True,
        )
