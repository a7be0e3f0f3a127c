"""Prunes a small vision transformer, where SynFlow's conservation law does not hold as it is.

    python examples/vision_transformer.py

Saliency is conserved where every step is homogeneous of degree one. Three kinds of steps in a
transformer are not: layer norm, softmax and GELU. The audit names their primitives (integer_pow,
rsqrt, tanh, ...), and its cuts do not agree: residual 1.

SynFlow scores weights, so for the scoring alone we replace each step that only normalises by what
it does to an input of ones: attention becomes an average over the tokens, a norm its scale and
bias, and GELU becomes ReLU. In that linear form all cuts agree to 4e-7, and at compression 100 each
layer keeps weights.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import show

import synflow_jax
from synflow_jax import analysis, masking, trees

INPUT_SHAPE = (16, 16, 3)
PATCH = (4, 4)


class Transformer(nn.Module):
    """Two blocks of attention and MLP on patches, and an average over the tokens.

    Attributes:
      linear: replaces every norm, softmax and GELU as the module's docstring says. The parameters
        are the same.
    """

    linear: bool = False
    width: int = 32
    num_heads: int = 2
    num_blocks: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps [batch, 16, 16, 3] to [batch, 10]."""
        patches = nn.Conv(self.width, PATCH, strides=PATCH, padding="VALID", name="patches")(images)
        x = patches.reshape(images.shape[0], -1, self.width)
        activation = nn.relu if self.linear else nn.gelu
        for i in range(1, self.num_blocks + 1):
            name = f"block{i}"
            y = self.norm(x, f"{name}_norm1")
            x = x + self.attention(y, name)
            y = self.norm(x, f"{name}_norm2")
            y = nn.Dense(2 * self.width, name=f"{name}_fc1")(y)
            y = activation(y)
            x = x + nn.Dense(self.width, name=f"{name}_fc2")(y)
        x = self.norm(x, "norm")
        x = jnp.mean(x, axis=1)
        return nn.Dense(10, name="head")(x)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        """Applies layer norm, or its scale and bias alone."""
        shape = (x.shape[-1],)
        # Two more axes, so that both have the rank of x: JAX may be set to refuse mixed ranks.
        scale = self.param(f"{name}_scale", nn.initializers.ones, shape)[None, None]
        bias = self.param(f"{name}_bias", nn.initializers.zeros, shape)[None, None]
        if self.linear:
            return x * scale + bias
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + 1e-6) * scale + bias

    def attention(self, x: jax.Array, name: str) -> jax.Array:
        """Applies self-attention, or averages the values of all tokens."""
        batch, num_tokens, _ = x.shape
        channels = self.width // self.num_heads
        heads = (batch, num_tokens, self.num_heads, channels)
        query = nn.Dense(self.width, name=f"{name}_query")(x).reshape(heads)
        key = nn.Dense(self.width, name=f"{name}_key")(x).reshape(heads)
        value = nn.Dense(self.width, name=f"{name}_value")(x).reshape(heads)
        logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / channels**0.5
        if self.linear:
            weights = jnp.full_like(logits, 1 / num_tokens)
        else:
            weights = jax.nn.softmax(logits)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value)
        return nn.Dense(self.width, name=f"{name}_out")(mixed.reshape(x.shape))


def apply(linear: bool, params: trees.Params, images: jax.Array) -> jax.Array:
    """Applies the transformer or its linear form."""
    return Transformer(linear=linear).apply({"params": params}, images)


def main() -> tuple[analysis.Conservation, analysis.Conservation, list[int]]:
    """Returns the audits of the transformer and its linear form, and the weights kept per layer."""
    params = Transformer().init(jax.random.key(0), jnp.ones((1, *INPUT_SHAPE)))["params"]
    true_fn = functools.partial(apply, False)
    linear_fn = functools.partial(apply, True)

    audit = synflow_jax.conservation(true_fn, params, input_shape=INPUT_SHAPE)
    linear_audit = synflow_jax.conservation(linear_fn, params, input_shape=INPUT_SHAPE)
    for name, found in (("the transformer", audit), ("its linear form", linear_audit)):
        broken = ", ".join(found.broken) or "-"
        print(f"{name}: largest residual {found.residual:.2g}; not homogeneous: {broken}")

    # Queries and keys are not on any path of the linear form, so they are not pruned.
    mask = synflow_jax.prunable(params, exclude="query|key")
    score_fn = synflow_jax.synflow(linear_fn, INPUT_SHAPE)
    mask, _ = synflow_jax.prune(score_fn, params, mask=mask, compression=100)
    collapsed = synflow_jax.collapsed(linear_fn, params, mask, INPUT_SHAPE)
    print(f"compression 100, collapsed: {collapsed}")
    show.layers(mask)
    kept = [int(number) for number in masking.count_kept(mask)]
    return audit, linear_audit, kept


if __name__ == "__main__":
    main()
