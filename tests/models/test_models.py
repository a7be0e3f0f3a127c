"""Checks the networks of the paper: counts, names, initializers, convolution and pooling.

- The number of prunable weights follows from the arithmetic of the published architecture.
- Names sort in the order of the network.
- Initial weights have the published distribution.
- `convolution` and `max_pool` agree with XLA's in value and gradient, with one exception: the
  gradient of a maximum goes to the first position that holds it.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from synflow_jax import models, trees
from synflow_jax.models import initialize, layers
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet
from synflow_jax.models.vgg import VGG

# (prunable weights, prunable leaves) with 10 classes for fc, conv and CIFAR, 200 for Tiny ImageNet
# and 1000 for ImageNet.
COUNTS = {
    "fc": (119_400, 6),
    "conv": (260_384, 3),
    "cifar_vgg11": (9_222_848, 9),
    "cifar_vgg11_bn": (9_222_848, 9),
    "cifar_vgg13": (9_407_168, 11),
    "cifar_vgg13_bn": (9_407_168, 11),
    "cifar_vgg16": (14_715_584, 14),
    "cifar_vgg16_bn": (14_715_584, 14),
    "cifar_vgg19": (20_024_000, 17),
    "cifar_vgg19_bn": (20_024_000, 17),
    "tiny_vgg11": (12_568_256, 11),
    "tiny_vgg11_bn": (12_568_256, 11),
    "tiny_vgg13": (12_752_576, 13),
    "tiny_vgg13_bn": (12_752_576, 13),
    "tiny_vgg16": (18_060_992, 16),
    "tiny_vgg16_bn": (18_060_992, 16),
    "tiny_vgg19": (23_369_408, 19),
    "tiny_vgg19_bn": (23_369_408, 19),
    "imagenet_vgg11": (132_851_392, 11),
    "imagenet_vgg11_bn": (132_851_392, 11),
    "imagenet_vgg13": (133_035_712, 13),
    "imagenet_vgg13_bn": (133_035_712, 13),
    "imagenet_vgg16": (138_344_128, 16),
    "imagenet_vgg16_bn": (138_344_128, 16),
    "imagenet_vgg19": (143_652_544, 19),
    "imagenet_vgg19_bn": (143_652_544, 19),
    "cifar_resnet20": (270_896, 22),
    "cifar_wide_resnet20": (1_081_440, 22),
    "cifar_resnet32": (464_432, 34),
    "cifar_wide_resnet32": (1_855_584, 34),
    "cifar_resnet44": (657_968, 46),
    "cifar_wide_resnet44": (2_629_728, 46),
    "cifar_resnet56": (851_504, 58),
    "cifar_wide_resnet56": (3_403_872, 58),
    "cifar_resnet110": (1_722_416, 112),
    "cifar_wide_resnet110": (6_887_520, 112),
    "cifar_resnet1202": (19_334_192, 1204),
    "cifar_wide_resnet1202": (77_334_624, 1204),
    "tiny_resnet18": (11_261_632, 21),
    "tiny_resnet34": (21_362_368, 37),
    "tiny_resnet50": (23_856_832, 54),
    "tiny_resnet101": (42_796_736, 105),
    "tiny_resnet152": (58_394_304, 156),
    "tiny_wide_resnet18": (44_771_008, 22),
    "tiny_wide_resnet34": (85_173_952, 38),
    "tiny_wide_resnet50": (67_167_936, 54),
    "tiny_wide_resnet101": (125_101_760, 105),
    "tiny_wide_resnet152": (172_811_968, 156),
    "imagenet_resnet18": (11_678_912, 21),
    "imagenet_resnet34": (21_779_648, 37),
    "imagenet_resnet50": (25_502_912, 54),
    "imagenet_resnet101": (44_442_816, 105),
    "imagenet_resnet152": (60_040_384, 156),
    "imagenet_wide_resnet50": (68_814_016, 54),
    "imagenet_wide_resnet101": (126_747_840, 105),
}

# All parameters of torchvision's networks, as its documentation states them.
TORCHVISION = {
    "imagenet_vgg11": 132_863_336,
    "imagenet_vgg11_bn": 132_868_840,
    "imagenet_vgg13": 133_047_848,
    "imagenet_vgg13_bn": 133_053_736,
    "imagenet_vgg16": 138_357_544,
    "imagenet_vgg16_bn": 138_365_992,
    "imagenet_vgg19": 143_667_240,
    "imagenet_vgg19_bn": 143_678_248,
    "imagenet_resnet18": 11_689_512,
    "imagenet_resnet34": 21_797_672,
    "imagenet_resnet50": 25_557_032,
    "imagenet_resnet101": 44_549_160,
    "imagenet_resnet152": 60_192_808,
    "imagenet_wide_resnet50": 68_883_240,
    "imagenet_wide_resnet101": 126_886_696,
}


def _num_classes(name: str) -> int:
    return {"tiny": 200, "imagenet": 1000}.get(name.split("_")[0], 10)


def _dense(*widths: int) -> list[int]:
    return [m * n for m, n in itertools.pairwise(widths)]


def _vgg_layers(depth: int, family: str) -> list[int]:
    """Follows configurations A, B, D and E of Simonyan & Zisserman, of 64 to 512 channels."""
    repeats = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}[
        depth
    ]
    widths = [
        3,
        *(w for w, n in zip((64, 128, 256, 512, 512), repeats, strict=True) for _ in range(n)),
    ]
    # CIFAR averages the last maps; Tiny ImageNet's 64x64 images end as 2x2, ImageNet's as 7x7.
    dense = {
        "cifar": (512, 10),
        "tiny": (512 * 4, 1024, 1024, 200),
        "imagenet": (512 * 49, 4096, 4096, 1000),
    }[family]
    return [9 * n for n in _dense(*widths)] + _dense(*dense)


def _cifar_resnet_layers(depth: int, width: int) -> list[int]:
    """Follows He et al. 2016: 6n + 2 layers of 1, 2 and 4 times the width.

    1x1 convolutions are added where the width grows.
    """
    n = (depth - 2) // 6
    found = [9 * 3 * width]
    for before, w in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
        found += [9 * before * w] + [9 * w * w] * (2 * n - 1)
        found += [before * w] if before != w else []
    return [*found, 4 * width * 10]


def _resnet_layers(depth: int, *, wide: bool, family: str) -> list[int]:
    """Follows table 1 of He et al. 2016, with 1x1 convolutions where the shape changes."""
    repeats = {
        18: (2,) * 4,
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }[depth]
    bottleneck = depth >= 50
    found = [(49 if family == "imagenet" else 9) * 3 * 64]
    before = 64
    for stage, repeat in enumerate(repeats):
        inner = 64 * 2**stage * (2 if wide else 1)
        out = 256 * 2**stage if bottleneck else inner
        for block in range(repeat):
            if bottleneck:
                found += [before * inner, 9 * inner * inner, inner * out]
            else:
                found += [9 * before * out, 9 * out * out]
            # The first block of each stage changes the shape, unless it is a basic block of the
            # stem's width.
            if block == 0 and (stage > 0 or before != out):
                found.append(before * out)
            before = out
    return [*found, before * _num_classes(family)]


def _published_layers(name: str) -> list[int]:
    """Computes the sizes of the kernels of a network from its name alone."""
    if name == "fc":
        return _dense(784, 100, 100, 100, 100, 100, 10)
    if name == "conv":
        return [9 * 1 * 32, 9 * 32 * 32, 28 * 28 * 32 * 10]
    family, wide, kind, depth = re.fullmatch(
        r"(\w+?)_(wide_)?(vgg|resnet)(\d+)(?:_bn)?", name
    ).groups()  # type: ignore[union-attr]
    if kind == "vgg":
        return _vgg_layers(int(depth), family)
    if family == "cifar":
        return _cifar_resnet_layers(int(depth), 32 if wide else 16)
    return _resnet_layers(int(depth), wide=bool(wide), family=family)


def _trace(
    model: nn.Module, input_shape: tuple[int, ...], *, norms: bool
) -> tuple[trees.Params, list[str]]:
    """Returns the shapes of the parameters, and the layers in the order of their calls."""
    calls: list[str] = []

    def record(next_function: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
            calls.append("/".join(context.module.path))
        return next_function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, nn.intercept_methods(record):
        # Tracing both forms of convolution, and norms that are not counted, takes three times as
        # long.
        patch.setattr(layers, "convolution", jax.lax.conv_general_dilated)
        if not norms:
            patch.setattr(layers, "BatchNorm", lambda train, name: lambda x: x)
        params, _ = jax.eval_shape(
            lambda key: models.init(model, input_shape, key), jax.random.key(0)
        )
    return params, calls


@functools.cache
def _shapes(name: str) -> tuple[trees.Params, list[str]]:
    model = models.create(name, _num_classes(name))
    return _trace(model, models.default_input_shape(name), norms=name in TORCHVISION)


def test_the_table_names_every_network() -> None:
    assert tuple(COUNTS) == models.NAMES
    assert set(TORCHVISION) == {name for name in models.NAMES if name.startswith("imagenet")}


@pytest.mark.parametrize("name", models.NAMES)
def test_prunable_weights(name: str) -> None:
    params, calls = _shapes(name)
    mask = jax.eval_shape(trees.prunable, params)
    sizes = trees.sizes(mask)
    assert (sum(sizes), len(sizes)) == COUNTS[name]
    assert sorted(sizes) == sorted(_published_layers(name))
    # Names sort in the order of the network, so that tables read from input to output.
    assert trees.names(mask) == [f"{layer}/kernel" for layer in calls]
    assert calls[-1] == models.HEAD
    if name in TORCHVISION:
        assert sum(trees.sizes(params)) == TORCHVISION[name]


@pytest.mark.parametrize(
    "name, num_classes, count",
    [("cifar_vgg16_bn", 100, 14_761_664), ("imagenet_resnet50", 10, 23_475_392)],
)
def test_the_head_has_a_column_per_class(name: str, num_classes: int, count: int) -> None:
    model, shape = models.create(name, num_classes), models.default_input_shape(name)
    params, _ = _trace(model, shape, norms=False)
    assert sum(trees.sizes(jax.eval_shape(trees.prunable, params))) == count


def test_a_dense_classifier_is_an_exclusion() -> None:
    params, _ = _shapes("cifar_resnet20")
    mask = jax.eval_shape(functools.partial(trees.prunable, exclude=models.HEAD), params)
    assert sum(trees.sizes(mask)) == COUNTS["cifar_resnet20"][0] - 640
    assert mask[models.HEAD]["kernel"] is None


@pytest.mark.parametrize(
    "name, norms", [("cifar_vgg11", 0), ("cifar_vgg11_bn", 8), ("cifar_resnet20", 21)]
)
def test_batch_norm_comes_with_the_name(name: str, norms: int) -> None:
    """Checks that there is one norm per convolution or none, and that norms are not kernels."""
    model = models.create(name, 10)
    params, batch_stats = jax.eval_shape(
        lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0)
    )
    kinds = list(trees.leaf_kinds(params).values())
    assert (
        kinds.count("norm scale")
        == kinds.count("norm bias")
        == norms
        == len(jax.tree.leaves(batch_stats)) / 2
    )
    assert kinds.count("kernel") == COUNTS[name][1]
    assert kinds.count("other") == 0


@pytest.mark.parametrize("factor", [0.25, 2.0])
@pytest.mark.parametrize(
    "name",
    [
        "fc",
        "conv",
        "cifar_vgg11",
        "tiny_vgg11",
        "cifar_resnet20",
        "tiny_resnet18",
        "tiny_wide_resnet50",
    ],
)
def test_width_multiplier_scales_every_hidden_width(name: str, factor: float) -> None:
    model, shape = models.create(name, 7, width_multiplier=factor), models.default_input_shape(name)
    params, _ = _trace(model, shape, norms=False)
    scaled, of_one = (jax.tree.leaves(_any_kernel(tree)) for tree in (params, _shapes(name)[0]))
    assert len(scaled) == len(of_one) > 2
    for i, (leaf, leaf_of_one) in enumerate(zip(scaled, of_one, strict=True)):
        *window, rows, columns = leaf_of_one.shape
        expected = (
            *window,
            rows * (factor if i > 0 else 1),
            columns * factor if i < len(scaled) - 1 else 7,
        )
        assert leaf.shape == expected


def _any_kernel(params: trees.Params) -> trees.Mask:
    return jax.tree.map(lambda leaf: leaf if leaf.ndim >= 2 else None, params)


def test_a_narrow_network_keeps_a_channel() -> None:
    model = models.create("cifar_vgg11", 10, width_multiplier=1e-3)
    params, _ = jax.eval_shape(lambda key: models.init(model, (32, 32, 3), key), jax.random.key(0))
    assert [leaf.shape[-1] for leaf in jax.tree.leaves(_any_kernel(params))] == [1] * 8 + [10]


@pytest.mark.parametrize(
    "name, suggestion",
    [
        ("cifar_vgg16bn", "cifar_vgg16_bn"),
        ("resnet18", "tiny_resnet18"),
        ("imagenet-resnet50", "imagenet_resnet50"),
    ],
)
def test_an_unknown_name_suggests_close_ones(name: str, suggestion: str) -> None:
    for function in (lambda: models.create(name, 10), lambda: models.default_input_shape(name)):
        message = (
            rf"model='{name}' is unknown. Did you mean .*\b{suggestion}\b.*\? "
            "The networks are fc, conv, "
        )
        with pytest.raises(ValueError, match=message):
            function()


def test_an_unknown_name_like_no_other() -> None:
    with pytest.raises(ValueError, match=r"model='%%%' is unknown. The networks are fc, conv, "):
        models.create("%%%", 10)


def test_the_families_of_the_message_are_the_networks() -> None:
    with pytest.raises(ValueError, match="is unknown") as error:
        models.create("%%%", 10)
    families = str(error.value).partition("The networks are ")[2].removesuffix(".")
    names = []
    for family in families.split(", "):
        start, depths, rest = re.fullmatch(r"([^{]*)(?:{(.*)})?(.*)", family).groups(default="")
        for depth in depths.split(","):
            name = start + depth + rest.removesuffix("[_bn]")
            names += [name, f"{name}_bn"] if rest.endswith("[_bn]") else [name]
    assert sorted(names) == sorted(models.NAMES)
    assert "\n" not in families and len(families) < len(", ".join(models.NAMES)) / 3


@pytest.mark.parametrize("num_classes", [0, -1])
def test_bad_number_of_classes(num_classes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_classes={num_classes} must be at least 1"):
        models.create("fc", num_classes)


@pytest.mark.parametrize("width_multiplier", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_width_multiplier(width_multiplier: float) -> None:
    with pytest.raises(
        ValueError, match=rf"width_multiplier={width_multiplier} must be positive and finite"
    ):
        models.create("fc", 10, width_multiplier=width_multiplier)


def _initialized(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    # A generator that compiles in a fifth of the time of the default one.
    params, _ = models.init(model, input_shape, jax.random.key(0, impl="rbg"))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {trees.path_name(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


def _assert_normal(x: np.ndarray, deviation: float) -> None:
    """Checks mean, variance and fourth moment to within 5 of their own deviations."""
    z, num = x.reshape(-1) / deviation, x.size
    assert num > 300  # few samples would say nothing
    assert abs(z.mean()) < 5 / num**0.5
    assert abs((z**2).mean() - 1) < 5 * (2 / num) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / num) ** 0.5


def _assert_uniform(x: np.ndarray, bound: float) -> None:
    """Checks the bound, and mean and variance to within 5 of their own deviations."""
    z, num = x.reshape(-1) / bound, x.size
    assert num >= 100
    assert np.abs(z).max() <= 1 + 1e-6
    assert np.abs(z).max() > 1 - 12 / num  # missed once in e^12 draws
    assert abs(z.mean()) < 5 * (1 / 3 / num) ** 0.5
    assert abs((z**2).mean() - 1 / 3) < 5 * (4 / 45 / num) ** 0.5


def _fan_in(kernel: np.ndarray) -> int:
    return int(np.prod(kernel.shape[:-1]))


def _fan_out(kernel: np.ndarray) -> int:
    return int(np.prod(kernel.shape) / kernel.shape[-2])


def test_initial_weights_of_a_cifar_vgg() -> None:
    """Expects Kaiming normal with fan-in, for the head too, and biases of 0."""
    model = models.create("cifar_vgg11", 100).clone(widths=((16,), (32,)))
    for name, leaf in _initialized(model, (4, 4, 3)).items():
        if name.endswith("kernel"):
            _assert_normal(leaf, (2 / _fan_in(leaf)) ** 0.5)
        else:
            assert not leaf.any(), name


def test_initial_weights_of_a_cifar_resnet() -> None:
    model = models.create("cifar_resnet20", 100).clone(num_blocks=(1, 1), widths=(16, 32))
    for name, leaf in _initialized(model, (8, 8, 3)).items():
        if name.endswith("kernel"):
            _assert_normal(leaf, (2 / _fan_in(leaf)) ** 0.5)
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


def test_initial_weights_of_a_tiny_imagenet_vgg() -> None:
    """Expects Kaiming normal with fan-out, deviation 0.01 for dense layers, and biases of 0."""
    model = models.create("tiny_vgg11_bn", 100).clone(widths=((16,), (32,)), hidden=(64, 32))
    for name, leaf in _initialized(model, (8, 8, 3)).items():
        if name.endswith("kernel") and name.startswith("conv"):
            _assert_normal(leaf, (2 / _fan_out(leaf)) ** 0.5)
        elif name.endswith("kernel"):
            _assert_normal(leaf, 0.01)
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name


@pytest.mark.parametrize("name", ["tiny_resnet18", "imagenet_resnet50"])
def test_initial_weights_of_an_imagenet_resnet(name: str) -> None:
    """Expects Kaiming normal with fan-out, and PyTorch's default for the head."""
    model = models.create(name, 100).clone(num_blocks=(1,), widths=(16,))
    for leaf_name, leaf in _initialized(model, (16, 16, 3)).items():
        if leaf_name.startswith("head"):
            features = 16 if name == "tiny_resnet18" else 64
            _assert_uniform(leaf, features**-0.5)
        elif leaf_name.endswith("kernel"):
            _assert_normal(leaf, (2 / _fan_out(leaf)) ** 0.5)
        else:
            assert (leaf == (1 if leaf_name.endswith("scale") else 0)).all(), leaf_name


