"""Writes a network as a program that runs with JAX alone, on any platform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.export
import jax.numpy as jnp

from synflow_jax import models, trees
from synflow_jax.models import Network

PLATFORMS = ("cpu", "cuda", "tpu")


def to_jax(network: Network, *, platforms: Sequence[str] = PLATFORMS) -> bytes:
    """Serializes a network in evaluation mode as a program of `jax.export` (StableHLO).

    The masked weights are inside. The program takes float32 images [batch, height, width, channels]
    of any batch size, normalised as in training, and returns logits [batch, num_classes]. It needs
    `jax` and `flatbuffers`, not this package:

        from jax import export
        program = export.deserialize(bytearray(open("network.jax", "rb").read()))
        logits = program.call(images)

    Args:
      network: full or compact.
      platforms: where the program can run. It is compiled there, in the form of convolution that
        suits the platform.

    Raises:
      ValueError: the mask does not fit, or a platform is unknown.
    """
    unknown = set(platforms) - {*PLATFORMS, "rocm"}
    if unknown or not platforms:
        known = ", ".join(PLATFORMS)
        raise ValueError(f"platforms={tuple(platforms)} must be some of {known} and rocm.")
    trees.check_mask(network.mask, network.params)
    weights = trees.apply_mask(network.params, network.mask)
    apply_fn = models.eval_fn(network.model, network.batch_stats)

    @jax.jit
    def logits_of(images: jax.Array) -> jax.Array:
        return apply_fn(weights, images)

    # A symbol for the batch makes one program for every batch size.
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *network.input_shape), jnp.float32)
    with _without_locations():
        exported = jax.export.export(logits_of, platforms=platforms)(images)
    return bytes(exported.serialize())


@contextlib.contextmanager
def _without_locations() -> Iterator[None]:
    """Leaves source lines out of programs.

    They hold the paths of this machine, and would make one network a different file for each place
    that it is exported from.
    """
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)
