"""A small vision transformer: where SynFlow's law ends, and what can be done about it.

    python examples/vision_transformer.py

Saliency is conserved where every step is homogeneous of degree one. A transformer has three kinds that are not: layer
norm, softmax and GELU. The audit names their steps (integer_pow, rsqrt, tanh, ...), and its cuts do not agree:
residual 1. SynFlow scores weights, so let the steps that only normalise be replaced, for the scoring alone, by what
they are for an input of ones: attention by an average over the tokens, and a norm by its scale, GELU by ReLU. On that
form every cut agrees to 4e-7, and at compression 100 each layer keeps weights.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

import synflow_jax
from synflow_jax import analysis, masking, trees


class Transformer(nn.Module):
    """Patches of 4x4 of 16x16 images, two blocks, an average over the tokens.

    linear: every norm, softmax and GELU is replaced as the module's docstring says; same parameters.
    """

    linear: bool = False
    width: int = 32
    num_heads: int = 2
    num_blocks: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """[batch, 16, 16, 3] -> [batch, 10]."""
        x = nn.Conv(self.width, (4, 4), strides=4, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        for i in range(1, self.num_blocks + 1):
            x = x + self.attention(self.norm(x, f"block{i}_norm1"), f"block{i}")
            y = nn.Dense(2 * self.width, name=f"block{i}_fc1")(self.norm(x, f"block{i}_norm2"))
            y = nn.relu(y) if self.linear else nn.gelu(y)
            x = x + nn.Dense(self.width, name=f"block{i}_fc2")(y)
        return nn.Dense(10, name="head")(jnp.mean(self.norm(x, "norm"), axis=1))

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """Layer norm, or its scale and bias alone."""
        scale = self.param(f"{name}_scale", nn.initializers.ones, (x.shape[-1],))[None, None]
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (x.shape[-1],))[None, None]
        if self.linear:
            return x * scale + bias
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return (
            centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + 1e-6) * scale
            + bias
        )

    def attention(self, x: jax.Array, name: str) -> jax.Array:
        """Self-attention, or the average of the tokens' values."""
        heads = (self.num_heads, self.width // self.num_heads)
        query, key, value = (
            nn.Dense(self.width, name=f"{name}_{part}")(x).reshape(*x.shape[:2], *heads)
            for part in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / heads[1] ** 0.5
        weights = jnp.full_like(logits, 1 / x.shape[1]) if self.linear else jax.nn.softmax(logits)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value).reshape(x.shape)
        return nn.Dense(self.width, name=f"{name}_out")(mixed)


def main() -> tuple[analysis.Conservation, analysis.Conservation, list[int]]:
    """The audits of the transformer and of its linear form, and the weights that are left in each layer at the end."""
    shape = (16, 16, 3)
    params = Transformer().init(jax.random.key(0), jnp.ones((1, *shape)))["params"]
    apply = lambda linear, params, x: Transformer(linear=linear).apply({"params": params}, x)
    true_fn, linear_fn = functools.partial(apply, False), functools.partial(apply, True)

    audit = synflow_jax.conservation(true_fn, params, shape)
    print(
        f"the transformer: largest residual {audit.residual:.2g}; not homogeneous: {', '.join(audit.broken)}"
    )
    linear = synflow_jax.conservation(linear_fn, params, shape)
    print(
        f"its linear form: largest residual {linear.residual:.2g}; not homogeneous: {', '.join(linear.broken) or '-'}"
    )

    # Queries and keys have no part in the linear form: they are not on its paths, and are left out of the pruning.
    mask = synflow_jax.prunable(params, exclude="query|key")
    score_fn = synflow_jax.synflow(linear_fn, shape)
    mask, _ = synflow_jax.prune(score_fn, params, mask=mask, compression=100)
    kept = [int(n) for n in masking.count_kept(mask)]
    print(f"compression 100: {sum(kept)} of {sum(trees.sizes(mask))} weights kept, "
          f"collapsed: {synflow_jax.collapsed(linear_fn, shape, params, mask)}")  # fmt: skip
    for name, number in zip(trees.names(mask), kept, strict=True):
        print(f"  {name:<22} {number:>5}")
    return audit, linear, kept


if __name__ == "__main__":
    main()
