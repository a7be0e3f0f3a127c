"""Reads PyTorch's state dicts as people have them, and returns the arrays that the layers have.

Tools that wrap a module change the names of its state dict, and those that prune it split a weight
into two entries:

| | names | becomes |
|---|---|---|
| nn.DataParallel | module.fc.weight, features.module.0.weight | fc.weight, features.0.weight |
| torch.compile | _orig_mod.fc.weight | fc.weight |
| a module that holds the network | model.fc.weight, in all names | fc.weight |
| torch.nn.utils.prune | fc.weight_orig, fc.weight_mask | fc.weight, 0 where it is pruned |
| torch.ao.pruning | fc.parametrizations.weight.original, .0.mask | the same |
| a checkpoint | {"state_dict": {...}, "epoch": 3} | the state dict |
"""

from __future__ import annotations

import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from synflow_jax.storage.arrays import Arrays, read_npz, read_safetensors
from synflow_jax.storage.files import AnyPath

State = Mapping[str, Any]  # names and arrays, of NumPy or PyTorch

# Turns a file of PyTorch into one that can be read here. A pickle can run any program, so only
# weights are loaded, where PyTorch is installed. NumPy has no bfloat16.
_CONVERT = (
    "python -c \"import numpy, torch; s = torch.load('net.pt', map_location='cpu', "
    "weights_only=True); s = s.get('state_dict', s); numpy.savez('net.npz', **{k: "
    '(v.float() if v.is_floating_point() else v).detach().numpy() for k, v in s.items()})"'
)

# The names under which these tools hold the module that they wrap.
_WRAPPERS = {
    "module",  # nn.DataParallel and DistributedDataParallel
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}

# The entry that holds a weight, and the one that holds its mask.
_PRUNED = (
    ("{layer}.{leaf}_orig", "{layer}.{leaf}_mask"),
    ("{layer}.parametrizations.{leaf}.original", "{layer}.parametrizations.{leaf}.0.mask"),
)

# What is left of weights that are computed from several entries in another way.
_COMPUTED = ("_g", "_v", "_u", "_orig", "_mask")


def read(state: AnyPath | State) -> Arrays:
    """Returns the arrays of a state dict by the names that it has.

    Args:
      state: a .safetensors or .npz file; or a dict of arrays, or a checkpoint that holds one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file cannot be read, or a checkpoint holds none or several state dicts.
    """
    if not isinstance(state, Mapping):
        return _read_file(pathlib.Path(state))
    arrays = {}
    for name, value in _unwrapped(state).items():
        arrays[str(name)] = _to_numpy(value)
    return arrays


def plain(arrays: Arrays, wanted: Collection[str]) -> Arrays:
    """Returns the arrays by the names that the bare module has, each pruned weight as one array.

    >>> names = {"module.fc.weight": np.ones(1), "module.fc.bias": np.zeros(1)}
    >>> sorted(plain(names, {"fc.weight", "fc.bias"}))
    ['fc.bias', 'fc.weight']

    Args:
      arrays: from `read`.
      wanted: the names of the network.

    Raises:
      ValueError: two entries have the same name without the names of wrappers; a weight is
        computed from several entries in a way that is not known here; a mask is not one.
    """
    renamed = _without_wrappers(arrays)
    renamed = _without_shared_prefix(renamed, wanted)
    masked = _apply_masks(renamed, wanted)
    _refuse_computed(masked, wanted)
    return masked


# Reading


def _unwrapped(state: State) -> State:
    """Returns the state dict that a checkpoint holds; a state dict is returned as it is."""
    if not any(isinstance(value, Mapping) for value in state.values()):
        return state
    # An optimizer's state is a dict of dicts and lists, not of arrays.
    found = [name for name, value in state.items() if _is_state(value)]
    if len(found) == 1:
        inner: State = state[found[0]]
        return inner
    held = f"the state dicts {found}" if found else f"no state dict, but {list(state)[:10]}"
    raise ValueError(
        f"the checkpoint holds {held}. Pass the state dict of the network, such as "
        "checkpoint['state_dict']."
    )


def _is_state(value: Any) -> bool:
    """Returns whether a value is a dict of arrays."""
    is_filled = isinstance(value, Mapping) and len(value) > 0
    return is_filled and all(hasattr(array, "shape") for array in value.values())


