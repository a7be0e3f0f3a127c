"""Checks that a config of any values is either resolved or refused by a message that names the key.

- Each field times each odd value, from a program and from a row: runs, or one ValueError.
- A value and its counterpart of NumPy are one run, whose name does not change.
- Numbers that a program cannot hold, e.g. a seed of 2^32, are refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from synflow_jax.experiments import checks, identity, memory, programs, settings
from synflow_jax.experiments.config import (
    Config,
    Grid,
    PruneConfig,
    TrainConfig,
)
from synflow_jax.experiments.run import from_dict, resolve, resolve_one


class _Rude:
    """Raises whatever it is asked."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


_WORDS = (None, True, "x", "", "1", "\0", "~", "nan", b"x", "x" * 10_000)
_NUMBERS = (0, -1, 1.5, 2**31, 2**32, 2**63, 10**20, 10**400, 1e30, 1e300, 1e-300, 1j)
_NOT_FINITE = (float("nan"), float("inf"), -float("inf"), np.float64("nan"))
_SEQUENCES = ((), (1, 2), ("a",), (float("nan"),), [0], range(10**9), range(10**20), {1}, {"a": 1})
_OBJECTS = (object(), _Rude(), _nested(100_000), Config(), Grid(), type, lambda steps: None)
_ARRAYS = (np.int64(3), np.float32(0.5), np.bool_(True), np.array(3), np.array([[1]]))
ODD = (*_WORDS, *_NUMBERS, *_NOT_FINITE, *_SEQUENCES, *_OBJECTS, *_ARRAYS)


def _config(**values: Any) -> Config:
    """Returns the default config with other values for some keys; __ stands for a dot."""
    config = Config()
    for key, value in values.items():
        *parts, name = key.split("__")
        owner: Any = config
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def _all_keys(kind: type = Config, prefix: str = "") -> Iterator[str]:
    """Yields the keys of a config, and of its parts as a whole."""
    for field in dataclasses.fields(kind):
        yield prefix + field.name
        part = settings.part_of(field)
        if part is not None:
            yield from _all_keys(part, f"{prefix}{field.name}.")


def _refusal(call: Callable[[Any], Any], value: Any) -> str | None:
    """Returns the message of the ValueError of a call, or None if it returns."""
    try:
        call(value)
    except ValueError as error:
        return str(error)
    return None


def _names_of(config: Config) -> None:
    for run in resolve(config):
        assert from_dict(json.loads(json.dumps(run.train_dict))).train_id == run.train_id


@pytest.mark.parametrize("key", list(_all_keys()))
def test_any_value_of_a_field_is_a_run_or_a_message(key: str) -> None:
    for value in ODD:
        config = _config(**{key.replace(".", "__"): value})
        message = _refusal(_names_of, config)
        # A value of a grid is named by the key that it sets.
        name = key.rpartition(".")[2]
        assert message is None or (name in message and "\n" not in message and len(message) < 500)


