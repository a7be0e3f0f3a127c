"""Checks that a network survives each file format: ours, a program of jax.export, and PyTorch's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch_exchange_reference as reference
from cases import slow_except
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import models, storage, trees
from synflow_jax.models import Network
from synflow_jax.storage import networks
from synflow_jax.storage.networks import native

ROOT = pathlib.Path(__file__).parents[2]

# One network of each form: (name, width multiplier, input shape). Maps that are flattened are not
# square, so that height and width cannot be confused.
FORMS = (
    ("fc", 0.1, (6, 5, 3)),
    ("conv", 0.2, (6, 5, 2)),
    ("cifar_vgg11", 0.05, (32, 32, 3)),
    ("cifar_vgg13_bn", 0.05, (32, 32, 3)),
    ("tiny_vgg11_bn", 0.05, (64, 96, 3)),
    ("imagenet_vgg11", 0.01, (96, 64, 3)),
    ("cifar_resnet20", 0.25, (32, 32, 3)),
    ("tiny_resnet18", 0.05, (64, 64, 3)),
    ("imagenet_resnet50", 0.03, (64, 64, 3)),
)
FORM_NAMES = [form[0] for form in FORMS]
# One network of each family and of each way to end in a head.
FAST = (
    "fc",
    "conv",
    "cifar_vgg13_bn",
    "imagenet_vgg11",
    "cifar_vgg11_bn",
    "cifar_resnet20",
    "tiny_resnet18",
)


# What a compiler does to make programs fast takes longer here than it saves.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def _shapes(name: str) -> tuple[Any, Any, Any, tuple[int, ...]]:
    _, multiplier, input_shape = next(form for form in FORMS if form[0] == name)
    model = models.create(name, 5, width_multiplier=multiplier)
    shapes = jax.eval_shape(lambda key: models.init(model, input_shape, key), jax.random.key(0))
    return model, *shapes, input_shape


def _network(name: str, seed: int = 0, density: float = 0.5) -> Network:
    """Draws all variables of a network at random, norms and biases too, and a mask."""
    model, params, batch_stats, input_shape = _shapes(name)
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        kernel = values * np.sqrt(2 / max(1, np.prod(leaf.shape[:-1])))
        return jnp.asarray(
            {"kernel": kernel, "var": 0.5 + values**2}.get(path[-1].key, 1 + 0.1 * values),
            jnp.float32,
        )

    params, batch_stats = jax.tree_util.tree_map_with_path(draw, (params, batch_stats))
    mask = jax.tree.map(
        lambda leaf: jnp.asarray(rng.random(leaf.shape) < density), trees.prunable(params)
    )
    return Network(model, params, batch_stats, mask, input_shape)


def _logits(network: Network, x: np.ndarray) -> np.ndarray:
    params = trees.apply_mask(network.params, network.mask)
    apply_fn = jax.jit(models.eval_fn(network.model, network.batch_stats), compiler_options=_QUICK)
    return np.asarray(apply_fn(params, x))


def _images(network: Network, batch: int = 3) -> np.ndarray:
    return np.random.default_rng(9).normal(size=(batch, *network.input_shape)).astype(np.float32)


def _assert_close(got: np.ndarray, wanted: np.ndarray, relative: float) -> None:
    assert got.shape == wanted.shape and np.abs(wanted).max() > 0
    assert np.abs(got - wanted).max() <= relative * np.abs(wanted).max()


def _assert_same(got: Any, wanted: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))


@functools.cache
def _compact(name: str) -> Network:
    """Returns the compact form of a network that has lost every third unit of each hidden layer."""
    network = _network(name)

    def drop(path: tuple, leaf: jax.Array) -> jax.Array:
        inside = path[-1].key in ("kernel", "bias", "mean") and "head" not in trees.path_name(path)
        return leaf.at[..., ::3].set(jnp.zeros((), leaf.dtype)) if inside else leaf

    params, batch_stats = jax.tree_util.tree_map_with_path(
        drop, (network.params, network.batch_stats)
    )
    mask = jax.tree_util.tree_map_with_path(drop, jax.tree.map(jnp.ones_like, network.mask))
    pruned = Network(network.model, params, batch_stats, mask, network.input_shape)
    small = models.compact(pruned, fold=True).network
    assert sum(trees.sizes(small.params)) < sum(trees.sizes(network.params))
    return small


# Our own format


@pytest.mark.parametrize("name", slow_except(FAST, FORM_NAMES))
def test_a_saved_network_is_read_bit_for_bit(tmp_path: pathlib.Path, name: str) -> None:
    network = _network(name)
    networks.save(tmp_path / "net.safetensors", network, {"seed": 3})
    read = networks.load(tmp_path / "net.safetensors")
    _assert_same(read[1:4], network[1:4])
    assert read.input_shape == network.input_shape and type(read.model) is type(network.model)
    for field in dataclasses.fields(read.model):
        new, old = getattr(read.model, field.name), getattr(network.model, field.name)
        # Initializers are functions that are not saved: a network from a file draws no weights.
        assert new == old or field.name.endswith("_init")
    with safetensors.safe_open(tmp_path / "net.safetensors", "np") as file:
        header = file.metadata()
    assert json.loads(header["run"]) == {"seed": 3}
    assert json.loads(header["widths"])["head"] == 5
    assert {n: layer["kept"] for n, layer in json.loads(header["mask"]).items()} == {
        f"mask/{n}": int(m.sum())
        for n, m in zip(trees.names(network.mask), jax.tree.leaves(network.mask), strict=True)
    }


@pytest.mark.slow
def test_a_compact_network_is_read_with_its_function(tmp_path: pathlib.Path) -> None:
    network = _compact("cifar_resnet20")
    networks.save(tmp_path / "net.safetensors", network)
    read = networks.load(tmp_path / "net.safetensors")
    _assert_same(read[1:4], network[1:4])
    np.testing.assert_array_equal(_logits(read, _images(read)), _logits(network, _images(network)))


def test_damaged_and_foreign_files(tmp_path: pathlib.Path) -> None:
    network, path = _network("fc"), tmp_path / "net.safetensors"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        networks.load(path)
    networks.save(path, network)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="cannot be read"):
        networks.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="do not match its sha256"):
        networks.load(path)
    tensors, header = native.read_safetensors(path)
    storage.save_mask(path, network.mask)
    with pytest.raises(ValueError, match="has format 'synflow_jax mask 1'"):
        networks.load(path)
    path.write_bytes(whole)
    tensors, header = native.read_safetensors(path)
    for change, message in (
        ({"model": header["model"].replace("MLP", "Transformer")}, "metadata that cannot be read"),
        (
            {"model": header["model"].replace('"num_classes": 5', '"num_classes": 6')},
            "'params/head/bias' is .5., and",
        ),
        ({"input_shape": "[2, 2, 1]"}, "'params/fc1/kernel' is .90, 10., and of the model .4, 10."),
    ):
        path.write_bytes(safetensors.numpy.save(tensors, header | change))
        with pytest.raises(ValueError, match=message):
            networks.load(path)


def test_forged_files(tmp_path: pathlib.Path) -> None:
    """Checks that each is refused by one message, which names the file."""
    network, path = _network("fc"), tmp_path / "net.safetensors"
    networks.save(path, network)
    tensors, header = native.read_safetensors(path)
    masks = json.loads(header["mask"])
    name = "mask/fc1/kernel"
    other_shape = {**masks, name: {"shape": [10, 90]}}
    unknown = {**{key: masks[key] for key in masks if key != name}, "mask/x": masks[name]}
    renamed = {key.replace(name, "mask/x"): array for key, array in tensors.items()}
    integers = {"params/head/bias": np.zeros(5, np.int32)}
    described = json.loads(header["model"])
    resnet = native._describe(_shapes("cifar_resnet20")[0])
    blocks = resnet | {"num_blocks": [10**9, 3]}
    for change, arrays, message in (
        ({"model": "[]"}, {}, "has metadata that cannot be read"),
        ({"model": "{"}, {}, "has no readable 'model'"),
        ({"model": json.dumps(described | {"widths": "x"})}, {}, "describes a network that cannot"),
        ({"model": json.dumps(described | {"depth": 3})}, {}, "has metadata that cannot be read"),
        ({"model": json.dumps(blocks)}, {}, "describes a network of 1000000003 blocks, but holds"),
        ({"input_shape": '"x"'}, {}, "has the input_shape 'x'"),
        ({"input_shape": "[6, 5, 0]"}, {}, r"has the input_shape \[6, 5, 0\]"),
        ({"input_shape": "[6, 5]"}, {}, "do not fit the model"),
        ({"mask": "{}"}, {}, r"describes the masks \[\], but holds"),
        ({"mask": json.dumps(other_shape)}, {}, r"has 'mask/fc1/kernel' of shape \[10, 90\]"),
        ({"mask": json.dumps(unknown)}, renamed, "but 'params/x' has the shape None"),
        ({}, tensors | integers, "has 'params/head/bias' of dtype int32"),
    ):
        forged = arrays or tensors
        whole = header | change | {"sha256": native._digest(forged)}
        path.write_bytes(safetensors.numpy.save(forged, whole))
        with pytest.raises(ValueError, match=message) as error:
            networks.load(path)
        assert str(path) in str(error.value)


def test_variables_that_do_not_fit_are_not_written(tmp_path: pathlib.Path) -> None:
    network = _network("cifar_vgg13_bn")
    for wrong, message in (
        (network._replace(batch_stats={}), "'batch_stats/conv1_1_norm/mean' is missing"),
        (network._replace(mask=network.params), "must be bool"),
        (
            network._replace(model=models.create("cifar_vgg13_bn", 5)),
            "'batch_stats/conv1_1_norm/mean' is .3., and of the model .64.",
        ),
    ):
        for write in (functools.partial(networks.save, tmp_path / "a"), networks.to_torch):
            with pytest.raises(ValueError, match=message):
                write(wrong)
    assert not list(tmp_path.iterdir())


# A program


@pytest.mark.slow
def test_the_program_runs_without_this_package(tmp_path: pathlib.Path) -> None:
    """Checks logits to 1e-6, for two batch sizes, in a process that cannot import the package."""
    inputs, expected = {}, {}
    for i, (network, batches) in enumerate(
        ((_compact("tiny_vgg11_bn"), (1,)), (_network("conv"), (1, 4)))
    ):
        (tmp_path / f"{i}.jax").write_bytes(networks.to_jax(network))
        for batch in batches:
            x = _images(network, batch)
            inputs[f"{i}_{batch}"], expected[f"{i}_{batch}"] = x, _logits(network, x)
    np.savez(tmp_path / "in.npz", **inputs)
    script = """
        import importlib.util, sys
        import numpy as np
        from jax import export
        assert importlib.util.find_spec("synflow_jax") is None
        with np.load("in.npz") as file:
            inputs = {name: file[name] for name in file.files}
        programs = {i: export.deserialize(bytearray(open(f"{i}.jax", "rb").read())) for i in "01"}
        assert all(program.platforms == ("cpu", "cuda", "tpu") for program in programs.values())
        np.savez("out.npz", **{name: programs[name[0]].call(x) for name, x in inputs.items()})
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # An editable install would put the package on the path again, so only other paths are passed.
    paths = [
        path for path in sys.path if not (pathlib.Path(path) / "synflow_jax").is_dir() and path
    ]
    script = f"import sys\nsys.path[:] = {paths!r}\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as file:
        for name, wanted in expected.items():
            _assert_close(file[name], wanted, 1e-6)


