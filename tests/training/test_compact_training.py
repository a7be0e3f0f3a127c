"""Tests runs that train the compact network instead of the masked one.

- Losses and accuracies are those of the masked run, up to rounding.
- A killed run resumes and ends in the same bits.
- Rows and checkpoints say which form was trained.
- The last checkpoint can be expanded into the full network.
- The form is chosen by the multiply-adds that it saves, and only if it computes the same function.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from synflow_jax import data, models, storage, training, trees
from synflow_jax.experiments import engine, initialization, masks, results, starts
from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig
from synflow_jax.experiments.run import resolve_one
from synflow_jax.models.vgg import VGG
from synflow_jax.storage import Workdir, checkpoints
from synflow_jax.training import forms
from synflow_jax.trees import Mask
from synflow_jax.units import compaction

ROOT = pathlib.Path(__file__).parents[2]
NUM_EPOCHS, STEPS_PER_EPOCH, BATCH = 10, 20, 71
FLAGS = (
    "--config=configs/digits.py",
    "--config.width_multiplier=0.5",
    "--config.prune.compression=100",
    "--config.prune.num_iterations=10",
    f"--config.train.num_epochs={NUM_EPOCHS}",
    f"--config.train.batch_size={BATCH}",
    "--config.train.learning_rate=0.02",
    "--config.train.drops=(8,)",
)


def _settings(compact: bool | None, **changes: Any) -> Config:
    """Returns the config that `FLAGS` describe."""
    train = TrainConfig(
        num_epochs=NUM_EPOCHS, batch_size=BATCH, learning_rate=0.02, drops=(8,), compact=compact
    )
    return Config(
        model="conv",
        dataset="digits",
        width_multiplier=0.5,
        prune=PruneConfig(compression=100.0, num_iterations=10),
        train=dataclasses.replace(train, **changes),
    )


@pytest.fixture(scope="module")
def pruned(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[models.Network, Mask, pathlib.Path]:
    """Returns the network, its mask, and the folder that holds the mask."""
    workdir = tmp_path_factory.mktemp("pruned")
    run = resolve_one(_settings(None))
    network = initialization.build(run)
    mask, _ = masks.prune(run, network, Workdir(workdir))
    return network, mask, workdir


@pytest.fixture(scope="module")
def runs(
    pruned: tuple[models.Network, Mask, pathlib.Path],
) -> dict[bool, tuple[pathlib.Path, dict[str, Any]]]:
    """Returns the folder and the row of a whole run of each form."""
    network, mask, workdir = pruned
    found = {}
    for compact in (False, True):
        folder = workdir.with_name(f"{workdir.name}-{compact}")
        shutil.copytree(workdir, folder)
        row = engine.train(resolve_one(_settings(compact)), network, mask, Workdir(folder))
        found[compact] = (folder, row)
    return found


Pruned = tuple[models.Network, Mask, pathlib.Path]
Runs = dict[bool, tuple[pathlib.Path, dict[str, Any]]]


def _choose(settings: Config, network: Any, mask: Mask) -> forms.Form:
    return starts.choose_form(resolve_one(settings), network, mask)


@pytest.mark.slow
def test_200_steps_are_those_of_the_masked_network(runs: Runs) -> None:
    (folder, masked), (small_folder, small) = runs[False], runs[True]
    assert small["num_steps"] == masked["num_steps"] == NUM_EPOCHS * STEPS_PER_EPOCH
    curve, small_curve = (
        results.read_curve(f / r["curve"]) for f, r in ((folder, masked), (small_folder, small))
    )
    assert len(curve) == NUM_EPOCHS and curve[-1]["train_loss"] < 0.5 * curve[0]["train_loss"]
    for point, small_point in zip(curve, small_curve, strict=True):
        for name, value in point.items():
            assert small_point[name] == (
                pytest.approx(value, rel=1e-4) if name.endswith("loss") else value
            ), name


@pytest.mark.slow
def test_rows_say_what_was_trained(runs: Runs, pruned: Pruned) -> None:
    network, mask, _ = pruned
    full = models.Network(
        network.model, network.params, network.batch_stats, mask, network.input_shape
    )
    small = models.compact(full).network
    (_, masked), (folder, row) = runs[False], runs[True]
    assert (masked["compact"], row["compact"]) == (False, True)
    kernel_sizes = lambda params: sum(
        leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim > 1
    )
    assert row["size"]["full"]["weights"] == kernel_sizes(network.params) == row["total"]
    assert row["size"]["kept"]["weights"] == row["kept"] == masked["kept"]
    assert row["size"]["compact"]["weights"] == kernel_sizes(small.params) < row["total"]
    # A weight of a convolution is used at each of the 28x28 positions, one of the head once.
    for name, params in (("full", network.params), ("compact", small.params)):
        head = params["head"]["kernel"].size
        assert row["size"][name]["multiply_adds"] == 28 * 28 * (kernel_sizes(params) - head) + head
    widths = [small.params[name]["kernel"].shape[-1] for name in ("conv1", "conv2", "head")]
    assert list(row["size"]["widths"].values()) == widths
    assert list(masked["size"]["widths"].values()) == [16, 16, 10]
    # The identity of a run does not depend on its form.
    assert row["run_id"] == masked["run_id"] == resolve_one(_settings(None)).train_id
    assert row["config"] == masked["config"]
    # Durations are not part of a row, so that rows of equal runs are equal.
    timing = Workdir(folder).timing(row["run_id"])
    assert timing is not None and 0 < timing["step_seconds"] < timing["seconds"]
    assert "step_seconds" not in row
    with checkpoints.open_folder(Workdir(folder).checkpoint_path(row["run_id"]), {}, 2) as opened:
        found = checkpoints.latest_run(opened)
    assert found is not None and found["compact"] is True and found["size"] == row["size"]


def _command(*flags: str) -> subprocess.Popen[str]:
    cache = str(ROOT / "tests" / ".jax_cache")
    return subprocess.Popen(
        [sys.executable, "train.py", *FLAGS, *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": cache, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bits(
    runs: Runs, pruned: Pruned, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "work"
    shutil.copytree(pruned[2], workdir)
    flags = ("--config.train.compact=True", f"--workdir={workdir}")
    process = _command(*flags)
    assert process.stdout is not None
    assert any(f"epoch 2/{NUM_EPOCHS}" in line for line in process.stdout), process.communicate()[1]
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -9
    # A run of the other form is refused, with the flag that resumes.
    process = _command(f"--workdir={workdir}", "--config.train.compact=False")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2 and stderr.count("\n") == 1, stderr
    assert "holds the compact network" in stderr and "--config.train.compact=True" in stderr
    process = _command(*flags)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    for text in (
        "resuming after step",
        "training the smaller dense network",
        "smaller, dense (trained",
        "ms per step",
    ):
        assert text in stdout
    folder, row = runs[True]
    (found,) = [
        r for r in storage.read_rows(workdir / "rows.jsonl") if r["run_id"] == row["run_id"]
    ]
    assert found == json.loads(json.dumps(row))
    assert (workdir / row["curve"]).read_bytes() == (folder / row["curve"]).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax warns
@pytest.mark.parametrize("compact", [False, True])
def test_the_full_network_comes_back(runs: Runs, pruned: Pruned, compact: bool) -> None:
    network, mask, _ = pruned
    folder, row = runs[compact]
    state = starts.restore_full(resolve_one(_settings(compact)), network, mask, Workdir(folder))
    assert int(state.step) == row["num_steps"]
    for leaf, wanted in zip(jax.tree.leaves(state.mask), jax.tree.leaves(mask), strict=True):
        np.testing.assert_array_equal(leaf, wanted)
    for leaf, kept in zip(
        jax.tree.leaves(trees.select(state.params, mask)), jax.tree.leaves(mask), strict=True
    ):
        assert not np.asarray(leaf)[~np.asarray(kept)].any()
    arrays = data.load("digits", network.input_shape)
    sums = training.make_evaluate(network.model, data.spec("digits"), 100)(state, *arrays[2:])
    means = training.means(sums)
    assert float(means["top1"]) == row["last"]["test_top1"]
    assert float(means["loss"]) == pytest.approx(row["last"]["test_loss"], rel=1e-5)
    # The row has the mean squares of the kept weights of the form that was trained. The compact
    # network has dropped those that are on no path.
    form = _choose(_settings(compact), network, mask)
    masks = dict(
        zip(trees.names(form.network.mask), jax.tree.leaves(form.network.mask), strict=True)
    )
    assert [(layer["name"], layer["size"]) for layer in row["mean_squares"]] == [
        (n, m.size) for n, m in masks.items()
    ]
    wanted = {"initial": form.network.params} | ({} if compact else {"final": state.params})
    for which, params in wanted.items():
        leaves = dict(zip(trees.names(params), jax.tree.leaves(params), strict=True))
        for layer in row["mean_squares"]:
            kept = np.asarray(leaves[layer["name"]], np.float64)[np.asarray(masks[layer["name"]])]
            assert layer[which] == pytest.approx(np.mean(kept**2), rel=1e-12)
    # The state of the optimizer is expanded too, so training can continue.
    moved = [np.count_nonzero(leaf) for leaf in jax.tree.leaves(state.opt_state)]
    assert sum(moved) > 0.5 * row["size"]["kept"]["weights"]


@pytest.mark.slow
def test_what_cannot_be_used_is_refused(runs: Runs, pruned: Pruned, tmp_path: pathlib.Path) -> None:
    network, mask, _ = pruned
    for compact in (False, True):
        with pytest.raises(ValueError, match=rf"To resume, give --config.train.compact={compact};"):
            engine.train(
                resolve_one(_settings(not compact)), network, mask, Workdir(runs[compact][0])
            )
    with pytest.raises(ValueError, match="holds no checkpoint of this run"):
        starts.restore_full(resolve_one(_settings(True)), network, mask, Workdir(tmp_path))
    empty = jax.tree.map(jnp.zeros_like, mask)
    with pytest.raises(
        ValueError, match=r"train.compact=True cannot .*collapsed.*masked network is trained"
    ):
        _choose(_settings(True), network, empty)
    form = _choose(_settings(None), network, empty)
    assert not form.compact and form.size["compact"] is None
    assert form.reason is forms.Reason.COLLAPSED
    assert "collapsed" in form.explain()


@pytest.mark.slow
def test_the_choice_is_by_counts_and_leaves_the_function(pruned: Pruned) -> None:
    network, mask, _ = pruned
    form = _choose(_settings(None), network, mask)
    counts = form.size["compact"]["multiply_adds"] / form.size["full"]["multiply_adds"]
    assert form.compact and counts < forms.PAYS_BELOW
    assert not _choose(_settings(None), network, network.mask).compact  # no unit would be removed
    assert _choose(_settings(True), network, network.mask).compact  # though it is the whole network
    # A user's optimizer may depend on whole layers, and the random bits of dropout depend on the
    # shape of its input. Both would compute another function in the compact form.
    own = _settings(None, make_optimizer=lambda steps: optax.lamb(1e-3))
    assert not _choose(own, network, mask).compact
    assert _choose(_settings(True, make_optimizer=own.train.make_optimizer), network, mask).compact
    for hidden in ((), (6,)):
        model = VGG(3, ((8,), (8,)), hidden=hidden)
        params, stats = models.init(model, (4, 4, 1), jax.random.key(0))
        few = trees.prunable(params)
        few["conv1_1"]["kernel"] = few["conv1_1"]["kernel"].at[..., 2:].set(False)
        network = models.Network(model, params, stats, few, (4, 4, 1))
        form = forms.choose(network)
        assert form.compact == (not hidden)
        assert form.size["compact"]["weights"] < form.size["full"]["weights"]
        assert forms.choose(network, compact=True).compact


@pytest.mark.slow
def test_a_half_trained_state_goes_on_in_the_compact_network(pruned: Pruned) -> None:
    network, mask, _ = pruned
    optimizer = training.sgd(lambda step: 0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)
    arrays = data.load("digits", network.input_shape)
    state = training.init_state(
        network.params, network.batch_stats, mask, optimizer, jax.random.key(5)
    )

    def run(model: Any, state: training.TrainState, start: int, stop: int) -> Any:
        step = training.make_step(model, optimizer)
        epoch = training.make_epoch(step, data.spec("digits"), len(arrays.train_labels), BATCH)
        state, info = jax.jit(epoch)(
            state, training.init_info(1), arrays[0], arrays[1], start, stop
        )
        return state, float(info.running.loss)

    half, _ = run(network.model, state, 0, 8)
    trained = models.Network(
        network.model, half.params, half.batch_stats, mask, network.input_shape
    )
    small = models.compact(trained)
    smaller = compaction.shrink_tree(small.plan, half)
    floats = lambda tree: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
    beyond_params = lambda state: floats(state.opt_state) - floats(state.params)
    assert beyond_params(smaller) == beyond_params(half)
    end, loss = run(network.model, half, 8, STEPS_PER_EPOCH)
    small_end, small_loss = run(small.network.model, smaller, 8, STEPS_PER_EPOCH)
    assert small_loss == pytest.approx(loss, rel=1e-4)
    back = compaction.expand_tree(small.plan, small_end, end)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(end.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
