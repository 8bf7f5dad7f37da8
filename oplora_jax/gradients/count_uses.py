"""Reads a traced program for where, how, and how often each LoRA parameter is used.

The program is followed as data flows through it, sub-programs included. Counting with Python side effects
while the loss runs would count a scan body as often as JAX happens to trace it.
"""

import collections
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp

from oplora_jax._jax import ClosedJaxpr, Jaxpr, Literal
from oplora_jax.gradients.tap import tap_p
from oplora_jax.sharding import entries, merged

# Operations that move a factor, or a part of it, without computing with it.
_MOVES = frozenset(
    [
        *("broadcast_in_dim", "gather", "dynamic_slice", "slice", "squeeze", "reshape", "transpose"),
        *("convert_element_type", "reduce_precision", "copy", "copy_p", "device_put", "name"),
        *("optimization_barrier", "sharding_constraint", "reshard", "mesh_cast", "pvary"),
    ]
)


class Use(NamedTuple):
    """One place where a program multiplies by a LoRA parameter."""

    kind: str  # "dot": through lora_dot; "dense": through to_dense or merge
    times: int  # how often that place runs with the same factors
    tokens: int  # N, the rows of x; this and what follows of "dot" alone
    dtypes: tuple[Any, ...]  # of x and dy
    sharding: tuple[Any, ...]  # on explicit axes: of the rows of x and dy, of x's columns, of dy's


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
    """What reaches a value: factors as they are, and parameters whose factors were computed with."""

    origins: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()  # those of the origins that may be there several times
    computed: frozenset[int] = frozenset()


_NOTHING = _Flow()
# The uses found so far, by parameter.
_Places: TypeAlias = collections.defaultdict[int, list[Use]]


def count_uses(program: ClosedJaxpr, factors: Sequence[int | None]) -> dict[int, Uses]:
    """The uses of LoRA parameters; `factors` has for each input the number of its parameter, or None."""
    flows = [_NOTHING if i is None else _Flow(origins=frozenset([i])) for i in factors]
    places = collections.defaultdict(list)
    loss = _walk(program, flows, places)[0]
    parameters = set(factors) - {None}
    return {i: Uses(tuple(places[i]), i in loss.computed | loss.origins) for i in parameters}


def _walk(program: ClosedJaxpr | Jaxpr, inputs: Sequence[_Flow], places: _Places) -> list[_Flow]:
    """The flows out of a program; what it does with the parameters goes to their places."""
    jaxpr = _open(program)
    flows = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: _NOTHING if isinstance(atom, Literal) else flows.get(atom, _NOTHING)
    for eqn in jaxpr.eqns:
        outputs = _step(eqn, [read(v) for v in eqn.invars], places)
        flows.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: Any, arguments: list[_Flow], places: _Places) -> list[_Flow]:
    """The flows out of one equation."""
    name = eqn.primitive.name
    if not any(f.origins or f.computed for f in arguments) or name == "stop_gradient":
        return [_NOTHING] * len(eqn.outvars)
    if eqn.primitive is tap_p and isinstance(eqn.params["rule"], str):
        return [_record(eqn, arguments, places)]
    if name in ("scan", "while", "cond"):
        return (_cond if name == "cond" else _loop)(eqn, arguments, places)
    if name == "shard_map":  # what every device sees is used by every device
        arguments = [f._replace(repeated=f.origins) for f in arguments]
    inner = [_open(value) for value in eqn.params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    if [(len(j.invars), len(j.outvars)) for j in inner] == [(len(eqn.invars), len(eqn.outvars))]:
        return _walk(inner[0], arguments, places)  # jit, remat, custom rules, shard_map
    flow = _merge(arguments)
    if name not in _MOVES:
        flow = _Flow(computed=flow.computed | flow.origins)
    elif _repeats(eqn):
        flow = flow._replace(repeated=flow.origins)
    # No derivative flows through integers and booleans.
    flows_on = lambda v: jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
    return [flow if flows_on(v) else _NOTHING for v in eqn.outvars]


def _open(program: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return program.jaxpr if isinstance(program, ClosedJaxpr) else program


def _repeats(eqn: Any) -> bool:
    """Whether a move can put the same factor into its result several times."""
    if eqn.primitive.name == "gather":
        return math.prod(eqn.invars[1].aval.shape[:-1]) > 1
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def _record(eqn: Any, arguments: list[_Flow], places: _Places) -> _Flow:
    """What flows out of a marker that has the factors as its taps; its use goes to the parameter's place."""
    kind, batch = eqn.params["rule"], eqn.params["batch"]
    x, _, a, b, *kernel = arguments
    # The factors in y itself are what is captured; those that x and the kernel are made of would be missed.
    missed = [x, *kernel] if kind == "dot" else []
    if a.origins == b.origins and len(a.origins) == 1:
        [parameter] = a.origins
        times = 2 if parameter in a.repeated | b.repeated else 1
        x, y = (v.aval for v in eqn.invars[:2])
        sharding = merged(entries(x)[batch:-1]), entries(x)[-1], entries(y)[-1]
        tokens = math.prod(x.shape[batch:-1])
        places[parameter].append(Use(kind, times, tokens, (x.dtype, y.dtype), sharding))
    else:
        missed += [a, b]
    return _Flow(computed=a.computed.union(b.computed, *(f.computed | f.origins for f in missed)))


def _merge(flows: Sequence[_Flow]) -> _Flow:
    return _Flow(*(frozenset().union(*column) for column in zip(*flows, strict=True)))


def _loop(eqn, arguments, places):
    """What flows out of the carry and the stacked outputs of a scan or a while loop."""
    params = eqn.params
    if eqn.primitive.name == "scan":
        body, rounds = _open(params["jaxpr"]), params["length"]
        # What is sliced or stacked has an axis less inside. JAX's own counts are named anew in each version.
        whole = lambda out, inner: sum(o.aval.ndim == i.aval.ndim for o, i in zip(out, inner, strict=True))
        unsliced, carries = whole(eqn.invars, body.invars), whole(eqn.outvars, body.outvars)
    else:
        body, rounds = params["body_jaxpr"], 2  # not known: more than one
        arguments = arguments[params["cond_nconsts"] :]
        unsliced, carries = len(arguments), len(eqn.outvars)
    head, xs = arguments[: unsliced - carries], arguments[unsliced:]
    carry = arguments[unsliced - carries : unsliced]
    while True:  # until nothing new flows into the carry
        found = collections.defaultdict(list)
        outputs = _walk(body, [*head, *carry, *xs], found)
        wider = [_merge(pair) for pair in zip(carry, outputs, strict=False)]
        if wider == carry:
            break
        carry = wider
    # A slice of xs is used once; what every round sees is used as often as the loop runs.
    sliced = _merge([_NOTHING, *xs]).origins - _merge([_NOTHING, *head, *carry]).origins
    for i, uses in found.items():
        often = 1 if i in sliced else rounds
        places[i].extend(use._replace(times=use.times * often) for use in uses)
    return [*carry, *outputs[len(carry) :]]


def _cond(eqn, arguments, places):
    found = [collections.defaultdict(list) for _ in eqn.params["branches"]]
    walked = zip(eqn.params["branches"], found, strict=True)
    outputs = [_walk(branch, arguments[1:], uses) for branch, uses in walked]
    for i in frozenset().union(*found):
        branches = [uses[i] for uses in found if i in uses]
        # One branch runs. Captures of different shapes are counted as several uses.
        same = all(uses == branches[0] for uses in branches)
        places[i].extend(branches[0] if same else itertools.chain(*branches))
    return [_merge(column) for column in zip(*outputs, strict=True)]
