"""Compares with published figures: the weights kept per layer of VGG-16 (Fig. 1), and its FLOPs.

Networks are drawn at random, so the counts scatter. If weights were kept independently, the count
of a layer would have the deviation sqrt(size p (1 - p)) of a binomial. Ours would then differ from
the mean of the two published runs by sqrt(1.5) times that. Random pruning does so, and 5 deviations
are allowed. Under magnitude and SynFlow the weights of a unit, a layer and the threshold depend on
each other, and the two published runs already differ by up to 4.7 deviations. For them 10 are
allowed, which is 3 % for a layer that keeps 10,000 weights.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from cases import EXHAUSTIVE

from synflow_jax import analysis, models, pruning, scores, trees

PUBLISHED = json.loads(
    (pathlib.Path(__file__).parents[1] / "paper" / "fig1_vgg16_cifar100.json").read_text()
)
# The fraction of multiply-adds that the published masks keep at 10, 100 and 1000.
FLOPS = {
    "random": (0.0999, 0.0100, 0.0010),
    "magnitude": (0.2432, 0.0740, 0.0156),
    "synflow": (0.3515, 0.0698, 0.0090),
}


@functools.cache
def _vgg16() -> tuple[trees.Params, trees.Mask, dict[str, scores.ScoreFn], dict[str, int]]:
    model, shape = models.create("cifar_vgg16_bn", 100), (32, 32, 3)
    params, batch_stats = models.init(model, shape, jax.random.key(0))
    rules = {
        "random": scores.random(),
        "magnitude": scores.magnitude(),
        "synflow": scores.synflow(models.synflow_fn(model, batch_stats), shape),
    }
    return params, trees.prunable(params), rules, models.output_positions(model, shape)


@pytest.mark.parametrize(
    "power, rule, deviations",
    [
        *[(power, "random", 5) for power in (1, 2, 3)],
        *[(power, "magnitude", 10) for power in (1, 2, 3)],
        pytest.param(1, "synflow", 10, marks=EXHAUSTIVE),
        pytest.param(2, "synflow", 10, marks=EXHAUSTIVE),
        pytest.param(3, "synflow", 10, marks=pytest.mark.slow),
    ],
)
def test_kept_in_each_layer_as_published(rule: str, deviations: float, power: int) -> None:
    params, full, rules, positions = _vgg16()
    mask, info = pruning.prune(
        rules[rule],
        params,
        compression=10.0**power,
        num_iterations=100 if rule == "synflow" else 1,
        key=jax.random.key(1),
        mask=full,
        score_dtype="float32",  # enough for statistics, and what large networks use
    )
    sizes = np.array(trees.sizes(full))
    runs = np.array([run[rule][f"{power}.0"]["kept"] for run in PUBLISHED["runs"].values()])
    mean = runs.mean(axis=0)
    # At least one weight's deviation, for layers of which hardly any is kept.
    deviation = np.sqrt(np.maximum(mean * (1 - mean / sizes), 1) * 1.5)
    kept = np.asarray(info.kept[-1])
    # Ties in float32 may prune a few more than asked.
    assert 0 <= sizes.sum() - int((1 - 1 / 10.0**power) * sizes.sum()) - kept.sum() <= 5
    np.testing.assert_array_less(np.abs(kept - mean), deviations * deviation)

    kept_flops, flops = analysis.multiply_adds(mask, positions)
    assert flops == 313_247_744
    # The published figures are rounded to 1e-4, and scatter as the counts do.
    np.testing.assert_allclose(kept_flops / flops, FLOPS[rule][power - 1], rtol=0.05, atol=1e-4)


POWERS = [f"{power / 4}" for power in range(25)]  # of ten, as published


@pytest.mark.slow
def test_magnitude_empties_layers_and_cuts_paths_where_the_published_runs_fail() -> None:
    """Critical compressions: no layer is empty up to 10^2.75, in the published masks as in ours.

    Long before, at 10^2.35, no path is left. The published accuracy agrees: above chance (1 %) at
    10^2.25, and at chance from 10^2.5 on, where every layer still has weights.
    """
    params, full, rules, _ = _vgg16()
    apply_fn = _apply_fn()
    layers_empty = {}
    for power in ("2.25", "2.5", "2.75", "3.0"):
        mask, info = pruning.prune(
            rules["magnitude"], params, compression=10 ** float(power), num_iterations=1, mask=full,
            score_dtype="float32",
        )  # fmt: skip
        layers_empty[power] = bool((np.asarray(info.kept[-1]) == 0).any())
        for run in PUBLISHED["runs"].values():
            published = run["magnitude"][power]
            assert layers_empty[power] == (min(published["kept"]) == 0)
            assert analysis.collapsed(apply_fn, params, mask, (32, 32, 3)) == (
                published["top1_last_and_best"][0] == 1
            )
    assert layers_empty == {"2.25": False, "2.5": False, "2.75": False, "3.0": True}

    critical = analysis.critical_compression(
        rules["magnitude"], apply_fn, params, full, (32, 32, 3), score_dtype="float32"
    )
    assert 2.25 < np.log10(critical) < 2.5


@pytest.mark.exhaustive
@pytest.mark.slow
def test_synflow_keeps_a_path_at_the_last_published_compression() -> None:
    """10^6, where 14 or 15 weights are left in 14 layers: both published runs, and ours."""
    params, full, rules, _ = _vgg16()
    for run in PUBLISHED["runs"].values():
        assert min(run["synflow"][POWERS[-1]]["kept"]) == 1
    mask, info = pruning.prune(
        rules["synflow"], params, compression=1e6, mask=full, score_dtype="float32"
    )
    assert np.asarray(info.kept[-1]).min() == 1 and int(info.kept[-1].sum()) <= 15
    assert not analysis.collapsed(_apply_fn(), params, mask, (32, 32, 3))


@functools.cache
def _apply_fn() -> scores.ApplyFn:
    model, shape = models.create("cifar_vgg16_bn", 100), (32, 32, 3)
    return models.synflow_fn(model, models.init(model, shape, jax.random.key(0))[1])
