"""Tests layerwise rules and ablations: exact counts per layer, and that nothing else changes."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from typing import Any

import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paper.figures import ablations
from synflow_jax import masking, models, pruning, schedules, scores, storage, trees
from synflow_jax.experiments import checks, initialization, masks, rules, starts
from synflow_jax.experiments.config import Config, Grid, PruneConfig
from synflow_jax.experiments.events import Finished
from synflow_jax.experiments.run import resolve, resolve_one
from synflow_jax.storage import Workdir

SMALL = Config(
    model="fc",
    dataset="digits",
    width_multiplier=0.2,
    prune=PruneConfig(compression=5.0, num_iterations=1),
)

shapes = st.lists(
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8
)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(shapes, st.floats(1, 1e4))
def test_erk_counts_are_exact_capped_and_in_proportion(
    shapes: list[tuple[int, ...]], compression: float
) -> None:
    kept = schedules.erdos_renyi_kernel_quotas(shapes, compression)
    sizes = np.array([math.prod(shape) for shape in shapes])
    total = int(sizes.sum())
    assert kept.sum() == total - int((1 - 1 / compression) * total)
    assert np.all(kept >= 0) and np.all(kept <= sizes)
    # Evci et al.: one factor for all layers that are not full. By that factor, a full layer would
    # keep more weights than it has.
    sums = np.array([sum(shape) for shape in shapes])
    sparse = kept < sizes
    if sparse.any():
        factor = kept[sparse].sum() / sums[sparse].sum()
        low = max((kept[sparse] - 1) / sums[sparse])
        high = min((kept[sparse] + 1) / sums[sparse])
        assert low <= factor * (1 + 1e-12) and factor <= high * (1 + 1e-12)
        assert np.all(
            sizes[~sparse] <= low * sums[~sparse] + 2 * sums[~sparse] / sums[sparse].min() + 1
        )


def test_erk_densities_are_those_of_the_paper() -> None:
    """Far from full, kept / (inputs + outputs + height + width) is one number."""
    shapes = [(3, 3, 64, 128), (1, 1, 128, 256), (512, 1000)]
    kept = schedules.erdos_renyi_kernel_quotas(shapes, 100)
    factors = kept / np.array([sum(shape) for shape in shapes])
    np.testing.assert_allclose(factors, factors[0], rtol=1e-2)


def _params() -> trees.Params:
    rng = np.random.default_rng(1)
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in
            {"a": (6, 20), "b": (20, 10), "c": (10, 4)}.items()}  # fmt: skip


def test_shuffling_keeps_the_counts_and_moves_the_weights() -> None:
    mask = {"a": jnp.arange(300).reshape(10, 30) < 60, "hole": None, "b": jnp.ones(7, bool)}
    shuffled = [masking.shuffle(mask, jax.random.key(i)) for i in range(60)]
    for one in shuffled:
        assert one["hole"] is None and int(one["a"].sum()) == 60 and bool(one["b"].all())
    places = np.stack([np.asarray(one["a"]).reshape(-1) for one in shuffled])
    assert len({row.tobytes() for row in places}) == 60
    # Each place is kept in a fifth of them. The sum over places of
    # (count - 12)^2 / (60 * 0.2 * 0.8) is then near 300.
    chi2 = np.sum((places.sum(axis=0) - 12.0) ** 2) / 9.6
    assert 200 < chi2 < 400


def test_inverted_scores_prune_in_the_opposite_order() -> None:
    params, rule = _params(), scores.random()
    for compression in (2, 10):
        upright, _ = pruning.prune(rule, params, compression=compression, num_iterations=1)
        opposite, info = pruning.prune(
            scores.inverted(rule), params, compression=compression, num_iterations=1
        )
        assert int(info.kept[-1].sum()) == 360 // compression
        both = jax.tree.map(lambda a, b: int(jnp.sum(a & b)), upright, opposite)
        assert sum(jax.tree.leaves(both)) == 0  # at 2 one is the complement of the other


def test_ties_at_0_do_not_go_at_once_where_scores_are_inverted() -> None:
    """Units that are dead score 0; SynFlow's scores are all 0 once it has pruned its own paths."""
    params = _params()
    params["b"]["kernel"] = params["b"]["kernel"].at[5:].set(0)
    score_fn = scores.synflow(
        lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"] @ p["c"]["kernel"], (6,)
    )
    mask, info = pruning.prune(scores.inverted(score_fn), params, compression=4, num_iterations=20)
    assert int(info.kept[-1].sum()) == 90 == sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))


