"""Tests certified pruning: each law of its docstring, down to the maximal compression."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EXHAUSTIVE
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import analysis, certified, models, pruning, scores, trees
from synflow_jax.models.mlp import MLP
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG, stage_widths

NUM_SEEDS = 50


class Case(NamedTuple):
    """A network, its score function and its weights by seed."""

    apply_fn: scores.ApplyFn
    input_shape: tuple[int, ...]
    draw: Callable[[jax.Array], trees.Params]
    num_weights: int
    shortest: int

    def prune(
        self, seed: int, *, by_schedule: bool = False, **options: Any
    ) -> tuple[trees.Mask, pruning.PruneInfo, trees.Params]:
        params = self.draw(jax.random.key(seed))
        rule = scores.synflow(self.apply_fn, self.input_shape)
        prune = pruning.prune if by_schedule else certified.prune
        options = {
            "compression": self.num_weights / self.shortest,
            "score_dtype": "float32",
            **options,
        }
        with warnings.catch_warnings():
            # A schedule that loses the network warns of it.
            warnings.simplefilter("ignore", pruning.Overpruned)
            return *prune(rule, params, **options), params

    def collapsed(self, params: trees.Params, mask: trees.Mask) -> bool:
        return analysis.collapsed(self.apply_fn, params, mask, self.input_shape)


@functools.cache
def _case(name: str) -> Case:
    model, input_shape = {
        "mlp": (MLP(10, widths=(32,) * 5), (16,)),
        "vgg": (VGG(10, widths=((8,), (16,), (16, 16))), (8, 8, 3)),
        "vgg16": (VGG(100, widths=stage_widths(16, 0.125)), (32, 32, 3)),
        "resnet": (ResNet(10, num_blocks=(2, 1), widths=(8, 16), stem_width=8), (8, 8, 3)),
    }[name]
    draw = jax.jit(lambda key: models.init(model, input_shape, key))
    params, batch_stats = draw(jax.random.key(0))
    mask = trees.prunable(params)
    apply_fn = models.synflow_fn(model, batch_stats)
    shortest = analysis.shortest_path(apply_fn, params, mask, input_shape)
    return Case(apply_fn, input_shape, lambda key: draw(key)[0], sum(trees.sizes(mask)), shortest)


def _ratios(info: pruning.PruneInfo) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):  # nothing flows any more
        return np.asarray(info.pruned_score) / np.asarray(info.cut)


def _pairs(left: Any, right: Any) -> Any:
    return zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)


@pytest.mark.parametrize(
    "name, length, num_lost", [("mlp", 6, 18), pytest.param("vgg", 5, 3, marks=EXHAUSTIVE)]
)
def test_a_chain_is_pruned_to_one_weight_a_layer(name: str, length: int, num_lost: int) -> None:
    """Prunes 50 networks to exactly N / L.

    With as many iterations the exponential schedule loses most MLPs and some VGGs.
    """
    case = _case(name)
    assert case.shortest == length
    lost = 0
    for seed in range(NUM_SEEDS):
        mask, info, params = case.prune(seed, cut_fraction=0.99)
        assert [int(m.sum()) for m in jax.tree.leaves(mask)] == [1] * length, seed
        assert not case.collapsed(params, mask), seed
        assert _ratios(info).max() < 1 and len(info.kept) == int(info.num_done)
        if seed < 20:
            mask, exponential, params = case.prune(
                seed, by_schedule=True, num_iterations=min(16, int(info.num_done))
            )
            broken = case.collapsed(params, mask)
            # Theorem 3: what no iteration pruned too much of is whole.
            assert not (broken and _ratios(exponential).max() < 1)
            lost += broken
    assert lost >= num_lost, lost  # of 20


@pytest.mark.slow
def test_vgg16_down_to_fourteen_weights() -> None:
    case = _case("vgg16")
    mask, info, params = case.prune(0, cut_fraction=0.99)
    assert [int(m.sum()) for m in jax.tree.leaves(mask)] == [1] * 14
    assert not case.collapsed(params, mask)
    assert _ratios(info).max() < 1


@pytest.mark.slow
def test_a_network_with_branches_is_pruned_to_a_single_path() -> None:
    """Leaves weights that all carry the whole flow: one path, which may not be the shortest."""
    case = _case("resnet")
    prune = functools.partial(case.prune, cut_fraction=0.99)
    flow_fn = jax.jit(scores.synflow(case.apply_fn, case.input_shape).flow)
    lengths = []
    with pytest.warns(
        certified.Shortfall,
        match="are left, not 3: every weight that is left carries all of the flow",
    ):
        prune(0)
    for seed in range(NUM_SEEDS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", certified.Shortfall)
            mask, info, params = prune(seed)
        assert not case.collapsed(params, mask), seed
        assert _ratios(info).max() < 1
        flow = flow_fn(params, mask, jax.random.key(0))
        alive = np.concatenate([np.asarray(s)[np.asarray(m)] for s, m in _pairs(flow.scores, mask)])
        np.testing.assert_allclose(alive, float(flow.cut), rtol=1e-3)
        lengths.append(alive.size)
    assert case.shortest == 3 and min(lengths) >= 3 and max(lengths) <= 8, lengths


@pytest.mark.slow
def test_the_certificate_can_be_replayed() -> None:
    """Computes from `removed_in` alone, in float64, that each iteration stayed below the cut."""
    case = _case("vgg")
    mask, info, params = case.prune(3, cut_fraction=0.5)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        flow_fn = jax.jit(scores.synflow(case.apply_fn, case.input_shape, scaled=False).flow)
        for i in range(1, int(info.num_done) + 1):
            found = jax.tree.map(lambda n, i=i: jnp.asarray((n == 0) | (n >= i)), info.removed_in)
            flow = flow_fn(wide, found, jax.random.key(0))
            gone = [
                np.asarray(s)[np.asarray(n) == i] for s, n in _pairs(flow.scores, info.removed_in)
            ]
            ratio = sum(map(np.sum, gone)) / float(flow.cut)
            np.testing.assert_allclose(ratio, _ratios(info)[i - 1], rtol=1e-4, atol=1e-6)
            assert ratio < 1
            # Without biases the cut is R, and what each layer holds.
            np.testing.assert_allclose(
                [np.sum(s) for s in jax.tree.leaves(flow.scores)], float(flow.cut), rtol=1e-9
            )
    jax.tree.map(
        lambda n, m: np.testing.assert_array_equal(np.asarray(n) == 0, m), info.removed_in, mask
    )


@pytest.mark.slow
def test_with_biases_a_cut_holds_more_than_flows_in() -> None:
    """Bounds by the flow at the input, which every cut holds. Biases add flow after it."""

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        for name in ("fc1", "fc2"):
            x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"][None])
        return x @ params["head"]["kernel"]

    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.standard_normal((m, n), np.float32), "bias": rng.random(n, np.float32)}
        for name, m, n in (("fc1", 6, 8), ("fc2", 8, 9), ("head", 9, 4))
    }
    params = jax.tree.map(jnp.asarray, params)
    mask = trees.prunable(params)
    flow = scores.synflow(apply_fn, (6,), scaled=False).flow(params, mask, jax.random.key(0))
    totals = [float(jnp.sum(s)) for s in jax.tree.leaves(flow.scores)]
    np.testing.assert_allclose(totals[0], float(flow.cut), rtol=1e-6)
    assert totals[0] < totals[1] < totals[2]
    compression = sum(trees.sizes(mask)) / 3
    found, info = certified.prune(scores.synflow(apply_fn, (6,)), params, compression=compression)
    assert [int(m.sum()) for m in jax.tree.leaves(found)] == [1, 1, 1]
    assert not analysis.collapsed(apply_fn, params, found, (6,))
    assert _ratios(info).max() < 1


def test_one_trace_for_all_compressions_fractions_and_seeds() -> None:
    calls = []

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        calls.append(None)
        return x @ params["fc"]["kernel"] @ params["head"]["kernel"]

    for seed, (compression, cut_fraction) in enumerate([(2, 0.5), (7, 0.9), (32, 0.1)]):
        keys = jax.random.split(jax.random.key(seed))
        params = {
            n: {"kernel": jax.random.normal(k, (8, 8))}
            for n, k in zip(("fc", "head"), keys, strict=True)
        }
        score_fn = scores.synflow(apply_fn, (8,))
        certified.prune(score_fn, params, compression=compression, cut_fraction=cut_fraction)
        if seed == 0:
            num_calls = len(calls)
    assert len(calls) == num_calls > 0


@pytest.mark.slow
def test_too_few_iterations_are_a_shortfall() -> None:
    with pytest.warns(certified.Shortfall, match="not 6: num_iterations=3 were not enough"):
        _, info, _ = _case("mlp").prune(0, num_iterations=3)
    assert int(info.num_done) == 3 and info.kept.shape == (3, 6)


def test_progress_and_objective() -> None:
    case, seen = _case("mlp"), []

    def on_progress(num_done: int, info: pruning.PruneInfo) -> None:
        seen.append((num_done, int(info.kept[num_done - 1].sum()) if num_done else 0))

    objective = scores.path_norm(case.apply_fn, case.input_shape)
    prune = functools.partial(case.prune, 0, compression=10)
    mask, info, params = prune(on_progress=on_progress)
    jax.tree.map(np.testing.assert_array_equal, mask, prune()[0])
    assert seen[0] == (0, 0) and seen[-1] == (int(info.num_done), 493) and len(seen) > 2
    # The cut is R of the mask that each iteration found.
    cuts = np.asarray(info.cut) * 2.0 ** np.asarray(info.exponent)
    for i in (0, 1, int(info.num_done) - 1):
        found = jax.tree.map(lambda n, i=i: jnp.asarray((n == 0) | (n > i)), info.removed_in)
        r = objective(trees.apply_mask(trees.without_biases(params), found))
        np.testing.assert_allclose(cuts[i], r, rtol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cut_fraction": 0.0}, "cut_fraction=0.0 must be above 0 and below 1"),
        ({"cut_fraction": 1.0}, "cut_fraction=1.0"),
        ({"cut_fraction": float("nan")}, "cut_fraction=nan"),
        ({"compression": 0.5}, "compression=0.5"),
        ({"num_iterations": 0}, "num_iterations=0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _case("mlp").prune(0, **options)


def test_a_network_without_a_path_is_told() -> None:
    case = _case("mlp")
    params = jax.tree.map(jnp.zeros_like, case.draw(jax.random.key(0)))
    rule = scores.synflow(case.apply_fn, case.input_shape)
    with pytest.warns(certified.Shortfall, match="no path leads from the input to the output"):
        mask, _ = certified.prune(rule, params, compression=10)
    assert all(bool(leaf.all()) for leaf in jax.tree.leaves(mask))


def test_biases_cannot_be_pruned_by_it() -> None:
    params = _case("mlp").draw(jax.random.key(0))
    mask = trees.prunable(params, biases=True)
    with pytest.raises(ValueError, match=r"mask lets \['fc1/bias', 'fc2/bias'"):
        _case("mlp").prune(0, mask=mask)


def test_only_synflow_can_be_certified() -> None:
    params = _case("mlp").draw(jax.random.key(0))
    with pytest.raises(ValueError, match="bounds the scores of an iteration by those of a cut"):
        certified.prune(scores.magnitude(), params, compression=2)
    without_flow = dataclasses.replace(scores.synflow(_case("mlp").apply_fn, (16,)), flow=None)
    with pytest.raises(ValueError, match="score_fn has no flow"):
        certified.prune(without_flow, params, compression=2)


# Networks that Theorem 3 does not hold for --------------------------------------------------------

_SHAPES = {"fc": (6, 8), "mid": (8, 8), "head": (8, 3)}


def _drawn() -> trees.Params:
    rng = np.random.default_rng(0)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return {name: {"kernel": draw(shape)} for name, shape in _SHAPES.items()}


def _network(step: Any, kernel: Any = lambda w: w) -> scores.ApplyFn:
    """A network whose first layer has this activation, and changes its kernel first."""

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        hidden = step(x @ kernel(params["fc"]["kernel"]))
        return jax.nn.relu(hidden @ params["mid"]["kernel"]) @ params["head"]["kernel"]

    return apply_fn


def _certify(apply_fn: scores.ApplyFn, params: Any = None, **options: Any) -> Any:
    params = _drawn() if params is None else params
    options = {"compression": 8, **options}
    return certified.prune(scores.synflow(apply_fn, (6,)), params, **options)


@pytest.mark.parametrize(
    ("apply_fn", "steps"),
    [
        (_network(lambda y: jax.nn.relu(y) ** 2), "integer_pow"),
        (_network(lambda y: y**3), "integer_pow"),
        (_network(jax.nn.gelu), "tanh"),
        (_network(jax.nn.silu), "logistic"),
        (_network(jax.nn.mish), "tanh"),
        (_network(jax.nn.relu6), "min of the data and a constant"),
        (_network(lambda y: y, lambda w: w / jnp.linalg.norm(w)), "div on the way of 'fc/kernel'"),
        (_network(lambda y: jnp.minimum(y, 2 * y[:, ::-1])), "min"),
    ],
)
def test_networks_that_do_not_conserve_flow_are_refused(
    apply_fn: scores.ApplyFn, steps: str
) -> None:
    with pytest.raises(ValueError, match=r"not all of its steps are homogeneous") as caught:
        _certify(apply_fn)
    assert steps in str(caught.value) and "Use pruning.prune" in str(caught.value)


@jax.custom_vjp
def _clipped(y: jax.Array) -> jax.Array:
    """The identity, with a derivative that is not its own."""
    return y


_clipped.defvjp(lambda y: (y, None), lambda _, gradient: (jnp.clip(3 * gradient, -10, 10),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (_clipped, "in iteration 1 R is not the flow from the input"),
        (lambda y: y - jnp.mean(y, 1, keepdims=True), "in iteration 1 scores are negative"),
        # The smallest of eight units: without any one of them it is 0.
        (lambda y: jnp.repeat(jnp.sort(y)[:, :1], 8, 1), "is disconnected after pruning"),
    ],
)
def test_what_the_steps_do_not_show_is_found_in_the_loop(step: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _certify(_network(step))


def test_what_is_added_counts_as_zero() -> None:
    """Certifies the paths of a network with a position embedding, as those without it."""
    params = {**_drawn(), "position": jnp.ones((1, 6))}

    def apply_fn(params: trees.Params, x: jax.Array) -> jax.Array:
        return _network(jax.nn.relu)(params, x + params["position"])

    rule = scores.synflow(apply_fn, (6,))
    mask = trees.prunable(params)
    checked = certified.check(rule, params, mask)
    assert not checked["position"].any()
    for layer in _SHAPES:
        np.testing.assert_array_equal(checked[layer]["kernel"], params[layer]["kernel"])
    prunable = {**mask, "position": jnp.ones((1, 6), bool)}
    with pytest.raises(ValueError, match="add of the data and 'position'"):
        certified.check(rule, params, prunable)

    # A threshold is another function where it is 0.
    limited = lambda p, x: _network(jax.nn.relu)(p, jnp.maximum(x, p["position"]))
    with pytest.raises(ValueError, match="max of the data and 'position'"):
        certified.check(scores.synflow(limited, (6,)), params, mask)


def test_a_rule_with_a_flow_needs_its_objective() -> None:
    rule = scores.synflow(_network(jax.nn.relu), (6,))
    with pytest.raises(ValueError, match="has a flow, but no objective"):
        certified.prune(dataclasses.replace(rule, objective=None), _drawn(), compression=2)


# Many iterations ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_chapters_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the same mask and records, whatever the loop holds at once."""
    run = functools.partial(_certify, _network(jax.nn.relu), compression=3, cut_fraction=0.1)
    mask, info = run()
    assert int(info.num_done) > 6
    reports: list[tuple[int, int]] = []

    def report(num_done: int, info: pruning.PruneInfo) -> None:
        reports.append((num_done, len(info.kept)))

    monkeypatch.setattr(certified, "_CHAPTER", 3)
    same_mask, same_info = run(on_progress=report)
    for left, right in _pairs((mask, info), (same_mask, same_info)):
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    # The first chapter reports all its rows, as any run does; those after it report rows so far.
    assert [num_done for num_done, _ in reports] == sorted({num for num, _ in reports})
    assert reports[-1] == (int(info.num_done), int(info.num_done))


