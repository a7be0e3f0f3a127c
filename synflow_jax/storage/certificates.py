"""Reads and writes certificates: records that no iteration of a run disconnected its network.

A certificate is two files: a JSON file with the claim, the config and one entry per iteration, and
an .npz file of the same name with the iteration that pruned each weight.
`synflow_jax.experiments.certificates` checks the claim.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from synflow_jax import trees
from synflow_jax.storage import arrays, files
from synflow_jax.storage.files import AnyPath

_FORMAT = "synflow_jax certificate 1"
# What the readers raise for damaged files; the last three for JSON or arrays beyond all bounds.
_UNREADABLE = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RecursionError,
    MemoryError,
)


def save_certificate(
    path: pathlib.Path, certificate: Mapping[str, Any], removed_in: trees.Tree
) -> None:
    """Writes both files of a certificate; read them with `load_certificate`.

    Args:
      path: the JSON file; the other one has the ending .npz.
      certificate: the contents of the JSON file.
      removed_in: tree of arrays, uint16 up to 65,535 iterations and uint32 beyond: the iteration,
        from 1, that pruned each weight; 0 if kept.
    """
    leaves = trees.by_name(removed_in)
    iterations = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    buffer = io.BytesIO()
    # Without allow_pickle=False, which NumPy 2.0 takes for one more array. Integers need no pickle.
    np.savez_compressed(buffer, **iterations)  # type: ignore[arg-type]
    contents = {
        "format": _FORMAT,
        **certificate,
        "removed_in_sha256": arrays.digest(iterations),
    }
    # The JSON file comes last: where it exists, the certificate is complete.
    files.write_bytes(path.with_suffix(".npz"), buffer.getvalue())
    files.write_json(path, contents)


def load_certificate(path: AnyPath) -> tuple[dict[str, Any], arrays.Arrays]:
    """Reads both files of a certificate.

    Returns:
      The contents of the JSON file, and {name: array} as `save_certificate` takes them.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is truncated, damaged or of another kind, or its arrays hold anything but
        unsigned integers.
    """
    path = pathlib.Path(path)
    arrays_path = path.with_suffix(".npz")
    certificate = _read(path, lambda file: json.loads(file.read_text()))
    # Checked before the arrays are looked for: a file of another kind has none.
    if not isinstance(certificate, dict) or certificate.get("format") != _FORMAT:
        raise ValueError(
            f"file {str(path)!r} is not a certificate of the format {_FORMAT!r}. {arrays.DAMAGED}"
        )
    iterations = _read(arrays_path, arrays.read_npz)
    # Each file is written atomically, but not both at once: a crash between the two writes leaves
    # the new arrays with an older claim.
    if certificate.get("removed_in_sha256") != arrays.digest(iterations):
        raise ValueError(
            f"certificate {str(path)!r} does not belong to {arrays_path.name!r} in the same "
            f"folder. {arrays.DAMAGED}"
        )
    for name, leaf in iterations.items():
        if not np.issubdtype(leaf.dtype, np.unsignedinteger):
            raise ValueError(
                f"certificate file {str(arrays_path)!r} holds {leaf.dtype} for {name!r}. The "
                f"numbers of iterations are unsigned integers. {arrays.DAMAGED}"
            )
    return certificate, iterations


def _read(path: pathlib.Path, reader: Callable[[pathlib.Path], Any]) -> Any:
    """Reads one of the two files.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"certificate file {str(path)!r} does not exist. prune.py writes both files of a "
            "certificate to WORKDIR/certificates/ if schedule='certified'."
        )
    try:
        return reader(path)
    except _UNREADABLE as error:
        raise ValueError(
            f"certificate file {str(path)!r} cannot be read: {error}. {arrays.DAMAGED}"
        ) from error
