"""Floor 1. Units followed through a jaxpr: which positions of which parameters are the same neuron or channel.

Every axis of every parameter starts as a row of nodes, one for each position. The jaxpr is followed once, and each
value carries, for the axes that hold units, which node each position is. Where two values meet elementwise, or a kernel
meets its input in a product, the nodes that lie on each other are the same unit.

Nodes never leave their place without a record: a step whose effect on units is not known, or that mixes units (a sum
over them, a softmax), marks them as `fixed`. So two units may be taken for one, and a unit for one that must stay;
never the other way round. `units.groups` reads what has been recorded.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from synflow_jax.jaxprs import CALLS, scan_counts
from synflow_jax.trees import Tree

NONE = -1  # no unit
_BATCH = 2
_CONSTANT, _PARAMETERS, _ACTIVATIONS = range(3)  # what a value depends on; the larger number wins

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


def trace(
    function: Callable[..., Any], params: Tree, input_shape: Sequence[int], dtype: Any, *, evaluate: bool = False
) -> Records:
    """Follows the units of `function(params, x)`.

    Args:
      function: in evaluation mode.
      params: a tree of arrays, or of shapes.
      input_shape: of one example.
      dtype: of the inputs.
      evaluate: computes the function as well, for inputs of 0: `Read.values` are known then.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), params)
    x = jax.ShapeDtypeStruct((_BATCH, *input_shape), dtype)
    closed = jax.make_jaxpr(function)(shapes, x)
    leaf_shapes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    if not evaluate:
        return _follow(closed, leaf_shapes, x.shape, None)
    found: list[Records] = []

    @jax.jit
    def evaluated(leaves: list[jax.Array], x: jax.Array) -> list[Any]:
        found.append(_follow(closed, leaf_shapes, x.shape, [*leaves, x]))
        return [(read.values, read.steady) for read in found[-1].reads]

    arrays = jax.device_get(evaluated(jax.tree.leaves(params), jnp.zeros(x.shape, dtype)))
    records = found[-1]
    reads = [r._replace(values=v, steady=s) for r, (v, s) in zip(records.reads, arrays, strict=True)]
    return records._replace(reads=reads)


def _follow(
    closed: Any, leaf_shapes: list[tuple[int, ...]], input_shape: tuple[int, ...], arrays: list[Any] | None
) -> Records:
    tracer = _Tracer(leaf_shapes, evaluating=arrays is not None)
    inputs = [tracer.parameter(i) for i in range(len(leaf_shapes))] + [tracer.network_input(input_shape)]
    if arrays is not None:
        inputs = [value._replace(array=array) for value, array in zip(inputs, arrays, strict=True)]
    outputs = tracer.run(closed.jaxpr, [_constant(c) for c in closed.consts], inputs)
    for value in outputs:
        tracer.leave(value.fields)
    once = lambda leaf: leaf is not None and tracer.met[leaf] == 1
    return Records(
        tracer.num_nodes,
        tracer.rows,
        tracer.inputs,
        [f.ids for value in outputs for f in value.fields],
        tracer.same,
        tracer.fixed,
        tracer.nonzero,
        tracer.open,
        *tracer.roles,
        [read if once(read.bias) else read._replace(bias=None) for read in tracer.reads],
    )


class _Field(NamedTuple):
    """Units along some axes of a value.

    ids: int, the node of each position; one axis for each of the value's, of size 1 outside of `support`.
    support: the axes along which the units lie.
    axes: the (leaf, axis) of parameters that they come from, in values that depend on parameters alone.
    zero: a unit that receives nothing, and whose sources are 0, is 0 here.
    open: something was added to the unit since the last function whose derivative at 0 is 0.
    """

    ids: np.ndarray
    support: frozenset[int]
    axes: frozenset[tuple[int, int]] = frozenset()
    zero: bool = True
    open: bool = False


class _Value(NamedTuple):
    """What is known of a value.

    uniform: axes along which it was broadcast. number: of a scalar that is known. leaf: the parameter that it is, with
    axes of size 1 more or less. product: the read that it is the result of, from `Records.reads`. array: itself, where
    the program is evaluated.
    """

    fields: tuple[_Field, ...]
    kind: int
    shape: tuple[int, ...]
    uniform: frozenset[int] = frozenset()
    number: Any = None
    leaf: int | None = None
    product: int | None = None
    array: Any = None


def _constant(value: Any) -> _Value:
    shape = np.shape(value)
    is_number = not shape and jnp.issubdtype(jnp.result_type(value), jnp.number)
    return _Value((), _CONSTANT, shape, _singles(shape), float(value) if is_number else None, array=value)


def _singles(shape: tuple[int, ...]) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(shape) if n == 1)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_KEEP_ZERO = _names(
    "neg abs sign tanh sin tan asin atan sinh asinh expm1 log1p sqrt cbrt square integer_pow floor ceil round erf "
    "convert_element_type real imag copy copy_p stop_gradient reduce_precision erf_inv optimization_barrier "
    "sharding_constraint pbroadcast pvary mul div rem"
)
_SUMS = _names("add sub add_any max min select_n clamp")
_ELEMENTWISE = (
    _KEEP_ZERO
    | _SUMS
    | _names(
        "exp exp2 log cos acos acosh atanh cosh logistic rsqrt pow atan2 erfc lgamma digamma nextafter "
        "eq ne lt le gt ge and or not xor shift_left shift_right_logical shift_right_arithmetic is_finite"
    )
)
_REDUCTIONS = _names("reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin")
_BROADCASTS = _names("broadcast_in_dim reshape squeeze")
_WINDOWS = _names("reduce_window reduce_window_max reduce_window_min reduce_window_sum")
_PLATFORM = "platform"  # the number of the platform that a program is lowered for
_CUMULATIVE = _names("cumsum cumprod cummax cummin")