def test_iterations_beyond_uint16() -> None:
    """Counts on to 65,536 in a wider type, where 0 would say that a weight was never pruned."""

    def chapter(num_done: int, removed_in: list[int]) -> pruning.PruneInfo:
        state = pruning.init_state({"w": jnp.ones(3, bool)}, num_done, records_removal=True)
        numbers = {"w": jnp.asarray(removed_in, jnp.uint16)}
        return state.info._replace(num_done=jnp.int32(num_done), removed_in=numbers)

    first = chapter(65_535, [65_535, 0, 0])
    assert certified._appended(None, first).removed_in["w"].dtype == jnp.uint16
    both = certified._appended(first, chapter(2, [0, 1, 0]))
    assert both.removed_in["w"].dtype == jnp.uint32
    assert both.removed_in["w"].tolist() == [65_535, 65_536, 0]
    assert int(both.num_done) == len(both.kept) == 65_537


SCORES = st.lists(
    st.sampled_from([0.0, 0.25, 1.0, 1.0, 3.0, 2.0**-10, 7.5]), min_size=40, max_size=40
)


@settings(max_examples=60, deadline=None)
@given(
    SCORES,
    st.lists(st.booleans(), min_size=40, max_size=40),
    st.integers(0, 40),
    st.integers(0, 30),
)
def test_the_affordable_mask_prunes_as_many_as_the_budget_allows(
    values: list[float], mask: list[bool], most: int, budget: int
) -> None:
    """Against sorting, on scores that are full of ties and exact in binary."""
    s, kept = np.array(values, np.float32), np.array(mask)
    tree = lambda x: [jnp.asarray(x[:15]), jnp.asarray(x[15:].reshape(5, 5))]
    found = _affordable(tree(s), tree(kept), budget, most)
    found = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in found])
    expected, left = kept.copy(), budget
    for i in np.argsort(np.where(kept, s, np.inf), kind="stable")[: kept.sum()][:most]:
        if s[i] > left:
            break
        expected[i], left = False, left - s[i]
    gone = kept & ~found
    assert not (found & ~kept).any() and s[gone].sum() <= budget
    if (gone != (kept & ~expected)).any():  # then the last thousandth of the budget was left
        assert s[gone].sum() >= (1 - 2**-10) * budget and gone.sum() < (kept & ~expected).sum()


_affordable = jax.jit(certified.affordable_mask)


def test_the_affordable_mask_of_many_scores() -> None:
    rng = np.random.default_rng(0)
    s = np.exp(3 * rng.standard_normal(300_000)).astype(np.float32)
    m = rng.random(s.size) < 0.1
    for budget in (1e-3, 0.01, 0.3):
        limit = np.float32(budget * s[m].sum())
        found = np.asarray(_affordable([jnp.asarray(s)], [jnp.asarray(m)], limit, s.size)[0])
        gone = s[m & ~found]
        rest = limit - gone.sum(dtype=np.float64)
        assert -1e-6 * limit <= rest <= max(limit / 1024, s[found].min())
        assert gone.max() < s[found].min()


def test_one_weight_goes_though_it_is_above_the_budget() -> None:
    s, m = [jnp.array([3.0, 2.0, 2.0])], [jnp.ones(3, bool)]
    run = lambda most, at_least_one: _affordable(s, m, 1.0, most, at_least_one=at_least_one)[
        0
    ].tolist()
    assert run(3, -1.0) == [True, True, True]
    assert run(3, 2.0) == [True, False, True]
    assert run(3, 1.9) == [True, True, True]
    assert run(0, 2.0) == [True, True, True]
