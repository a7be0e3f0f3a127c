"""Tests `python prune.py` as a user runs it.

- A run writes a mask and a row. The same command then finds them and does nothing.
- A certificate can be verified, and a forged one is refused.
- One network on several devices has the mask of one device.
- Bad input ends before any work with one message that names the argument, the value and the cure.
  The exit status is not 0, and no file is written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import commands
import jax
import numpy as np
import pytest
from cases import slow_except

from synflow_jax import storage
from synflow_jax.experiments import cli, initialization, masks
from synflow_jax.experiments.config import Config, PruneConfig
from synflow_jax.experiments.run import resolve_one
from synflow_jax.storage import Workdir

Prune = Callable[..., commands.Result]


@pytest.fixture(scope="module")
def prune(cache: pathlib.Path) -> Iterator[Prune]:
    """Returns a function that runs `python prune.py FLAGS`."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    with commands.serve("prune", environment) as run:
        yield run


def test_a_run_and_a_second_one(tmp_path: pathlib.Path, prune: Prune) -> None:
    flags = ("--config=configs/digits.py", f"--workdir={tmp_path}", "--config.model=fc")
    first = prune(*flags)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""

    (row,) = storage.read_rows(tmp_path / "rows.jsonl")
    expected = {
        "model": "fc",
        "dataset": "digits",
        "pruner": "synflow",
        "compression": 10.0,
        "seed": 0,
        "num_iterations": 100,
        "schedule": "exponential",
        "scope": "global",
        "total": 119_400,
        "kept": 11_940,
        "collapsed": False,
        "max_compression": 19_900.0,
    }
    assert {key: row[key] for key in expected} == expected
    assert row["seconds"] > 0 and 0 < row["log10_objective"] < 6
    assert [layer["name"] for layer in row["layers"]] == [
        *(f"fc{i}/kernel" for i in range(1, 6)),
        "head/kernel",
    ]
    assert row["layers"][0]["shape"] == [784, 100] and row["layers"][0]["size"] == 78_400
    assert sum(layer["kept"] for layer in row["layers"]) == row["kept"]
    assert row["iterations"]["kept"][-1] == row["kept"]
    assert len(row["iterations"]["min_layer_score"]) == 100
    # The kernel of every layer is a cut. The biases are small, so all layers have the same score.
    assert max(layer["score"] for layer in row["layers"]) < 1.3 * min(
        layer["score"] for layer in row["layers"]
    )

    mask = storage.load_mask(tmp_path / "masks" / f"{row['run_id']}.safetensors")
    assert {name: int(m.sum()) for name, m in mask.items()} == {
        x["name"]: x["kept"] for x in row["layers"]
    }
    assert json.loads((tmp_path / "config.json").read_text()) == row["config"]
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    for text in (
        "119,400 prunable weights",
        "fc1/kernel",
        "compression 10.00",
        "not collapsed",
        row["run_id"],
    ):
        assert text in first.stdout

    written = (tmp_path / "rows.jsonl").read_bytes()
    second = prune(*flags)
    assert second.returncode == 0
    assert "already in" in second.stdout
    assert "fc1/kernel" in second.stdout
    assert (tmp_path / "rows.jsonl").read_bytes() == written

    again = prune(*flags, "--overwrite")
    assert again.returncode == 0 and "already in" not in again.stdout
    (new,) = storage.read_rows(tmp_path / "rows.jsonl")
    assert new["mask_sha256"] == row["mask_sha256"] and new["seconds"] != row["seconds"]

    # A damaged mask is found before the old run is reported. --overwrite replaces it.
    path = tmp_path / "masks" / f"{row['run_id']}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    damaged = prune(*flags)
    assert damaged.returncode != 0
    assert "cannot be read" in damaged.stderr
    assert "--overwrite" in damaged.stderr
    (tmp_path / "rows.jsonl").write_text('{"run_id": "half\n')
    damaged = prune(*flags, "--overwrite")
    assert damaged.returncode != 0 and "line 1" in damaged.stderr


