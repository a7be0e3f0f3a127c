"""Tests the examples and the code in README.md.

- Each example runs and finds what its docstring says.
- The same weights have the same mask in Linen, NNX, Haiku and Equinox.
- The code blocks of README.md run in order and print the counts that the text gives.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import sys
from types import ModuleType
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_except
from flax import nnx

from synflow_jax import pruning, scores, trees

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the path as `python examples/NAME.py` does: the examples share show.py."""
    monkeypatch.syspath_prepend(EXAMPLES)


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _num_kept(mask: trees.Mask) -> int:
    return sum(int(leaf.sum()) for leaf in jax.tree.leaves(mask))


@pytest.mark.parametrize(
    "name",
    slow_except(
        ["with_linen", "with_nnx"], ["with_linen", "with_nnx", "with_haiku", "with_equinox"]
    ),
)
def test_a_library_is_scored_pruned_and_audited(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    audit, mask = _load(name).main()
    kept = _num_kept(mask)
    assert audit.conserved and audit.residual < 1e-5
    (hidden,) = audit.units.values()
    assert hidden.incoming.size == 20 and hidden.residual < 1e-5
    assert kept == 15_880 - int(0.99 * 15_880)
    printed = capsys.readouterr().out
    assert f"{kept} of 15880 weights kept, collapsed: False" in printed
    assert (
        f"{kept} of 15880 weights kept, collapsed: False" in (EXAMPLES / f"{name}.py").read_text()
    )


@pytest.mark.slow
def test_the_same_weights_give_the_same_mask_in_every_library() -> None:
    """Prunes an MLP of widths 6-8-3, written in the layout and with the names of each library."""
    rng = np.random.default_rng(0)
    w1, b1, w2 = (jnp.asarray(rng.random(shape, np.float32)) for shape in ((6, 8), (8,), (8, 3)))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(3, use_bias=False, name="head")(nn.relu(nn.Dense(8, name="fc")(x)))

    linen = {"fc": {"kernel": w1, "bias": b1}, "head": {"kernel": w2}}

    class Nnx(nnx.Module):
        def __init__(self) -> None:
            self.fc = nnx.Linear(6, 8, rngs=nnx.Rngs(0))
            self.head = nnx.Linear(8, 3, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.head(nnx.relu(self.fc(x)))

    module = Nnx()
    module.fc.kernel[...], module.fc.bias[...], module.head.kernel[...] = w1, b1, w2
    graph, state = nnx.split(module)

    haiku = hk.without_apply_rng(
        hk.transform(
            lambda x: hk.Linear(3, with_bias=False, name="head")(
                jax.nn.relu(hk.Linear(8, name="fc")(x))
            )
        )
    )

    def equinox(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: params["head"](jax.nn.relu(params["fc"](x))))(x)

    layers = {
        "fc": eqx.nn.Linear(6, 8, key=jax.random.key(0)),
        "head": eqx.nn.Linear(8, 3, use_bias=False, key=jax.random.key(0)),
    }
    where = lambda tree: (tree["fc"].weight, tree["fc"].bias, tree["head"].weight)
    layers, static = eqx.partition(
        eqx.tree_at(where, layers, (w1.T, b1, w2.T)), eqx.is_inexact_array
    )

    networks = {
        "linen": (lambda p, x: Linen().apply({"params": p}, x), linen),
        "nnx": (lambda p, x: nnx.merge(graph, p)(x), state),
        "haiku": (haiku.apply, {"fc": {"w": w1, "b": b1}, "head": {"w": w2}}),
        "equinox": (lambda p, x: equinox(eqx.combine(p, static), x), layers),
    }
    found = {}
    for name, (apply_fn, params) in networks.items():
        mask, _ = pruning.prune(
            scores.synflow(apply_fn, (6,)), params, compression=6, num_iterations=10
        )
        kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
        assert [kernel.size for kernel in kernels] == [48, 24], trees.names(mask)
        found[name] = [kernel.T if name == "equinox" else kernel for kernel in kernels]
    for name in ("nnx", "haiku", "equinox"):
        for ours, theirs in zip(found["linen"], found[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert sum(kernel.sum() for kernel in found["linen"]) == 72 - int((1 - 1 / 6) * 72)


@pytest.mark.slow
def test_depthwise() -> None:
    audit, fractions = _load("depthwise").main()
    assert audit.conserved
    assert min(fractions["synflow"].values()) > 0 and min(fractions["magnitude"].values()) == 0
    sizes = {"stem": 432, "block1_depthwise": 144, "head": 640}
    for layer, size in sizes.items():
        assert fractions["certified, to the maximum"][f"{layer}/kernel"] == pytest.approx(1 / size)


@pytest.mark.slow
def test_vision_transformer() -> None:
    audit, linear, kept = _load("vision_transformer").main()
    assert {"rsqrt", "tanh", "integer_pow"} <= set(audit.broken) and audit.residual > 0.1
    assert linear.conserved and linear.residual < 1e-5
    assert min(kept) > 0 and sum(kept) == 14_144 - int(0.99 * 14_144)


@pytest.mark.slow
def test_architecture_search() -> None:
    """Checks the ranking of two networks without batch norm."""
    found = _load("architecture_search").main(("conv", "fc"))
    assert {name: weights for name, weights, _ in found} == {"conv": 337_760, "fc": 348_200}
    proxies = [proxy for _, _, proxy in found]
    assert proxies == sorted(proxies, reverse=True) and np.isfinite(proxies).all()


@pytest.mark.slow
def test_norms_are_the_identity_for_the_search() -> None:
    example = _load("architecture_search")
    params = {
        "conv": {"kernel": jnp.ones((2, 2))},
        "norm": {"scale": jnp.full(2, 3.0), "bias": jnp.full(2, 4.0)},
    }
    plain, statistics = example.norm_free(
        params, {"norm": {"mean": jnp.full(2, 5.0), "var": jnp.full(2, 6.0)}}
    )
    assert plain["norm"]["scale"].tolist() == [1, 1] and plain["norm"]["bias"].tolist() == [0, 0]
    norm_statistics = statistics["norm"]
    assert norm_statistics["mean"].tolist() == [0, 0]
    assert norm_statistics["var"].tolist() == [1, 1]
    assert (plain["conv"]["kernel"] == params["conv"]["kernel"]).all()


def test_the_code_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Executes all Python blocks in order, each with the names that earlier blocks defined."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names = {"__name__": "readme"}
    for block in blocks[:2]:
        exec(block, names)
    printed = capsys.readouterr().out.strip()
    assert f"This prints `{printed}`" in readme
    sizes = trees.sizes(names["mask"])
    kept = _num_kept(names["mask"])
    assert f"{kept:,} of {sum(sizes):,} weights are left in three layers" in readme
    assert len(sizes) == 3
    assert jax.tree.structure(names["scores"]) == jax.tree.structure(names["mask"])

    exec(blocks[2], names)
    assert _num_kept(names["mask"]) == sum(sizes) - int(0.9 * sum(sizes))
    printed = capsys.readouterr().out.strip()
    assert f"This prints `{printed}`" in readme


@pytest.mark.parametrize("page", slow_except(["add_a_rule"], ["add_a_rule", "own_models"]))
def test_the_code_in_a_guide_runs(
    page: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executes all Python blocks of a page in order, as one program."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)  # own_models.md writes a mask under runs/
    names = {"__name__": page}
    for block in blocks:
        exec(block, names)
    assert 0 < _num_kept(names["mask"]) < sum(trees.sizes(names["mask"]))