def test_counts_that_are_given_are_met() -> None:
    params = _params()
    counts = np.array([[10, 20, 3], [100, 199, 40]])
    mask, info = pruning.prune(
        scores.magnitude(), params, compression=2, num_iterations=2, schedule=lambda *_: counts
    )
    np.testing.assert_array_equal(info.kept, np.array([120, 200, 40]) - counts)
    assert [int(leaf.sum()) for leaf in jax.tree.leaves(mask)] == [20, 1, 0]
    for bad, message in (
        (counts[:, :2], r"schedule returned int64\[2, 2\].*int\[2, 3\]"),
        (counts + 0.5, "schedule returned float64"),
        (counts + 100, "must be between 0 and the number of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            pruning.prune(
                scores.magnitude(),
                params,
                compression=2,
                num_iterations=2,
                schedule=lambda *_, bad=bad: bad,
            )


def _snip_rule() -> tuple[trees.Params, scores.ScoreFn, Any]:
    params = _params()
    apply_fn = lambda p, x: (
        jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"]) @ p["c"]["kernel"]
    )
    rng = np.random.default_rng(2)
    batch = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32), jnp.asarray(rng.integers(0, 4, 16))
    loss_fn = scores.cross_entropy(apply_fn)
    return params, scores.snip(loss_fn, [batch]), lambda p: loss_fn(p, batch)


@pytest.mark.parametrize("nested", [True, False])
def test_iterative_snip_and_force(nested: bool) -> None:
    """Scores |dL/dtheta * theta| at the masked network. With regrowth all weights rank (FORCE)."""
    params, rule, loss = _snip_rule()
    gradient = jax.jit(jax.grad(loss))
    mask, returned = trees.prunable(params), 0
    for step in range(1, 4):
        density = (1 / 20) ** (step / 3)
        g = gradient(trees.apply_mask(params, mask))
        flat = np.concatenate(
            [
                np.abs(a * b).reshape(-1)
                for a, b in zip(*map(jax.tree.leaves, (g, params)), strict=True)
            ]
        )
        old = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(mask)])
        flat = np.where(old, flat, -1) if nested else flat
        new = flat > np.sort(flat)[int((1 - density) * 360) - 1]
        returned += np.sum(new & ~old)
        parts = np.split(new, np.cumsum(trees.sizes(mask))[:-1])
        mask = jax.tree.unflatten(
            jax.tree.structure(mask),
            [
                jnp.asarray(part.reshape(leaf.shape))
                for part, leaf in zip(parts, jax.tree.leaves(mask), strict=True)
            ],
        )
        if step == 1:  # one iteration of three is another density than one of one
            single, _ = pruning.prune(
                rule, params, compression=1 / density, num_iterations=1, nested=nested
            )
            jax.tree.map(np.testing.assert_array_equal, single, mask)
    ours, _ = pruning.prune(rule, params, compression=20, num_iterations=3, nested=nested)
    jax.tree.map(np.testing.assert_array_equal, ours, mask)
    assert (returned == 0) == nested


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(8, name="a")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(3, name="head")(x)


