"""Reads a traced program for where, how, and how often each LoRA parameter is used.

The program is followed as data flows through it, sub-programs included. Counting with Python side effects
while the loss runs would count a scan body as often as JAX happens to trace it.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    tokens: int  # N, the rows of x (0 for "dense")
    dtypes: tuple[Any, ...]  # of x and dy
    sharding: tuple[Any, ...]  # on explicit axes: of the rows of x and dy, of x's columns, of dy's


class Uses(NamedTuple):
    """What a program does with one LoRA parameter."""

    places: tuple[Use, ...]
    elsewhere: bool  # whether the first output depends on a factor in another way

    @property
    def once(self) -> bool:
        """Whether there is one use at most, through lora_dot."""
        return self._times <= 1 and self._by_dot

    def __str__(self) -> str:
        return f"used {self._times} times" if self._by_dot else "merged into a weight"

    @property
    def _times(self) -> int:
        return sum(use.times for use in self.places)

    @property
    def _by_dot(self) -> bool:
        return all(use.kind == "dot" for use in self.places)


class _Flow(NamedTuple):
    """What reaches a value: factors as they are, and parameters whose factors were computed with."""

    origins: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()  # those of the origins that may be there several times
    computed: frozenset[int] = frozenset()


_NOTHING = _Flow()


def count_uses(program: ClosedJaxpr, factors: Sequence[int | None], count: int) -> list[Uses]:
    """The uses of LoRA parameters in a program.

    Args:
      program: the traced loss; its first output is the loss itself.
      factors: for each of its inputs, the index of the parameter it is a factor of, or None.
      count: the number of parameters.
    """
    flows = [_NOTHING if i is None else _Flow(origins=frozenset([i])) for i in factors]
    places: list[list[Use]] = [[] for _ in range(count)]
    loss = _walk(program, flows, places)[0]
    return [Uses(tuple(places[i]), i in loss.computed | loss.origins) for i in range(count)]


def _walk(program: ClosedJaxpr | Jaxpr, inputs: Sequence[_Flow], places: list[list[Use]]) -> list[_Flow]:
    """The flows out of a program; what it does with the parameters goes to their places."""
    jaxpr = _open(program)
    flows = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: _NOTHING if isinstance(atom, Literal) else flows.get(atom, _NOTHING)
    for eqn in jaxpr.eqns:
        outputs = _step(eqn, [read(v) for v in eqn.invars], places)
        flows.update(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _step(eqn: Any, arguments: list[_Flow], places: list[list[Use]]) -> list[_Flow]:
    """The flows out of one equation."""
    name = eqn.primitive.name
    if not any(f.origins or f.computed for f in arguments) or name == "stop_gradient":
        return [_NOTHING] * len(eqn.outvars)
    if eqn.primitive is tap_p and isinstance(eqn.params["rule"], str):
        return [_record(eqn, arguments, places)]
    if name in _CONTROL:
        return _CONTROL[name](eqn, arguments, places)
    if name == "shard_map":  # what every device sees is used by every device
        arguments = [f._replace(repeated=f.origins) for f in arguments]
    inner = [_open(value) for value in eqn.params.values() if isinstance(value, ClosedJaxpr | Jaxpr)]
    if [(len(j.invars), len(j.outvars)) for j in inner] == [(len(eqn.invars), len(eqn.outvars))]:
        return _walk(inner[0], arguments, places)  # jit, remat, custom rules, shard_map
    merged = _merge(arguments)
    if name not in _MOVES:
        merged = _Flow(computed=merged.computed | merged.origins)
    elif _repeats(eqn):
        merged = merged._replace(repeated=merged.origins)
    # No derivative flows through integers and booleans.
    flows_on = lambda v: jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)
    return [merged if flows_on(v) else _NOTHING for v in eqn.outvars]


def _open(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _repeats(eqn: Any) -> bool:
    """Whether a move can put the same factor into its result several times."""
    if eqn.primitive.name == "gather":
        return math.prod(eqn.invars[1].aval.shape[:-1]) > 1
    return eqn.outvars[0].aval.size > eqn.invars[0].aval.size


def _record(eqn: Any, arguments: list[_Flow], places: list[list[Use]]) -> _Flow:
    """What flows out of a marker that has the factors as its taps; its use goes to the parameter's place."""
    kind, batch = eqn.params["rule"], eqn.params["batch"]
    x, _, a, b, *kernel = arguments  # y is x times the kernel and the factors: that is what is captured
    others = [] if kind == "dense" else [x, *kernel]
    if a.origins != b.origins or len(a.origins) != 1:
        others += [a, b]
    else:
        [parameter] = a.origins
        times = 2 if parameter in a.repeated | b.repeated else 1
        use = Use("dense", times, 0, (), ())
        if kind == "dot":
            x_aval, y_aval = (v.aval for v in eqn.invars[:2])
            rows, (*x_entries, column), y_entries = slice(batch, -1), entries(x_aval), entries(y_aval)
            tokens, sharding = math.prod(x_aval.shape[rows]), merged(x_entries[batch:])
            use = Use("dot", times, tokens, (x_aval.dtype, y_aval.dtype), (sharding, column, y_entries[-1]))
        places[parameter].append(use)
    return _Flow(computed=a.computed.union(b.computed, *(f.computed | f.origins for f in others)))