@pytest.mark.slow
def test_a_certificate_is_written_and_can_be_verified(tmp_path: pathlib.Path, prune: Prune) -> None:
    """Certifies the maximal compression, one weight per layer, and refuses a forged certificate."""
    flags = (
        "--config=configs/digits.py",
        f"--workdir={tmp_path}",
        "--config.prune.schedule=certified",
    )
    first = prune(*flags, f"--config.prune.compression={260_384 / 3!r}")
    assert first.returncode == 0 and first.stderr == "", first.stderr
    assert "no iteration of" in first.stdout and "certificates/" in first.stdout
    (row,) = storage.read_rows(tmp_path / "rows.jsonl")
    assert [layer["kept"] for layer in row["layers"]] == [1, 1, 1] and not row["collapsed"]
    assert row["largest_cut_fraction"] < 1

    path = tmp_path / row["certificate"]
    certificate, removed_in = storage.load_certificate(path)
    assert [step["kept"] for step in certificate["iterations"]] == row["iterations"]["kept"]
    assert certificate["mask_sha256"] == row["mask_sha256"]
    verified = prune(f"--verify={path}")
    assert verified.returncode == 0 and "holds: none of its" in verified.stdout, verified.stderr

    # The forged certificate says that the last iteration but one pruned more than a cut.
    last = len(certificate["iterations"])
    early = {
        name: np.where((n > 0) & (n < last), 1, n).astype(np.uint16)
        for name, n in removed_in.items()
    }
    steps = [{**step, "kept": 4} for step in certificate["iterations"][:-1]]
    consistent = {**certificate, "iterations": [*steps, certificate["iterations"][-1]]}
    for changed, message in (
        ({**certificate, "mask_sha256": "0" * 64}, "is of another mask than it says"),
        (certificate, "it records iterations[0].kept="),
        (consistent, "does not hold: iteration 1 pruned"),
    ):
        storage.save_certificate(tmp_path / "forged.json", changed, early)
        forged = prune(f"--verify={tmp_path / 'forged.json'}")
        assert (
            forged.returncode == 2 and message in forged.stderr and forged.stderr.count("\n") == 1
        ), forged.stderr
    (tmp_path / "no_certificate.json").write_text("{}")
    for value, message in (
        ("none.json", "'none.json' does not exist"),
        (f"{tmp_path / 'no_certificate.json'}", "no_certificate.json' is not a certificate"),
        ("", "--verify='' names no certificate"),
    ):
        refused = prune(f"--verify={value}")
        assert refused.returncode == 2 and message in refused.stderr
        assert refused.stdout == ""  # no progress bar before an error


