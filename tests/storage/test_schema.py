"""Checks that a schema accepts what is right, and names what is not by its key and value."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import pytest

from synflow_jax.storage import schema
from synflow_jax.storage.schema import FRACTION, INTEGER, NATURAL, NUMBER, POSITIVE, TEXT, TRUTH

# Values that JSON can hold, and a float that Python reads from 1e400.
VALUES = (None, True, 0, 1, -1, 2**63, 10**400, 0.5, 1.5, -0.5, 1e400, "", "a", [], [1], {})
ACCEPTED = {
    TEXT: ["", "a"],
    TRUTH: [True],
    INTEGER: [0, 1, -1],
    NATURAL: [0, 1],
    POSITIVE: [1],
    NUMBER: [0, 1, -1, 2**63, 0.5, 1.5, -0.5],
    FRACTION: [0, 1, 0.5],
}


@pytest.mark.parametrize("kind", ACCEPTED, ids=lambda kind: kind.words)
def test_each_kind_accepts_its_values_alone(kind: schema.Kind) -> None:
    accepted = [value for value in VALUES if kind.accepts(value)]
    # By type too: to Python, True == 1.
    assert [(type(value), value) for value in accepted] == [
        (type(value), value) for value in ACCEPTED[kind]
    ]


NESTED: schema.Schema = {
    "layers": [{"kept": NATURAL, "score": schema.Nullable(NUMBER)}],
    "steps": [INTEGER, ...],
    "size": schema.Nullable({"full": POSITIVE}),
}


@pytest.mark.parametrize(
    ("value", "key", "problem"),
    [
        ({"layers": []}, "layers.kept", None),
        ({"layers": [{"kept": 1}, {"kept": -1}]}, "layers.kept", "layers[1].kept=-1 is not a wh"),
        ({"layers": [{"kept": 1}]}, "layers.score", "layers[0].score is missing"),
        ({"layers": [{"kept": 1}]}, "layers.score?", None),
        ({"layers": [{"score": None}]}, "layers.score", None),
        ({"layers": [{"score": "x"}]}, "layers.score?", "layers[0].score='x' is not a finite numb"),
        ({"layers": {"kept": 1}}, "layers.kept", "layers={'kept': 1} is not a list"),
        ({"layers": [3]}, "layers.kept", "layers[0]=3 is not an object"),
        ({}, "layers.kept", "layers is missing"),
        ({}, "layers?.kept", None),
        ({"layers": [{}]}, "layers?.kept", "layers[0].kept is missing"),
        ({}, "layers.kept?", "layers is missing"),
        ({"steps": []}, "steps", "steps is empty"),
        ({"size": None}, "size.full", None),
        ({"size": {}}, "size.full", "size.full is missing"),
        ({"size": {"full": 0}}, "size.full", "size.full=0 is not a whole number from 1"),
        ([], "size", "it=[] is not an object"),
        ({"steps": "x" * 1000}, "steps", "steps='xxxxxxxx"),
    ],
)
def test_the_first_problem_is_named(value: Any, key: str, problem: str | None) -> None:
    found = schema.problem(value, NESTED, [key])
    assert found is None if problem is None else str(found).startswith(problem)
    assert found is None or len(found) < 120


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"\xff", b'{"a": ', b"[" * 100_000, b'{"a": ' + b"9" * 5000]
)
def test_files_that_hold_no_object_are_named(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json' cannot be read"):
        schema.read_object(path)


def test_what_is_no_file_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "good").write_text(json.dumps({"a": [1]}))
    assert schema.read_object(tmp_path / "good") == {"a": [1]}
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (("", "not a file"), ("pipe", "not a file"), ("gone", "missing")):
        with pytest.raises(ValueError, match=problem):
            schema.read_object(tmp_path / name)
