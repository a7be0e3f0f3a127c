"""A depthwise-separable network (as MobileNet's): what SynFlow does to it, and what the audit says.

    python examples/depthwise.py

Depthwise kernels multiply channels one by one. They are convolutions, so saliency is conserved through them too: the
audit finds no residual. They are the smallest layers, so that their weights score highest: at compression 30 SynFlow
keeps 5 to 15 % of each of them and 1 to 5 % of the 1x1 layers, and the network is whole; magnitude keeps a fifth of
them, empties the stem, the last 1x1 layer and the head, and has collapsed. The certified schedule goes down to one
weight a layer.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

import synflow_jax
from synflow_jax import analysis, masking, trees


class Network(nn.Module):
    """A stem and three blocks of a 3x3 depthwise and a 1x1 convolution, on 16x16 images."""

    widths: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, 16, 16, 3] -> [batch, 10]."""
        x = nn.relu(nn.Conv(16, (3, 3), use_bias=False, name="stem")(x))
        for i, width in enumerate(self.widths, 1):
            channels = x.shape[-1]
            strides = 2 if i > 1 else 1
            depthwise = nn.Conv(
                channels,
                (3, 3),
                strides,
                feature_group_count=channels,
                use_bias=False,
                name=f"block{i}_depthwise",
            )
            x = nn.relu(depthwise(x))
            x = nn.relu(nn.Conv(width, (1, 1), use_bias=False, name=f"block{i}_pointwise")(x))
        return nn.Dense(10, use_bias=False, name="head")(jnp.mean(x, axis=(1, 2)))


def main(
    widths: tuple[int, ...] = (16, 32, 64),
) -> tuple[analysis.Conservation, dict[str, dict[str, float]]]:
    """The audit, and for each rule the fraction kept in each layer."""
    model, shape = Network(widths), (16, 16, 3)
    params = model.init(jax.random.key(0), jnp.ones((1, *shape)))["params"]
    apply_fn = lambda params, x: model.apply({"params": params}, x)
    audit = synflow_jax.conservation(apply_fn, params, shape)
    print(audit)

    score_fn = synflow_jax.synflow(apply_fn, shape)
    runs = {
        "synflow": {"score_fn": score_fn, "compression": 30},
        "magnitude": {"score_fn": synflow_jax.magnitude(), "compression": 30, "num_iterations": 1},
        "certified, to the maximum": {
            "score_fn": score_fn,
            "compression": synflow_jax.max_compression(
                apply_fn, shape, synflow_jax.prunable(params), params
            ),
            "schedule": "certified",
        },
    }
    fractions = {}
    for name, options in runs.items():
        mask, _ = synflow_jax.prune(params=params, **options)
        names, sizes = trees.names(mask), trees.sizes(mask)
        kept = [int(n) for n in masking.count_kept(mask)]
        fractions[name] = {n: k / size for n, k, size in zip(names, kept, sizes, strict=True)}
        print(f"\n{name}: collapsed: {synflow_jax.collapsed(apply_fn, shape, params, mask)}")
        for layer, k, size in zip(names, kept, sizes, strict=True):
            print(f"  {layer:<26} {k:>6} of {size:>6}")
    return audit, fractions


if __name__ == "__main__":
    main()
