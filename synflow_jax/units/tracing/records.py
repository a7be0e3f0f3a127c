"""What is seen of a program: nodes, which of them are one unit, and what reads and writes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

NONE = -1  # no unit

LeafAxis = tuple[int, int]  # the number of a leaf, and one of its axes


class Read(NamedTuple):
    """A product of activations with a kernel.

    leaf, read, write: the kernel, its input and its output axis; read and write are -1 where the kernel is not a
      parameter as it is, with one axis of each kind.
    values: what it is multiplied with where the program was evaluated, [size of the input axis], and None where not.
    steady: whether each of them is the same at all places of the product, so that it acts as a bias.
    whole: whether all of the kernel is used at each place: a convolution whose kernel lies on padding uses a part of it
      at the borders.
    bias, sign: the parameter that is added to the product (1) or subtracted from it (-1), if one is, with no other use.
    """

    leaf: int
    read: int
    write: int
    values: Any = None
    steady: Any = None
    whole: bool = True
    bias: int | None = None
    sign: int = 1


class Records(NamedTuple):
    """What has been seen of a program.

    Attributes:
      num_nodes: nodes are numbered from 0.
      rows: the nodes of each axis of each parameter.
      inputs, outputs: nodes of the network's inputs, in rows, and of its outputs.
      same: pairs of arrays of nodes that are one unit.
      fixed: nodes of units that must stay, and why.
      nonzero: nodes that are read where they are not 0, though nothing reaches them and their sources are 0.
      open: nodes that are read after something was added, and before a function whose derivative at 0 is 0.
      writers, readers, sources, scales: axes of kernels that write to units and read from them, axes of what is added
        to units and of what multiplies them; in the order of the program.
      reads: the products.
    """

    num_nodes: int
    rows: dict[LeafAxis, np.ndarray]
    inputs: list[np.ndarray]
    outputs: list[np.ndarray]
    same: list[tuple[np.ndarray, np.ndarray]]
    fixed: list[tuple[np.ndarray, str]]
    nonzero: list[np.ndarray]
    open: list[np.ndarray]
    writers: dict[LeafAxis, None]
    readers: dict[LeafAxis, None]
    sources: dict[LeafAxis, None]
    scales: dict[LeafAxis, None]
    reads: list[Read]