def test_any_value_of_a_row_is_a_run_or_a_message() -> None:
    values = resolve_one(Config()).train_dict
    keys = [*values, "more", *(f"prune.{key}" for key in (*values["prune"], "more"))]
    for key in keys:
        *parts, name = key.split(".")
        for value in ODD:
            changed = copy.deepcopy(values)
            owner = changed
            for part in parts:
                owner = owner[part]
            owner[name] = value
            message = _refusal(from_dict, changed)
            assert message is None or (name in message and "\n" not in message)
    for value in ODD:
        message = _refusal(from_dict, value)
        assert message is not None and message.startswith("this is no config of prune.py: ")
        assert _refusal(resolve, value) is not None or value == Config()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"seed": 2**32}, "seed=4294967296 must be a whole number .* at most 4294967295"),
        ({"width_multiplier": 1e30}, "width_multiplier=1e.30 must be a number .* below 1024"),
        ({"prune": None}, r"prune=None must be a PruneConfig: set prune=PruneConfig\(...\)"),
        ({"prune__num_iterations": 10**9}, "prune.num_iterations=1000000000 must be a whole"),
        ({"prune__compression": "10"}, "prune.compression='10' must be a number"),
        ({"prune__compression": True}, "prune.compression=True must be a number"),
        ({"prune__nested": "False"}, "prune.nested='False' must be True or False"),
        ({"prune__compresion": 3}, r"prune.compresion .* Did you mean prune.compression\?"),
        ({"train__drops": ("a",)}, r"train.drops=\('a',\) must be epoch numbers"),
        ({"train__drops": (6, 6)}, r"train.drops=\(6, 6\) must be .* increasing"),
        ({"train__drops": None}, "train.drops=None must be epoch numbers"),
        ({"train__num_epochs": 4 * 10**9}, "train.num_epochs=4000000000 must be a whole number"),
        ({"train__make_optimizer": "adam"}, "train.make_optimizer='adam' must be a function"),
        ({"data__dir": ""}, "data.dir='' must be the name of a folder"),
        ({"grids": (1, 2)}, r"grids=\(1, 2\) must be a tuple of Grid"),
        ({"grid__seed": "01"}, "grid.seed='01' must be a tuple of whole numbers"),
        ({"grid__seed": (2**32,)}, "seed=4294967296 .* This is the grid's run of seed="),
        ({"grid__seed": range(2000), "grid__compression": range(1, 2000)}, "names 3998000 runs"),
    ],
)
def test_messages(values: dict[str, Any], message: str) -> None:
    config = _config(**values)
    for call in (resolve, checks.check, checks.check_train):
        with pytest.raises(ValueError, match=message):
            call(config)


def test_numbers_of_numpy_are_those_of_python() -> None:
    plain = Config(
        model="fc",
        seed=3,
        prune=PruneConfig(compression=10.0, num_iterations=5, nested=False),
        train=TrainConfig(drops=(2, 4)),
        grid=Grid(compression=(2.0, 4.0)),
    )
    same = _config(
        model=np.str_("fc"),
        seed=np.uint8(3),
        prune__compression=np.float16(10),
        prune__num_iterations=np.int64(5),
        prune__nested=np.bool_(False),
        train__drops=np.array([2, 4]),
        grid__compression=[np.float32(2), 4],
    )
    assert settings.checked(same) == plain
    assert [run.train_id for run in resolve(same)] == [run.train_id for run in resolve(plain)]


def test_the_home_folder_is_found_and_names_no_run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").write_bytes(b"weights")
    run = resolve_one(_config(init="~/weights", data__dir=pathlib.Path("~/data")))
    assert run.config.init == str(tmp_path / "weights")
    assert run.config.data.dir == str(tmp_path / "data")
    assert run.prune_id == resolve_one(Config(init=str(tmp_path / "weights"))).prune_id
    with pytest.raises(ValueError, match="it is not a file"):
        identity.file_digest(str(tmp_path))


def test_an_optimizer_of_a_row_is_its_name() -> None:
    run = resolve_one(Config(train=TrainConfig(make_optimizer=lambda steps: None)))
    again = from_dict(run.train_dict)
    assert again.train_id == run.train_id and isinstance(again.config.train.make_optimizer, str)


@pytest.mark.parametrize(
    "train, message",
    [
        (
            {"make_optimizer": lambda steps: None},
            "make_optimizer=<lambda> returns None in place of",
        ),
        ({"make_optimizer": lambda steps: (1, 2)}, r"returns \(1, 2\) in place of an optax"),
        ({"make_optimizer": lambda steps: 1 / 0}, "<lambda> fails for 11 steps per epoch: ZeroDiv"),
        ({"make_optimizer": lambda: None}, "<lambda> fails for 11 steps per epoch: TypeError"),
        ({"batch_size": 2**31 - 1}, "train.batch_size=2147483647 must be from 1 to 1438"),
    ],
)
def test_a_recipe_that_cannot_be_is_found_before_pruning(
    train: dict[str, Any], message: str
) -> None:
    recipe = TrainConfig(**{"batch_size": 128, **train})
    run = resolve_one(Config(model="fc", dataset="digits", train=recipe))
    with pytest.raises(ValueError, match=message):
        programs.make_recipe(run)


def test_a_network_beyond_the_memory_is_not_drawn() -> None:
    with pytest.raises(ValueError, match=r"model x has 1000000000000000 weights: 4000000 GB"):
        memory.check_fits(10**15, "model x")
    memory.check_fits(10**6, "model x")
