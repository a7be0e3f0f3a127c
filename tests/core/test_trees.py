"""Tests which leaves are prunable in four libraries, trees with holes, and the errors of masks.

- `merge` and `select` are inverses of each other.
- `apply_mask` is `where(mask, leaf, 0)` on prunable leaves, the identity elsewhere, and idempotent.
- `prunable` is a full mask of exactly the leaves of the kinds that are asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from synflow_jax import models, trees


class _LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        x = nn.LayerNorm(name="layer_norm")(x)
        return nn.Dense(2, name="head")(x.reshape(x.shape[0], -1))


def _linen() -> trees.Params:
    return jax.eval_shape(_LinenNet().init, jax.random.key(0), jnp.ones((1, 5, 5, 3)))["params"]


def _haiku() -> trees.Params:
    # Haiku's module names hold "/", and its batch norm's parameters have four axes.
    return {
        "net/~/conv": {"w": jnp.ones((3, 3, 3, 4)), "b": jnp.ones(4)},
        "net/~/batch_norm": {"scale": jnp.ones((1, 1, 1, 4)), "offset": jnp.ones((1, 1, 1, 4))},
        "net/~/linear": {"w": jnp.ones((100, 2)), "b": jnp.ones(2)},
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Equinox:
    """A module as in Equinox: `weight` is a kernel or the scale of a norm."""

    weight: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _EquinoxNet:
    layers: list[_Equinox]


def _equinox() -> trees.Params:
    conv = _Equinox(jnp.ones((4, 3, 3, 3)), jnp.ones((4, 1, 1)))
    norm = _Equinox(jnp.ones(4), jnp.ones(4))
    linear_without_bias = _Equinox(jnp.ones((2, 100)), None)
    return _EquinoxNet([conv, norm, linear_without_bias])


def _nnx() -> trees.Params:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(100, 2, rngs=rngs)

    return nnx.state(Net(nnx.Rngs(0)), nnx.Param)


# Per library: the parameters; the names of kernels, biases and norms in the order of the leaves.
_LIBRARIES = {
    "linen": (
        _linen,
        ["conv/kernel", "head/kernel"],
        ["conv/bias", "head/bias"],
        ["layer_norm/bias", "layer_norm/scale", "norm/bias", "norm/scale"],
    ),
    "haiku": (
        _haiku,
        ["net/~/conv/w", "net/~/linear/w"],
        ["net/~/conv/b", "net/~/linear/b"],
        ["net/~/batch_norm/offset", "net/~/batch_norm/scale"],
    ),
    "equinox": (
        _equinox,
        ["layers/0/weight", "layers/2/weight"],
        ["layers/0/bias"],
        ["layers/1/bias", "layers/1/weight"],
    ),
    "nnx": (
        _nnx,
        ["conv/kernel", "head/kernel"],
        ["conv/bias", "head/bias"],
        ["norm/bias", "norm/scale"],
    ),
}


@pytest.mark.parametrize("library", _LIBRARIES)
@pytest.mark.parametrize("kinds", range(1, 8))
def test_prunable_leaves_are_exactly_those_of_the_kinds_asked_for(library: str, kinds: int) -> None:
    make, *named = _LIBRARIES[library]
    params = make()
    chosen = [bool(kinds & bit) for bit in (1, 2, 4)]
    mask = trees.prunable(params, kernels=chosen[0], biases=chosen[1], norms=chosen[2])

    expected = {
        name for names, wanted in zip(named, chosen, strict=True) if wanted for name in names
    }
    assert sorted(trees.names(mask)) == sorted(expected)
    # A leaf of every kind is prunable or a hole, never lost: the names above are all of the leaves.
    assert sorted(trees.names(params)) == sorted(name for names in named for name in names)
    shapes = {
        trees.path_name(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for name, leaf in zip(trees.names(mask), jax.tree.leaves(mask), strict=True):
        assert leaf.dtype == jnp.bool_ and leaf.shape == shapes[name] and bool(leaf.all())
    trees.check_mask(mask, params)


@pytest.mark.parametrize("library", _LIBRARIES)
def test_kernels_are_the_default(library: str) -> None:
    make, kernels, *_ = _LIBRARIES[library]
    mask = trees.prunable(make())
    assert trees.names(mask) == kernels
    assert trees.sizes(mask) == [108, 200]


def test_nnx_paths_that_end_in_value_lose_it() -> None:
    for last in ("value", ".value"):
        params = {"dense": {"kernel": {last: jnp.ones((2, 3))}, "bias": {last: jnp.ones(3)}}}
        assert trees.names(params) == ["dense/bias", "dense/kernel"]
        assert trees.names(trees.prunable(params)) == ["dense/kernel"]
        assert trees.names(trees.prunable(params, kernels=False, biases=True)) == ["dense/bias"]
    # A module that is called `value` is no ending: attention has one.
    assert trees.names({"value": {"kernel": jnp.ones((2, 3))}}) == ["value/kernel"]


def test_gamma_is_a_scale_and_the_bias_beside_it_a_norm() -> None:
    params = {
        "norm": {"gamma": jnp.ones(3), "bias": jnp.ones(3)},
        "fc": {"w": jnp.ones((3, 2)), "bias": jnp.ones(2)},
    }
    assert trees.names(trees.prunable(params, kernels=False, norms=True)) == [
        "norm/bias",
        "norm/gamma",
    ]
    assert trees.names(trees.prunable(params, kernels=False, biases=True)) == ["fc/bias"]


def test_unknown_names_are_never_prunable() -> None:
    params = {"fc": {"kernel": jnp.ones((2, 2)), "mystery": jnp.ones((2, 2))}}
    mask = trees.prunable(params, biases=True, norms=True)
    assert trees.names(mask) == ["fc/kernel"] and mask["fc"]["mystery"] is None


@pytest.mark.parametrize(
    "exclude, left",
    [
        ("head", ["conv/kernel"]),
        ("^conv/", ["head/kernel"]),
        ("nv/ker", ["head/kernel"]),  # anywhere in the name
        ("^head/kernel$", ["conv/kernel"]),
        (None, ["conv/kernel", "head/kernel"]),
    ],
)
def test_exclude_matches_anywhere_in_the_name(exclude: str | None, left: list[str]) -> None:
    assert trees.names(trees.prunable(_linen(), exclude=exclude)) == left


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("pattern", ["^kernel", "nothing"])  # of the whole name, not its last part
def test_a_pattern_of_nothing_is_a_mistake(argument: str, pattern: str) -> None:
    message = f"{argument}={pattern!r} matches none of the leaves ['conv/bias', "
    with pytest.raises(ValueError, match=re.escape(message)):
        trees.prunable(_linen(), **{argument: pattern})


def test_exclude_works_on_all_kinds() -> None:
    mask = trees.prunable(_linen(), biases=True, norms=True, exclude="norm|head")
    assert trees.names(mask) == ["conv/bias", "conv/kernel"]


def test_an_excluded_scale_still_makes_its_bias_a_norm() -> None:
    params = {
        "norm": {"scale": jnp.ones(3), "bias": jnp.ones(3)},
        "fc": {"kernel": jnp.ones((3, 2))},
    }
    assert trees.names(trees.prunable(params, biases=True, exclude="scale")) == ["fc/kernel"]
    assert trees.names(trees.prunable(params, norms=True, exclude="scale")) == [
        "fc/kernel",
        "norm/bias",
    ]


def test_bad_regular_expression() -> None:
    with pytest.raises(
        ValueError, match=r"exclude='head\(' is not a regular expression: .*pattern such as 'head'"
    ):
        trees.prunable(_linen(), exclude="head(")


@pytest.mark.parametrize("kinds", [{"exclude": "kernel"}, {"kernels": False}])
def test_nothing_prunable(kinds: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"no parameter is prunable with .*'conv/kernel'.*Choose other kinds"
    ):
        trees.prunable(_linen(), **kinds)


# Leaves that libraries name in their own ways; each with its kind.
_NAMES = {
    "gru/w_i": ((4, 24), "kernel"),  # Haiku
    "gru/w_h": ((8, 24), "kernel"),
    "cell/weight_ih": ((24, 4), "kernel"),  # Equinox
    "cell/weight_hh": ((24, 8), "kernel"),
    "cell/bias": ((24,), "bias"),
    "cell/bias_n": ((8,), "bias"),
    "lstm/weight_ih_l0": ((32, 4), "kernel"),  # PyTorch
    "lstm/weight_hh_l0_reverse": ((32, 8), "kernel"),
    "lstm/bias_hh_l0": ((32,), "bias"),
    "attention/in_proj_weight": ((24, 8), "kernel"),
    "attention/in_proj_bias": ((24,), "bias"),
    "adapter/lora_a": ((8, 2), "kernel"),  # NNX
    "adapter/lora_b": ((2, 8), "kernel"),
    "norm/weight": ((2, 3, 4), "norm scale"),  # Equinox, over several axes
    "norm/bias": ((2, 3, 4), "norm bias"),
    "conv/weight": ((4, 1, 1, 1), "kernel"),
    "conv/bias": ((4, 1, 1), "bias"),
    "bn/mean": ((3,), "running mean"),
    "bn/var": ((3,), "running variance"),
    "torch/running_mean": ((3,), "running mean"),
    "torch/running_var": ((3,), "running variance"),
    "hk/~/mean_ema/average": ((1, 3), "running mean"),
    "hk/~/var_ema/average": ((1, 3), "running variance"),
    "prior/mean": ((3,), "other"),  # alone
    "vae/mean/kernel": ((8, 2), "kernel"),  # a layer that is called so, and one beside it
    "vae/var/kernel": ((8, 2), "kernel"),
    "block_bias": ((3,), "bias"),
}


def test_kinds_of_names() -> None:
    params = {name: jnp.ones(shape) for name, (shape, _) in _NAMES.items()}
    assert trees.leaf_kinds(params) == {name: kind for name, (_, kind) in sorted(_NAMES.items())}
    means = [name for name, (_, kind) in _NAMES.items() if kind == "running mean"]
    zeroed = trees.without_means(params)
    assert sorted(means) == [name for name in sorted(_NAMES) if not zeroed[name].any()]


@pytest.mark.parametrize(
    "include, kernels, names",
    [
        ("^fc/m", True, ["fc/kernel", "fc/mystery"]),
        ("^fc/m", False, ["fc/mystery"]),
        ("bias", True, ["fc/bias", "fc/kernel"]),
        ("fc", False, ["fc/bias", "fc/kernel", "fc/mystery"]),
    ],
)
def test_include_adds_leaves_of_any_kind(include: str, kernels: bool, names: list[str]) -> None:
    params = {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "mystery": jnp.ones((2, 2))}}
    mask = trees.prunable(params, include=include, kernels=kernels)
    assert trees.names(mask) == names
    # What is excluded is excluded.
    left = trees.prunable(params, include=include, exclude="mystery|bias")
    assert trees.names(left) == ["fc/kernel"]


@pytest.mark.parametrize(
    "name, leaf, warns",
    [
        ("W_rec", jnp.ones((4, 4)), True),
        ("attention/query_matrix", jnp.ones((2, 4, 4)), True),
        ("token_embedding", jnp.ones((10, 4)), False),
        ("embed/table", jnp.ones((10, 4)), False),
        ("pos_encoding", jnp.ones((10, 4)), False),
        ("block/position", jnp.ones((10, 4)), False),
        ("cls", jnp.ones((2, 4)), False),
        ("layer_scale", jnp.ones(4), False),
        ("temperature", jnp.ones((1, 1, 4)), False),  # a single axis, in effect
        ("norm/scale", jnp.ones((2, 3, 4)), False),
        ("norm/bias", jnp.ones((2, 3, 4)), False),
        ("indices", jnp.ones((3, 3), int), False),
        ("keys", jax.random.split(jax.random.key(0), (2, 2)), False),
    ],
)
def test_unknown_weights_are_said_to_stay(name: str, leaf: jax.Array, warns: bool) -> None:
    params = {"fc": {"kernel": jnp.ones((4, 2))}, name: leaf}
    if not warns:
        assert trees.names(trees.default_mask(params)) == ["fc/kernel"]
        return
    with pytest.warns(trees.UnprunedLeaves, match=f"{name}.*include=.{name}") as said:
        trees.default_mask(params)
    assert len(said) == 1
    # The cure.
    mask = trees.prunable(params, include=name)
    assert sorted(trees.names(mask)) == sorted(["fc/kernel", name])


def test_models_of_this_package_have_no_unknown_weights() -> None:
    for name in ("cifar_vgg11_bn", "cifar_resnet20", "fc"):
        model = models.create(name, num_classes=10)
        init = functools.partial(models.init, model, (32, 32, 3))
        params, batch_stats = jax.eval_shape(init, jax.random.key(0))
        assert "other" not in trees.leaf_kinds(params).values()
        # All of its batch statistics are known, too.
        kinds = set(trees.leaf_kinds(batch_stats).values())
        assert kinds <= {"running mean", "running variance"}
        trees.default_mask(params)


def test_float_type_and_absolute_ignore_what_is_not_a_float() -> None:
    key = jax.random.key(0)
    params = {"w": -jnp.ones(2, jnp.bfloat16), "i": jnp.int32(-3), "k": key, "p": -2.0, "n": None}
    assert trees.float_type(params) == jnp.bfloat16
    assert trees.float_type({"i": jnp.int32(3), "k": key}) == jnp.float32
    positive = trees.absolute(params)
    assert positive["w"].tolist() == [1, 1] and float(positive["p"]) == 2
    assert positive["i"] is params["i"] and positive["k"] is key


def _params() -> trees.Params:
    return {
        "a": {"kernel": jnp.arange(6.0).reshape(2, 3) - 2, "bias": jnp.arange(3.0)},
        "b": [jnp.ones((2, 2), jnp.bfloat16), jnp.int32(7)],
    }


def _mask() -> trees.Mask:
    return {
        "a": {"kernel": jnp.array([[True, False, True], [False, True, True]]), "bias": None},
        "b": [jnp.array([[False, True], [True, False]]), None],
    }


def _assert_same(left: trees.Tree, right: trees.Tree) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, strict=True)


def test_select_then_merge_is_the_identity() -> None:
    params, mask = _params(), _mask()
    assert jax.tree.structure(trees.select(params, mask)) == jax.tree.structure(mask)
    assert trees.sizes(trees.select(params, mask)) == [6, 4]
    _assert_same(trees.merge(trees.select(params, mask), params), params)


def test_merge_then_select_gives_back_what_was_merged() -> None:
    params, mask = _params(), _mask()
    selected = jax.tree.map(lambda leaf: leaf + 10, trees.select(params, mask))
    merged = trees.merge(selected, params)
    _assert_same(trees.select(merged, mask), selected)
    # What was not selected is the very same array, not a copy.
    assert merged["a"]["bias"] is params["a"]["bias"] and merged["b"][1] is params["b"][1]


def test_apply_mask_zeroes_exactly_the_pruned() -> None:
    params, mask = _params(), _mask()
    masked = trees.apply_mask(params, mask)
    expected = {
        "a": {
            "kernel": jnp.array([[-2.0, 0.0, 0.0], [0.0, 2.0, 3.0]]),
            "bias": params["a"]["bias"],
        },
        "b": [jnp.array([[0, 1], [1, 0]], jnp.bfloat16), params["b"][1]],
    }
    _assert_same(masked, expected)
    assert masked["a"]["bias"] is params["a"]["bias"] and masked["b"][1] is params["b"][1]
    _assert_same(trees.apply_mask(masked, mask), masked)  # idempotent


def test_apply_mask_of_the_full_mask_is_the_identity() -> None:
    params = _params()["a"]
    _assert_same(trees.apply_mask(params, trees.prunable(params)), params)


def test_apply_mask_zeroes_what_is_not_finite() -> None:
    # A product with the mask would leave NaN; the rule is a choice.
    masked = trees.apply_mask(
        {"kernel": jnp.array([[jnp.nan, jnp.inf, -1.0]])}, {"kernel": jnp.zeros((1, 3), bool)}
    )
    np.testing.assert_array_equal(
        np.asarray(masked["kernel"]), np.zeros((1, 3), np.float32), strict=True
    )


def test_map_prunable_calls_the_function_on_prunable_leaves_alone() -> None:
    params, mask = _params(), _mask()
    seen = []

    def function(m: jax.Array, *leaves: jax.Array) -> int:
        seen.append([leaf.shape for leaf in (m, *leaves)])
        return len(seen)

    assert trees.map_prunable(function, mask, params, params) == {
        "a": {"bias": None, "kernel": 1},
        "b": [2, None],
    }
    assert seen == [[(2, 3)] * 3, [(2, 2)] * 3]


def test_check_mask_accepts_masks() -> None:
    trees.check_mask(_mask(), _params())
    trees.check_mask(jax.tree.map(np.asarray, _mask()), _params())  # as they come from a file


@pytest.mark.parametrize(
    "mask, message",
    [
        ({"kernel": jnp.ones((2, 3), bool)}, "mask does not have the structure of the parameters"),
        (
            {"kernel": jnp.ones((2, 3), bool), "bias": None, "more": None},
            "mask does not have the structure of the parameters",
        ),
        (None, "mask does not have the structure of the parameters"),
        (
            {"kernel": {"w": jnp.ones((2, 3), bool)}, "bias": None},
            r"^mask at 'kernel' is a dict",
        ),
        ({"kernel": None, "bias": None}, "mask has no prunable leaf"),
        (
            {"kernel": jnp.ones((3, 2), bool), "bias": None},
            r"mask at 'kernel' is bool\[3, 2\]; it must be bool\[2, 3\]",
        ),
        (
            {"kernel": jnp.ones((2, 3)), "bias": None},
            r"mask at 'kernel' is float32\[2, 3\]; it must be bool\[2, 3\]",
        ),
        (
            {"kernel": None, "bias": jnp.ones((), bool)},
            r"mask at 'bias' is bool\[\]; it must be bool\[3\]",
        ),
    ],
)
def test_check_mask_names_what_does_not_fit(mask: trees.Mask, message: str) -> None:
    params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    with pytest.raises(ValueError, match=message):
        trees.check_mask(mask, params)
