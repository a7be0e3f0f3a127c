"""Compares scores and masks with the authors' figures in the golden folder (--golden-dir)."""

from __future__ import annotations

import pathlib
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import pruning, schedules

RULES = [("magnitude", 1), ("synflow", 1), ("snip", 1), ("snip", 2), ("grasp", 1), ("grasp", 2)]


@pytest.mark.parametrize("rule, num_batches", RULES)
def test_scores_in_float64(golden_file: pathlib.Path, rule: str, num_batches: int) -> None:
    with jax.enable_x64(True):
        case = golden.load(golden_file, jnp.float64)
        key = rule if num_batches == 1 else f"{rule}_two_batches"
        if f"{key}_0" not in case.arrays:
            assert key.startswith(("snip", "grasp")), (
                f"{golden_file.name} lacks the scores of {rule}"
            )
            pytest.skip(f"{golden_file.name} has no scores of {key}")
        score_fn = case.score_fn(rule, num_batches, scaled=False)
        ours = case.in_reference_order(jax.jit(score_fn)(case.params, case.mask, jax.random.key(0)))
        for i, layer in enumerate(ours):
            expected = case.arrays[f"{key}_{i}"]
            np.testing.assert_allclose(
                layer[case.arrays[f"score_index_{i}"]],
                expected,
                rtol=1e-9,
                atol=1e-9 * np.abs(expected).max(),
                err_msg=f"layer {case.meta['layers'][i][0]}",
            )
        sums = [layer.sum() for layer in ours]
        scale = max(np.abs(layer).sum() for layer in ours)
        np.testing.assert_allclose(
            sums, case.arrays[f"{key}_layer_sum"], rtol=1e-9, atol=1e-12 * scale
        )


def test_masks(golden_file: pathlib.Path) -> None:
    """Every bit, of float32 parameters that are scored in float64."""
    _check_masks(golden_file, "float32")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_masks_of_float64_parameters() -> None:
    """Scores float64 parameters. The dense network is enough: it computes the same."""
    _check_masks(pathlib.Path(__file__).parents[1] / "golden" / "fc_seed0.npz", "float64")


def _check_masks(path: pathlib.Path, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        case = golden.load(path, jnp.dtype(dtype))
        wrong = {}
        for expected in case.meta["cases"]:
            mask = _prune(case, expected)
            ours = np.concatenate(case.in_reference_order(mask))
            theirs = np.unpackbits(case.arrays[expected["key"]], count=ours.size).astype(bool)
            same = np.mean(ours == theirs)
            if ours.sum() != sum(expected["kept"]) or same < 1:
                wrong[expected["key"]] = (expected, int(ours.sum()), float(same))
        assert not wrong


def _prune(case: golden.Golden, expected: dict[str, Any]) -> Any:
    schedule = getattr(schedules, expected["schedule"])
    if expected["scope"] == "local":
        schedule = schedules.per_layer(schedule)
    mask, _ = pruning.prune(
        case.score_fn(expected["pruner"]),
        case.params,
        compression=expected["compression"],
        num_iterations=expected["iterations"],
        schedule=schedule,
        mask=case.mask,
        score_dtype="float64",  # the order of scores that differ by rounding decides on masks
        # The reference lets a pruned weight return in iterative SNIP and GraSP.
        nested=expected["pruner"] not in ("snip", "grasp"),
    )
    return mask
