"""Tests runs that begin from files of weights, and `python export.py`.

- The run id depends on the content of the file. Files that do not fit are refused.
- Pruned and trained networks, masked or compact, are read from the folder of their run.
- Every exported format has the logits of the network in the run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import models, storage, trees
from synflow_jax.experiments import (
    certificates,
    checks,
    engine,
    events,
    exports,
    initialization,
    masks,
    results,
    starts,
)
from synflow_jax.experiments.config import Config, PruneConfig, TrainConfig
from synflow_jax.experiments.identity import file_digest
from synflow_jax.experiments.run import Run, from_dict, resolve_one
from synflow_jax.models import Network
from synflow_jax.storage import Workdir, checkpoints, networks
from synflow_jax.storage.networks import native

ROOT = pathlib.Path(__file__).parents[2]


def _settings(**values: Any) -> Config:
    prune = PruneConfig(pruner="magnitude", compression=4.0)
    return Config(model="fc", dataset="digits", width_multiplier=0.1, prune=prune, **values)


def _run(**values: Any) -> Run:
    return resolve_one(_settings(**values))


def _pretrained() -> Network:
    """Returns a network that no seed draws."""
    network = initialization.build(_run(seed=5))
    return network._replace(params=jax.tree.map(lambda leaf: leaf + 1, network.params))


def _assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


def _logits(network: Network) -> np.ndarray:
    shape = (3, *network.input_shape)
    images = np.random.default_rng(9).normal(size=shape).astype(np.float32)
    params = trees.apply_mask(network.params, network.mask)
    return np.asarray(jax.jit(models.eval_fn(network.model, network.batch_stats))(params, images))


@pytest.mark.slow
def test_a_pretrained_network_is_pruned(tmp_path: pathlib.Path) -> None:
    """Checks that the run id depends on the content of the initial weights, not on their path."""
    network, workdir = _pretrained(), Workdir(tmp_path / "work")
    np.savez(tmp_path / "a.npz", **networks.to_torch(network))
    shutil.copy(tmp_path / "a.npz", tmp_path / "b.npz")
    networks.save(tmp_path / "ours.safetensors", network)
    a, b, ours = (
        _run(init=str(tmp_path / file)) for file in ("a.npz", "b.npz", "ours.safetensors")
    )
    for run in (a, ours):
        _assert_same(initialization.build(run).params, network.params)
    assert a.prune_id == b.prune_id
    assert len({run.prune_id for run in (a, ours, _run())}) == 3
    # Runs without such a file keep their names.
    assert "init" not in _run().prune_dict

    mask, row = masks.prune(a, initialization.build(a), workdir)
    assert row["config"]["init"] == file_digest(b.config.init)
    assert masks.find_row(b, workdir)
    stored = storage.load_mask(workdir.mask_path(row["run_id"]), network.params)
    _assert_same(stored, mask)
    kernels = jax.tree.leaves(trees.select(network.params, mask))
    pairs = list(zip(kernels, jax.tree.leaves(mask), strict=True))
    kept = jnp.concatenate([jnp.abs(w)[m] for w, m in pairs])
    gone = jnp.concatenate([jnp.abs(w)[~m] for w, m in pairs])
    assert kept.min() > gone.max()
    with pytest.raises(
        ValueError,
        match=r"is a digest, not a path: name the file .*--config=CONFIG --config\.init=FILE",
    ):
        exports.read(row, workdir)
    read = exports.read(row, workdir, str(tmp_path / "b.npz"))
    _assert_same(read.params, trees.apply_mask(network.params, mask))
    with pytest.raises(ValueError, match="is not the file that the run began from"):
        exports.read(row, workdir, str(tmp_path / "ours.safetensors"))


@pytest.mark.slow
def test_a_certificate_of_a_pretrained_network(tmp_path: pathlib.Path) -> None:
    file = str(tmp_path / "net.safetensors")
    networks.save(file, _pretrained())
    prune = PruneConfig(schedule="certified", compression=2.0)
    run = resolve_one(dataclasses.replace(_settings(init=file), prune=prune))
    _, row = masks.prune(run, initialization.build(run), Workdir(tmp_path))
    path = tmp_path / row["certificate"]
    assert certificates.verify(path, init=file).kept == row["kept"]
    with pytest.raises(ValueError, match="is a digest, not a path"):
        certificates.verify(path)
    (tmp_path / "other").write_bytes(b"")
    with pytest.raises(ValueError, match="is not the file that the run began from"):
        certificates.verify(path, init=str(tmp_path / "other"))


def test_files_that_no_network_can_begin_from(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match=r"init='none\.npz' cannot be read: No such file.*leave it out"
    ):
        checks.check(_settings(init="none.npz"))
    conv = resolve_one(Config(model="conv", dataset="digits", width_multiplier=0.2))
    wide = resolve_one(Config(model="fc", dataset="digits", width_multiplier=0.2))
    np.savez(tmp_path / "net.npz", **networks.to_torch(initialization.build(conv)))
    networks.save(tmp_path / "net.safetensors", initialization.build(wide))
    for name, message in (
        ("net.npz", r"init='.*net\.npz' cannot be used: .*missing: 1\.bias"),
        (
            "net.safetensors",
            r"init=.* cannot be used: the variables of .* 'params/fc1/bias' is .20., and of",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            initialization.build(_run(init=str(tmp_path / name)))


def test_a_trained_network_is_read_from_its_checkpoint(tmp_path: pathlib.Path) -> None:
    train = TrainConfig(num_epochs=2, drops=(), batch_size=512)
    run, workdir = _run(train=train), Workdir(tmp_path)
    network = initialization.build(run)
    mask, _ = masks.prune(run, network, workdir)
    row = engine.train(run, network, mask, workdir)
    assert exports.find_row(workdir, run, None)["run_id"] == row["run_id"]
    prune_id = row["prune_run_id"]
    assert exports.find_row(workdir, None, prune_id)["run_id"] == prune_id
    read = exports.read(row, workdir)
    assert results.digest(read.params) == row["params_sha256"]
    _assert_same(read.mask, mask)
    assert read.model == network.model

    _check_that_other_checkpoints_are_refused(row, workdir)

    # A network that was trained in its compact form is known by the shapes of its checkpoint.
    small = exports.compact(read._replace(mask=_third_gone(read.mask)), trained=False)
    folder = workdir.checkpoint_path(row["run_id"])
    checkpoints.delete(folder)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        exports.read(row, workdir)
    with checkpoints.open_folder(folder, {"run_id": row["run_id"]}, 1) as opened:
        state = {"params": small.params, "batch_stats": small.batch_stats, "mask": small.mask}
        state["step"] = jnp.int32(row["num_steps"])
        checkpoints.save(opened, 1, (state, {"step": jnp.zeros(3)}))
    of_small = {"compact": True, "params_sha256": results.digest(small.params)}
    again = exports.read(row | of_small, workdir)
    assert again.model == small.model
    _assert_same(again.params, trees.apply_mask(small.params, small.mask))
    _assert_same((again.batch_stats, again.mask), (small.batch_stats, small.mask))


def _check_that_other_checkpoints_are_refused(row: dict[str, Any], workdir: Workdir) -> None:
    """Puts checkpoints that are not the last one of the run in its place."""
    folder = workdir.checkpoint_path(row["run_id"])
    arrays, description = checkpoints.read_latest(folder)
    last = checkpoints.latest_step(folder)
    assert last == row["num_steps"]
    # The last one is missing, so that the one before is the newest.
    shutil.rmtree(folder / str(last))
    message = rf"its num_steps is {last // 2}, and the run's is {last}.*--overwrite runs it again"
    with pytest.raises(ValueError, match=message):
        exports.read(row, workdir)
    run = from_dict(row["config"])
    network = initialization.build(run)
    found = masks.find_mask(run, network, workdir)
    assert found is not None
    with pytest.raises(ValueError, match=message):
        starts.restore_full(run, network, found[0], workdir)

    weights = {"0/params/head/bias": arrays["0/params/head/bias"] + 1}
    mask = {"0/mask/fc1/kernel": ~arrays["0/mask/fc1/kernel"]}
    for other_arrays, other_run, message in (
        ({}, {"run_id": "another"}, f"its run_id is 'another', and the run's is '{row['run_id']}'"),
        (weights, {}, "its params_sha256 is"),
        (mask, {}, f"the mask in .* is not that of run '{row['prune_run_id']}'"),
    ):
        checkpoints.delete(folder)
        with checkpoints.open_folder(folder, description | other_run, 1) as opened:
            checkpoints.save(opened, last, arrays | other_arrays)
        with pytest.raises(ValueError, match=message):
            exports.read(row, workdir)
    checkpoints.delete(folder)
    with checkpoints.open_folder(folder, description, 1) as opened:
        checkpoints.save(opened, last, arrays)
    assert results.digest(exports.read(row, workdir).params) == row["params_sha256"]


def _third_gone(mask: Any) -> Any:
    """Returns the mask without the weights that read every third unit of the first layer."""
    kernel = mask["fc2"]["kernel"].at[::3].set(jnp.array(False))
    return mask | {"fc2": mask["fc2"] | {"kernel": kernel}}


def _export(*flags: str) -> subprocess.CompletedProcess[str]:
    # The Python that runs the tests, with its packages.
    path = os.pathsep.join(path for path in sys.path if path)
    return subprocess.run(
        [sys.executable, "export.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command(tmp_path: pathlib.Path) -> None:
    """Exports a pruned run by its config in all formats, and a run of another process by its id."""
    run, workdir = _run(), Workdir(tmp_path)
    _, row = masks.prune(run, initialization.build(run), workdir)
    flags = [
        "--config=configs/digits.py",
        "--config.model=fc",
        "--config.width_multiplier=0.1",
        "--config.prune.pruner=magnitude",
        "--config.prune.compression=4",
        f"--workdir={tmp_path}",
    ]
    done = _export(*flags, f"--out={tmp_path / 'out'}", "--compact")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    name = f"{row['run_id']}-compact"
    assert f"{name}: " in done.stdout and "of jax.export" in done.stdout
    network = networks.load(tmp_path / "out" / f"{name}.safetensors")
    assert len(list((tmp_path / "out").iterdir())) == 3
    logits, wanted = _logits(network), _logits(exports.read(row, workdir))
    np.testing.assert_allclose(logits, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    read = networks.from_torch(tmp_path / "out" / f"{name}.torch.safetensors", "fc")
    _assert_same(read.params, trees.apply_mask(network.params, network.mask))
    header = native.read_safetensors(tmp_path / "out" / f"{name}.torch.safetensors")[1]
    assert json.loads(header["run"])["run_id"] == row["run_id"]

    done = _export(f"--workdir={tmp_path}", "--run=r1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "has no run 'r1'; its runs are fc-digits" in done.stderr


def test_runs_of_all_processes_are_found(tmp_path: pathlib.Path) -> None:
    """A sweep of several processes writes one row file per process."""
    workdir = Workdir(tmp_path)
    first, second = _run(seed=1), _run(seed=2)
    for run, rows in ((second, "rows-0001.jsonl"), (first, "rows.jsonl")):
        masks.prune(run, initialization.build(run), workdir)
        if rows != "rows.jsonl":
            (tmp_path / "rows.jsonl").rename(tmp_path / rows)
    for run in (first, second):
        assert exports.find_row(workdir, run, None)["seed"] == run.config.seed
    flags = [f"--workdir={tmp_path}", f"--run={second.prune_id}", "--format=safetensors"]
    done = _export(*flags)
    assert done.returncode == 0, done.stderr
    written = networks.load(workdir.exported_path / f"{second.prune_id}.safetensors")
    row = exports.find_row(workdir, second, None)
    _assert_same(written.params, exports.read(row, workdir).params)


def test_files_of_another_run(tmp_path: pathlib.Path) -> None:
    """Every reader of a mask compares it with the row, which holds its digest."""
    workdir = Workdir(tmp_path)
    first, second = _run(), _run(seed=1)
    for run in (first, second):
        masks.prune(run, initialization.build(run), workdir)
    row = exports.find_row(workdir, first, None)
    path = workdir.mask_path(first.prune_id)
    own = path.read_bytes()
    shutil.copy(workdir.mask_path(second.prune_id), path)
    message = f"{path.name}' is not that of run '{first.prune_id}': its mask_sha256 is"
    for read in (
        lambda: masks.find_row(first, workdir),
        lambda: masks.find_mask(first, initialization.build(first), workdir),
        lambda: exports.read(row, workdir),
    ):
        with pytest.raises(ValueError, match=f"{message}.*prune.py.* --overwrite runs it again"):
            read()
    # The other runs of a grid go on.
    failed, done = masks.prune_all([first, second], workdir)
    assert isinstance(failed, events.Failed) and isinstance(done, events.Finished)

    path.write_bytes(own[:-1])
    with pytest.raises(ValueError, match=r"cannot be read.*prune.py.* --overwrite runs it again"):
        exports.read(row, workdir)
    path.write_bytes(own)
    other = exports.find_row(workdir, second, None)
    message = f"the config in the row of run '{first.prune_id}' is not that of run"
    with pytest.raises(ValueError, match=message):
        exports.read(row | {"config": other["config"]}, workdir)
    with pytest.raises(
        ValueError, match=r"the row of run .* lacks dataset, config, mask_sha256\. `python"
    ):
        exports.read({"run_id": row["run_id"]}, workdir)


def test_a_network_exported_twice_is_one_file(tmp_path: pathlib.Path) -> None:
    """A run that begins from a network file is named by its bytes, in every process."""
    workdir, run = Workdir(tmp_path), _run()
    masks.prune(run, initialization.build(run), workdir)
    row = exports.find_row(workdir, run, None)
    network = exports.read(row, workdir)
    written = [
        exports.write(network, row, tmp_path / folder, "net", ["safetensors", "torch"])
        for folder in ("a", "b")
    ]
    for name in written[0]:
        content = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == content
        # The library orders metadata at random.
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        assert list(header["__metadata__"]) == sorted(header["__metadata__"])


def test_bad_arguments(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    with pytest.raises(ValueError, match="--config and --run are missing"):
        exports.find_row(workdir, None, None)
    with pytest.raises(ValueError, match="it has no runs"):
        exports.find_row(workdir, _run(), None)
    with pytest.raises(
        ValueError, match=r"format='onnx,jax' must be some of safetensors,jax,torch"
    ):
        exports.check_formats(["onnx", "jax"])
    for run_id in ("../../evil/x", "/etc/x", "a\0", "a\n", "a\\b", "", ".", "..", "x" * 300):
        with pytest.raises(ValueError, match="is not the name of a run"):
            exports.find_row(workdir, None, run_id)
    assert exports.check_formats(["jax", "torch", "jax"]) == ["jax", "torch"]
