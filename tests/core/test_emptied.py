"""Tests what is said of networks that lose more than was asked for, or all.

- Scores that are all 0, all alike, or rounding errors rank nothing: an error.
- Ties that take many more weights than were asked for: a warning.
- A handful of ties, and layers that are emptied, say nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import pruning, schedules, scores, trees
from synflow_jax.parallel import sharded

KEYS = jax.random.split(jax.random.key(0), 3)
PARAMS = {
    "l1": {"kernel": jax.random.normal(KEYS[0], (6, 16))},
    "l2": {"kernel": jax.random.normal(KEYS[1], (16, 3))},
    "gate": jnp.ones(()),
}
SIZE = 6 * 16 + 16 * 3
BATCH = (jax.random.normal(KEYS[2], (6, 6)), jnp.arange(6) % 3)


def _apply(params: trees.Params, x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["l1"]["kernel"])
    return params["gate"] * hidden @ params["l2"]["kernel"]


SYNFLOW = scores.synflow(_apply, (6,))
ZERO_HEAD = {**PARAMS, "l2": {"kernel": jnp.zeros((16, 3))}}
ZERO_GATE = {**PARAMS, "gate": jnp.zeros(())}
ALIKE = jax.tree.map(jnp.sign, PARAMS)
TANH = scores.synflow(lambda p, x: jnp.tanh(1e3 * _apply(p, x)), (6,))
# Small logits: probabilities that do not saturate, but add up to 1 whatever the weights are.
SOFTMAX = scores.synflow(lambda p, x: jax.nn.softmax(_apply(p, x) / 5), (6,))
GRASP = scores.grasp(scores.cross_entropy(_apply), [BATCH])


@pytest.mark.parametrize(
    "rule, params, words",
    [
        (SYNFLOW, ZERO_HEAD, "the score 0 in iteration 1"),
        (SYNFLOW, ZERO_GATE, "a gate or a branch that is 0"),
        (GRASP, ZERO_GATE, "the score 0 in iteration 1"),
        (TANH, PARAMS, "saturated tanh"),
        (SOFTMAX, PARAMS, "rounding errors: .* Let apply_fn return the logits"),
        (scores.magnitude(), ALIKE, "none of the 144 weights would be left, and 72 were asked"),
    ],
)
def test_a_network_that_cannot_be_ranked_is_refused(
    rule: scores.Rule, params: trees.Params, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        pruning.prune(rule, params, compression=2, num_iterations=2)


def test_a_network_that_cannot_be_ranked_is_refused_over_devices() -> None:
    with pytest.raises(ValueError, match="the score 0 in iteration 1"):
        sharded.prune(SYNFLOW, ZERO_HEAD, compression=2, num_iterations=2)


def test_nothing_is_said_where_nothing_is_to_go() -> None:
    _, info = pruning.prune(SYNFLOW, ZERO_HEAD, compression=1)
    assert int(info.kept.sum()) == SIZE
    # Nor of a mask that is already as sparse.
    half = jax.tree.map(lambda w: w > 0, trees.select(PARAMS, trees.prunable(PARAMS)))
    _, info = pruning.prune(SYNFLOW, ZERO_HEAD, compression=1.1, num_iterations=1, mask=half)
    assert int(info.kept.sum()) == sum(int(m.sum()) for m in jax.tree.leaves(half))


def _with_ties(num_ties: int, num_above: int) -> scores.Rule:
    """Returns a rule whose largest scores are distinct, and the next ones alike."""
    flat = np.arange(SIZE, dtype=np.float32)
    flat[SIZE - num_above - num_ties : SIZE - num_above] = SIZE - num_above - 0.5
    l1, l2 = np.split(flat, [96])
    return scores.fixed(
        {
            "gate": None,
            "l1": {"kernel": jnp.asarray(l1.reshape(6, 16))},
            "l2": {"kernel": jnp.asarray(l2.reshape(16, 3))},
        }
    )


@pytest.mark.parametrize(
    "compression, num_ties, num_above, warns",
    [
        (2, 30, 50, True),  # 72 asked for, 50 kept
        (2, 9, 64, False),  # 64 kept: a handful
        (2, 10, 63, True),
        (48, 20, 1, True),  # 3 asked for, 1 kept: less than half
        (48, 20, 2, False),
    ],
)
def test_ties_that_take_many_weights_are_said(
    compression: float, num_ties: int, num_above: int, warns: bool
) -> None:
    rule = _with_ties(num_ties, num_above)
    run = lambda: pruning.prune(rule, PARAMS, compression=compression)[1]
    if not warns:
        assert int(run().kept.sum()) == num_above
        return
    asked = SIZE - int((1 - 1 / compression) * SIZE)
    words = f"{num_above} weights are left, and {asked} were asked for"
    with pytest.warns(pruning.Overpruned, match=words):
        assert int(run().kept.sum()) == num_above


def test_an_emptied_layer_is_a_result() -> None:
    small = {**PARAMS, "l2": {"kernel": 1e-3 * PARAMS["l2"]["kernel"]}}
    _, info = pruning.prune(scores.magnitude(), small, compression=2)
    assert info.kept.tolist() == [[72, 0]]


def test_a_collapsed_network_that_goes_on_is_said_to_be_emptied() -> None:
    """Once no path is left, as with SynFlow, all scores are 0 and the next iteration prunes all."""
    gone = lambda shapes, compression, num_iterations: np.array([[140], [141]])
    with pytest.warns(pruning.Overpruned, match="0 weights are left, and 3 were asked for"):
        _, info = pruning.prune(
            _collapsing, PARAMS, compression=40, num_iterations=2, schedule=gone
        )
    assert info.kept.sum(axis=1).tolist() == [4, 0]


def _collapsing(params: trees.Params, mask: trees.Mask, key: jax.Array) -> trees.Scores:
    """Scores by size, and all weights 0 once few are left."""
    del key
    is_alive = sum(jnp.sum(m) for m in jax.tree.leaves(mask)) > 10
    return trees.map_prunable(lambda _, w: jnp.abs(w) * is_alive, mask, params)


def test_layers_that_are_ranked_by_themselves_are_counted_by_themselves() -> None:
    quotas = schedules.per_layer(schedules.exponential)
    _, info = pruning.prune(scores.magnitude(), PARAMS, compression=4, schedule=quotas)
    assert info.kept.tolist() == [[24, 12]]
