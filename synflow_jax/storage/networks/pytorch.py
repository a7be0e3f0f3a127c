"""Networks as PyTorch's state dicts, in both directions: names, layouts, and the order in which maps are flattened.

Names are those of the published networks: torchvision's for a VGG with hidden dense layers and a ResNet of four stages
(`imagenet_*`, `tiny_*`), OpenLTH's for a VGG without and a ResNet of three stages (`cifar_*`). The layers of `fc` and
`conv` have the numbers that they have in an `nn.Sequential`, its `nn.Flatten` and `nn.ReLU` included. PyTorch itself is
not needed.
"""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors.numpy

from synflow_jax import models, storage, trees
from synflow_jax.models.mlp import MLP, ConvNet
from synflow_jax.models.resnet import ResNet, block_name
from synflow_jax.models.vgg import VGG
from synflow_jax.storage.networks import bundle
from synflow_jax.storage.networks.bundle import Bundle
from synflow_jax.trees import Mask, Params, Tree

State = Mapping[str, Any]  # names and arrays, as NumPy reads them

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # of each of PyTorch's batch norms; of no use to us


def torch_names(model: nn.Module) -> dict[str, str]:
    """PyTorch's name of each layer of a network, by ours, in the order of the network.

    >>> names = torch_names(models.create("imagenet_vgg11_bn", 1000))
    >>> names["conv2_1"], names["conv2_1_norm"], names["fc1"], names["head"]
    ('features.4', 'features.5', 'classifier.0', 'classifier.6')
    >>> names = torch_names(models.create("cifar_resnet20", 10))
    >>> names["conv1"], names["conv3_1/conv1"], names["conv3_1/shortcut_norm"], names["head"]
    ('conv', 'blocks.3.conv1', 'blocks.3.shortcut.1', 'fc')

    Raises:
      ValueError: the network is of no family of this package.
    """
    if isinstance(model, VGG):
        return _vgg_names(model)
    if isinstance(model, ResNet):
        return _resnet_names(model)
    if isinstance(model, MLP):
        return {f"fc{i}": str(2 * i - 1) for i in range(1, len(model.widths) + 1)} | {
            models.HEAD: str(2 * len(model.widths) + 1)
        }
    if isinstance(model, ConvNet):
        return {f"conv{i}": str(2 * i - 2) for i in range(1, len(model.widths) + 1)} | {
            models.HEAD: str(2 * len(model.widths) + 1)
        }
    raise ValueError(
        f"model is a {type(model).__name__}; PyTorch's names are known for VGG, ResNet, MLP and ConvNet."
    )


def _vgg_names(model: VGG) -> dict[str, str]:
    names, index = {}, 0
    for i, stage in enumerate(model.widths, 1):
        for j in range(1, len(stage) + 1):
            layer = f"conv{i}_{j}"
            if model.hidden:
                names[layer] = f"features.{index}"
                if model.batch_norm:
                    index += 1
                    names[f"{layer}_norm"] = f"features.{index}"
                index += 2  # itself, and its ReLU
            else:
                names[layer] = f"layers.{index}.conv"
                if model.batch_norm:
                    names[f"{layer}_norm"] = f"layers.{index}.bn"
                index += 1
        index += 1  # the pooling
    for i in range(len(model.hidden)):
        names[f"fc{i + 1}"] = f"classifier.{3 * i}"  # ReLU and dropout between them
    names[models.HEAD] = f"classifier.{3 * len(model.hidden)}" if model.hidden else "fc"
    return names