def _to_numpy(value: Any) -> np.ndarray:
    """Returns an array of NumPy, or a tensor of PyTorch, as an array of NumPy."""
    # PyTorch is not imported here, so a tensor is known by its methods.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16, and weights become float32 in any case.
        if value.is_floating_point():
            value = value.float()
    return np.asarray(value)


def _read_file(path: pathlib.Path) -> Arrays:
    """Reads the arrays of a .safetensors or .npz file."""
    if not path.is_file():
        raise FileNotFoundError(f"file {str(path)!r} does not exist.")
    if path.suffix == ".safetensors":
        arrays, _ = read_safetensors(path, "network file")
        return arrays
    if path.suffix != ".npz":
        raise ValueError(
            f"file {str(path)!r} is neither .safetensors nor .npz. Convert it where PyTorch is "
            f"installed: {_CONVERT}"
        )
    try:
        return read_npz(path)
    except ValueError as error:
        raise ValueError(f"file {str(path)!r} cannot be read: {error}. Make it again.") from error


# Names


def _without_wrappers(arrays: Arrays) -> Arrays:
    """Leaves the names of wrappers out, wherever they are in a name."""
    found: Arrays = {}
    sources: dict[str, str] = {}
    for name, array in arrays.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        bare = ".".join(parts)
        if bare in found:
            raise ValueError(
                f"the state dict has {sources[bare]!r} and {name!r}, which are both {bare!r} "
                "without the prefix of a wrapper. Pass one of them."
            )
        found[bare] = array
        sources[bare] = name
    return found


def _without_shared_prefix(arrays: Arrays, wanted: Collection[str]) -> Arrays:
    """Leaves out what all names begin with, such as "model.", unless the network's do too."""
    firsts = {name.partition(".")[0] for name in arrays}
    layers = {name.partition(".")[0] for name in wanted}
    while len(firsts) == 1 and not firsts & layers and all("." in name for name in arrays):
        arrays = {name.partition(".")[2]: array for name, array in arrays.items()}
        firsts = {name.partition(".")[0] for name in arrays}
    return arrays


# Weights of several entries


def _apply_masks(arrays: Arrays, wanted: Collection[str]) -> Arrays:
    """Puts each weight that PyTorch has pruned together from its entry and its mask."""
    found = dict(arrays)
    for name in wanted:
        layer, _, leaf = name.rpartition(".")
        for weight_form, mask_form in _PRUNED:
            weight_name = weight_form.format(layer=layer, leaf=leaf)
            mask_name = mask_form.format(layer=layer, leaf=leaf)
            if weight_name in found and mask_name in found:
                weight, mask = found.pop(weight_name), found.pop(mask_name)
                _check_mask(mask_name, mask, weight)
                found[name] = np.where(mask != 0, weight, np.zeros_like(weight))
    return found


def _check_mask(name: str, mask: np.ndarray, weight: np.ndarray) -> None:
    """Checks that an array is the mask of a weight."""
    is_mask = mask.shape == weight.shape and bool(np.isin(mask, (0, 1)).all())
    if not is_mask:
        raise ValueError(
            f"the state dict has {name!r} of shape {list(mask.shape)}, which is not a mask of "
            f"zeros and ones for a weight of shape {list(weight.shape)}. Make it permanent in "
            "PyTorch (torch.nn.utils.prune.remove), and save it again."
        )


def _refuse_computed(arrays: Arrays, wanted: Collection[str]) -> None:
    """Refuses weights that PyTorch computes from other entries, as weight_norm does."""
    found = []
    for name in wanted:
        layer, _, leaf = name.rpartition(".")
        parametrized = f"{layer}.parametrizations.{leaf}."
        parts = [entry for entry in arrays if entry.startswith(parametrized)]
        parts += [f"{name}{end}" for end in _COMPUTED if f"{name}{end}" in arrays]
        if parts and name not in arrays:
            found.append(parts)
    if found:
        raise ValueError(
            f"the state dict computes a weight from {', '.join(sorted(found[0]))}: weight_norm, "
            "spectral_norm or another parametrization. Make the weights plain in PyTorch, and save "
            "the state dict again: torch.nn.utils.parametrize.remove_parametrizations, or "
            "remove_weight_norm."
        )
