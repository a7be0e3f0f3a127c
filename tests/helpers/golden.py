"""Reads golden files: scores and masks that the authors' implementation computed on known weights.

NumPy draws the weights and the inputs from the seed in the file, so a file holds results only.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import models, scores, trees

_MODELS = {"fc": "fc", "conv": "conv", "resnet18": "tiny_resnet18"}


def model_name(net: str) -> str:
    """Returns our name of a reference network, such as cifar_vgg16_bn for vgg16_bn."""
    return _MODELS.get(net, f"cifar_{net}")


class Golden(NamedTuple):
    """Holds a golden file and the network that it describes, in our layout."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    params: trees.Params
    mask: trees.Mask
    apply_fn: scores.ApplyFn
    synflow_fn: scores.ApplyFn
    input_shape: tuple[int, ...]
    inputs: np.ndarray  # NHWC
    labels: np.ndarray

    def score_fn(self, rule: str, num_batches: int = 1, *, scaled: bool = True) -> scores.ScoreFn:
        """Returns the rule, scored on all inputs in `num_batches` equal batches."""
        dtype = jax.tree.leaves(self.params)[0].dtype
        batches = [
            (jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32))
            for x, y in zip(
                np.split(self.inputs, num_batches), np.split(self.labels, num_batches), strict=True
            )
        ]
        return {
            "magnitude": lambda: scores.magnitude(),
            "synflow": lambda: scores.synflow(self.synflow_fn, self.input_shape, scaled=scaled),
            "snip": lambda: scores.snip(scores.cross_entropy(self.apply_fn), batches),
            "grasp": lambda: scores.grasp(
                scores.cross_entropy(self.apply_fn, temperature=200), batches
            ),
        }[rule]()

    def in_reference_order(self, tree: trees.Tree) -> list[np.ndarray]:
        """Flattens each prunable leaf in the layout of the reference."""
        shapes = [shape for _, shape in self.meta["layers"]]
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
        return [
            _to_reference(leaf, shape, i, shapes)
            for i, (leaf, shape) in enumerate(zip(leaves, shapes, strict=True))
        ]


def load(path: pathlib.Path, dtype: Any) -> Golden:
    """Reads a golden file. Its weights are drawn anew, checked by hash and cast to `dtype`."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    shapes = [tuple(shape) for _, shape in meta["layers"]]
    rng = np.random.Generator(np.random.PCG64(meta["seed"]))
    weights = [
        (rng.standard_normal(shape) * np.sqrt(2 / math.prod(shape[1:]))).astype(np.float32)
        for shape in shapes
    ]
    digest = hashlib.sha256(b"".join(w.tobytes() for w in weights)).hexdigest()
    assert digest == meta["weights_sha256"], (
        "NumPy drew other weights than the golden file was made with"
    )
    inputs = (
        rng.standard_normal((16, *meta["input_shape_chw"])).astype(np.float32).transpose(0, 2, 3, 1)
    )
    labels = rng.integers(0, meta["num_classes"], 16)

    model = models.create(model_name(meta["net"]), meta["num_classes"])
    channels, *image = meta["input_shape_chw"]
    input_shape = (*image, channels)
    blank, batch_stats = jax.tree_util.tree_map_with_path(
        # All biases 0, norms at their initial values; the kernels follow.
        lambda path, leaf: (jnp.ones if path[-1].key in ("scale", "var") else jnp.zeros)(
            leaf.shape, leaf.dtype
        ),
        jax.eval_shape(lambda key: models.init(model, input_shape, key), jax.random.key(0)),
    )
    mask = trees.prunable(blank)
    kernels = jax.tree.structure(mask).unflatten(
        [_from_reference(w, i, shapes) for i, w in enumerate(weights)]
    )
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), trees.merge(kernels, blank))
    batch_stats = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), batch_stats)
    return Golden(
        meta,
        arrays,
        params,
        mask,
        models.eval_fn(model, batch_stats),
        models.synflow_fn(model, batch_stats),
        input_shape,
        inputs,
        labels,
    )


def _unflattened(i: int, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Returns (out, channels, height, width) if layer `i` is dense and reads flattened maps.

    The reference flattens channels first, our networks flatten them last.
    """
    out, size = shapes[i][:2]
    before = shapes[i - 1] if i else (0,)
    if len(shapes[i]) == 2 and len(before) == 4 and size != before[0]:
        side = math.isqrt(size // before[0])
        return out, before[0], side, side
    return None


def _from_reference(weight: np.ndarray, i: int, shapes: list[tuple[int, ...]]) -> np.ndarray:
    maps = _unflattened(i, shapes)
    if maps is not None:
        return weight.reshape(maps).transpose(2, 3, 1, 0).reshape(-1, maps[0])
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


def _to_reference(
    leaf: np.ndarray, shape: tuple[int, ...], i: int, shapes: list[tuple[int, ...]]
) -> np.ndarray:
    maps = _unflattened(i, shapes)
    if maps is not None:
        out, channels, height, width = maps
        leaf = leaf.reshape(height, width, channels, out).transpose(3, 2, 0, 1)
    else:
        leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
    assert leaf.size == math.prod(shape)
    return leaf.reshape(-1)