def test_a_program_for_an_unknown_platform() -> None:
    with pytest.raises(ValueError, match=r"platforms=\('gpu',\) must be some of cpu, cuda, tpu"):
        networks.to_jax(_network("fc"), platforms=("gpu",))


def test_a_program_is_the_same_wherever_it_is_exported() -> None:
    network = _network("fc")
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    program = networks.to_jax(network, platforms=("cpu",))
    from_another_line = networks.to_jax(network, platforms=("cpu",))
    assert program == from_another_line
    assert str(pathlib.Path(__file__).parents[2]).encode() not in program
    assert getattr(jax.config, name) == before


# PyTorch


@pytest.mark.parametrize("name", slow_except(FAST, FORM_NAMES))
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.3, 1.0]))
def test_reading_undoes_writing(name: str, seed: int, density: float) -> None:
    """Checks from_torch(to_torch(x)) == x in every bit, with the network and with its name."""
    network = _network(name, seed, density)
    state = networks.to_torch(network)
    assert all(array.flags.c_contiguous for array in state.values())
    wanted = trees.apply_mask(network.params, network.mask), network.batch_stats
    by_model = networks.from_torch(state, network.model, network.input_shape)
    _assert_same(by_model[1:3], wanted)
    assert by_model.model == network.model
    by_name = networks.from_torch(state, name, network.input_shape)
    _assert_same(by_name[1:3], wanted)
    assert all(bool(leaf.all()) for leaf in jax.tree.leaves(by_name.mask))


