"""A network as a compiled-anywhere program, which runs with JAX alone."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

from synflow_jax import models, trees
from synflow_jax.trees import Mask, Params, Tree

PLATFORMS = ("cpu", "cuda", "tpu")


def to_jax(
    model: nn.Module,
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    input_shape: tuple[int, ...],
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """The network in evaluation mode as a serialized `jax.export` program (StableHLO), its masked weights inside.

    The program takes float32 images [batch, height, width, channels], normalised as in training, and gives logits
    [batch, num_classes], for any batch size. It runs with `jax` and `flatbuffers` alone, without this package:

        from jax import export
        logits = export.deserialize(open("network.jax", "rb").read()).call(images)

    Args:
      model, params, batch_stats, mask, input_shape: the network, full or compact.
      platforms: what it can run on; the form of the convolutions is chosen when it is compiled there.

    Raises:
      ValueError: the mask does not fit, or a platform is unknown.
    """
    unknown = sorted(set(platforms) - {*PLATFORMS, "rocm"})
    if unknown or not platforms:
        raise ValueError(
            f"platforms={tuple(platforms)} must be some of {', '.join(PLATFORMS)} and rocm."
        )
    trees.check_mask(mask, params)
    weights, apply_fn = trees.apply_mask(params, mask), models.eval_fn(model, batch_stats)
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *input_shape), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda images: apply_fn(weights, images)), platforms=platforms
    )(images)
    return bytes(exported.serialize())