def test_initial_weights_of_the_toy_networks() -> None:
    """Expects PyTorch's default: kernels and biases uniform in +-1 / sqrt(fan_in)."""
    for model in (MLP(100, (100,)), ConvNet(100, (128,))):
        params = _initialized(model, (6, 5, 3))
        assert len(params) == 4
        for name, kernel in params.items():
            if name.endswith("kernel"):
                _assert_uniform(kernel, _fan_in(kernel) ** -0.5)
                _assert_uniform(params[name.replace("kernel", "bias")], _fan_in(kernel) ** -0.5)


def _draw(shape: tuple[int, ...], seed: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Sides that a stride divides and that it does not.
@pytest.mark.parametrize(
    "size, stride, padding, shape, features, groups",
    [
        (3, 1, 1, (2, 6, 5, 3), 7, 1),
        (3, 2, 1, (2, 8, 7, 3), 5, 1),
        (1, 1, 0, (2, 4, 4, 3), 5, 1),
        (1, 2, 0, (2, 8, 7, 3), 5, 1),
        (7, 2, 3, (1, 16, 15, 3), 4, 1),
        (3, 1, 1, (2, 6, 5, 4), 6, 2),
    ],
)
def test_convolution_is_xlas_in_value_and_gradients(
    size: int, stride: int, padding: int, shape: tuple[int, ...], features: int, groups: int
) -> None:
    inputs, kernel = _draw(shape, 0), _draw((size, size, shape[-1] // groups, features), 1)
    numbers = nn.linear._conv_dimension_numbers(inputs.shape)

    def run(form: Callable[..., jax.Array]) -> Callable[..., Any]:
        def apply(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
            outputs = form(
                inputs,
                kernel,
                (stride, stride),
                [(padding, padding)] * 2,
                lhs_dilation=(1, 1),
                rhs_dilation=(1, 1),
                dimension_numbers=numbers,
                feature_group_count=groups,
                precision=jax.lax.Precision.HIGHEST,
            )
            return jnp.sum(outputs * _draw(outputs.shape, 2)), outputs

        return jax.jit(jax.value_and_grad(apply, argnums=(0, 1), has_aux=True))

    (_, ours), our_gradients = run(layers.convolution)(inputs, kernel)
    (_, xlas), xla_gradients = run(jax.lax.conv_general_dilated)(inputs, kernel)
    for a, b in zip((ours, *our_gradients), (xlas, *xla_gradients), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_networks_convolve_with_ours() -> None:
    """Checks that `layers.conv` pads (size - 1) / 2 on both sides, where "SAME" pads 0 and 1."""
    x = _draw((1, 8, 8, 3), 0)
    for size, stride in ((3, 2), (7, 2)):
        module = layers.conv(
            4, size, stride=stride, bias=True, init=nn.initializers.zeros, name="conv"
        )
        kernel, bias = _draw((size, size, 3, 4), 1), _draw((4,), 2)
        ours = module.apply({"params": {"kernel": kernel, "bias": bias}}, x)
        side = (size - 1) // 2
        xlas = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            [(side, side)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        np.testing.assert_allclose(ours, xlas + bias[None, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window, stride, padding", [(2, 2, 0), (3, 2, 1)])
def test_max_pool_is_flaxs(window: int, stride: int, padding: int) -> None:
    x = _draw((2, 8, 7, 3), 0)
    pads = [(padding, padding)] * 2

    @jax.jit
    def ours(x: jax.Array) -> jax.Array:
        return layers.max_pool(x, window, stride, padding)

    def flaxs(x: jax.Array) -> jax.Array:
        return nn.max_pool(x, (window, window), (stride, stride), pads)

    np.testing.assert_array_equal(ours(x), flaxs(x), strict=True)
    weights = _draw(flaxs(x).shape, 1)
    gradients = [
        jax.jit(jax.grad(lambda x, pool=pool: jnp.sum(pool(x) * weights)))(x)
        for pool in (ours, flaxs)
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-6, atol=1e-6)  # no ties among normal draws
    # Everything negative: a pad is not a 0.
    np.testing.assert_array_equal(ours(x - 100), flaxs(x - 100), strict=True)


def test_the_gradient_of_a_maximum_goes_to_the_first() -> None:
    """Checks that, of equal inputs, the first of each window gets it, and padding never does."""
    found = jax.jit(jax.grad(lambda x: jnp.sum(layers.max_pool(x, 2, 2))))(jnp.ones((1, 4, 4, 1)))[
        0, :, :, 0
    ]
    assert found.tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]

    # Windows of 3 at stride 2 with a pad start at rows -1 (so at 0), 1 and 3. They overlap in rows
    # 1 and 3.
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(layers.max_pool(x, 3, 2, 1))))
    found = gradient(jnp.ones((1, 5, 5, 1)))[0, :, :, 0]
    row = [1, 1, 0, 1, 0]
    assert found.tolist() == [row, row, [0] * 5, row, [0] * 5]

    # Where two windows share their first maximum it takes from both.
    x = jnp.zeros((1, 5, 5, 1)).at[0, 1, 1, 0].set(1.0)
    assert float(gradient(x)[0, 1, 1, 0]) == 4


def test_a_few_images_at_a_time_is_the_same_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks values and gradients of a batch that is cut into 3 parts of 2 images.

    The gradient of the kernel is the sum over the parts.
    """
    x, kernel = _draw((6, 5, 4, 3), 0), _draw((3, 3, 3, 4), 1)
    form = functools.partial(
        layers._convolution_as_matrices, strides=(1, 1), padding=((1, 1), (1, 1)), precision=None
    )
    program = lambda: jax.jit(
        jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(form(*args))), argnums=(0, 1))
    )
    whole = program()(x, kernel)
    monkeypatch.setattr(layers, "_CHUNK_BYTES", 5 * 4 * (9 + 12) * 4 * 2)
    assert layers._num_chunks(6, 5 * 4 * (9 + 12) * 4) == 3
    assert "scan" in str(jax.make_jaxpr(form)(x, kernel))
    for a, b in zip(jax.tree.leaves(program()(x, kernel)), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_max_pool_passes_nan() -> None:
    x = _draw((1, 4, 4, 1), 0)
    for row, column in ((0, 0), (1, 1), (2, 1)):
        pooled = layers.max_pool(x.at[0, row, column, 0].set(jnp.nan), 2, 2)[0, :, :, 0]
        expected = np.zeros((2, 2), bool)
        expected[row // 2, column // 2] = True
        assert np.isnan(pooled).tolist() == expected.tolist()


def _trained_vgg() -> tuple[nn.Module, trees.Params, trees.Tree]:
    model = VGG(3, widths=((4,), (5,)))
    params, batch_stats = jax.eval_shape(
        lambda key: models.init(model, (4, 4, 2), key), jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), jnp.float32)
    return model, jax.tree.map(draw, params), jax.tree.map(draw, batch_stats)


def test_synflow_fn_takes_out_the_running_means_and_nothing_else() -> None:
    model, params, batch_stats = _trained_vgg()
    x = _draw((2, 4, 4, 2), 1)

    @jax.jit
    def apply(statistics: trees.Tree) -> jax.Array:
        return model.apply({"params": params, "batch_stats": statistics}, x, train=False)

    means_at_0 = {name: {"mean": 0 * s["mean"], "var": s["var"]} for name, s in batch_stats.items()}
    call = jax.jit(lambda apply_fn: apply_fn(params, x))
    np.testing.assert_allclose(
        call(models.eval_fn(model, batch_stats)), apply(batch_stats), rtol=1e-6
    )
    np.testing.assert_allclose(
        call(models.synflow_fn(model, batch_stats)), apply(means_at_0), rtol=1e-6
    )
    assert not np.allclose(apply(batch_stats), apply(means_at_0))
    # The statistics that were passed in are as they were.
    assert all((np.asarray(leaf) > 0).all() for leaf in jax.tree.leaves(batch_stats))


def test_no_statistics_without_batch_norm() -> None:
    model = MLP(3, (5,))
    params, batch_stats = models.init(model, (4,), jax.random.key(0, impl="rbg"))
    assert batch_stats == {}
    x = _draw((2, 4), 0)
    for apply_fn in (models.eval_fn(model, batch_stats), models.synflow_fn(model, batch_stats)):
        np.testing.assert_allclose(
            apply_fn(params, x), model.apply({"params": params}, x), rtol=1e-6
        )


def test_jitted_users_of_eval_fn_find_their_trace_again() -> None:
    model, params, batch_stats = _trained_vgg()
    traces = []

    @jax.jit
    def run(apply_fn: Any, params: trees.Params, x: jax.Array) -> jax.Array:
        traces.append(None)
        return apply_fn(params, x)

    x = _draw((1, 4, 4, 2), 0)
    one = run(models.eval_fn(model, batch_stats), params, x)
    other = run(models.eval_fn(model, jax.tree.map(lambda leaf: 2 * leaf, batch_stats)), params, x)
    # An equal module that was made anew needs no new trace.
    equal = VGG(3, widths=((4,), (5,)))
    run(models.synflow_fn(equal, batch_stats), params, x)
    assert len(traces) == 1 and not np.allclose(one, other)


@pytest.mark.parametrize(
    "model, shape",
    [
        (models.create("fc", 10, width_multiplier=0.1), (28, 28, 1)),
        (ResNet(10, (2, 1), (4, 8), stem_width=4), (8, 8, 3)),
        (
            ResNet(10, (1, 1), (4, 8), bottleneck=True, stem_width=4, imagenet_stem=True),
            (32, 32, 3),
        ),
        (VGG(10, ((4,), (8, 8)), hidden=(16,)), (8, 8, 3)),
    ],
)
def test_shapes_of_outputs_and_of_any_batch(model: nn.Module, shape: tuple[int, ...]) -> None:
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False)
    )
    for batch in (1, 5):
        x = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
        outputs = jax.eval_shape(functools.partial(model.apply, train=False), variables, x)
        assert outputs.shape == (batch, 10) and outputs.dtype == jnp.float32


@pytest.mark.slow
def test_weights_drawn_one_by_one_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that networks of very many leaves get the same numbers, up to rounding."""
    model = models.create("cifar_vgg11_bn", 10, width_multiplier=1 / 16)
    together = models.init(model, (32, 32, 3), jax.random.key(3))
    monkeypatch.setattr(initialize, "_MAX_DRAWN_AT_ONCE", 1)
    apart = models.init(model, (32, 32, 3), jax.random.key(3))
    assert jax.tree.structure(together) == jax.tree.structure(apart)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, apart
    )
