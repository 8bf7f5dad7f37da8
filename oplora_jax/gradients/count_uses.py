"""Reads a traced program for where, how, and how often each LoRA parameter is used.

The program is followed as data flows through it, sub-programs included. Counting with Python side effects
while the loss runs would count a scan body as often as JAX happens to trace it.
"""

import collections
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from oplora_jax._jax import ClosedJaxpr, Jaxpr, Literal
from oplora_jax.gradients.views import SAME, View, moved, slice_of
from oplora_jax.marker import marker_p
from oplora_jax.sharding import entries, merged, varying

# Programs that run as they are written, so that taps can be put into them: those of `jax.jit` and
# `jax.checkpoint`. A function with a derivative of its own, or a while loop, is not one.
CALLS = frozenset(["jit", "pjit", "remat", "remat2", "checkpoint"])
# Of integers alone: what an index is computed with.
_OF_INDICES = frozenset(
    [
        *("lt", "gt", "ge", "le", "add", "sub", "mul", "rem", "max", "min", "clamp", "select_n", "slice"),
        *("convert_element_type", "reshape", "squeeze", "concatenate", "eq", "ne", "and", "or", "not"),
    ]
)


class Use(NamedTuple):
    """One place where a program multiplies by a LoRA parameter."""

    kind: str  # "dot": through lora_dot; "dense": through to_dense or merge
    times: int  # how often that place runs with the same factors
    tokens: int  # N, the rows of x; this and what follows of "dot" alone
    dtypes: tuple[Any, ...]  # of x and dy
    sharding: tuple[Any, ...]  # on explicit axes: of the rows of x and dy, of x's columns, of dy's
    scale: float | int  # of the increment there
    transposed: bool  # of s b^T a^T: x and dy are then those of the parameter, which change places


class Uses(NamedTuple):
    """What a program does with one LoRA parameter."""

    places: tuple[Use, ...]
    elsewhere: bool  # whether the first output depends on a factor in another way

    times = property(lambda self: sum(use.times for use in self.places))
    by_dot = property(lambda self: all(use.kind == "dot" for use in self.places))
    once = property(lambda self: self.times <= 1 and self.by_dot)

    def __str__(self) -> str:
        return f"used {self.times} times" if self.by_dot else "merged into a weight"


class _Flow(NamedTuple):
    """What reaches a value: a factor, as it is or in part; parameters whose factors were computed with."""

    view: View | None = None
    computed: frozenset[int] = frozenset()
    stopped: View | None = None  # the same, without a derivative
    token: Any = None  # equal only where values are, of those that may be an index

    @property
    def parameters(self) -> frozenset[int]:
        return self.computed | ({self.view.parameter} if self.view else set())


_NOTHING = _Flow()
# The uses found so far, by parameter.
_Places: TypeAlias = collections.defaultdict[int, list[Use]]


def count_uses(program: ClosedJaxpr, factors: Sequence[View | None]) -> dict[int, Uses]:
    """The uses of LoRA parameters; `factors` has for each input the factor that it is, or None."""
    places: _Places = collections.defaultdict(list)
    loss = _walk(program, [_Flow(view) for view in factors], places, _Names())[0]
    parameters = {view.parameter for view in factors if view}
    return {i: Uses(tuple(places[i]), i in loss.parameters) for i in parameters}


class _Names:
    """Tokens: a new one for each value, or the same where the same is computed of the same."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}
        self.count: Iterator[int] = itertools.count()

    def named(self, flow: _Flow) -> _Flow:
        return flow._replace(token=next(self.count)) if flow.token is None else flow

    def result(self, key: Any) -> int:
        return self.known.setdefault(key, next(self.count))


def open_program(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """A traced program without its constants."""
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def loop_parts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan every round sees, and how many values it carries."""
    body = open_program(eqn.params["jaxpr"])
    # What is sliced or stacked has an axis less inside. JAX's own counts are named anew in each version.
    whole = lambda out, inner: sum(o.aval.ndim == i.aval.ndim for o, i in zip(out, inner, strict=True))
    unsliced, carries = whole(eqn.invars, body.invars), whole(eqn.outvars, body.outvars)
    return unsliced - carries, carries


