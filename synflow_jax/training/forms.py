"""Chooses the form in which a pruned network trains: masked, or as a smaller dense network.

Both are the same function. The choice is made after pruning and from counts alone, so that it is
the same on every machine and at every start.
"""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import flax.errors
import jax
import jax.numpy as jnp

from synflow_jax import analysis, models, trees
from synflow_jax.models import Network
from synflow_jax.trees import Params, Tree
from synflow_jax.units import Collapsed
from synflow_jax.units.compaction import Plan

# VGG-16 at batch 128 on two CPU cores: with 64 % of the multiply-adds a step takes 77 % of the
# processor time of the masked one, with 20 % it takes 30 %. Above 90 % a short run would lose more
# time to planning and compiling than it gains.
PAYS_BELOW = 0.9


class Reason(enum.Enum):
    """Why a form was chosen."""

    ASKED = enum.auto()  # the caller said which
    COLLAPSED = enum.auto()  # a collapsed network has no smaller form
    TOO_LARGE = enum.auto()  # the smaller network needs almost as many multiply-adds
    OWN_OPTIMIZER = enum.auto()  # a user's optimizer may look at whole layers
    DROPOUT = enum.auto()  # it would draw other numbers in smaller layers
    REWOUND = enum.auto()  # the network starts from a state after initialization
    PAYS = enum.auto()  # the smaller network needs clearly fewer multiply-adds


class Form(NamedTuple):
    """The network that is trained, and how it was chosen.

    Attributes:
      network: the one that is trained.
      plan: maps the full network to the compact one; None if the masked network is trained.
      size: recorded in rows and checkpoints, as plain values. `full`, `kept` and `compact` each
        hold `weights` (of kernels) and `multiply_adds` (per example): of the whole network, of the
        weights that the mask keeps, and of the smaller dense network (None if none was made).
        `widths` holds the number of outputs of each trained layer.
      reason: why this form was chosen.
    """

    network: Network
    plan: Plan | None
    size: dict[str, Any]
    reason: Reason

    @property
    def compact(self) -> bool:
        """Returns whether the smaller network is trained."""
        return self.plan is not None

    def explain(self) -> str:
        """Returns the reason in words, as the report and error messages print it."""
        if self.reason in (Reason.PAYS, Reason.TOO_LARGE):
            percent = f"{100 * _fraction(self.size):.3g} % of the multiply-adds"
        match self.reason:
            case Reason.ASKED:
                return f"train.compact={self.compact}"
            case Reason.COLLAPSED:
                return "the network has collapsed, and a collapsed network has no smaller form"
            case Reason.TOO_LARGE:
                return f"the smaller network would still need {percent}"
            case Reason.OWN_OPTIMIZER:
                return (
                    "train.make_optimizer may look at whole layers; train.compact=True trains the "
                    "smaller network all the same"
                )
            case Reason.DROPOUT:
                return (
                    "dropout would draw other numbers in the smaller network; train.compact=True "
                    "trains it all the same"
                )
            case Reason.REWOUND:
                return "it was rewound to a state after initialization"
            case Reason.PAYS:
                return f"it needs {percent}"