def _resnet_names(model: ResNet) -> dict[str, str]:
    torchvision = len(model.num_blocks) == 4
    names = {
        "conv1": "conv1" if torchvision else "conv",
        "conv1_norm": "bn1" if torchvision else "bn",
    }
    short, count = "downsample" if torchvision else "shortcut", 0
    for i, num in enumerate(model.num_blocks):
        for j in range(1, num + 1):
            ours = block_name(i, j, num)
            theirs = f"layer{i + 1}.{j - 1}" if torchvision else f"blocks.{count}"
            count += 1
            for k in range(1, 4 if model.bottleneck else 3):
                names[f"{ours}/conv{k}"], names[f"{ours}/conv{k}_norm"] = (
                    f"{theirs}.conv{k}",
                    f"{theirs}.bn{k}",
                )
            if j == 1 and (i > 0 or model.has_stem_shortcut()):
                names[f"{ours}/shortcut"], names[f"{ours}/shortcut_norm"] = (
                    f"{theirs}.{short}.0",
                    f"{theirs}.{short}.1",
                )
    return names | {models.HEAD: "fc"}


def to_torch(
    model: nn.Module, params: Params, batch_stats: Tree, mask: Mask, input_shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """The network as PyTorch's state dict: masked weights, kernels OIHW or [out, in], running statistics.

    `module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})` takes it, strictly.
    A dense layer that reads flattened maps reads them channel by channel, as PyTorch flattens.

    >>> import jax
    >>> model = models.create("cifar_vgg11_bn", 10, width_multiplier=0.1)
    >>> params, batch_stats = models.init(model, (32, 32, 3), jax.random.key(0))
    >>> state = to_torch(model, params, batch_stats, trees.prunable(params), (32, 32, 3))
    >>> state["layers.0.conv.weight"].shape, state["layers.2.bn.running_mean"].shape
    ((6, 3, 3, 3), (13,))

    Raises:
      ValueError: the model is of no known family, or variables or mask do not fit.
    """
    trees.check_mask(mask, params)
    variables = bundle.flatten(trees.apply_mask(params, mask), batch_stats)
    bundle.check_shapes(variables, bundle.shapes_of(model, input_shape), "the variables")
    names, flattened = _leaf_names(model, variables), _flattened(model, input_shape)
    state = {
        theirs: _to_torch(variables[ours], flattened.get(ours)) for ours, theirs in names.items()
    }
    norms = [name for name in state if name.endswith(".running_var")]
    return state | {name.replace("running_var", _COUNTER): np.zeros((), np.int64) for name in norms}


def save_torch(
    path: str | os.PathLike[str],
    model: nn.Module,
    params: Params,
    batch_stats: Tree,
    mask: Mask,
    input_shape: tuple[int, ...],
    run: Mapping[str, Any] | None = None,
) -> None:
    """Writes `to_torch` as safetensors, which `safetensors.torch.load_file` reads.

    The metadata holds as JSON `widths` (the outputs of each layer by PyTorch's name: a compact network is narrower than
    the published one), `input_shape` (channels, height, width), and `run`. The shapes alone say as much: this builds
    the module of a CIFAR VGG, of any widths:

        import torch
        from collections import OrderedDict
        from torch import nn

        def vgg(state):
            layers = []
            for i in range(1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))):
                if f"layers.{i}.conv.weight" in state:
                    width, channels = state[f"layers.{i}.conv.weight"].shape[:2]
                    norm = f"layers.{i}.bn.weight" in state
                    parts = OrderedDict(conv=nn.Conv2d(channels, width, 3, padding=1))
                    parts |= OrderedDict(bn=nn.BatchNorm2d(width)) if norm else {}
                    layers.append(nn.Sequential(parts | {"relu": nn.ReLU()}))
                else:
                    layers.append(nn.MaxPool2d(2))
            classes, channels = state["fc.weight"].shape
            parts = {"layers": nn.Sequential(*layers), "mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
            module = nn.Sequential(OrderedDict(parts, fc=nn.Linear(channels, classes)))
            module.load_state_dict(state)
            return module.eval()
    """
    state = to_torch(model, params, batch_stats, mask, input_shape)
    names = torch_names(model)
    *image, channels = input_shape
    header = {
        "format": "pt",
        "widths": json.dumps(
            {names[layer]: width for layer, width in bundle.widths(params).items()}
        ),
        "input_shape": json.dumps([channels, *image]),
        "run": json.dumps(dict(run or {})),
    }
    storage.write_bytes(pathlib.Path(path), safetensors.numpy.save(state, header))


def from_torch(
    state: str | os.PathLike[str] | State,
    model: str | nn.Module,
    input_shape: tuple[int, ...] | None = None,
) -> Bundle:
    """A network from PyTorch's weights, such as a published checkpoint, with nothing pruned.

    Values become float32. Names may begin with "module." (of nn.DataParallel).

    Args:
      state: a .safetensors or .npz file, or a dict of arrays. PyTorch's own files are turned into one by
        `python -c "import numpy, torch; s = torch.load('net.pt', map_location='cpu', weights_only=True);
        numpy.savez('net.npz', **{k: v.numpy() for k, v in s.items()})"`.
      model: a name of `models.NAMES`, whose widths and classes are then those of the weights: a narrower or compact
        network of that form can be read; or a network, which the weights must fit exactly.
      input_shape: of one example; by default that of the published network. It decides on the order of the inputs of
        a dense layer that reads flattened maps.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read, or does not fit: names all that is missing, unknown, of a wrong shape, not finite.

    >>> import jax
    >>> model = models.create("conv", 10)
    >>> params, batch_stats = models.init(model, (8, 8, 1), jax.random.key(0))
    >>> state = to_torch(model, params, batch_stats, trees.prunable(params), (8, 8, 1))
    >>> bool((from_torch(state, "conv", (8, 8, 1)).params["head"]["kernel"] == params["head"]["kernel"]).all())
    True
    """
    what = "the state dict" if isinstance(state, Mapping) else f"file {str(state)!r}"
    arrays = _arrays(state)
    if isinstance(model, nn.Module) and input_shape is None:
        raise ValueError(
            "input_shape=None goes with a network's name only: give the shape of one example."
        )
    named = models.create(model, 1) if isinstance(model, str) else model
    shape = models.default_input_shape(str(model)) if input_shape is None else input_shape
    expected = bundle.shapes_of(named, shape)
    names, flattened = _leaf_names(named, expected), _flattened(named, shape)

    found = {ours: arrays[theirs] for ours, theirs in names.items() if theirs in arrays}
    missing = [theirs for theirs in names.values() if theirs not in arrays]
    extra = [name for name in arrays if name not in names.values() and not name.endswith(_COUNTER)]
    problems = _listed("missing", missing) + _listed("unknown", extra)
    problems += _listed(
        "no numbers", [names[ours] for ours, array in found.items() if not _is_float(array)]
    )
    resized = named
    if isinstance(model, str):
        flat = [names[ours] for ours, array in found.items() if array.ndim != len(expected[ours])]
        problems += _listed(
            "of another number of axes", [f"{n} {list(arrays[n].shape)}" for n in flat]
        )
        if not problems:
            resized = _with_widths(named, {ours: array.shape for ours, array in found.items()})
            expected = bundle.shapes_of(resized, shape)
    if isinstance(model, nn.Module) or not problems:
        wanted = {ours: _torch_shape(expected[ours]) for ours in found}
        wrong = [ours for ours, array in found.items() if array.shape != wanted[ours]]
        problems += _listed(
            "of another shape",
            [f"{names[o]} {list(found[o].shape)} in place of {list(wanted[o])}" for o in wrong],
        )
    if not problems:
        problems = _listed(
            "NaN or infinite", [names[o] for o, a in found.items() if not np.isfinite(a).all()]
        )
    if problems:
        raise ValueError(
            f"{what} does not fit {model if isinstance(model, str) else type(model).__name__}: {'; '.join(problems)}. "
            "Choose the network and the number of classes that it was made for; torch_names lists the names."
        )
    ours = {
        name: _from_torch(np.asarray(array, np.float32), flattened.get(name))
        for name, array in found.items()
    }
    params, batch_stats = bundle.unflatten(ours)
    return Bundle(resized, params, batch_stats, trees.prunable(params), shape)


def read_variables(
    path: str | os.PathLike[str], model: nn.Module, input_shape: tuple[int, ...]
) -> tuple[Params, Tree]:
    """(params, batch_stats) of a network from a file of `bundle.save` or of PyTorch's weights, which must fit it.

    Raises:
      FileNotFoundError, ValueError: as `from_torch`.
    """
    if pathlib.Path(path).suffix == ".safetensors":
        header = bundle.read_safetensors(path)[1]
        if header.get("format") == bundle.FORMAT:
            read = bundle.load(path)
            variables = bundle.flatten(read.params, read.batch_stats)
            bundle.check_shapes(
                variables, bundle.shapes_of(model, input_shape), f"the variables of {str(path)!r}"
            )
            return trees.apply_mask(read.params, read.mask), read.batch_stats
    read = from_torch(path, model, input_shape)
    return read.params, read.batch_stats


def _arrays(state: str | os.PathLike[str] | State) -> dict[str, np.ndarray]:
    if isinstance(state, Mapping):
        arrays = {name: np.asarray(array) for name, array in state.items()}
    elif not pathlib.Path(state).is_file():
        raise FileNotFoundError(f"file {str(state)!r} does not exist.")
    elif pathlib.Path(state).suffix == ".safetensors":
        arrays = bundle.read_safetensors(state)[0]
    elif pathlib.Path(state).suffix == ".npz":
        try:
            with open(state, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"file {str(state)!r} cannot be read: {error}. Make it again."
            ) from error
    else:
        raise ValueError(
            f"file {str(state)!r} is neither .safetensors nor .npz. Where PyTorch is installed, turn it into one: "
            "python -c \"import numpy, torch; s = torch.load('net.pt', map_location='cpu', weights_only=True); "
            "numpy.savez('net.npz', **{k: v.numpy() for k, v in s.items()})\""
        )
    prefix = "module." if all(name.startswith("module.") for name in arrays) else ""
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _listed(kind: str, names: Sequence[str], most: int = 6) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{kind}: {', '.join(names[:most])}{more}"]


def _leaf_names(model: nn.Module, variables: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each variable, in PyTorch's order of layers, and PyTorch's: "params/head/kernel" -> "fc.weight"."""
    layers = torch_names(model)
    order = list(layers)
    split = {name: name.split("/", 1)[1].rpartition("/")[::2] for name in variables}
    return {
        name: f"{layers[layer]}.{_LEAVES[leaf]}"
        for name, (layer, leaf) in sorted(split.items(), key=lambda item: order.index(item[1][0]))
    }


def _flattened(model: nn.Module, input_shape: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """The kernel that reads flattened maps, if any, and their height and width."""
    height, width = input_shape[:2]
    if isinstance(model, VGG):
        halved = 2 ** len(model.widths)
        return {"params/fc1/kernel": (height // halved, width // halved)} if model.hidden else {}
    if isinstance(model, MLP):
        return {f"params/{'fc1' if model.widths else models.HEAD}/kernel": (height, width)}
    return {f"params/{models.HEAD}/kernel": (height, width)} if isinstance(model, ConvNet) else {}


def _to_torch(array: np.ndarray, maps: tuple[int, int] | None) -> np.ndarray:
    if maps is not None:
        inputs, out = array.shape
        channels_first = array.reshape(*maps, inputs // (maps[0] * maps[1]), out).transpose(
            3, 2, 0, 1
        )
        return np.ascontiguousarray(channels_first.reshape(out, inputs))
    return np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T)


def _from_torch(array: np.ndarray, maps: tuple[int, int] | None) -> np.ndarray:
    if maps is not None:
        out, inputs = array.shape
        channels_last = array.reshape(out, inputs // (maps[0] * maps[1]), *maps).transpose(
            2, 3, 1, 0
        )
        return channels_last.reshape(inputs, out)
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch has for a variable of ours."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _with_widths(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """The network whose layers have as many outputs as PyTorch's weights of these shapes."""
    kernels = {
        name: np.zeros((1, shape[0]), np.float32)
        for name, shape in shapes.items()
        if name.endswith("/kernel")
    }
    params, _ = bundle.unflatten(kernels)
    return model.resized(params).clone(num_classes=shapes[f"params/{models.HEAD}/kernel"][0])
