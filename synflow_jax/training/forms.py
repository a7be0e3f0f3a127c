"""In which form a pruned network trains: masked, or as a smaller dense network that is the same function.

The choice is made after pruning from counts alone, so that it is the same on every machine and at every start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax import analysis, models, trees
from synflow_jax.trees import Mask, Params, Tree
from synflow_jax.units.compaction import Plan

# VGG-16 at batch 128 on two CPU cores: with 64 % of the multiply-adds a step takes 77 % of the masked one's processor
# time, with 20 % 30 %. Between 90 % and 100 % there is less to win than planning and another program cost a short run.
PAYS_BELOW = 0.9


class Form(NamedTuple):
    """The network that is trained, and what is said of it.

    Attributes:
      model, params, batch_stats, mask: of the network that is trained.
      plan: the map from the full network to the compact one; None where the masked network is trained.
      size: what rows and checkpoints hold of it, as plain values. `weights` are those of kernels, `multiply_adds` those
        of one example; `full`: of the whole network, `kept`: of the weights that the mask keeps, `compact`: of the
        smaller network, as a dense one (None where none was made). `widths`: outputs of each layer that is trained.
      reason: why this form, in words.
    """

    model: nn.Module
    params: Params
    batch_stats: Tree
    mask: Mask
    plan: Plan | None
    size: dict[str, Any]
    reason: str

    @property
    def compact(self) -> bool:
        """Whether the smaller network is trained."""
        return self.plan is not None


def choose(
    model: nn.Module,
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    input_shape: tuple[int, ...],
    compact: bool | None = None,
    *,
    own_optimizer: bool = False,
) -> Form:
    """The network to train: the compact one if it is asked for, or if nothing is said and it pays.

    Unless told otherwise, the compact network is taken where it needs less than `PAYS_BELOW` of the full one's
    multiply-adds and where the training is the same up to rounding: dropout would draw other numbers, and a user's
    optimizer may look at whole layers.

    Args:
      model, params, batch_stats, mask, input_shape: as `models.compact` takes them.
      compact: True, False, or None to choose.
      own_optimizer: it is not known to treat every weight on its own.

    Raises:
      ValueError: compact is True, and the network has collapsed.

    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> mask = trees.prunable(params)
    >>> mask["conv2"]["kernel"] = mask["conv2"]["kernel"].at[:, :, 5:].set(False)  # 27 channels are not read
    >>> form = choose(model, params, batch_stats, mask, (8, 8, 1))
    >>> form.compact, form.size["widths"]
    (True, {'conv1': 5, 'conv2': 32, 'head': 10})
    >>> form.size["full"], form.size["compact"]
    ({'weights': 29984, 'multiply_adds': 628736}, {'weights': 21965, 'multiply_adds': 115520})
    """

    def masked(reason: str, small: models.Compact | None = None) -> Form:
        size = _size(model, params, mask, input_shape, small, compact=False)
        return Form(model, params, batch_stats, mask, None, size, reason)

    if compact is False:
        return masked("train.compact=False")
    try:
        small = models.compact(model, params, batch_stats, mask, input_shape)
    except ValueError as error:
        if "collapsed" not in str(error):
            raise
        if compact:
            raise ValueError(
                f"train.compact=True, but {error} Without train.compact the masked network is trained as it is."
            ) from error
        return masked("the network has collapsed, and has no smaller form")
    size = _size(model, params, mask, input_shape, small, compact=True)
    if not compact:
        fraction = size["compact"]["multiply_adds"] / size["full"]["multiply_adds"]
        kept_out = None
        if fraction >= PAYS_BELOW:
            kept_out = f"the smaller network needs {100 * fraction:.3g} % of the multiply-adds: too many to pay"
        elif own_optimizer:
            kept_out = "an optimizer of one's own may see whole layers: train.compact=True trains the smaller network"
        elif _draws(model, params, batch_stats, input_shape):
            kept_out = "its dropout would draw other numbers: train.compact=True trains the smaller network"
        if kept_out is not None:
            return masked(kept_out, small)
        reason = f"{100 * fraction:.3g} % of the multiply-adds"
    else:
        reason = "train.compact=True"
    return Form(small.model, small.params, small.batch_stats, small.mask, small.plan, size, reason)


def _size(
    model: nn.Module,
    params: Params,
    mask: Mask,
    input_shape: tuple[int, ...],
    small: models.Compact | None,
    *,
    compact: bool,
) -> dict[str, Any]:
    kernels, positions = trees.prunable(params), models.output_positions(model, input_shape)
    pruned = dict(zip(trees.names(mask), jax.tree.leaves(mask), strict=True))
    # Kernels that may not be pruned (a hole in the mask) are kept.
    kept = jax.tree_util.tree_map_with_path(
        lambda path, leaf: pruned.get(trees.path_name(path), leaf), kernels
    )
    counts = lambda weights, multiply_adds: {"weights": weights, "multiply_adds": multiply_adds}
    size: dict[str, Any] = {
        "full": counts(sum(trees.sizes(kernels)), analysis.multiply_adds(kernels, positions)[1]),
        "kept": counts(
            analysis.multiply_adds(kept, {})[0], analysis.multiply_adds(kept, positions)[0]
        ),
        "compact": None,
    }
    trained = kernels
    if small is not None:
        left = trees.prunable(small.params)
        positions = models.output_positions(small.model, input_shape)
        size["compact"] = counts(sum(trees.sizes(left)), analysis.multiply_adds(left, positions)[1])
        trained = left if compact else kernels
    widths = zip(trees.names(trained), jax.tree.leaves(trained), strict=True)
    return {
        **size,
        "widths": {name.removesuffix("/kernel"): leaf.shape[-1] for name, leaf in widths},
    }


def _draws(
    model: nn.Module, params: Params, batch_stats: Tree, input_shape: tuple[int, ...]
) -> bool:
    """Whether the network draws random numbers while it trains."""

    def apply(params: Params, batch_stats: Tree, x: jax.Array) -> Any:
        variables = (
            {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
        )
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    try:
        jax.eval_shape(apply, params, batch_stats, jnp.zeros((1, *input_shape)))
    except flax.errors.InvalidRngError:
        return True
    return False
