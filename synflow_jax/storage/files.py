"""What a run leaves behind: masks, rows of results, JSON. All of it is written atomically.

A file is written under another name, flushed to the disk and then renamed, so that it is there whole or not at
all. Rows are JSON lines, one a run; a lock file beside them keeps two processes from losing each other's rows.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from synflow_jax import masking, trees
from synflow_jax.trees import Mask, Params

_FORMAT = "synflow_jax mask 1"
_CERTIFICATE = "synflow_jax certificate 1"
_ARRAYS = "synflow_jax arrays 1"
_HINT = "It is damaged or was made by another program: make it again, or take another file."


class Stopped(Exception):
    """A run was asked to stop, and has saved where it stands."""


def check_writable(folder: pathlib.Path, flag: str = "workdir") -> None:
    """Makes `folder` and raises ValueError, naming `flag`, if no file can be written there: before long work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag}={str(folder)!r} cannot be written: {error.strerror}. Choose another folder: --{flag}=DIR."
        ) from error


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file atomically, making its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        pathlib.Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON atomically. NaN and infinities become null: JSON has no word for them."""
    write_bytes(path, (json.dumps(_plain(value), indent=2) + "\n").encode())


def save_mask(
    path: str | os.PathLike[str], mask: Mask, metadata: Mapping[str, Any] | None = None
) -> str:
    """Writes a mask as a safetensors file that describes itself; read it back with `load_mask`.

    One uint8 tensor for each prunable leaf, by name, holds its bits (`masking.pack`). The file's metadata holds
    `format`, `layers` (JSON: name -> shape and kept), `sha256` (of all the bits, in the order of the names), and
    `run`, the `metadata` given here as JSON.

    Returns:
      The sha256 in hex.
    """
    names, leaves = trees.names(mask), [np.asarray(leaf) for leaf in jax.tree.leaves(mask)]
    packed = _packed(mask)
    layers = {
        name: {"shape": leaf.shape, "kept": int(leaf.sum())}
        for name, leaf in zip(names, leaves, strict=True)
    }
    digest = _digest(packed)
    header = {
        "format": _FORMAT,
        "layers": json.dumps(layers),
        "sha256": digest,
        "run": json.dumps(_plain(dict(metadata or {}))),
    }
    write_bytes(pathlib.Path(path), safetensors.numpy.save(packed, header))
    return digest


def load_mask(path: str | os.PathLike[str], params: Params | None = None) -> Mask:
    """Reads a mask that `save_mask` wrote.

    Args:
      path: the file.
      params: if given, the result has the structure of these parameters, with holes where the file has no leaf.

    Returns:
      Without `params`, {name: bool array}, by names such as "conv1_1/kernel".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated, damaged or of another kind, or it does not fit `params`.
    """
    path = pathlib.Path(path)
    header, packed = _open(path, "mask file", "prune.py writes masks to WORKDIR/masks/.")
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"mask file {str(path)!r} has format {header.get('format')!r}, not {_FORMAT!r}. {_HINT}"
        )
    if _digest(packed) != header.get("sha256"):
        raise ValueError(f"mask file {str(path)!r} has bits that do not match its sha256. {_HINT}")
    shapes = {name: tuple(layer["shape"]) for name, layer in json.loads(header["layers"]).items()}
    masks = {name: masking.unpack(packed[name], shape) for name, shape in shapes.items()}
    return masks if params is None else _fit(masks, params, path)


def _fit(masks: dict[str, np.ndarray], params: Params, path: pathlib.Path) -> Mask:
    found = {
        name: np.shape(leaf)
        for name, leaf in zip(trees.names(params), jax.tree.leaves(params), strict=True)
    }
    for name, mask in masks.items():
        if found.get(name) != mask.shape:
            raise ValueError(
                f"mask file {str(path)!r} has {name!r} of shape {mask.shape}; the parameters have "
                f"{found.get(name, 'no such leaf')} there. It belongs to another network."
            )
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: (
            jax.numpy.asarray(masks[trees.path_name(keys)])
            if trees.path_name(keys) in masks
            else None
        ),
        params,
    )


def mask_digest(mask: Mask) -> str:
    """The sha256, in hex, that `save_mask` returns for a mask."""
    return _digest(_packed(mask))


def _packed(mask: Mask) -> dict[str, np.ndarray]:
    return {
        name: masking.pack(leaf)
        for name, leaf in zip(trees.names(mask), jax.tree.leaves(mask), strict=True)
    }


def _digest(packed: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(packed[name].tobytes() for name in sorted(packed))).hexdigest()


def save_arrays(
    path: pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]
) -> None:
    """Writes arrays by name as a safetensors file; the metadata holds `format`, `sha256` and `run`, as JSON."""
    header = {
        "format": _ARRAYS,
        "sha256": _digest(arrays),
        "run": json.dumps(_plain(dict(metadata))),
    }
    write_bytes(path, safetensors.numpy.save(dict(arrays), header))


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated, damaged or of another kind.
    """
    header, arrays = _open(path, "state file", "train.py writes it, where imp rewinds to a step.")
    if header.get("format") != _ARRAYS or _digest(arrays) != header.get("sha256"):
        raise ValueError(
            f"state file {str(path)!r} does not match its format or its sha256. {_HINT}"
        )
    return arrays