def test_help_lists_the_keys_of_pruning() -> None:
    # absl lists the flags of the script that was started.
    command = [sys.executable, "prune.py", "--help"]
    result = subprocess.run(
        command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    text = result.stdout.partition("The keys are ")[2].partition("(default")[0]
    values = dataclasses.asdict(Config())
    keys = [
        key for key in values if key not in ("data", "prune", "train", "sweep", "grid", "grids")
    ]
    keys += [f"{part}.{key}" for part in ("data", "prune", "grid") for key in values[part]]
    assert re.split(r",\s+", text.strip()) == keys


@pytest.mark.slow
def test_one_network_on_several_devices(tmp_path: pathlib.Path, prune: Prune) -> None:
    """Scores four batches on three devices: run id and mask are those of one device."""
    flags = ("--config=configs/digits.py", "--config.model=fc", "--config.prune.pruner=snip")
    for name, more in (("one", ()), ("three", ("--cpu_devices=3", "--config.prune.over_devices"))):
        folder = f"--workdir={tmp_path / name}"
        # The number of threads decides how XLA rounds matrix products.
        result = prune(*flags, "--config.prune.batch_size=30", folder, *more, NPROC="8")
        assert result.returncode == 0, result.stderr
    (one,), (three,) = (
        storage.read_rows(tmp_path / name / "rows.jsonl") for name in ("one", "three")
    )
    assert one["run_id"] == three["run_id"] and one["mask_sha256"] == three["mask_sha256"]


@pytest.mark.parametrize("rule", slow_except(["snip"], ["snip", "grasp", "random"]))
def test_rules_on_real_digits(tmp_path: pathlib.Path, prune: Prune, rule: str) -> None:
    flags = ("--config=configs/digits.py", "--config.model=fc", f"--config.prune.pruner={rule}")
    options = ("--config.prune.dense_classifier", "--config.prune.scope=local")
    result = prune(*flags, *options, f"--workdir={tmp_path}")
    assert result.returncode == 0, result.stderr
    (row,) = storage.read_rows(tmp_path / "rows.jsonl")
    assert row["num_iterations"] == 1
    assert [layer["kept"] for layer in row["layers"]] == [
        7840,
        1000,
        1000,
        1000,
        1000,
    ]  # the head is not prunable


BAD = {
    "network": (["--config.model=cifar_vgg17"], "model='cifar_vgg17'", "cifar_vgg16"),
    "rule": (["--config.prune.pruner=snop"], "prune.pruner='snop'", "snip"),
    "schedule": (["--config.prune.schedule=cosine"], "schedule='cosine'", "exponential"),
    "scope": (["--config.prune.scope=layer"], "scope='layer'", "local"),
    "dataset": (["--config.dataset=cifar"], "dataset='cifar'", "cifar10"),
    "key": (
        ["--config.prune.compresion=3"],
        "--config.prune.compresion",
        "--config.prune.compression",
    ),
    "type": (["--config.prune.num_iterations=ten"], "num_iterations", "ten"),
    "compression below 1": (["--config.prune.compression=0.5"], "compression=0.5", "at least 1"),
    "compression NaN": (["--config.prune.compression=nan"], "compression=nan", "finite"),
    "compression above the maximum": (
        ["--config.prune.compression=1e5"],
        "compression=100000",
        "86794.66667",
    ),
    "no iterations": (["--config.prune.num_iterations=0"], "num_iterations=0", "at least 1"),
    "data that is not here": (
        ["--config.prune.pruner=snip", "--config.dataset=cifar100"],
        "dataset='cifar100'",
        "--config.dataset=digits",
    ),
    "certified needs synflow": (
        ["--config.prune.schedule=certified", "--config.prune.pruner=magnitude"],
        "prune.pruner='magnitude'",
        "it needs 'synflow'",
    ),
    "fraction of a cut": (
        ["--config.prune.schedule=certified", "--config.prune.cut_fraction=1.5"],
        "prune.cut_fraction=1.5",
        "below 1",
    ),
    "nothing prunable": (["--config.prune.exclude=."], "exclude='.'", "another pattern"),
    "pattern": (["--config.prune.exclude=("], "exclude='('", "regular expression"),
    "images too small": (
        ["--config.model=imagenet_vgg11", "--config.dataset=mnist"],
        "model='imagenet_vgg11' does not take mnist's images: a map of 1x1",
        "cifar_",
    ),
    "part of a config file": (
        ["--config=paper/configs/fig6.py:vgg12_c10"],
        "fig6.py:vgg12_c10",
        "vgg11, vgg16",
    ),
    "key without its part": (
        ["--config.compression=3"],
        "--config.compression",
        "--config.prune.compression",
    ),
    "function": (
        ["--config.train.make_optimizer=adam"],
        "train.make_optimizer",
        "in the config file",
    ),
    "words of a grid": (["--config.grid.pruner=snip,grasp"], "'snip,grasp'", "('snip','grasp')"),
    "examples": (
        ["--config.prune.examples_per_class=0"],
        "prune.examples_per_class=0",
        "at least 1",
    ),
    "pattern of nothing": (["--config.prune.exclude=fc7"], "exclude='fc7'", "fix the pattern"),
    "no folder": (["--workdir="], "--workdir=''", "--workdir=DIR"),
    "key as a flag": (["--seed=3"], "--seed is not a flag", "Did you mean --config.seed?"),
    "key of a part as a flag": (
        ["--compression=3"],
        "--compression",
        "--config.prune.compression?",
    ),
    "misspelled flag": (["--workdr=runs"], "--workdr is not a flag", "Did you mean --workdir?"),
    "unknown flag": (["--xyzzy=3"], "--xyzzy is not a flag", "--help lists the flags"),
    "word": (["seed"], "'seed' is not a flag", "Write --name=value"),
    "number": (["--config.prune.compression=abc"], "compression=abc", "must be a number (float)"),
    "whole number": (["--config.seed=1.5"], "--config.seed=1.5", "must be a whole number (int)"),
    "optional whole number": (
        ["--config.prune.num_iterations=1.5"],
        "--config.prune.num_iterations=1.5",
        "must be a whole number (int)",
    ),
    "bool": (["--config.prune.nested=maybe"], "nested=maybe", "must be True or False (bool)"),
    "key of a grid with its part": (
        ["--config.grid.prune.pruner=snip"],
        "--config.grid.prune.pruner is not a key of the config",
        "Did you mean --config.grid.pruner?",
    ),
    "unknown key": (["--config.xyzzy=3"], "--config.xyzzy is not a key", "The keys are: model,"),
    "group of keys": (["--config.data=here"], "--config.data is a group of keys", "data.dir"),
    "letters as seeds": (["--config.grid.seed=a,b"], "grid.seed holds 'a,b'", "whole numbers"),
    "seed beyond 32 bits": (["--config.seed=4294967296"], "seed=4294967296", "at most 4294967295"),
    "seed of many digits": (
        ["--config.seed=" + "9" * 5000],
        "--config.seed=999",
        "must be a whole number (int)",
    ),
    "drops of words": (["--config.train.drops=a"], "train.drops=('a',)", "epoch numbers"),
    "width": (["--config.width_multiplier=1e30"], "width_multiplier=1e+30", "below 1024"),
    "network beyond the memory": (
        ["--config.model=cifar_vgg16", "--config.width_multiplier=1000"],
        "model='cifar_vgg16' with width_multiplier=1000",
        "Choose a smaller network",
    ),
    "repetitions": (["--config.prune.exclude=a{9999999999}"], "exclude=", "regular expression"),
    "devices": (["--cpu_devices=1000000000"], "--cpu_devices=1000000000", "[1, 256]"),
    "long name": (["--workdir=" + "x" * 5000], "--workdir='xxx", "File name too long"),
    "nearest network": (
        ["--config.model=cifar_resnet21"],
        "model='cifar_resnet21'",
        "Did you mean cifar_resnet20?",
    ),
}


@pytest.fixture(scope="module")
def bad(
    tmp_path_factory: pytest.TempPathFactory, prune: Prune
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Returns the folder that holds each command's folder, and the results of the commands."""
    folder = tmp_path_factory.mktemp("bad")
    results = {
        case: prune("--config=configs/digits.py", f"--workdir={folder / case}", *flags)
        for case, (flags, *_) in BAD.items()
    }
    return folder, results


@pytest.mark.parametrize("case", BAD)
def test_bad_values(bad: tuple[pathlib.Path, dict[str, Any]], case: str) -> None:
    (_, argument, cure), workdir, result = BAD[case], bad[0] / case, bad[1][case]
    assert result.returncode != 0
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert argument in result.stderr and cure in result.stderr
    assert result.stdout == ""
    assert not workdir.exists() or not list(workdir.iterdir())


def test_a_hint_replaces_the_list_of_keys(bad: tuple[pathlib.Path, dict[str, Any]]) -> None:
    assert "The keys are" not in bad[1]["key"].stderr
    assert "make_optimizer" not in bad[1]["unknown key"].stderr  # no flag can set it


def test_bad_config_files(tmp_path: pathlib.Path, prune: Prune) -> None:
    broken, foreign = tmp_path / "broken.py", tmp_path / "foreign.py"
    broken.write_text("def get_config(:\n")
    foreign.write_text(
        "import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict()\n"
    )
    odd = tmp_path / "odd.py"
    odd.write_text(
        "from synflow_jax.experiments.config import Config\n\n"
        "def get_config(what):\n"
        "    config = Config(model='fc', dataset='digits')\n"
        "    exec(what)\n"
        "    return config\n"
    )
    for flags, message in (
        (["--config=none.py"], "--config=none.py: there is no such file"),
        (["--config", "none.py"], "--config=none.py: there is no such file"),
        (["--config=configs"], "--config=configs is a folder, not a file"),
        (["--config="], "--config= names no file"),
        (["--config=README.md"], "--config=README.md is not a Python file"),
        (["--config=configs/recipes.py"], "recipes.py has no function get_config()"),
        ([f"--config={broken}"], "does not load: SyntaxError"),
        ([f"--config={foreign}"], "--config is a ConfigDict"),
        ([f"--config={odd}:1/0"], "odd.py:1/0 does not load: ZeroDivisionError"),
        ([f"--config={odd}:config.seed='x'"], "seed='x' must be a whole number"),
        ([f"--config={odd}:config.sead=3"], "sead is not a key of the config. Did you mean seed?"),
        ([f"--config={odd}:config.prune=None"], "prune=None must be a PruneConfig"),
        ([f"--config={odd}:config.grids=(1,2)"], "grids=(1, 2) must be a tuple of Grid"),
        ([], "--config is missing"),
    ):
        result = prune(*flags, f"--workdir={tmp_path / 'work'}")
        assert result.returncode != 0
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_a_config_file_that_returns_nothing(tmp_path: pathlib.Path, prune: Prune) -> None:
    file = tmp_path / "nothing.py"
    file.write_text("def get_config():\n    pass\n")
    result = prune(f"--config={file}", f"--workdir={tmp_path / 'work'}")
    assert result.returncode == 2 and "--config is a NoneType" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_home_folder_in_flags(
    tmp_path: pathlib.Path, prune: Prune, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writes ~ as a shell leaves it in --name=~/x. No folder is named ~."""
    for flag, message in (
        ("--config=~/none.py", f"--config={tmp_path}/none.py: there is no such file"),
        ("--verify=~/none.json", f"'{tmp_path}/none.json' does not exist"),
    ):
        assert message in prune(flag, HOME=str(tmp_path)).stderr
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.check_workdir("~/runs").path == tmp_path / "runs"
    with pytest.raises(ValueError, match=r"--workdir='~nobody-here/x' .* no such user"):
        cli.check_workdir("~nobody-here/x")
    assert (tmp_path / "runs").is_dir()
    for name in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"--out='.*' names no file or folder"):
            cli.check_path(name, "out")


def test_unwritable_workdir(tmp_path: pathlib.Path, prune: Prune) -> None:
    (tmp_path / "file").write_text("")
    result = prune("--config=configs/digits.py", f"--workdir={tmp_path / 'file'}")
    assert result.returncode != 0
    assert "is a file, not a folder" in result.stderr
    assert result.stderr.count("\n") == 1


def test_overflow_names_the_layer_and_writes_nothing(tmp_path: pathlib.Path) -> None:
    settings = Config(
        model="fc", dataset="digits", prune=PruneConfig(compression=10.0, scaled=False)
    )
    run = resolve_one(settings)
    network = initialization.build(run)
    network = network._replace(params=jax.tree.map(lambda leaf: 1e8 * leaf, network.params))
    with pytest.raises(
        FloatingPointError, match="layer 'fc1/kernel' are not finite in iteration 1 of 100"
    ):
        masks.prune(run, network, Workdir(tmp_path))
    assert not list(tmp_path.iterdir())


def test_modes_of_jax_that_end_any_training_have_no_effect(
    capsys: pytest.CaptureFixture[str],
) -> None:
    modes = {"jax_transfer_guard": "disallow", "jax_numpy_dtype_promotion": "strict"}
    before = {name: getattr(jax.config, name) for name in modes}
    try:
        for name, value in modes.items():
            jax.config.update(name, value)
        cli._end_modes()
        assert jax.config.jax_transfer_guard == "allow"  # type: ignore[attr-defined]
        assert (np.float32(1) * jax.random.key_data(jax.random.key(0))).dtype == np.float32
    finally:
        for name, old in before.items():
            jax.config.update(name, old)
    notes = capsys.readouterr().err.splitlines()
    assert notes == [f"note: {name}={value} has no effect here." for name, value in modes.items()]


def test_a_platform_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli._platform_problem() is None

    def fail() -> None:
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    problem = cli._platform_problem()
    assert problem is not None
    assert problem.startswith("JAX_PLATFORMS='cuda' cannot be used here: JAX does not find it.")
