"""Prunes and audits a depthwise-separable network, such as MobileNet.

    python examples/depthwise.py

A depthwise kernel multiplies each channel by itself. That is a convolution, so saliency is
conserved through it too: the audit finds no residual. Depthwise layers are the smallest, so their
weights score highest. At compression 30 SynFlow keeps 5 to 15 % of each depthwise layer and 1 to
5 % of each 1x1 layer, and the network does not collapse. Magnitude keeps a fifth of the depthwise
layers and empties the stem, the last 1x1 layer and the head: the network has collapsed. The
certified schedule goes down to one weight per layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import show

import synflow_jax
from synflow_jax import analysis, certified

INPUT_SHAPE = (16, 16, 3)


class Network(nn.Module):
    """A stem, and three blocks of a 3x3 depthwise and a 1x1 convolution."""

    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [batch, 16, 16, 3] to [batch, 10]."""
        x = nn.relu(nn.Conv(16, (3, 3), use_bias=False, name="stem")(x))
        for i, width in enumerate(self.widths, 1):
            channels = x.shape[-1]
            depthwise = nn.Conv(
                channels,
                kernel_size=(3, 3),
                strides=2 if i > 1 else 1,
                feature_group_count=channels,  # one group per channel
                use_bias=False,
                name=f"block{i}_depthwise",
            )
            pointwise = nn.Conv(width, (1, 1), use_bias=False, name=f"block{i}_pointwise")
            x = nn.relu(depthwise(x))
            x = nn.relu(pointwise(x))
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(10, use_bias=False, name="head")(x)


def main(
    widths: tuple[int, ...] = (16, 32, 64),
) -> tuple[analysis.Conservation, dict[str, dict[str, float]]]:
    """Returns the audit, and for each rule the fraction kept in each layer."""
    model = Network(widths)
    params = model.init(jax.random.key(0), jnp.ones((1, *INPUT_SHAPE)))["params"]
    apply_fn = lambda params, x: model.apply({"params": params}, x)
    audit = synflow_jax.conservation(apply_fn, params, input_shape=INPUT_SHAPE)
    print(audit)

    synflow = synflow_jax.synflow(apply_fn, INPUT_SHAPE)
    magnitude = synflow_jax.magnitude()
    everything = synflow_jax.prunable(params)
    maximum = synflow_jax.max_compression(apply_fn, params, everything, INPUT_SHAPE)
    masks = {
        "synflow": synflow_jax.prune(synflow, params, compression=30)[0],
        "magnitude": synflow_jax.prune(magnitude, params, compression=30, num_iterations=1)[0],
        "certified, to the maximum": certified.prune(synflow, params, compression=maximum)[0],
    }

    fractions = {}
    for name, mask in masks.items():
        collapsed = synflow_jax.collapsed(apply_fn, params, mask, INPUT_SHAPE)
        print(f"\n{name}: collapsed: {collapsed}")
        fractions[name] = show.layers(mask)
    return audit, fractions


if __name__ == "__main__":
    main()