def _open(path: pathlib.Path, what: str, hint: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The metadata and the arrays of a safetensors file."""
    if not path.is_file():
        raise FileNotFoundError(f"{what} {str(path)!r} does not exist. {hint}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{what} {str(path)!r} cannot be read: {error}. {_HINT}") from error


def save_certificate(
    path: pathlib.Path, certificate: Mapping[str, Any], removed_in: trees.Tree
) -> None:
    """Writes a certificate: what it says as JSON, and beside it (.npz) the iteration that pruned each weight."""
    names, leaves = trees.names(removed_in), jax.tree.leaves(removed_in)
    arrays = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path.with_suffix(".npz"), buffer.getvalue())
    write_json(path, {"format": _CERTIFICATE, **certificate, "removed_in_sha256": _digest(arrays)})


def load_certificate(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads what `save_certificate` wrote: what it says, and {name: uint16 array}, the iterations.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, damaged or of another kind.
    """
    path = pathlib.Path(path)
    arrays_path = path.with_suffix(".npz")
    for file in (path, arrays_path):
        if not file.is_file():
            raise FileNotFoundError(
                f"certificate file {str(file)!r} does not exist. prune.py writes both files of a certificate to "
                "WORKDIR/certificates/ where schedule='certified'."
            )
    try:
        certificate = json.loads(path.read_text())
        with np.load(io.BytesIO(arrays_path.read_bytes()), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"certificate {str(path)!r} cannot be read: {error}. {_HINT}") from error
    if not isinstance(certificate, dict) or certificate.get("format") != _CERTIFICATE:
        raise ValueError(
            f"file {str(path)!r} is no certificate of the format {_CERTIFICATE!r}. {_HINT}"
        )
    if certificate.get("removed_in_sha256") != _digest(arrays):
        raise ValueError(
            f"certificate {str(path)!r} does not belong to {arrays_path.name!r} beside it. {_HINT}"
        )
    return certificate, arrays


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, oldest first; [] if there is none.

    Raises:
      ValueError: a line is no JSON object; names the file, the line and the cure.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = error
        if not isinstance(row, dict) or "run_id" not in row:
            raise ValueError(
                f"row file {str(path)!r}, line {number}: {line[:60]!r} is no result row (a JSON object with a run_id). "
                "Delete that line, and run again what it held."
            )
        rows.append(row)
    return rows


def read_all_rows(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a folder, whichever process wrote them: of rows.jsonl and, by name, of every rows-*.jsonl.

    One row a `run_id`, at the place where it came first; where several files hold one, that of the last file.

    Raises:
      ValueError: as `read_rows`.
    """
    folder = pathlib.Path(workdir)
    paths = [folder / "rows.jsonl", *sorted(folder.glob("rows-*.jsonl"))]
    return list({row["run_id"]: row for path in paths for row in read_rows(path)}.values())


def own(path: pathlib.Path) -> pathlib.Path:
    """The file of this process in place of one that several would write: rows.jsonl, or of several rows-0003.jsonl."""
    return (
        path
        if jax.process_count() == 1
        else path.with_stem(f"{path.stem}-{jax.process_index():04d}")
    )


def write_row(path: pathlib.Path, row: Mapping[str, Any]) -> None:
    """Adds a row, in place of an older one of the same `run_id`."""
    with _locked(path):
        rows = [old for old in read_rows(path) if old["run_id"] != row["run_id"]]
        lines = [json.dumps(_plain(r)) for r in [*rows, row]]
        write_bytes(path, "".join(line + "\n" for line in lines).encode())


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _plain(value: Any) -> Any:
    """What JSON can hold: dicts, lists, numbers, strings, null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
