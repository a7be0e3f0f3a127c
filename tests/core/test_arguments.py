"""Tests the door of the library: wrong arguments end in a ValueError before any work.

Each row of a table is a call, and words of the message: the argument, the value and the cure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import synflow_jax
from synflow_jax import arguments, certified, masking, pruning, schedules, scores, trees
from synflow_jax.parallel import sharded

KEY = jax.random.key(0)
PARAMS = {
    "a": {"kernel": jax.random.normal(KEY, (6, 8))},
    "b": {"kernel": jax.random.normal(KEY, (8, 4))},
}
MASK = trees.prunable(PARAMS)
X = jax.random.normal(jax.random.key(1), (5, 6))
Y = jnp.arange(5) % 4


def _apply(params: trees.Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


LOSS = scores.cross_entropy(_apply)
SYNFLOW = scores.synflow(_apply, (6,))
COUNTS = jnp.array([[10], [40]])


def _never(params: Any, mask: Any, key: Any) -> Any:
    raise AssertionError("scores were computed")


def _prune(score_fn: Any = _never, params: Any = PARAMS, **more: Any) -> Any:
    return pruning.prune(score_fn, params, **{"compression": 4, "num_iterations": 2, **more})


def _loop(**more: Any) -> Any:
    given = {"counts": COUNTS, "key": KEY, "mask": MASK, **more}
    return pruning.prune_loop(_never, PARAMS, **given)


def _each(function: Callable[[jax.Array], Any]) -> scores.ScoreFn:
    """Returns a rule that scores each layer by a function of its mask."""
    return lambda params, mask, key: jax.tree.map(function, mask)


def _cast(dtype: Any) -> trees.Params:
    return jax.tree.map(lambda w: (10 * w).astype(dtype), PARAMS)


def _data(*batches: Any, rule: Any = scores.snip, prune: Any = _prune) -> Any:
    return prune(rule(LOSS, batches), PARAMS, compression=2, num_iterations=1)


def _wrong_mask(layer: str, leaf: Any) -> trees.Mask:
    return {**MASK, layer: {"kernel": leaf}}


_OTHER = {"a": MASK["a"], "c": MASK["b"]}
_SHARDED = functools.partial(sharded.prune, SYNFLOW, PARAMS, compression=2)
_CERTIFIED = functools.partial(certified.prune, SYNFLOW, PARAMS, compression=2)

Cases = dict[str, tuple[Callable[[], Any], tuple[str, ...]]]

FLAGS: Cases = {
    "nested word": (lambda: _prune(nested="False"), ("nested='False'", "True or False")),
    "nested None": (lambda: _prune(nested=None), ("nested=None",)),
    "nested 0": (lambda: _prune(nested=0), ("nested=0",)),
    "nested loop": (lambda: _loop(nested="False"), ("nested='False'",)),
    "nested sharded": (lambda: _SHARDED(nested="no"), ("nested='no'",)),
    "shard_params": (lambda: _SHARDED(shard_params="no"), ("shard_params='no'",)),
    "scaled": (lambda: scores.synflow(_apply, (6,), scaled="False"), ("scaled='False'",)),
    "kernels": (lambda: trees.prunable(PARAMS, kernels="False"), ("kernels='False'",)),
    "biases": (lambda: trees.prunable(PARAMS, biases=None), ("biases=None",)),
    "norms": (lambda: trees.prunable(PARAMS, norms=1), ("norms=1",)),
}

NUMBERS: Cases = {
    "compression bool": (lambda: _prune(compression=True), ("compression=True", "a number")),
    "compression word": (lambda: _prune(compression="10"), ("compression='10'",)),
    "compression None": (lambda: _prune(compression=None), ("compression=None",)),
    "compression nan": (lambda: _prune(compression=np.nan), ("compression=nan", "at least 1")),
    "compression 0.5": (lambda: _prune(compression=0.5), ("compression=0.5",)),
    "compression huge": (lambda: _prune(compression=10**400), ("compression=1000", "finite")),
    "compression 81": (lambda: _prune(compression=81), ("compression=81", "at most 80")),
    "iterations huge": (lambda: _prune(num_iterations=10**20), ("num_iterations=1", "1,000,000")),
    "iterations bool": (lambda: _prune(num_iterations=True), ("num_iterations=True", "whole")),
    "iterations float": (lambda: _prune(num_iterations=2.0), ("num_iterations=2.0", "whole")),
    "iterations 0": (lambda: _prune(num_iterations=0), ("num_iterations=0", "at least 1")),
    "iterations of certified": (
        lambda: _CERTIFIED(num_iterations=10**20),
        ("num_iterations=1", "1,000,000"),
    ),
    "cut_fraction": (lambda: _CERTIFIED(cut_fraction="0.5"), ("cut_fraction='0.5'", "0.5")),
    "temperature -1": (lambda: scores.cross_entropy(_apply, -1.0), ("temperature=-1.0", "above 0")),
    "temperature 0": (lambda: scores.cross_entropy(_apply, 0), ("temperature=0", "above 0")),
    "temperature inf": (lambda: scores.cross_entropy(_apply, np.inf), ("temperature=inf",)),
    "temperature nan": (lambda: scores.cross_entropy(_apply, np.nan), ("temperature=nan",)),
    "temperature word": (lambda: scores.cross_entropy(_apply, "200"), ("temperature='200'",)),
    "temperature bool": (lambda: scores.cross_entropy(_apply, True), ("temperature=True",)),
    "temperature array": (
        lambda: scores.cross_entropy(_apply, jnp.float32(-2)),
        ("temperature=-2.0",),
    ),
    "erk": (lambda: schedules.erdos_renyi_kernel([(3, 3)], "4", 1), ("compression='4'",)),
    "k float": (lambda: masking.global_mask(X, 1.5), ("k=float32[]", "int[]")),
    "k vector": (lambda: masking.global_mask(X, jnp.array([1, 2])), ("k=int32[2]",)),
    "k per leaf": (lambda: masking.local_mask([X, X], jnp.arange(3)), ("k=int32[3]", "int[2]")),
    "k bool": (lambda: masking.kth_smallest(X, True), ("k=bool[]",)),
    "counts floats": (lambda: _loop(counts=COUNTS / 2), ("counts=float32[2,1]", "whole")),
    "counts shape": (lambda: _loop(counts=COUNTS[:, 0]), ("counts=int32[2]", "int[num_iter")),
}

FUNCTIONS: Cases = {
    "score_fn word": (lambda: _prune("synflow"), ("score_fn is 'str'", "scores.synflow")),
    "score_fn array": (lambda: _prune(np.ones(3)), ("score_fn is 'ndarray'",)),
    "score_fn of two": (lambda: _prune(lambda p, m: m), ("score_fn takes (p, m)", "(params, mask")),
    "apply_fn": (lambda: scores.synflow((6,), _apply), ("apply_fn=(6,)", "(params, x)")),
    "apply_fn of one": (lambda: scores.path_norm(lambda x: x, (6,)), ("apply_fn takes (x)",)),
    "loss_fn": (lambda: scores.snip(_apply(PARAMS, X), [(X, Y)]), ("loss_fn=float32[5,4]",)),
    "loss_fn of one": (lambda: scores.grasp(lambda p: p, [X]), ("loss_fn takes (p)",)),
    "objective": (lambda: scores.saliency(3, PARAMS, MASK), ("objective=3",)),
    "on_progress": (lambda: _prune(on_progress=3), ("on_progress=3", "num_done, info")),
    "on_progress of one": (lambda: _prune(on_progress=lambda n: None), ("on_progress takes (n)",)),
    "loop_fn": (lambda: _prune(loop_fn="fori"), ("loop_fn='fori'", "jax.lax.fori_loop")),
    "schedule": (lambda: _prune(schedule=COUNTS), ("schedule=int32[2,1]", "schedules.linear")),
    "per_layer": (lambda: schedules.per_layer("linear"), ("schedule='linear'",)),
}

SHAPES: Cases = {
    "floats": (lambda: scores.synflow(_apply, (6.0,)), ("input_shape=(6.0,)", "whole numbers")),
    "negative": (lambda: scores.synflow(_apply, (-1,)), ("input_shape=(-1,)",)),
    "0": (lambda: scores.synflow(_apply, (0,)), ("input_shape=(0,)",)),
    "bool": (lambda: scores.synflow(_apply, (True,)), ("input_shape=(True,)",)),
    "word": (lambda: scores.synflow(_apply, "6"), ("input_shape='6'", "(784,)")),
    "number": (lambda: scores.synflow(_apply, 6), ("input_shape=6", "(784,)")),
    "None": (lambda: scores.synflow(_apply, None), ("input_shape=None",)),
    "huge": (lambda: scores.synflow(_apply, (10**12,)), ("input_shape=(10000", "2147483647")),
    "dict": (lambda: scores.synflow(_apply, {"a": (6,)}), ("input_shape={'a': (6,)}", "split")),
    "several": (lambda: scores.synflow(_apply, ((6,), (6,))), ("input_shape=((6,), (6,))",)),
    "another network's": (
        lambda: _prune(scores.synflow(_apply, (7,))),
        ("apply_fn(params, x) failed", "float32[1,7]", "input_shape=(7,)", "dot_general"),
    ),
}

TREES: Cases = {
    "integers": (lambda: _prune(params=_cast(jnp.int32)), ("params at 'a/kernel' is int32",)),
    "bools": (lambda: _prune(params=_cast(bool)), ("params at 'a/kernel' is bool", "exclude=")),
    "complex": (lambda: _prune(params=_cast(jnp.complex64)), ("complex64", "only floats")),
    "function": (
        lambda: _prune(params={**PARAMS, "act": jax.nn.relu}),
        ("params at 'act'", "eqx.partition"),
    ),
    "word": (lambda: _prune(params={**PARAMS, "act": "relu"}), ("params at 'act' is a str",)),
    "nothing": (lambda: _prune(params={}), ("no parameter is prunable", "leaves are []")),
    "mask of others": (lambda: _prune(mask=_OTHER), ("it lacks ['b/kernel']", "['c/kernel']")),
    "mask for apply_mask": (
        lambda: trees.apply_mask(PARAMS, _OTHER),
        ("mask does not have the structure", "it lacks ['b/kernel']", "prunable(params)"),
    ),
    "mask that broadcasts": (
        lambda: trees.apply_mask(PARAMS, _wrong_mask("a", jnp.ones((1, 8), bool))),
        ("mask at 'a/kernel' is bool[1, 8]", "bool[6, 8]"),
    ),
    "mask of floats": (
        lambda: trees.apply_mask(PARAMS, _wrong_mask("a", jnp.ones((6, 8)))),
        ("mask at 'a/kernel' is float32[6, 8]",),
    ),
    "mask for collapsed": (
        lambda: synflow_jax.collapsed(_apply, PARAMS, _OTHER, (6,)),
        ("mask does not have the structure",),
    ),
    "mask for saliency": (
        lambda: scores.saliency(lambda p: jnp.sum(_apply(p, X)), PARAMS, _OTHER),
        ("mask does not have the structure",),
    ),
    "mask for the loop": (lambda: _loop(mask=_OTHER), ("mask does not have the structure",)),
    "an array as mask": (lambda: trees.apply_mask(PARAMS, X), ("it is float32[5,6], not a tree",)),
    "key 0": (lambda: _prune(key=0), ("key=0", "jax.random.key(0)")),
    "keys": (lambda: _prune(key=jax.random.split(KEY, 3)), ("key=key<fry>[3]", "single one")),
    "floats as key": (lambda: _prune(key=jnp.ones(2)), ("key=float32[2]",)),
    "key of the loop": (lambda: _loop(key=0), ("key=0",)),
    "key of shuffle": (lambda: masking.shuffle(MASK, 0), ("key=0",)),
    "shuffled floats": (lambda: masking.shuffle(PARAMS, KEY), ("mask holds float32[6,8]", "bool")),
    "quotas of floats": (lambda: schedules.quotas_of(PARAMS), ("mask=", "bool arrays")),
    "ranked integers": (lambda: masking.global_mask(Y, 1), ("scores=int32[5]", "floats")),
    "only holes": (lambda: masking.count_kept({"a": None}), ("mask has no prunable leaf",)),
    "exclude list": (lambda: trees.prunable(PARAMS, exclude=["a"]), ("exclude=['a']", "'head'")),
}

RETURNED: Cases = {
    "bools": (lambda: _prune(_each(lambda m: m)), ("score_fn returned bool[6,8]", "'a/kernel'")),
    "integers": (lambda: _prune(_each(lambda m: m.astype(int))), ("int32[6,8]", "floats")),
    "complex": (lambda: _prune(_each(lambda m: m + 0j)), ("complex64[6,8]", "floats")),
    "scalars": (lambda: _prune(_each(lambda m: jnp.float32(1))), ("shape []", "'a/kernel'")),
    "(1, 1)": (lambda: _prune(_each(lambda m: jnp.ones((1, 1)))), ("shape [1, 1]", "[6, 8]")),
    "None": (lambda: _prune(lambda p, m, k: None), ("score_fn returned None", "structure")),
    "a pair": (lambda: _prune(lambda p, m, k: (p, m)), ("another structure", "map_prunable")),
    "first scores": (
        lambda: pruning.first_scores(_each(lambda m: m), PARAMS),
        ("score_fn returned bool[6,8]",),
    ),
    "a flow": (
        lambda: _prune(
            scores.Rule(_never, flow=lambda p, m, k: scores.Flow(m, jnp.float32(1), jnp.int32(0)))
        ),
        ("score_fn returned bool[6,8]",),
    ),
    "features and logits": (
        lambda: _prune(scores.synflow(lambda p, x: (x, _apply(p, x)), (6,))),
        ("apply_fn returned (float32[1,6], float32[1,4])", "apply_fn(params, x)[1]"),
    ),
    "logits and a state": (
        lambda: _prune(scores.synflow(lambda p, x: (_apply(p, x), {"mean": x}), (6,))),
        ("apply_fn returned (float32[1,4], {'mean': float32[1,6]})", "apply_fn(params, x)[0]"),
    ),
    "a dict": (
        lambda: _prune(scores.synflow(lambda p, x: {"logits": _apply(p, x)}, (6,))),
        ("apply_fn returned {'logits': float32[1,4]}", "['logits']"),
    ),
    "no output": (
        lambda: _prune(scores.synflow(lambda p, x: None, (6,))),
        ("apply_fn returned None",),
    ),
    "classes": (
        lambda: _prune(scores.synflow(lambda p, x: _apply(p, x).argmax(1), (6,))),
        ("apply_fn returned int32[1]", "floats"),
    ),
    "look-ups": (
        lambda: _prune(scores.synflow(lambda p, x: p["a"]["kernel"][x].sum(1), (5,))),
        ("input_shape=(5,)", "integer inputs of an embedding"),
    ),
    "losses": (
        lambda: _prune(scores.snip(lambda p, b: _apply(p, b[0])[:, 0], [(X, Y)])),
        ("loss_fn returned float32[5]", "mean"),
    ),
    "losses of grasp": (
        lambda: _prune(scores.grasp(lambda p, b: _apply(p, b[0]), [(X, Y)])),
        ("loss_fn returned float32[5,4]",),
    ),
    "an objective": (
        lambda: scores.saliency(lambda p: _apply(p, X), PARAMS, MASK),
        ("objective returned float32[5,4]",),
    ),
    "logits of a loss": (
        lambda: scores.cross_entropy(lambda p, x: (x, _apply(p, x)))(PARAMS, (X, Y)),
        ("apply_fn returned (float32[5,6], float32[5,4])",),
    ),
}

BATCHES: Cases = {
    "label -1": (lambda: _data((X, Y.at[0].set(-1))), ("labels", "-1", "between 0 and 3")),
    "label 4": (lambda: _data((X, Y.at[4].set(4)), rule=scores.grasp), ("labels", "hold 4")),
    "of a later batch": (lambda: _data((X, Y), (X[:2], Y[:2] + 8)), ("labels", "hold 8")),
    "sharded": (lambda: _data((X, Y - 1), prune=sharded.prune), ("labels", "hold -1")),
    "inverted": (
        lambda: _prune(scores.inverted(scores.snip(LOSS, [(X, Y + 1)]))),
        ("labels", "hold 4"),
    ),
    "first scores": (
        lambda: pruning.first_scores(scores.snip(LOSS, [(X, Y + 1)]), PARAMS),
        ("labels", "hold 4"),
    ),
    "one for five": (lambda: _data((X, Y[:1])), ("labels", "int32[1]", "one label for each")),
    "one-hot": (lambda: _data((X, jax.nn.one_hot(Y, 4))), ("labels", "float32[5,4]", "argmax")),
    "floats": (lambda: _data((X, Y.astype(float))), ("labels", "float32[5]", "whole")),
    "columns": (lambda: _data((X, Y[:, None])), ("labels", "int32[5,1]")),
    "other inputs": (lambda: _data((X[:, :4], Y)), ("inputs of batches", "float32[5,4]")),
    "a dict": (lambda: _data({"x": X, "y": Y}), ("batches holds {'x'", "[(inputs, labels)]")),
    "two rows": (lambda: _data(X[:2]), ("batches holds float32[2,6]",)),
    "one batch": (lambda: scores.snip(LOSS, (X, Y)), ("batches=", "[(inputs, labels)]")),
    "a dict of arrays": (lambda: scores.snip(LOSS, {"x": X}), ("batches={'x'", "a list")),
    "an array": (lambda: scores.grasp(LOSS, X), ("batches=float32[5,6]", "a list")),
    "a number": (lambda: scores.snip(LOSS, 5), ("batches=5", "a list")),
    "no examples": (lambda: scores.snip(LOSS, [(X, Y), (X[:0], Y[:0])]), ("batches[1]", "example")),
    "None": (lambda: scores.snip(LOSS, [None]), ("batches[0]=None", "(inputs, labels)")),
    "words": (lambda: scores.snip(LOSS, [("a", "b")]), ("batches[0]=('a', 'b')", "arrays")),
}

TABLES = {
    "flags": FLAGS,
    "numbers": NUMBERS,
    "functions": FUNCTIONS,
    "shapes": SHAPES,
    "trees": TREES,
    "returned": RETURNED,
    "batches": BATCHES,
}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[": ".join(row) for row in ROWS])
def test_wrong_arguments_are_named(table: str, name: str) -> None:
    call, words = TABLES[table][name]
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        call()
    for word in words[1:]:
        assert word in str(caught.value)


def test_an_error_of_the_network_is_the_cause() -> None:
    class Unlike(Exception):
        pass

    def fails(params: trees.Params, x: jax.Array) -> jax.Array:
        raise Unlike("no such layer")

    with pytest.raises(ValueError, match="Unlike: no such layer") as caught:
        scores.path_norm(fails, (6,))(PARAMS)
    assert isinstance(caught.value.__cause__, Unlike)


ALIKE: dict[str, dict[str, Any]] = {
    "raw key": {"key": jax.random.PRNGKey(0)},
    "number of NumPy": {"compression": np.float32(4), "num_iterations": np.int32(2)},
    "flag of NumPy": {"nested": np.True_},
}


@pytest.mark.parametrize("name", ALIKE)
def test_equal_arguments_of_other_types_are_welcome(name: str) -> None:
    expected, _ = _prune(scores.random())
    found, _ = _prune(scores.random(), **ALIKE[name])
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("shape", [[6], (np.int64(6),), jnp.ones(6).shape])
def test_equal_shapes_are_one_objective(shape: Any) -> None:
    found = scores.path_norm(_apply, shape)
    assert jax.tree.structure(found) == jax.tree.structure(scores.path_norm(_apply, (6,)))


def test_batches_may_be_any_iterable_of_any_integers() -> None:
    small = np.asarray(Y, np.uint8)
    rule = scores.snip(LOSS, ((X, small) for _ in range(2)))
    assert rule.check is not None and rule.batches is not None
    rule.check(PARAMS, rule.batches)
    ((inputs, labels),) = rule.batches
    assert inputs.shape == (2, 5, 6) and labels.tolist() == [Y.tolist()] * 2


def test_batches_may_be_traced() -> None:
    """Values that are traced cannot be checked, and nothing tries."""

    def score(x: jax.Array, y: jax.Array, temperature: jax.Array) -> trees.Scores:
        rule = scores.snip(scores.cross_entropy(_apply, temperature), [(x, y)])
        pruning.check_batches(rule, PARAMS)
        return rule(PARAMS, MASK, KEY)

    found = jax.jit(score)(X, Y, jnp.float32(1))
    expected = scores.snip(LOSS, [(X, Y)])(PARAMS, MASK, KEY)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_what_cannot_tell_its_arguments_is_welcome() -> None:
    arguments.check_function("on_progress", print, ("num_done", "info"), "print")
    arguments.check_function("type", type, ("params", "x"), "print")


def test_describe_shortens_what_is_long() -> None:
    assert len(arguments.describe([X] * 100)) == 100
    assert arguments.describe({"a": X, "b": None}) == "{'a': float32[5,6], 'b': None}"