def _walk(
    program: ClosedJaxpr | Jaxpr, inputs: Sequence[_Flow], places: _Places, names: _Names
) -> list[_Flow]:
    """The flows out of a program; what it does with the parameters goes to their places."""
    jaxpr = open_program(program)
    flows = {v: names.named(_NOTHING) for v in jaxpr.constvars}
    flows.update(zip(jaxpr.invars, map(names.named, inputs), strict=True))

    def read(atom):
        return _Flow(token=(str(atom.val), str(atom.aval))) if isinstance(atom, Literal) else flows[atom]

    for eqn in jaxpr.eqns:
        outputs = _step(eqn, [read(v) for v in eqn.invars], places, names)
        flows.update(zip(eqn.outvars, map(names.named, outputs), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: Any, arguments: list[_Flow], places: _Places, names: _Names) -> list[_Flow]:
    """The flows out of one equation."""
    name = eqn.primitive.name
    if name == "stop_gradient":
        return [_Flow(stopped=arguments[0].view)]
    if not any(f.parameters for f in arguments):
        return _indices(eqn, arguments, names)
    if eqn.primitive is marker_p:
        return [_record(eqn, arguments, places)]
    if name in ("scan", "cond"):
        return (_cond if name == "cond" else _loop)(eqn, arguments, places, names)
    if name in CALLS:
        return _walk(eqn.params["jaxpr"], arguments, places, names)
    if name == "shard_map":
        return _devices(eqn, arguments, places, names)
    if name in SAME:
        flows = [f._replace(token=None) for f in arguments]
        if name == "pvary":
            flows = [f._replace(view=f.view and f.view._replace(times=2)) for f in flows]
    else:
        view = arguments[0].view
        view = view and moved(eqn, view, [f.token for f in arguments[1:]])
        view = _chosen(eqn, arguments) if name == "select_n" else view
        flows = [_Flow(view) if view else _computed(arguments)] * len(eqn.outvars)
    # No derivative flows through integers and booleans.
    flows_on = lambda v: jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
    return [flow if flows_on(v) else _NOTHING for flow, v in zip(flows, eqn.outvars, strict=True)]


def _indices(eqn, arguments, names):
    """The flows out of an equation that no parameter reaches: tokens, of integers that may be an index."""
    is_index = lambda v: jnp.issubdtype(getattr(v.aval, "dtype", jnp.float32), jnp.integer)
    name = eqn.primitive.name
    if name in CALLS:
        what = id(eqn.params["jaxpr"])
    elif name == "broadcast_in_dim":
        return [_Flow(token=("along", eqn.params["broadcast_dimensions"], arguments[0].token))]
    elif name in _OF_INDICES:
        what = str(eqn.params)
    else:
        return [_NOTHING] * len(eqn.outvars)
    key = (name, what, *(f.token for f in arguments))
    token = lambda k, v: names.result((key, k)) if is_index(v) or v.aval.dtype == bool else None
    return [_Flow(token=token(k, v)) for k, v in enumerate(eqn.outvars)]


def _chosen(eqn: Any, arguments: list[_Flow]) -> View | None:
    """A factor or the same without a derivative: what `jax.vmap` makes of the operands of a `lax.cond`."""
    which, *cases = arguments
    views = {f.view or f.stopped for f in cases}
    if len(views) != 1 or None in views:
        return None
    [view], along = views, which.token
    if eqn.invars[0].aval.ndim:  # it must not choose among the entries of one matrix
        if not isinstance(along, tuple) or along[0] != "along":
            return None
        along = tuple(view.axes[k] for k in along[1]), along[2]
        if {"wide", "rank"} & set(along[0]):
            return None
    has_derivative = tuple(f.view is not None for f in cases)
    return view._replace(moves=(*view.moves, ("chosen", along, has_derivative)))


def _record(eqn: Any, arguments: list[_Flow], places: _Places) -> _Flow:
    """What flows out of a mark; its use goes to the parameter's place."""
    kind, batch = eqn.params["kind"], eqn.params["batch"]
    x, _, a, b, *kernel = arguments
    # The factors in y itself are what is captured; those that x and the kernel are made of would be missed.
    missed = [x, *kernel] if kind == "dot" else []
    if a.view and b.view and _are_factors(a.view, b.view):
        transposed = a.view.side == 1
        x, y = (v.aval for v in eqn.invars[:2])
        rows, columns = merged(entries(x)[batch:-1]), (entries(x)[-1], entries(y)[-1])
        order = -1 if transposed else 1
        # On the devices of a `jax.shard_map` around the loss, each of which has other rows.
        everywhere = (varying(x) | varying(y)) - varying(eqn.invars[2].aval)
        places[a.view.parameter].append(
            Use(
                kind,
                max(a.view.times, b.view.times, 2 if everywhere else 1),
                math.prod(x.shape[batch:-1]),
                (x.dtype, y.dtype)[::order],
                (rows, *columns[::order]),
                eqn.params["scale"],
                transposed,
            )
        )
    else:
        missed += [a, b]
    return _computed(missed)


def _are_factors(a: View, b: View) -> bool:
    """Whether two views are the factors of one matrix, of the same entries of the batch axes."""
    same = a.parameter == b.parameter and a.side != b.side and (a.batch, a.moves) == (b.batch, b.moves)
    return same and a.axes[-2:] == ("wide", "rank") and b.axes[-2:] == ("rank", "wide")


def _computed(flows: Sequence[_Flow]) -> _Flow:
    """Of values that are computed with others."""
    return _Flow(computed=frozenset().union(*(f.parameters for f in flows)))


def _either(f: _Flow, g: _Flow) -> _Flow:
    """Of a value that is the one or the other."""
    if f.view == g.view:
        return _Flow(f.view, f.computed | g.computed)
    return _computed([f, g])


def _loop(eqn, arguments, places, names):
    """What flows out of the carry and the stacked outputs of a scan."""
    body, rounds = eqn.params["jaxpr"], eqn.params["length"]
    heads, carries = loop_parts(eqn)
    often = lambda f: f._replace(view=f.view and f.view._replace(times=f.view.times * rounds))

    def slice_(f):
        view = f.view and slice_of(f.view, id(eqn))
        return _Flow(view) if view else _computed([f])

    head, xs = [often(f) for f in arguments[:heads]], [slice_(f) for f in arguments[heads + carries :]]
    start = carry = [often(f)._replace(token=None) for f in arguments[heads : heads + carries]]
    while True:  # until nothing new flows into the carry
        found: _Places = collections.defaultdict(list)
        outputs = [f._replace(token=None) for f in _walk(body, [*head, *carry, *xs], found, names)]
        wider = [_either(*pair) for pair in zip(carry, outputs, strict=False)]
        if wider == carry:
            break
        carry = wider
    for i, uses in found.items():
        places[i].extend(uses)
    first = arguments[heads:]
    kept = [f if z == s else _computed([z]) for f, z, s in zip(first, carry, start, strict=False)]
    return [*kept, *(_computed([f]) for f in outputs[carries:])]


def _cond(eqn, arguments, places, names):
    found: list[_Places] = [collections.defaultdict(list) for _ in eqn.params["branches"]]
    walked = zip(eqn.params["branches"], found, strict=True)
    outputs = [_walk(branch, arguments[1:], uses, names) for branch, uses in walked]
    for i in frozenset().union(*found):
        branches = [uses[i] for uses in found if i in uses]
        # One branch runs. Captures of different shapes are counted as several uses.
        same = all(uses == branches[0] for uses in branches)
        places[i].extend(branches[0] if same else itertools.chain(*branches))
    return [_computed(column) for column in zip(*outputs, strict=True)]


def _devices(eqn, arguments, places, names):
    """What flows out of a shard_map: what every device sees is used by every device."""

    def on_each(f, spec):
        if f.view is None:
            return f
        along = dict(zip(f.view.axes, spec, strict=False))
        if along.pop("wide", None) is not None or along.pop("rank", None) is not None:
            return _computed([f])
        return _Flow(f.view._replace(times=2, moves=(*f.view.moves, (id(eqn), *along.values()))))

    inside = [on_each(*z) for z in zip(arguments, eqn.params["in_specs"], strict=True)]
    return [_computed([f]) for f in _walk(eqn.params["jaxpr"], inside, places, names)]