@pytest.mark.parametrize("name", ["cifar_vgg13_bn", "tiny_vgg11_bn", "cifar_resnet20", "conv"])
def test_a_compact_network_passes_through_pytorch(name: str) -> None:
    network = _compact(name)
    read = networks.from_torch(networks.to_torch(network), name, network.input_shape)
    _assert_close(_logits(read, _images(read)), _logits(network, _images(network)), 1e-6)


@functools.cache
def _reference(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Returns a state dict, and the logits that PyTorch computed with it."""
    with np.load(reference.FILE) as file:
        return reference.fill(json.loads(str(file[f"{name}/shapes"]))), file[f"{name}/logits"]


@pytest.mark.parametrize("name", slow_except(FAST, reference.CASES))
def test_weights_from_pytorch_give_its_logits(name: str) -> None:
    """Checks that writing them yields the same state dict bit for bit, so PyTorch loads it."""
    state, logits = _reference(name)
    side = reference.CASES[name].side
    network = networks.from_torch(state, name, (side, side, 3))
    _assert_close(_logits(network, reference.images(name)), logits, 1e-5)
    written = networks.to_torch(network)
    assert set(written) == set(state)
    for key, array in written.items():
        assert array.dtype == state[key].dtype
        np.testing.assert_array_equal(array, state[key])


@pytest.mark.parametrize("name", slow_except(FAST, reference.CASES))
def test_our_networks_load_in_pytorch(name: str) -> None:
    """Checks masked networks, if PyTorch is installed."""
    pytest.importorskip("torch")
    case = reference.CASES[name]
    network = networks.from_torch(_reference(name)[0], name, (case.side, case.side, 3))
    rng = np.random.default_rng(4)
    network = network._replace(
        mask=jax.tree.map(lambda m: jnp.asarray(rng.random(m.shape) < 0.5), network.mask)
    )
    net = reference.module(name, case.widths, case.hidden, maps=case.side // 32)
    theirs = reference.logits(net, networks.to_torch(network), reference.images(name))
    _assert_close(_logits(network, reference.images(name)), theirs, 1e-5)


@pytest.mark.parametrize("name", ["cifar_vgg13_bn", "cifar_vgg11"])
def test_the_documented_pytorch_module_of_a_compact_network(
    name: str, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch")
    network = _compact(name)
    networks.save_torch(tmp_path / "net.safetensors", network)
    state = {
        k: torch.from_numpy(v)
        for k, v in native.read_safetensors(tmp_path / "net.safetensors")[0].items()
    }
    code = (
        inspect.getdoc(networks.save_torch)
        .partition("any widths:\n\n")[2]
        .partition("\n\nRaises")[0]
    )
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    x = _images(network)
    with torch.no_grad():
        theirs = names["vgg"](state)(
            torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        ).numpy()
    _assert_close(_logits(network, x), theirs, 1e-5)


def test_files_of_weights(tmp_path: pathlib.Path) -> None:
    """Checks safetensors with metadata, .npz, names of nn.DataParallel, and half precision."""
    network = _compact("cifar_vgg13_bn")
    state = networks.to_torch(network)
    wanted = trees.apply_mask(network.params, network.mask), network.batch_stats
    networks.save_torch(tmp_path / "net.safetensors", network, {"seed": 3})
    np.savez(tmp_path / "net.npz", **{f"module.{name}": array for name, array in state.items()})
    for file in ("net.safetensors", "net.npz"):
        _assert_same(networks.from_torch(tmp_path / file, "cifar_vgg13_bn")[1:3], wanted)
    header = native.read_safetensors(tmp_path / "net.safetensors")[1]
    assert json.loads(header["run"]) == {"seed": 3} and json.loads(header["input_shape"]) == [
        3,
        32,
        32,
    ]
    assert json.loads(header["widths"]) == {
        name.removesuffix(".weight"): len(array) for name, array in state.items() if array.ndim > 1
    }
    half = {name: array.astype(np.float16) for name, array in state.items()}
    read = networks.from_torch(half, "cifar_vgg13_bn")
    _assert_same(
        read.params["head"]["kernel"],
        wanted[0]["head"]["kernel"].astype(jnp.float16).astype(jnp.float32),
    )


def test_state_dicts_as_people_have_them() -> None:
    """Checks wrapped names, averaged models, checkpoints, and weights that PyTorch has pruned."""
    network = _network("cifar_vgg13_bn", density=1.0)
    state = networks.to_torch(network)
    wanted = network.params, network.batch_stats
    averaged: dict[str, Any] = {"n_averaged": np.int64(3)}
    for found in (
        {f"module.{name}": array for name, array in state.items()} | averaged,
        {f"_orig_mod.{name}": array for name, array in state.items()},
        {f"module._orig_mod.{name}": array for name, array in state.items()},
        {f"model.net.module.{name}": array for name, array in state.items()},
        # A part of the network is wrapped.
        {name.replace("layers.", "layers.module."): array for name, array in state.items()},
        {"state_dict": {f"model.{name}": array for name, array in state.items()}, "epoch": 3},
        {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    ):
        _assert_same(networks.from_torch(found, "cifar_vgg13_bn")[1:3], wanted)

    kept = np.random.default_rng(0).random(state["fc.weight"].shape) < 0.5
    rest = {name: array for name, array in state.items() if name != "fc.weight"}
    pruned = state | {"fc.weight": np.where(kept, state["fc.weight"], np.float32(0))}
    wanted = networks.from_torch(pruned, "cifar_vgg13_bn")[1:3]
    for weight, mask in (
        ("fc.weight_orig", "fc.weight_mask"),
        ("fc.parametrizations.weight.original", "fc.parametrizations.weight.0.mask"),
    ):
        for values in (kept, kept.astype(np.float32)):
            found = rest | {weight: state["fc.weight"], mask: values}
            _assert_same(networks.from_torch(found, "cifar_vgg13_bn")[1:3], wanted)


def test_state_dicts_that_need_a_decision(tmp_path: pathlib.Path) -> None:
    state = networks.to_torch(_network("cifar_vgg13_bn"))
    weight = state["fc.weight"]
    rest = {name: array for name, array in state.items() if name != "fc.weight"}
    of_model = {f"model.{name}": array for name, array in state.items()}
    wrapped = {f"module.{name}": array for name, array in state.items()}
    for found, message in (
        (rest | {"fc.weight_g": weight[:, :1], "fc.weight_v": weight}, "from fc.weight_g, fc.weig"),
        (
            rest | {"fc.parametrizations.weight.original0": weight},
            "computes a weight from fc.parametrizations.weight.original0: weight_norm",
        ),
        (rest | {"fc.weight_orig": weight, "fc.weight_mask": weight}, "is not a mask of zeros"),
        (rest | {"fc.weight_orig": weight}, "computes a weight from fc.weight_orig"),
        (state | wrapped, "which are both 'layers.0.conv.bias' without"),
        (of_model | {"loss.weight": weight}, "names have the prefix 'model.': pass those entries"),
        ({"model": state, "model_ema": state}, r"holds the state dicts \['model', 'model_ema'\]"),
        ({"optimizer": {"state": {}}}, r"holds no state dict, but \['optimizer'\]. Pass"),
        (state | {"fc.bias": np.full(5, 1e300)}, "NaN or infinite: fc.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.from_torch(found, "cifar_vgg13_bn")
    np.savez(tmp_path / "net.npz", **(rest | {"fc.weight_orig": weight}))
    with pytest.raises(ValueError, match=r"file .*net\.npz' cannot be used: the state dict comp"):
        networks.from_torch(tmp_path / "net.npz", "cifar_vgg13_bn")


def test_tensors_of_pytorch() -> None:
    """Checks parameters with gradients, and the types of tensors that weights come in."""
    torch = pytest.importorskip("torch")
    network = _network("fc", density=1.0)
    state = networks.to_torch(network)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in state.items()}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
    double = {name: tensor.double() for name, tensor in tensors.items()}
    for found in (parameters, double):
        read = networks.from_torch(found, "fc", network.input_shape)
        _assert_same(read.params, network.params)
    for dtype in (jnp.bfloat16, jnp.float16):
        half = {name: tensor.to(getattr(torch, dtype.__name__)) for name, tensor in tensors.items()}
        rounded = jax.tree.map(lambda leaf, d=dtype: leaf.astype(d).astype("f4"), network.params)
        read = networks.from_torch(half, "fc", network.input_shape)
        _assert_same(read.params, rounded)


def test_all_that_does_not_fit_is_said_at_once(tmp_path: pathlib.Path) -> None:
    network = _network("cifar_vgg13_bn")
    state = networks.to_torch(network)
    model, shape = network.model, network.input_shape

    def without(*names: str) -> dict[str, np.ndarray]:
        return {name: array for name, array in state.items() if name not in names}

    bad = without("fc.weight") | {"fc.mask": state["fc.bias"], "layers.0.bn.bias": np.zeros(4)}
    listed = (
        "missing: fc.weight; unknown: fc.mask; "
        "of another shape: layers.0.bn.bias [4] in place of [3]. Choose the"
    )
    with pytest.raises(ValueError, match=re.escape(listed)):
        networks.from_torch(bad, model, shape)
    for wrong, message in (
        (
            state | {"fc.weight": state["fc.weight"][:, :1]},
            r"fc\.weight \[5, 1\] in place of \[5, 26\]",
        ),
        (
            state | {"layers.0.conv.weight": state["fc.weight"]},
            r"of another number of axes: layers\.0\.conv\.weight",
        ),
        (state | {"fc.bias": np.full(5, np.nan, np.float32)}, r"NaN or infinite: fc\.bias"),
        (state | {"fc.bias": np.zeros(5, int)}, r"not floating point: fc\.bias"),
        ({}, r"missing: layers\.0\.conv\.bias, .* and 56 more"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.from_torch(wrong, "cifar_vgg13_bn")
    with pytest.raises(ValueError, match=r"input_shape=None"):
        networks.from_torch(state, model)
    with pytest.raises(ValueError, match=r"model='vgg13' is unknown"):
        networks.from_torch(state, "vgg13")
    with pytest.raises(FileNotFoundError, match=r"none\.npz' does not exist"):
        networks.from_torch(tmp_path / "none.npz", "cifar_vgg13_bn")
    (tmp_path / "net.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither \.safetensors nor \.npz.*torch\.load"):
        networks.from_torch(tmp_path / "net.pt", "cifar_vgg13_bn")
    for name in ("net.npz", "net.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
        with pytest.raises(ValueError, match="cannot be read"):
            networks.from_torch(tmp_path / name, "cifar_vgg13_bn")


def test_names_of_foreign_modules_are_unknown() -> None:
    import flax.linen as nn

    with pytest.raises(ValueError, match="model is a Dense"):
        networks.torch_names(nn.Dense(3))