class _Tracer:
    """The nodes, which of them are the same unit, and what has been seen to happen to them."""

    def __init__(self, leaf_shapes: Sequence[tuple[int, ...]], evaluating: bool) -> None:
        self.leaf_shapes = leaf_shapes
        self.evaluating = evaluating
        self.num_nodes = 0
        self.rows = {
            (i, axis): self.nodes(size) for i, shape in enumerate(leaf_shapes) for axis, size in enumerate(shape)
        }
        # See `Records`.
        self.inputs: list[np.ndarray] = []
        self.same: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.nonzero: list[np.ndarray] = []
        self.open: list[np.ndarray] = []
        self.reads: list[Read] = []
        self.writers: dict[LeafAxis, None] = {}
        self.readers: dict[LeafAxis, None] = {}
        self.sources: dict[LeafAxis, None] = {}
        self.scales: dict[LeafAxis, None] = {}
        self.met = collections.Counter[int]()  # how often a parameter meets activations
        self.lists: list[list] = [self.same, self.fixed, self.nonzero, self.open, self.reads]
        self.roles = (self.writers, self.readers, self.sources, self.scales)
        self.composites: dict[tuple[bytes, ...], np.ndarray] = {}

    # Nodes

    def nodes(self, num: int) -> np.ndarray:
        self.num_nodes += num
        return np.arange(self.num_nodes - num, self.num_nodes)

    def parameter(self, leaf: int) -> _Value:
        shape = self.leaf_shapes[leaf]
        fields = [
            _Field(_along(self.rows[leaf, axis], axis, len(shape)), frozenset([axis]), frozenset([(leaf, axis)]))
            for axis in range(len(shape))
        ]
        return _Value(tuple(fields), _PARAMETERS, shape, leaf=leaf)

    def network_input(self, shape: tuple[int, ...]) -> _Value:
        """Each axis but the batch's has nodes of its own: which of them are features, their readers decide."""
        fields = []
        for axis, size in enumerate(shape[1:], 1):
            self.inputs.append(self.nodes(size))
            fields.append(_Field(_along(self.inputs[-1], axis, len(shape)), frozenset([axis]), zero=False))
        return _Value(tuple(fields), _ACTIVATIONS, shape)

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        a, b = np.broadcast_arrays(a, b)
        units = (a >= 0) & (b >= 0) & (a != b)
        if units.any():
            self.same.append((a[units], b[units]))

    def fix(self, fields: Sequence[_Field], reason: str) -> None:
        self.fixed += [(f.ids[f.ids >= 0], reason) for f in fields]

    def leave(self, fields: Sequence[_Field]) -> None:
        """Units that are read from here on: are they 0 if nothing reaches them, and do they stay so?"""
        self.nonzero += [f.ids for f in fields if not f.zero]
        self.open += [f.ids for f in fields if f.open]

    def composite(self, fields: Sequence[_Field], axes: Sequence[int]) -> _Field:
        """One field in place of several along `axes` of a value: its units are the combinations of theirs."""
        known = np.concatenate(self.inputs) if self.inputs else np.zeros(0, int)
        # Inputs stay in any case: what lies along the axis beside them is what counts.
        hidden = [f for f in fields if not np.isin(f.ids, known).all()]
        fields = hidden or fields
        if len(fields) == 1:
            return fields[0]
        arrays = np.broadcast_arrays(*[f.ids for f in fields])
        support = frozenset(axes)
        key = (str(arrays[0].shape).encode(), *(a.tobytes() for a in arrays))
        if key not in self.composites:
            _, inverse = np.unique(np.stack([a.ravel() for a in arrays]), axis=1, return_inverse=True)
            inverse = np.reshape(inverse, -1)
            ids = self.nodes(int(inverse.max(initial=-1)) + 1)[inverse]
            self.composites[key] = ids.reshape(arrays[0].shape)
            if not hidden:
                self.inputs.append(np.unique(ids))
            else:
                self.fix([*fields, _Field(ids, support)], "combined with other units in one axis")
        return _Field(
            self.composites[key], support, frozenset().union(*[f.axes for f in fields]),
            all(f.zero for f in fields), any(f.open for f in fields),
        )  # fmt: skip

    # The program

    def run(self, jaxpr: Any, consts: Sequence[_Value], args: Sequence[_Value]) -> list[_Value]:
        found: dict[Any, _Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        found |= dict(zip(jaxpr.invars, args, strict=True))
        read = lambda atom: _constant(atom.val) if isinstance(atom, core.Literal) else found[atom]
        for eqn in jaxpr.eqns:
            results = self.equation(eqn, [read(atom) for atom in eqn.invars])
            for variable, value in zip(eqn.outvars, results, strict=True):
                assert value.shape == variable.aval.shape, (eqn.primitive.name, value.shape, variable.aval.shape)
                found[variable] = value
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        results = self.step(eqn, values)
        name = eqn.primitive.name
        if name in CALLS or (name == "cond" and values[0].number == _PLATFORM) or not self.evaluating:
            return results  # with the arrays of what has been looked into
        if any(value.array is None for value in values):
            return [value._replace(array=None) for value in results]
        arrays = eqn.primitive.bind(*[v.array for v in values], **eqn.primitive.get_bind_params(eqn.params))
        arrays = arrays if eqn.primitive.multiple_results else [arrays]
        return [value._replace(array=array) for value, array in zip(results, arrays, strict=True)]

    def step(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name == "platform_index":
            return [_Value((), _CONSTANT, (), number=_PLATFORM)]
        if name in CALLS and CALLS[name] in eqn.params:
            return self.call(eqn, values)
        if name in ("cond", "scan", "while"):
            return getattr(self, name + "_")(eqn, values)
        if name in _ELEMENTWISE:
            if len(eqn.outvars) > 1:  # optimization_barrier
                return values
            return [self.elementwise(name, values, eqn.outvars[0].aval.shape, eqn.params)]
        if name in _REDUCTIONS:
            return [self.reduction(values[0], eqn.params["axes"], name, eqn.outvars[0].aval.shape)]
        if name in _CUMULATIVE:
            return [self.without(values[0], [eqn.params["axis"]], name)]
        if name in _WINDOWS and len(eqn.outvars) == 1:
            return [self.windows(eqn, values[0])]
        result: list[_Value] | None = getattr(self, name)(eqn, values) if name in _STEPS else None
        return self.unknown(eqn, values) if result is None else result

    def unknown(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        """What is done is not known: the units stay, and the results hold none."""
        for value in values:
            self.fix(value.fields, eqn.primitive.name)
            self.leave(value.fields)
        kind = max([value.kind for value in values], default=_CONSTANT)
        # Parameters beyond this point cannot be told apart: what they do is as unknown as an activation.
        kind = _ACTIVATIONS if kind == _PARAMETERS else kind
        shapes = [variable.aval.shape for variable in eqn.outvars]
        return [_Value((), kind, shape, _singles(shape)) for shape in shapes]

    def call(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        inner = eqn.params[CALLS[eqn.primitive.name]]
        outs = self.run(getattr(inner, "jaxpr", inner), [_constant(c) for c in getattr(inner, "consts", ())], values)
        if eqn.primitive.name == "custom_jvp_call" and len(values) == len(outs) == 1 and _is_gate(eqn):
            return [_flagged(outs[0], open=False)]
        return outs

    def cond_(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        branches = list(eqn.params["branches"])
        if values[0].number == _PLATFORM:  # all branches compute the same; the last one is the default
            branches = branches[-1:]
        self.fix(values[0].fields, "cond")
        self.leave(values[0].fields)
        results = [self.run(b.jaxpr, [_constant(c) for c in b.consts], values[1:]) for b in branches]
        return [functools.reduce(self.joined, outs) for outs in zip(*results, strict=True)]

    def joined(self, a: _Value, b: _Value) -> _Value:
        """Either of two values, which of them is not known: units are what both say."""
        fields = []
        for value, other in ((a, b), (b, a)):
            for f in value.fields:
                here = [g for g in value.fields if g.support & f.support]
                there = [g for g in other.fields if g.support & f.support]
                if len(here) == len(there) == 1 and f.support == there[0].support:
                    if value is a:
                        self.unify(f.ids, there[0].ids)
                        flags = f.zero and there[0].zero, f.open or there[0].open
                        fields.append(_Field(f.ids, f.support, f.axes | there[0].axes, *flags))
                elif not there and f.support <= other.uniform:  # the state before the first step, for example
                    fields.append(f._replace(zero=f.zero and other.number == 0))
                else:
                    self.fix([f], "a choice between values of other shapes")
                    self.leave([f])
        if {a.kind, b.kind} == {_PARAMETERS, _ACTIVATIONS}:
            self.sources |= _all_axes(fields)
            fields = [f._replace(axes=frozenset(), zero=False) for f in fields]
        same = a.number if a.number == b.number else None
        return _Value(tuple(fields), max(a.kind, b.kind), a.shape, a.uniform & b.uniform, same)

    def loop(self, body: Callable[[list[_Value]], list[_Value]], carry: list[_Value]) -> tuple[list[_Value], Any]:
        """The carried values of a loop when they change no more, and what the body gives beside them."""
        carry = [value._replace(array=None, leaf=None, product=None) for value in carry]
        while True:
            before = self.records()
            results = body(carry)
            new = [self.joined(a, b) for a, b in zip(carry, results, strict=False)]
            shape = lambda values: [(v.kind, v.uniform, v.number, [f[1:] for f in v.fields]) for v in values]
            if shape(new) == shape(carry):
                return new, results[len(carry) :]
            self.forget(before)  # what was seen of values that are not yet those of every step
            carry = [self.joined(a, b) for a, b in zip(carry, results, strict=False)]

    def records(self) -> tuple[list[int], list[dict], collections.Counter]:
        return [len(r) for r in self.lists], [dict(r) for r in self.roles], self.met.copy()

    def forget(self, since: tuple[list[int], list[dict], collections.Counter]) -> None:
        self.met = since[2]
        for record, length in zip(self.lists, since[0], strict=True):
            del record[length:]
        for role, before in zip(self.roles, since[1], strict=True):
            role.clear()
            role.update(before)

    def scan_(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        closed = eqn.params["jaxpr"]
        consts = [_constant(c) for c in closed.consts]
        num_consts, num_carry = scan_counts(eqn, closed.jaxpr)
        slices = [self.sliced(value) for value in values[num_consts + num_carry :]]
        body = lambda carry: self.run(closed.jaxpr, consts, [*values[:num_consts], *carry, *slices])
        carry, ys = self.loop(body, values[num_consts : num_consts + num_carry])
        length = eqn.params["length"]
        stack = lambda y: _moved(y, [i + 1 for i in range(len(y.shape))], (length, *y.shape))
        return [*carry, *map(stack, ys)]

    def sliced(self, value: _Value) -> _Value:
        """One of the values that are stacked along the first axis."""
        value = self.without(value, [0], "scan over units")
        return _moved(value, [None, *range(len(value.shape) - 1)], value.shape[1:])

    def while_(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        params = eqn.params
        num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
        body, cond = params["body_jaxpr"], params["cond_jaxpr"]
        consts = values[num_cond : num_cond + num_body]
        run = lambda closed, args: self.run(closed.jaxpr, [_constant(c) for c in closed.consts], args)
        carry, _ = self.loop(lambda carry: run(body, [*consts, *carry]), values[num_cond + num_body :])
        for value in run(cond, [*values[:num_cond], *carry]):
            self.fix(value.fields, "while")
            self.leave(value.fields)
        return carry

    # Steps of the program

    def elementwise(self, name: str, values: list[_Value], shape: tuple[int, ...], params: dict) -> _Value:
        values = [self.broadcast(v, list(range(len(v.shape))), shape) for v in values]
        if name == "select_n":  # which case it is does not matter where all are 0
            values[0] = _flagged(values[0], zero=True)
        if name == "div" and values[1].fields:
            self.nonzero += [f.ids for f in values[1].fields if values[1].kind == _ACTIVATIONS]
        out = functools.reduce(functools.partial(self.meet, name), values)
        if name in _SUMS:
            kept = _neutral(name, values)
        else:
            kept = name in _KEEP_ZERO and (name != "integer_pow" or params["y"] > 0)
        if not kept:
            out = _flagged(out, zero=False)
        if name == "convert_element_type":
            out = out._replace(leaf=values[0].leaf, product=values[0].product)
        return out

    def meet(self, name: str, a: _Value, b: _Value) -> _Value:
        """Two values, elementwise. Units that lie on each other are the same."""
        a, b = self.matched(a, b)
        pairs = [(f, g) for f, g in itertools.product(a.fields, b.fields) if f.support & g.support]
        is_product = name in ("mul", "div")
        mixed = {a.kind, b.kind} == {_PARAMETERS, _ACTIVATIONS}
        role = self.scales if is_product else self.sources
        if mixed:
            self.meet_parameter(name, a, b)
        fields = []
        for f, g in pairs:
            if mixed:
                role |= _all_axes([f if a.kind == _PARAMETERS else g])
            self.unify(f.ids, g.ids)
            smaller, larger = (f, g) if len(f.support) <= len(g.support) else (g, f)
            if not smaller.support <= larger.support:
                self.fix([f, g], "units along crossing axes")
            if mixed and is_product:  # a scale that happens to be 0 may change
                zero = (g if a.kind == _PARAMETERS else f).zero
            elif is_product and max(a.kind, b.kind) == _ACTIVATIONS:
                zero = f.zero or (name == "mul" and g.zero)
            else:
                zero = f.zero and g.zero
            added = mixed and not is_product
            ids = np.where(f.ids >= 0, f.ids, g.ids) if f.support == g.support else smaller.ids
            axes = f.axes | g.axes if max(a.kind, b.kind) == _PARAMETERS else frozenset()
            fields.append(_Field(ids, smaller.support, axes, zero, f.open or g.open or added))
        for value, other, met in ((a, b, {id(f) for f, _ in pairs}), (b, a, {id(g) for _, g in pairs})):
            for f in value.fields:
                if id(f) in met:
                    continue
                if not f.support <= other.uniform:
                    self.fix([f], f"{name} with an array that has no such units")
                if mixed and value.kind == _PARAMETERS:
                    continue  # a parameter along an axis that holds no units
                harmless = other.number == 0 or (other.number is not None and name != "concatenate")  # or see _neutral
                zero = f.zero and (is_product or harmless)
                fields.append(f._replace(zero=zero, open=f.open or (mixed and not is_product)))
        unique = {(f.support, f.ids.tobytes()): f for f in fields}
        for f in fields:  # one field may have met several
            first = unique[f.support, f.ids.tobytes()]
            flags = first.zero and f.zero, first.open or f.open
            unique[f.support, f.ids.tobytes()] = _Field(f.ids, f.support, first.axes | f.axes, *flags)
        return _Value(tuple(unique.values()), max(a.kind, b.kind), a.shape, a.uniform & b.uniform)

    def meet_parameter(self, name: str, a: _Value, b: _Value) -> None:
        """Notes what is added to a product as its bias."""
        x, parameter = (a, b) if b.kind == _PARAMETERS else (b, a)
        self.met.update({leaf for f in parameter.fields for leaf, _ in f.axes})
        if x.product is not None and parameter.leaf is not None and (name == "add" or (name == "sub" and x is a)):
            sign = 1 if name == "add" else -1
            self.reads[x.product] = self.reads[x.product]._replace(bias=parameter.leaf, sign=sign)

    def matched(self, a: _Value, b: _Value) -> tuple[_Value, _Value]:
        """a and b, with at most one field along the same axes where the other one has just one there."""
        count = lambda value, support: [f for f in value.fields if f.support == support]
        for support in {f.support for f in (*a.fields, *b.fields)}:
            ours, theirs = count(a, support), count(b, support)
            if len(ours) > 1 and theirs:
                a = self.narrowed(a, ours, theirs)
            if len(theirs) > 1 and ours:
                b = self.narrowed(b, theirs, ours)
        return a, b

    def narrowed(self, value: _Value, several: list[_Field], others: list[_Field]) -> _Value:
        """The value with one of several fields along the same axes: that with the pattern of another value's, or all.

        A kernel [3, 3, in, out] that was reshaped to [9 * in, out] has three fields along its first axis.
        """
        chosen = [f for f in several if len(others) == 1 and _same_pattern(f.ids, others[0].ids)]
        parameter = value.kind == _PARAMETERS and chosen
        field = chosen[-1] if parameter else self.composite(several, sorted(several[0].support))
        return value._replace(fields=(*[f for f in value.fields if all(f is not g for g in several)], field))

    def without(self, value: _Value, axes: Sequence[int], reason: str) -> _Value:
        """The value after units along `axes` were mixed."""
        lost = [f for f in value.fields if f.support & set(axes)]
        self.fix(lost, reason)
        self.leave(lost)
        fields = tuple(f for f in value.fields if not f.support & set(axes))
        return _Value(fields, value.kind, value.shape, value.uniform - set(axes))

    def reduction(self, value: _Value, axes: Sequence[int], name: str, shape: tuple[int, ...]) -> _Value:
        out = self.without(value, axes, name)
        if name.startswith("arg"):
            out = _flagged(out, zero=False)
        places = iter(range(len(shape)))
        return _moved(out, [None if axis in axes else next(places) for axis in range(len(value.shape))], shape)

    def windows(self, eqn: Any, value: _Value) -> _Value:
        window = eqn.params["window_dimensions"]
        strides = eqn.params["window_strides"]
        padding = eqn.params["padding"]
        moved = [i for i, (w, s, p) in enumerate(zip(window, strides, padding, strict=True))
                 if w != 1 or s != 1 or tuple(p) != (0, 0)]  # fmt: skip
        return self.without(value, moved, eqn.primitive.name)._replace(shape=eqn.outvars[0].aval.shape)

    def broadcast_in_dim(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        return [self.broadcast(values[0], list(eqn.params["broadcast_dimensions"]), eqn.outvars[0].aval.shape)]

    def broadcast(self, value: _Value, places: list[int], shape: tuple[int, ...]) -> _Value:
        """The value's axis i becomes axis places[i]; the others are new, and sizes of 1 are widened."""
        if value.shape == shape:
            return value
        repeated = {i for i, place in enumerate(places) if value.shape[i] != shape[place]}
        single = [f for f in value.fields if f.support <= repeated]  # a unit that acts on many
        if value.kind == _ACTIVATIONS:
            self.fix(single, "broadcast")
            self.leave(single)
        kept = tuple(f._replace(support=f.support - repeated) for f in value.fields if not f.support <= repeated)
        uniform = {i for i in range(len(shape)) if i not in places} | {places[i] for i in repeated}
        return _moved(value._replace(fields=kept), places, shape, frozenset(uniform))._replace(leaf=value.leaf)

    def transpose(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        order = list(eqn.params["permutation"])
        return [_moved(values[0], [order.index(i) for i in range(len(order))], eqn.outvars[0].aval.shape)]

    def squeeze(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        return [self.squeezed(values[0], set(eqn.params["dimensions"]), eqn.outvars[0].aval.shape)]

    def squeezed(self, value: _Value, gone: set[int], shape: tuple[int, ...]) -> _Value:
        lost = [f for f in value.fields if f.support <= gone]
        if value.kind == _ACTIVATIONS:
            self.fix(lost, "squeeze")
            self.leave(lost)
        kept = tuple(f._replace(support=f.support - gone) for f in value.fields if not f.support <= gone)
        places = iter(range(len(value.shape)))
        where = [None if i in gone else next(places) for i in range(len(value.shape))]
        return _moved(value._replace(fields=kept), where, shape)._replace(leaf=value.leaf)

    def reshape(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        value, shape = values[0], eqn.outvars[0].aval.shape
        blocks = _blocks(value.shape, shape)
        fields, uniform = [], set()
        for f in value.fields:
            new = _reshaped(f, value.shape, shape, blocks)
            # A single unit is lost if its axis is gone, or if others vary along the axis it comes into.
            single = all(value.shape[i] == 1 for i in f.support)
            near = {i for ours, _ in blocks for i in ours if f.support & set(ours)}
            others = any(g.support & near and any(value.shape[i] > 1 for i in g.support) for g in value.fields)
            if new.support and not (single and others):
                fields.append(new)
                if len(new.support) > 1:
                    self.fix([f], "split into several axes")
            elif value.kind == _ACTIVATIONS:
                self.fix([f], "reshape")
                self.leave([f])
        for before, after in blocks:
            if set(before) <= value.uniform | {i for i in before if value.shape[i] == 1}:
                uniform |= set(after)
        uniform -= frozenset().union(*[f.support for f in fields])
        return [_Value(tuple(fields), value.kind, shape, frozenset(uniform), value.number, value.leaf)]

    def slice(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        params = eqn.params
        strides = params["strides"] or (1,) * len(params["start_indices"])
        index = [slice(*b) for b in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]
        return [self.part(_indexed(values[0], index, eqn.outvars[0].aval.shape))]

    def rev(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        turned = eqn.params["dimensions"]
        index = [slice(None, None, -1 if i in turned else 1) for i in range(len(values[0].shape))]
        return [_indexed(values[0], index, values[0].shape)]

    def split(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        sizes = [variable.aval.shape[eqn.params["axis"]] for variable in eqn.outvars]
        return [self.part(value) for value in _parts(values[0], eqn.params["axis"], sizes)]

    def part(self, value: _Value) -> _Value:
        """A part of a value without the units that are one unit throughout it, where others lie along the same axes.

        Such are the rows of a kernel that were multiplied at once, [in, 3 * out], when the result of one is cut out.
        They are not followed any further: they stay, and their axis is not that of a layer.
        """
        one = lambda f: bool((f.ids == f.ids.flat[0]).all()) if f.ids.size else False
        among = lambda f: any(g.support == f.support and not one(g) for g in value.fields)
        gone = [f for f in value.fields if value.kind == _ACTIVATIONS and one(f) and among(f)]
        self.fix(gone, "one unit throughout a part")
        self.leave(gone)
        for key, row in self.rows.items():
            if any(f.ids.flat[0] in row for f in gone):
                self.writers.pop(key, None)
        return value._replace(fields=tuple(f for f in value.fields if all(f is not g for g in gone)))

    def unstack(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        axis = eqn.params["axis"]
        parts = _parts(values[0], axis, [1] * len(eqn.outvars))
        return [self.squeezed(part, {axis}, eqn.outvars[0].aval.shape) for part in parts]

    def dynamic_slice(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        shape = eqn.outvars[0].aval.shape
        self.fix([f for v in values[1:] for f in v.fields], "dynamic_slice")
        cut = [i for i, (a, b) in enumerate(zip(values[0].shape, shape, strict=True)) if a != b]
        kind = max(v.kind for v in values)
        return [self.without(values[0], cut, "dynamic_slice")._replace(shape=shape, kind=kind)]

    def gather(self, eqn: Any, values: list[_Value]) -> list[_Value] | None:
        """Rows of a table: whole axes keep their units."""
        table, indices = values
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        batching = getattr(numbers, "operand_batching_dims", ())
        kept = [i for i in range(len(table.shape)) if i not in (*numbers.collapsed_slice_dims, *batching)]
        cut = [i for i in range(len(table.shape)) if i not in kept or sizes[i] != table.shape[i]]
        self.fix(indices.fields, "gather")
        self.leave(indices.fields)
        if table.kind == _PARAMETERS:  # an embedding: a position that is looked up is no unit
            fields = tuple(f for f in table.fields if not f.support & set(cut))
            out = table._replace(fields=fields)
        else:
            out = self.without(table, cut, "gather")
        where: list[int | None] = [None] * len(table.shape)
        for axis, place in zip(kept, numbers.offset_dims, strict=True):
            where[axis] = place
        out = _moved(out._replace(uniform=frozenset()), where, eqn.outvars[0].aval.shape)
        if table.kind == _PARAMETERS and indices.kind == _ACTIVATIONS:
            self.writers |= _all_axes(out.fields)
            fields = tuple(f._replace(axes=frozenset(), zero=False) for f in out.fields)
            out = out._replace(kind=_ACTIVATIONS, fields=fields)
        return [out]

    def pad(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        value, fill = values
        config, shape = eqn.params["padding_config"], eqn.outvars[0].aval.shape
        padded = {i for i, c in enumerate(config) if tuple(c) != (0, 0, 0)}
        self.fix(fill.fields, "pad")
        fields = []
        for f in value.fields:
            ids = f.ids
            for axis in sorted(f.support & padded):
                ids = _padded(ids, axis, config[axis])
            # What is padded with -inf goes into a maximum.
            zero = f.zero and (not padded or fill.number in (0, -math.inf))
            fields.append(f._replace(ids=ids, zero=zero))
        return [_Value(tuple(fields), max(value.kind, fill.kind), shape, value.uniform - padded)]

    def concatenate(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        axis, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
        kind = max(v.kind for v in values)
        parts, rests = [], []
        for value in values:
            along = [f for f in value.fields if axis in f.support]
            if len({f.support for f in along}) > 1:
                self.fix(along, "concatenate")
            support = frozenset().union(*[f.support for f in along])
            part = self.composite(along, sorted(support)) if along else None
            if part is not None and value.kind == _PARAMETERS and kind == _ACTIVATIONS:
                self.writers |= _all_axes([part])
                part = part._replace(axes=frozenset(), zero=False)
            parts.append(part)
            rest = tuple(f for f in value.fields if axis not in f.support)
            rests.append(value._replace(fields=rest, shape=shape))
        out = functools.reduce(functools.partial(self.meet, "concatenate"), rests)
        present = [f for f in parts if f is not None]
        if len({f.support for f in present}) > 1:
            self.fix(present, "concatenate")
            self.leave(present)
        elif present:
            support = present[0].support
            sizes = [shape[i] if i in support else 1 for i in range(len(shape))]
            arrays = []
            for value, f in zip(values, parts, strict=True):
                sizes[axis] = value.shape[axis]
                arrays.append(np.broadcast_to(NONE if f is None else f.ids, sizes))
            ids = np.concatenate(arrays, axis)
            axes = frozenset().union(*[f.axes for f in present])
            flags = all(f.zero for f in present), any(f.open for f in present)
            out = out._replace(fields=(*out.fields, _Field(ids, support, axes, *flags)))
        uniform = frozenset(i for i in out.uniform if i != axis)
        return [out._replace(kind=kind, uniform=uniform, number=None)]

    # Products

    def dot_general(self, eqn: Any, values: list[_Value]) -> list[_Value]:
        (a_contract, b_contract), (a_batch, b_batch) = eqn.params["dimension_numbers"]
        a, b = values
        num_batch = len(a_batch)
        a_free = [i for i in range(len(a.shape)) if i not in (*a_contract, *a_batch)]
        b_free = [i for i in range(len(b.shape)) if i not in (*b_contract, *b_batch)]
        a_out = {axis: i for i, axis in enumerate([*a_batch, *a_free])}
        b_out = {axis: i for i, axis in enumerate(b_batch)}
        b_out |= {axis: num_batch + len(a_free) + i for i, axis in enumerate(b_free)}
        return [self.product(a, b, a_contract, b_contract, a_out, b_out, eqn.outvars[0].aval.shape)]

    def conv_general_dilated(self, eqn: Any, values: list[_Value]) -> list[_Value] | None:
        x, kernel = values
        if kernel.kind != _PARAMETERS or eqn.params["batch_group_count"] != 1:
            return None
        numbers, num_groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
        x_batch, x_feature = numbers.lhs_spec[:2]
        kernel_out, kernel_in = numbers.rhs_spec[:2]
        out_batch, out_feature = numbers.out_spec[:2]
        shape = eqn.outvars[0].aval.shape
        if num_groups == 1:
            places = {x_batch: out_batch}, {kernel_out: out_feature}
            whole = all(tuple(p) == (0, 0) for p in eqn.params["padding"]) and set(eqn.params["lhs_dilation"]) <= {1}
            return [self.product(x, kernel, [x_feature], [kernel_in], *places, shape, whole)]
        fields = [f for f in x.fields if f.support == {x_feature}]
        outs = [f for f in kernel.fields if f.support == {kernel_out}]
        if num_groups != x.shape[x_feature] or len(fields) != 1 or len(outs) != 1 or not outs[0].zero:
            return None  # in blocks of channels
        (field,), (out,) = fields, outs
        lost = [f for f in x.fields if f is not field and not f.support <= {x_batch}]
        self.fix(lost, "convolution over units")
        self.leave(lost)
        ids = np.repeat(field.ids.ravel(), shape[out_feature] // num_groups)
        self.unify(ids, out.ids.ravel())
        self.scales |= _all_axes([out])
        new = field._replace(ids=_along(ids, out_feature, len(shape)), support=frozenset([out_feature]))
        return [_Value((new,), _ACTIVATIONS, shape)]

    def product(
        self, a: _Value, b: _Value, a_contract: Sequence[int], b_contract: Sequence[int],
        a_out: dict[int, int], b_out: dict[int, int], shape: tuple[int, ...], whole: bool = True,
    ) -> _Value:  # fmt: skip
        """A sum of products: `contract` axes meet pairwise and are summed over, the others go to their new places.

        whole: all of the kernel is used at each place (and nothing of it lies on padding).
        """
        kind = max(a.kind, b.kind)
        inner, outer = [], []
        for value, contract, out in ((a, a_contract, a_out), (b, b_contract, b_out)):
            summed = tuple(f for f in value.fields if f.support <= set(contract))
            passing = tuple(f for f in value.fields if f.support <= set(out))
            lost = [f for f in value.fields if not (f.support <= set(contract) or f.support <= set(out))]
            if value.kind == _ACTIVATIONS or any(f.support & set(contract) for f in lost):
                self.fix(lost, "summed over with other axes")
                self.leave(lost)
            where = [contract.index(i) if i in contract else None for i in range(len(value.shape))]
            sizes = tuple(value.shape[i] for i in contract)
            inner.append(_moved(value._replace(fields=summed), where, sizes))
            where = [out.get(i) for i in range(len(value.shape))]
            new = frozenset(range(len(shape))) - set(out.values())
            outer.append(_moved(value._replace(fields=passing), where, shape, new))
        self.contraction(*inner, *outer)
        if kind == _ACTIVATIONS:
            outer = [
                v._replace(fields=tuple(f._replace(axes=frozenset(), open=False) for f in v.fields))
                if v.kind == _PARAMETERS else v
                for v in outer
            ]  # fmt: skip
        result = self.meet("mul", *[v._replace(kind=kind) for v in outer])
        if {a.kind, b.kind} != {_PARAMETERS, _ACTIVATIONS}:
            return result
        if a.kind == _PARAMETERS:
            read = self.read(b, a, b_contract, a_contract, a_out, whole)
        else:
            read = self.read(a, b, a_contract, b_contract, b_out, whole)
        self.reads += read
        return result._replace(product=len(self.reads) - 1 if len(read) == 1 else None)

    def read(
        self, x: _Value, kernel: _Value, x_contract: Sequence[int], contract: Sequence[int], out: dict, whole: bool
    ) -> list[Read]:
        leaves = {leaf for f in kernel.fields for leaf, _ in f.axes}
        self.met.update(leaves)
        is_leaf = kernel.leaf is not None and kernel.shape == self.leaf_shapes[kernel.leaf]
        if not is_leaf or kernel.leaf is None or len(contract) != 1 or len(out) != 1:
            return [Read(leaf, NONE, NONE) for leaf in sorted(leaves)]
        read = Read(kernel.leaf, contract[0], next(iter(out)), whole=whole)
        if x.array is None:
            return [read]
        rows = jnp.moveaxis(x.array, x_contract[0], -1).reshape(-1, x.shape[x_contract[0]])
        same = jnp.all(jnp.abs(rows - rows[:1]) <= 1e-6 * jnp.abs(rows[:1]), axis=0)
        return [read._replace(values=rows[0], steady=same)]

    def contraction(self, a: _Value, b: _Value, a_outer: _Value, b_outer: _Value) -> None:
        """What meets in the axes that are summed over. a, b: these axes alone; *_outer: the others."""
        kinds = {a.kind, b.kind}
        if kinds != {_PARAMETERS, _ACTIVATIONS}:
            reason = "summed over without parameters" if _ACTIVATIONS in kinds else "a product of parameters"
            self.fix([*a.fields, *b.fields], reason)
        a, b = self.matched(a, b)
        for f, g in itertools.product(a.fields, b.fields):
            if f.support & g.support:
                self.unify(f.ids, g.ids)
        x, kernel, written = (a, b, b_outer) if b.kind == _PARAMETERS else (b, a, a_outer)
        for f in x.fields:
            if not any(f.support & g.support for g in kernel.fields):
                self.fix([f], "summed over without parameters")
        self.leave([f for v in (x, kernel) if v.kind == _ACTIVATIONS for f in v.fields])
        if kinds == {_PARAMETERS, _ACTIVATIONS}:
            fields = (*kernel.fields, *written.fields)
            if not all(f.zero for f in fields):
                self.fix([*fields, *x.fields], "a kernel that is not 0 where its parameter is")
            self.readers |= _all_axes(kernel.fields)
            self.writers |= _all_axes(written.fields)


_STEPS = _names(
    "broadcast_in_dim transpose squeeze reshape slice rev split unstack dynamic_slice gather pad concatenate "
    "dot_general conv_general_dilated"
)


def _along(row: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    return row.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _moved(
    value: _Value, places: Sequence[int | None], shape: tuple[int, ...], new: frozenset[int] = frozenset()
) -> _Value:
    """The value with its axis i at places[i] (None: it is gone and held no units); `new` axes are uniform."""
    fields = []
    for f in value.fields:
        kept = [i for i in range(len(places)) if i in f.support]
        order = sorted(kept, key=lambda i: places[i])  # type: ignore[arg-type, return-value]
        ids = f.ids.transpose([*order, *[i for i in range(f.ids.ndim) if i not in f.support]])
        sizes = [1] * len(shape)
        for i in kept:
            sizes[places[i]] = f.ids.shape[i]  # type: ignore[index]
        fields.append(f._replace(ids=ids.reshape(sizes), support=frozenset(places[i] for i in kept)))  # type: ignore[misc]
    uniform = {places[i] for i in value.uniform if i < len(places) and places[i] is not None}
    return _Value(tuple(fields), value.kind, shape, frozenset(uniform | new), value.number)  # type: ignore[arg-type]


def _indexed(value: _Value, index: list[slice], shape: tuple[int, ...]) -> _Value:
    cut = lambda f: f.ids[tuple(s if i in f.support else slice(None) for i, s in enumerate(index))]
    fields = tuple(f._replace(ids=cut(f)) for f in value.fields)
    return _Value(fields, value.kind, shape, value.uniform, value.number)


def _parts(value: _Value, axis: int, sizes: Sequence[int]) -> list[_Value]:
    parts, stop = [], 0
    for size in sizes:
        start, stop = stop, stop + size
        index = [slice(start, stop) if i == axis else slice(None) for i in range(len(value.shape))]
        parts.append(_indexed(value, index, (*value.shape[:axis], size, *value.shape[axis + 1 :])))
    return parts


def _padded(ids: np.ndarray, axis: int, config: Sequence[int]) -> np.ndarray:
    low, high, interior = config
    row = np.moveaxis(ids, axis, 0)
    wide = np.full((max(0, len(row) * (interior + 1) - interior), *row.shape[1:]), NONE)
    wide[:: interior + 1] = row
    wide = wide[max(0, -low) : len(wide) - max(0, -high)]
    ends = [(max(0, low), max(0, high))] + [(0, 0)] * (wide.ndim - 1)
    return np.moveaxis(np.pad(wide, ends, constant_values=NONE), 0, axis)


def _blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The runs of axes of a reshape that hold the same elements: [2, 4, 4, 3] -> [2, 48] is (0)(0) and (1, 2, 3)(1)."""
    if 0 in before:
        return [(list(range(len(before))), list(range(len(after))))]
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ours, theirs = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(ours), j + len(theirs)
        size = lambda shape, axes: math.prod(shape[axis] for axis in axes)
        while size(before, ours) != size(after, theirs):
            if size(before, ours) < size(after, theirs):
                ours, i = [*ours, i], i + 1
            else:
                theirs, j = [*theirs, j], j + 1
        blocks.append((ours, theirs))
    return blocks


def _reshaped(field: _Field, before: tuple[int, ...], after: tuple[int, ...], blocks: list) -> _Field:
    touched = [(ours, theirs) for ours, theirs in blocks if field.support & set(ours)]
    inside = {i for ours, _ in touched for i in ours}
    ids = np.broadcast_to(field.ids, [n if i in inside else 1 for i, n in enumerate(before)])
    places = {j for _, theirs in touched for j in theirs}
    ids = ids.reshape([n if j in places else 1 for j, n in enumerate(after)])
    support = set(places)
    for j in sorted(places):
        first = ids.take([0], axis=j)
        if after[j] > 1 and (ids == first).all() and len(support) > 1:
            ids, support = first, support - {j}
    single = [j for j in support if after[j] == 1]
    varies = bool((ids != ids.flat[0]).any()) if ids.size else True
    if single and not varies:  # any of these axes could be that of a single unit: in most layouts it is the last one
        support = {max(single)}
    return field._replace(ids=ids, support=frozenset(support - (set(single) if varies else set())))


def _all_axes(fields: Iterable[_Field]) -> dict[LeafAxis, None]:
    return dict.fromkeys(sorted({axis for f in fields for axis in f.axes}))


def _flagged(value: _Value, **flags: Any) -> _Value:
    return value._replace(fields=tuple(f._replace(**flags) for f in value.fields))


def _same_pattern(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of nodes tell the same positions apart."""
    pairs = np.stack([x.ravel() for x in np.broadcast_arrays(a, b)])
    num = np.unique(pairs, axis=1).shape[1]
    return num == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))


def _neutral(name: str, values: list[_Value]) -> bool:
    """Whether a sum, a maximum or a choice of values that are 0 is 0: are the constants in it 0, or out of its way?"""
    if name == "select_n":
        values = values[1:]
    for value in values:
        if value.kind != _CONSTANT:
            continue
        number = value.number
        harmless = (
            number is not None
            and number != _PLATFORM
            and (
                number == 0
                or (name == "max" and number < 0)
                or (name == "min" and number > 0)
                or (name == "clamp" and ((value is values[0] and number < 0) or (value is values[2] and number > 0)))
            )
        )
        if not harmless:
            return False
    return True


def _is_gate(eqn: Any) -> bool:
    """Whether a function is 0 with derivative 0 at 0, as `jax.nn.relu` is."""
    aval = eqn.invars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return False
    function = lambda x: eqn.primitive.bind(x, **eqn.primitive.get_bind_params(eqn.params))
    closed = jax.make_jaxpr(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    )
    with jax.ensure_compile_time_eval():  # this may be inside of the traced evaluation
        results = _on_scalars(closed.jaxpr, closed.consts, [np.zeros((), aval.dtype)])
        return results is not None and not any(np.any(r) for r in jax.tree.leaves(results))


def _on_scalars(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any] | None:
    """The outputs of an elementwise jaxpr for arrays of one value each; None if it is more than elementwise."""
    found = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else found[atom]
    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if any(np.ndim(value) for value in values):
            return None
        if name in CALLS and CALLS[name] in eqn.params:
            inner = eqn.params[CALLS[name]]
            results = _on_scalars(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values)
        elif name in _BROADCASTS:
            results = values
        elif name in _ELEMENTWISE and len(eqn.outvars) == 1:
            results = [eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))]
        else:
            return None
        if results is None:
            return None
        found |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