def choose(network: Network, compact: bool | None = None, *, own_optimizer: bool = False) -> Form:
    """Chooses the network to train: the compact one if it is asked for, or by default if it pays.

    By default the compact network is taken if it needs less than `PAYS_BELOW` of the full network's
    multiply-adds, and if its training is the same up to rounding. It is not the same where dropout
    would draw other numbers, or where a user's optimizer looks at whole layers.

    Args:
      network: with its mask.
      compact: True, False, or None to choose.
      own_optimizer: whether the optimizer may treat weights of a layer together.

    Raises:
      ValueError: compact is True, and the network has collapsed.

    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> mask = trees.prunable(params)
    >>> mask["conv2"]["kernel"] = mask["conv2"]["kernel"].at[:, :, 5:].set(False)
    >>> form = choose(Network(model, params, batch_stats, mask, (8, 8, 1)))

    27 of the 32 channels of conv1 are not read, and the compact network has none of them:

    >>> form.compact, form.size["widths"]
    (True, {'conv1': 5, 'conv2': 32, 'head': 10})
    >>> form.size["full"], form.size["compact"]
    ({'weights': 29984, 'multiply_adds': 628736}, {'weights': 21965, 'multiply_adds': 115520})
    """
    if compact is False:
        return Form(network, None, _size(network, None, compact=False), Reason.ASKED)
    try:
        small = models.compact(network)
    except Collapsed as error:
        if compact:
            raise ValueError(
                f"train.compact=True cannot be done. {error} Without train.compact the masked "
                "network is trained as it is."
            ) from error
        return Form(network, None, _size(network, None, compact=False), Reason.COLLAPSED)
    size = _size(network, small, compact=True)
    # A user who asks for the compact network gets it, whether or not it pays.
    against = None if compact else _reason_against(network, size, own_optimizer)
    if against is not None:
        return Form(network, None, _size(network, small, compact=False), against)
    return Form(small.network, small.plan, size, Reason.ASKED if compact else Reason.PAYS)


def _reason_against(network: Network, size: dict[str, Any], own_optimizer: bool) -> Reason | None:
    """Returns why the compact network is not the default here, or None if it is."""
    if _fraction(size) >= PAYS_BELOW:
        return Reason.TOO_LARGE
    if own_optimizer:
        return Reason.OWN_OPTIMIZER
    if _draws(network):
        return Reason.DROPOUT
    return None


def _fraction(size: dict[str, Any]) -> float:
    """Returns the multiply-adds of the compact network as a fraction of the full network's."""
    fraction: float = size["compact"]["multiply_adds"] / size["full"]["multiply_adds"]
    return fraction


def _size(network: Network, small: models.Compact | None, *, compact: bool) -> dict[str, Any]:
    """Counts weights and multiply-adds; see `Form.size`. `compact` says which one is trained."""
    kernels = trees.prunable(network.params)
    positions = models.output_positions(network.model, network.input_shape)
    kept = _kept(kernels, network.mask)
    num_kept, _ = analysis.multiply_adds(kept, {})
    kept_multiply_adds, _ = analysis.multiply_adds(kept, positions)
    size: dict[str, Any] = {
        "full": _counts(kernels, positions),
        "kept": {"weights": num_kept, "multiply_adds": kept_multiply_adds},
        "compact": None,
    }
    trained = kernels
    if small is not None:
        left = trees.prunable(small.network.params)
        small_positions = models.output_positions(small.network.model, network.input_shape)
        size["compact"] = _counts(left, small_positions)
        trained = left if compact else kernels
    widths = {}
    for name, leaf in zip(trees.names(trained), jax.tree.leaves(trained), strict=True):
        widths[name.removesuffix("/kernel")] = leaf.shape[-1]
    return {**size, "widths": widths}


def _kept(kernels: Tree, mask: Tree) -> Tree:
    """Returns what is kept of each kernel. Kernels that may not be pruned are kept whole."""
    # By name, since the mask has holes where the kernels may not be pruned.
    by_name = trees.by_name(mask)

    def kept(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return by_name.get(trees.path_name(path), leaf)

    return jax.tree_util.tree_map_with_path(kept, kernels)


def _counts(kernels: Tree, positions: dict[str, int]) -> dict[str, int]:
    """Counts the weights of dense kernels, and their multiply-adds for one example."""
    _, multiply_adds = analysis.multiply_adds(kernels, positions)
    return {"weights": sum(trees.sizes(kernels)), "multiply_adds": multiply_adds}


def _draws(network: Network) -> bool:
    """Returns whether the network draws random numbers while it trains."""

    def apply(params: Params, batch_stats: Tree, x: jax.Array) -> Any:
        collections = network._replace(params=params, batch_stats=batch_stats).variables()
        return network.model.apply(collections, x, train=True, mutable=["batch_stats"])

    x = jnp.zeros((1, *network.input_shape))
    # Shapes are enough: Flax asks for the key while it traces.
    try:
        jax.eval_shape(apply, network.params, network.batch_stats, x)
    except flax.errors.InvalidRngError:  # no key was given, and it asked for one
        return True
    return False