def test_scores_in_training_mode_do_not_know_the_running_statistics() -> None:
    model = _Normed()
    params, first = models.init(model, (6,), jax.random.key(0))
    other = jax.tree.map(lambda leaf: leaf + 0.5, first)
    x = jax.random.normal(jax.random.key(1), (12, 6))
    batch = x, jnp.arange(12) % 3
    key, mask = jax.random.key(0), trees.prunable(params)
    score = lambda make, stats: scores.snip(scores.cross_entropy(make(model, stats)), [batch])(
        params, mask, key
    )
    same = [score(models.train_fn, stats) for stats in (first, other)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    evaluated = [score(models.eval_fn, stats) for stats in (first, other)]
    assert not np.allclose(evaluated[0]["a"]["kernel"], evaluated[1]["a"]["kernel"])
    assert not np.allclose(evaluated[0]["a"]["kernel"], same[0]["a"]["kernel"])


def test_rows_of_a_grid_of_ablations(tmp_path: pathlib.Path) -> None:
    grids = (
        Grid(pruner=("magnitude",), ablation=tuple(rules.ABLATIONS)),
        Grid(pruner=("random", "uniform", "erk"), mode=("eval", "train")),
        Grid(pruner=("random", "uniform"), scope=("local",)),
    )
    settings = dataclasses.replace(SMALL, grids=grids)
    runs, workdir = resolve(settings), Workdir(tmp_path)
    assert len(runs) == 4 + 3 + 1  # a mode decides on nothing here, and uniform is local anyway
    outcomes = list(masks.prune_all(runs, workdir))
    assert all(isinstance(outcome, Finished) for outcome in outcomes), outcomes
    rows = {
        (row["pruner"], row["ablation"], row["scope"]): row
        for row in storage.read_rows(tmp_path / "rows.jsonl")
    }
    network = initialization.build(resolve_one(SMALL))
    sizes = np.array(trees.sizes(network.mask))
    kept = lambda *key: np.array([layer["kept"] for layer in rows[key]["layers"]])
    np.testing.assert_array_equal(
        kept("uniform", "none", "local"), sizes - (0.8 * sizes).astype(int)
    )
    erk = schedules.erdos_renyi_kernel_quotas(
        [leaf.shape for leaf in jax.tree.leaves(network.mask)], 5.0
    )
    np.testing.assert_array_equal(kept("erk", "none", "local"), erk)
    none, shuffled, drawn, inverted = (
        rows["magnitude", name, "global"] for name in rules.ABLATIONS
    )
    np.testing.assert_array_equal(
        kept("magnitude", "none", "global"), kept("magnitude", "shuffle", "global")
    )
    assert (
        none["mask_sha256"]
        == drawn["mask_sha256"]
        != shuffled["mask_sha256"]
        != inverted["mask_sha256"]
    )
    assert none["kept"] == inverted["kept"] == int(sizes.sum()) - int(0.8 * sizes.sum())
    assert (
        rows["uniform", "none", "local"]["mask_sha256"]
        == rows["random", "none", "local"]["mask_sha256"]
    )

    # Another initialization for the same mask, in training alone.
    run = next(run for run in runs if run.config.prune.ablation == "reinitialize")
    mask, _ = masks.find_mask(run, network, workdir) or (None, None)
    form, same = (starts.choose_form(r, network, mask) for r in (run, runs[0]))
    jax.tree.map(np.testing.assert_array_equal, form.network.mask, same.network.mask)
    kernels = [
        jax.tree.leaves(trees.select(f.network.params, f.network.mask)) for f in (form, same)
    ]
    assert all(
        np.mean(np.asarray(a) == np.asarray(b)) < 0.01 for a, b in zip(*kernels, strict=True)
    )

    lines = ablations.table(tmp_path)
    text = ablations.markdown(lines)
    assert len(lines) == len(runs) and text.count("\n") == len(runs) + 2
    assert "| magnitude | mask shuffled within layers | 5 |" in text
    assert [line[0] for line in lines] == ["magnitude"] * 4 + ["random"] * 2 + ["uniform", "erk"]
    assert all(line[4] == "-" for line in lines)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ablation": (
        {"ablation": "shufle"},
        "prune.ablation='shufle' is unknown. Choose one of none, shuffle",
    ),
    "mode": ({"mode": "test"}, "prune.mode='test' is unknown. Choose one of eval, train"),
    "certified": (
        {"ablation": "shuffle", "schedule": "certified"},
        "does not go with schedule='certified'",
    ),
    "certified mode": (
        {"mode": "train", "schedule": "certified"},
        "prune.mode='train' does not go with",
    ),
    "at once": (
        {"pruner": "erk", "num_iterations": 3},
        "prune.num_iterations=3 does not go with 'erk'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(case: str) -> None:
    values, message = BAD[case]
    prune = {"pruner": "synflow", "num_iterations": None, **values}
    with pytest.raises(ValueError, match="prune") as error:
        checks.check(dataclasses.replace(SMALL, prune=dataclasses.replace(SMALL.prune, **prune)))
    assert message in str(error.value)
