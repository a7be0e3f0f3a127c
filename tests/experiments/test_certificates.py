"""Tests the verification of certificates: each number is computed again, and none may be forged."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from synflow_jax import storage
from synflow_jax.experiments import certificates, initialization, masks
from synflow_jax.experiments.config import Config, PruneConfig
from synflow_jax.experiments.run import resolve_one
from synflow_jax.storage import Workdir

Arrays = Mapping[str, np.ndarray]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The certificate of a small run."""
    prune = PruneConfig(schedule="certified", compression=20.0)
    config = Config(model="fc", dataset="digits", width_multiplier=0.05, prune=prune)
    run, folder = resolve_one(config), tmp_path_factory.mktemp("runs")
    _, row = masks.prune(run, initialization.build(run), Workdir(folder))
    return folder / row["certificate"]


def _forge(
    path: pathlib.Path, folder: pathlib.Path, changes: Mapping[str, Any], arrays: Arrays
) -> pathlib.Path:
    """Writes a certificate with other values, and digests that fit. None leaves a key out."""
    forged = folder / "forged.json"
    np.savez_compressed(forged.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]
    content = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    digest = hashlib.sha256(content).hexdigest()
    values = {**json.loads(path.read_text()), "removed_in_sha256": digest, **changes}
    kept = {key: value for key, value in values.items() if value is not None}
    forged.write_text(json.dumps(kept))
    return forged


def _step(**changes: Any) -> Any:
    """Changes the first iteration that a certificate lists."""

    def change(certificate: dict[str, Any]) -> dict[str, Any]:
        first, *rest = certificate["iterations"]
        return {"iterations": [{**first, **changes}, *rest]}

    return change


def _of_seed_7(certificate: dict[str, Any]) -> dict[str, Any]:
    """Takes the config and the name of another run."""
    config = {**certificate["config"], "seed": 7}
    return {"config": config, "run_id": certificates.from_dict(config).prune_id}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Keys that are missing or of another type.
        *(({key: None}, f"{key} is missing") for key in certificates._SCHEMA),
        ({"config": 3}, "config=3 is not an object"),
        ({"config": {}}, "is no config"),
        ({"iterations": 5}, "iterations=5 is not a list"),
        ({"iterations": []}, "iterations is empty"),
        ({"iterations": [{}]}, r"iterations\[0\].kept is missing"),
        ({"kept": True}, "kept=True is not a whole number"),
        # Values that do not follow from the arrays.
        ({"run_id": "fc-digits-synflow-c1000-s9-00000000"}, "it records run_id='fc-digits"),
        ({"kept": 1}, "it records kept=1, but computing it again gives 204"),
        ({"mask_sha256": "0" * 64}, "is of another mask than it says"),
        ({"largest_cut_fraction": 0.0}, "it records largest_cut_fraction=0.0"),
        (_step(cut_fraction=0.1), r"it records iterations\[0\].cut_fraction=0.1"),
        (_step(log10_cut=9.0), r"it records iterations\[0\].log10_cut=9.0"),
        (_step(kept=9), r"it records iterations\[0\].kept=9"),
        (_of_seed_7, "does not hold"),
    ],
)
def test_each_value_of_a_certificate_is_verified(
    path: pathlib.Path, tmp_path: pathlib.Path, changes: Any, message: str
) -> None:
    certificate, removed_in = storage.load_certificate(path)
    if callable(changes):
        changes = changes(certificate)
    forged = _forge(path, tmp_path, changes, removed_in)
    with pytest.raises(ValueError, match=message) as caught:
        certificates.verify(forged)
    assert "forged.json" in str(caught.value)


@pytest.mark.slow
def test_the_arrays_of_a_certificate_are_verified(
    path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    certificate, removed_in = storage.load_certificate(path)
    num_iterations = len(certificate["iterations"])

    def never(dtype: Any, number: float) -> Arrays:
        """Prunes all weights in an iteration that is never looked at."""
        return {n: np.where(a > 0, number, 0).astype(dtype) for n, a in removed_in.items()}

    none_listed = {"iterations": []}
    for changes, arrays, message in (
        (none_listed, never(np.int32, -1), "holds int32 for 'fc1/kernel'"),
        (none_listed, never(np.float32, 0.5), "holds float32 for 'fc1/kernel'"),
        ({}, never(np.uint64, 2**60), "prunes weights in iteration 1152921504606846976"),
        ({}, never(np.uint16, 1), r"it records iterations\[0\].kept="),
        ({}, {n: a.reshape(-1) for n, a in removed_in.items()}, "is of other layers"),
        ({}, {"fc1/kernel": removed_in["fc1/kernel"]}, "is of other layers"),
    ):
        with pytest.raises(ValueError, match=message):
            certificates.verify(_forge(path, tmp_path, changes, arrays))

    # A wider type holds the same iterations.
    wide = {name: leaf.astype(np.uint32) for name, leaf in removed_in.items()}
    verdict = certificates.verify(_forge(path, tmp_path, {}, wide))
    assert verdict == certificates.verify(path) and verdict.num_iterations == num_iterations
