"""The networks of the paper, by name."""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from synflow_jax.models import layers
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.smaller import Compact as Compact
from synflow_jax.models.smaller import compact as compact
from synflow_jax.models.vgg import VGG, stage_widths
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Params, Tree, path_name

HEAD = "head"  # the name of the last layer of every network

_RESIDUAL = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def _widen(width: int, multiplier: float) -> int:
    return max(1, round(width * multiplier))


def _vgg(
    num_classes: int,
    width: float,
    *,
    depth: int,
    batch_norm: bool,
    hidden: tuple[int, ...],
    cifar: bool,
) -> nn.Module:
    return VGG(
        num_classes,
        widths=stage_widths(depth, width),
        batch_norm=batch_norm,
        hidden=tuple(_widen(w, width) for w in hidden),
        kernel_init=layers.KAIMING_FAN_IN if cifar else layers.KAIMING_FAN_OUT,
        dense_init=layers.KAIMING_FAN_IN if cifar else nn.initializers.normal(0.01),
    )


def _cifar_resnet(num_classes: int, width: float, *, depth: int, base: int) -> nn.Module:
    widths = tuple(_widen(base * factor, width) for factor in (1, 2, 4))
    return ResNet(
        num_classes,
        num_blocks=((depth - 2) // 6,) * 3,
        widths=widths,
        stem_width=widths[0],
        kernel_init=layers.KAIMING_FAN_IN,
        torch_head=False,
    )


def _resnet(num_classes: int, width: float, *, depth: int, wide: bool, imagenet: bool) -> nn.Module:
    bottleneck = depth >= 50
    # A wide bottleneck block doubles its inner width (torchvision's wide_resnet50_2); a wide basic block has no
    # inner width and doubles both of its convolutions (WRN-18-2 of Zagoruyko & Komodakis 2016).
    factor = 2 if wide and not bottleneck else 1
    return ResNet(
        num_classes,
        num_blocks=_RESIDUAL[depth],
        widths=tuple(_widen(factor * base, width) for base in (64, 128, 256, 512)),
        bottleneck=bottleneck,
        bottleneck_multiplier=2 if wide and bottleneck else 1,
        stem_width=_widen(64, width),
        imagenet_stem=imagenet,
    )


def _registry() -> dict[str, tuple[Callable[[int, float], nn.Module], tuple[int, int, int]]]:
    registry: dict[str, tuple[Callable[[int, float], nn.Module], tuple[int, int, int]]] = {
        "fc": (lambda classes, width: MLP(classes, (_widen(100, width),) * 5), (28, 28, 1)),
        "conv": (lambda classes, width: ConvNet(classes, (_widen(32, width),) * 2), (28, 28, 1)),
    }
    for family, side, hidden in (
        ("cifar", 32, ()),
        ("tiny", 64, (1024, 1024)),
        ("imagenet", 224, (4096, 4096)),
    ):
        for depth in (11, 13, 16, 19):
            for suffix in ("", "_bn"):
                build = functools.partial(
                    _vgg,
                    depth=depth,
                    batch_norm=bool(suffix),
                    hidden=hidden,
                    cifar=family == "cifar",
                )
                registry[f"{family}_vgg{depth}{suffix}"] = (build, (side, side, 3))
    for depth in (20, 32, 44, 56, 110, 1202):
        for prefix, base in (("", 16), ("wide_", 32)):
            build = functools.partial(_cifar_resnet, depth=depth, base=base)
            registry[f"cifar_{prefix}resnet{depth}"] = (build, (32, 32, 3))
    for family, side, wide_depths in (
        ("tiny", 64, (18, 34, 50, 101, 152)),
        ("imagenet", 224, (50, 101)),
    ):
        for wide, depths in ((False, tuple(_RESIDUAL)), (True, wide_depths)):
            for depth in depths:
                build = functools.partial(
                    _resnet, depth=depth, wide=wide, imagenet=family == "imagenet"
                )
                registry[f"{family}_{'wide_' if wide else ''}resnet{depth}"] = (
                    build,
                    (side, side, 3),
                )
    return registry


_REGISTRY = _registry()
NAMES = tuple(_REGISTRY)


def create(name: str, num_classes: int, *, width_multiplier: float = 1.0) -> nn.Module:
    """A network of the paper, by name.

    `fc`, `conv`; `cifar_vgg{11,13,16,19}[_bn]`, `tiny_vgg...`, `imagenet_vgg...`;
    `cifar_[wide_]resnet{20,32,44,56,110,1202}`; `tiny_[wide_]resnet{18,34,50,101,152}` (also used for ResNet-18
    on CIFAR); `imagenet_resnet{18,34,50,101,152}`, `imagenet_wide_resnet{50,101}`. `NAMES` lists them.

    The wide CIFAR networks have twice the channels, wide bottleneck blocks twice the inner channels. The
    published wide ResNet-18 was never widened (its basic block ignored its width); ours has twice the
    channels in every block.

    Args:
      name: see above.
      num_classes: width of the head.
      width_multiplier: scales every hidden width.

    Returns:
      A Linen module: `module.apply(variables, x [batch, height, width, channels], train=False)` -> logits.

    Raises:
      ValueError: the name is unknown, or a number is not positive.
    """
    _check_name(name)
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be at least 1.")
    if not 0 < width_multiplier < float("inf"):
        raise ValueError(f"width_multiplier={width_multiplier} must be positive and finite.")
    return _REGISTRY[name][0](num_classes, width_multiplier)


def default_input_shape(name: str) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the published network `name` was run on."""
    _check_name(name)
    return _REGISTRY[name][1]


def _check_name(name: str) -> None:
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, NAMES, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"model={name!r} is unknown. {hint}The networks are {_families()}.")


def _families() -> str:
    """`NAMES` in short: depths in braces, as a shell expands them, and an ending that may be left out in brackets."""
    depths: dict[str, list[str]] = {}
    for name in NAMES:
        if not (name.endswith("_bn") and name.removesuffix("_bn") in NAMES):
            family = re.sub(r"\d+", "{}", name) + ("[_bn]" if f"{name}_bn" in NAMES else "")
            depths.setdefault(family, []).extend(re.findall(r"\d+", name))
    return ", ".join(
        family.replace("{}", f"{{{','.join(found)}}}") for family, found in depths.items()
    )


def init(model: nn.Module, input_shape: tuple[int, ...], key: jax.Array) -> tuple[Params, Tree]:
    """(params, batch statistics) of a new network; the statistics are {} where there is no batch norm.

    Args:
      model: a network of this package, or any Linen module called as `module(x, train=...)`.
      input_shape: of one example.
      key: consumed.
    """
    x = jnp.zeros((1, *input_shape))
    if isinstance(key, jax.core.Tracer):  # inside of another program, which takes no options
        variables = model.init(key, x, train=False)
    elif len(jax.tree.leaves(jax.eval_shape(_draw(model), key, x))) > _MAX_DRAWN_AT_ONCE:
        variables = model.lazy_init(key, jax.ShapeDtypeStruct(x.shape, x.dtype), train=False)
    else:
        variables = _draw(model)(key, x)
    return variables["params"], variables.get("batch_stats", {})


# Compiling the program that draws all weights of ResNet-1202 (3,600 leaves) took more than five minutes and 4 GB.
# Drawn one after another they are the same numbers up to rounding.
_MAX_DRAWN_AT_ONCE = 1000


@functools.cache
def _draw(model: nn.Module) -> Callable[[jax.Array, jax.Array], dict[str, Tree]]:
    # One function per module, so that another seed is no new trace. Drawing the weights takes milliseconds, and
    # optimizing the program that draws them took three seconds of a CPU.
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(functools.partial(model.init, train=False), compiler_options=quick)


def eval_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """`apply_fn(params, x)` in evaluation mode, for the score functions."""
    return jax.tree_util.Partial(_apply(model), batch_stats)


def train_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """`apply_fn(params, x)` with the statistics of the batch x, for scores in training mode; dropout draws one mask."""
    return jax.tree_util.Partial(_apply_train(model), batch_stats)


def synflow_fn(model: nn.Module, batch_stats: Tree) -> ApplyFn:
    """`eval_fn` with the running means at 0, for SynFlow: a mean that is subtracted would make negative flow.

    On a network at initialization, whose means are 0, both are the same.
    """

    def centred(path: tuple, leaf: jax.Array) -> jax.Array:
        return jnp.zeros_like(leaf) if getattr(path[-1], "key", None) == "mean" else leaf

    return eval_fn(model, jax.tree_util.tree_map_with_path(centred, batch_stats))


@functools.cache
def _apply(model: nn.Module) -> Callable[[Tree, Params, jax.Array], jax.Array]:
    # One function per module, so that its jitted users find their trace again.
    def apply(batch_stats: Tree, params: Params, x: jax.Array) -> jax.Array:
        variables = (
            {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
        )
        return jnp.asarray(model.apply(variables, x, train=False))

    return apply


@functools.cache
def _apply_train(model: nn.Module) -> Callable[[Tree, Params, jax.Array], jax.Array]:
    def apply(batch_stats: Tree, params: Params, x: jax.Array) -> jax.Array:
        variables = (
            {"params": params, "batch_stats": batch_stats} if batch_stats else {"params": params}
        )
        rngs = {"dropout": jax.random.key(0)}
        return jnp.asarray(
            model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)[0]
        )

    return apply


@functools.cache
def output_positions(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, int]:
    """Per kernel name, the height times width of its layer's output: how often each of its weights is used.

    >>> output_positions(create("conv", 10), (28, 28, 1))
    {'conv1/kernel': 784, 'conv2/kernel': 784, 'head/kernel': 1}
    """

    def apply(key: jax.Array) -> Tree:
        x = jnp.zeros((1, *input_shape))
        is_layer = lambda module, method: (
            isinstance(module, nn.Conv | nn.Dense) and method == "__call__"
        )
        _, state = model.init_with_output(key, x, train=False, capture_intermediates=is_layer)
        return state["intermediates"]

    outputs = jax.tree_util.tree_leaves_with_path(jax.eval_shape(apply, jax.random.key(0)))
    return {
        path_name(path[:-2]) + "/kernel": math.prod(
            leaf.shape[1:-1]
        )  # the path ends in __call__, 0
        for path, leaf in outputs
    }