def _merge(flows: Sequence[_Flow]) -> _Flow:
    return _Flow(*(frozenset().union(*column) for column in zip(*flows, strict=True)))


def _scan(eqn, arguments, places):
    body = _open(eqn.params["jaxpr"])
    # What is sliced or stacked has an axis less inside. JAX's own counts go by other names in each version.
    whole = lambda outer, inner: sum(o.aval.ndim == i.aval.ndim for o, i in zip(outer, inner, strict=True))
    unsliced, carries = whole(eqn.invars, body.invars), whole(eqn.outvars, body.outvars)
    consts = unsliced - carries
    split = arguments[:consts], arguments[consts:unsliced], arguments[unsliced:]
    return _loop(body, *split, eqn.params["length"], places)


def _while(eqn, arguments, places):
    params = eqn.params
    skip, consts = params["cond_nconsts"], params["body_nconsts"]
    head, carry = arguments[skip : skip + consts], arguments[skip + consts :]
    return _loop(params["body_jaxpr"], head, carry, [], 2, places)  # the rounds are not known: more than one


def _loop(body, head, carry, xs, rounds, places):
    """A loop of a body of (constants, carry, slices): what flows out of its carry and its stacked outputs."""
    while True:  # until nothing new flows into the carry
        found: list[list[Use]] = [[] for _ in places]
        outputs = _walk(body, [*head, *carry, *xs], found)
        wider = [_merge(pair) for pair in zip(carry, outputs, strict=False)]
        if wider == carry:
            break
        carry = wider
    # A slice of xs is used once; what every round sees is used as often as the loop runs.
    sliced = _merge([_NOTHING, *xs]).origins - _merge([_NOTHING, *head, *carry]).origins
    for i, uses in enumerate(found):
        often = 1 if i in sliced else rounds
        places[i].extend(use._replace(times=use.times * often) for use in uses)
    return [*carry, *outputs[len(carry) :]]


def _cond(eqn, arguments, places):
    outputs, found = [], []
    for branch in eqn.params["branches"]:
        uses: list[list[Use]] = [[] for _ in places]
        outputs.append(_walk(branch, arguments[1:], uses))
        found.append(uses)
    for i, into in enumerate(places):
        branches = [uses[i] for uses in found if uses[i]]
        if branches and all(b == branches[0] for b in branches):  # one branch runs
            into.extend(branches[0])
        else:  # captures of different shapes: counted as several uses
            into.extend(use for b in branches for use in b)
    return [_merge(column) for column in zip(*outputs, strict=True)]


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}
