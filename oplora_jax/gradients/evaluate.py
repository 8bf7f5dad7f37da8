"""Evaluates a traced program with taps at its marks.

The program is what the user's loss does with its LoRA parameters, which are nothing but `LowRank` there. A
tap goes beside a factor wherever that goes, into loops and functions too, to where it is used.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from oplora_jax._jax import ClosedJaxpr, Jaxpr, Literal, current_name_stack, user_context
from oplora_jax.gradients.count_uses import CALLS, loop_parts, open_program
from oplora_jax.gradients.tap import Tap, tapped
from oplora_jax.gradients.views import SAME, View, moved, slice_of
from oplora_jax.marker import marker_p
from oplora_jax.sharding import partition

Taps: TypeAlias = Sequence[Tap | None]


def evaluate(program: ClosedJaxpr, values: Sequence[Any], taps: Taps) -> list[Any]:
    """The results of a traced program, with taps beside some of its inputs, the whole factors."""

    @functools.cache
    def jitted(name: str) -> Callable[..., Any]:
        """One function for each name: programs that run several times are compiled once."""

        def run(program, values, taps):
            return _run(program, values, taps, jitted)

        run.__name__ = name
        return jax.jit(run, static_argnums=0)

    return [jnp.asarray(z) for z in _run(program, values, taps, jitted)[0]]


def _run(program: ClosedJaxpr | Jaxpr, values: Any, taps: Any, jitted: Any) -> tuple[list[Any], list[Any]]:
    """The results, and the taps beside them."""
    jaxpr, consts = open_program(program), getattr(program, "consts", ())
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
    beside = dict(zip(jaxpr.invars, taps, strict=True))
    read = lambda atom: atom.val if isinstance(atom, Literal) else known[atom]
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        at = [None if isinstance(v, Literal) else beside.get(v) for v in eqn.invars]
        stack = current_name_stack() + eqn.source_info.name_stack
        with user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
            results, following = _step(eqn, operands, at, jitted)
        known.update(zip(eqn.outvars, results, strict=True))
        beside.update((v, tap) for v, tap in zip(eqn.outvars, following, strict=True) if tap is not None)
    return [read(v) for v in jaxpr.outvars], [
        None if isinstance(v, Literal) else beside.get(v) for v in jaxpr.outvars
    ]


def _step(eqn: Any, operands: list[Any], taps: Taps, jitted: Any) -> tuple[list[Any], list[Any]]:
    """The results of one equation, and the taps beside them."""
    name, params, nothing = eqn.primitive.name, eqn.params, [None] * len(eqn.outvars)
    if eqn.primitive is marker_p:
        x, y, a, b, *_ = operands
        tap = _tap_of_both(*taps[2:4])
        return [y if tap is None else tapped(tap, params, x, y, a, b)], nothing
    if any(tap is not None for tap in taps):
        if name == "scan":
            return _scan(eqn, operands, taps, jitted)
        if name == "cond":
            branches = [lambda *at, b=b: _run(b, *at, jitted)[0] for b in params["branches"]]
            return jax.lax.switch(operands[0], branches, operands[1:], taps[1:]), nothing
        if name in CALLS:
            return _call(name, params, operands, taps, jitted)
        if name == "shard_map":
            return _on_devices(params, operands, taps, jitted), nothing
    bound = eqn.primitive.get_bind_params(params)
    functions, bound = bound if isinstance(bound, tuple) else ((), bound)  # JAX 0.9.0 and 0.9.1 have both
    results = eqn.primitive.bind(*functions, *operands, **bound)
    results = list(results) if eqn.primitive.multiple_results else [results]
    if name in SAME:
        return results, list(taps)
    if name == "select_n":
        return results, [_chosen(operands[0], taps[1:])]
    if taps and taps[0] is not None and (view := moved(eqn, taps[0].view, [None] * len(operands))):
        return results, [_moved(eqn, operands, taps[0], view)]
    return results, nothing


def _tap_of_both(a: Tap | None, b: Tap | None) -> Tap | None:
    """What is beside the first of two factors, if they are those of one matrix."""
    if a is None or b is None or a.view.parameter != b.view.parameter or a.view.side == b.view.side:
        return None
    return a if a.zeros else None


def _moved(eqn: Any, operands: list[Any], tap: Tap, view: View) -> Tap:
    """A tap, moved along its batch axes as an equation moves the factor."""
    old, shape = tap.view, operands[0].shape
    if (old.batch, old.moves) == (view.batch, view.moves):
        return _with(tap, view)
    sizes = [n for n, axis in zip(shape, old.axes, strict=True) if axis in old.batch]
    fixed = [old.axes.index(axis) for axis in ("wide", "rank")]
    # Where each entry of the batch axes comes from: the equation says it, of numbers that count them. What a
    # gather fills, out of bounds, comes from none.
    count = math.prod(sizes)
    entries = jnp.arange(count, dtype=jnp.int32).reshape(sizes)
    entries = jnp.broadcast_to(jnp.expand_dims(entries, sorted(fixed)), shape)
    params = eqn.params | ({"fill_value": count} if eqn.primitive.name == "gather" else {})
    entries = eqn.primitive.bind(entries, *operands[1:], **params)
    entries = entries[tuple(0 if axis in ("wide", "rank") else slice(None) for axis in view.axes)]
    stack = lambda z: z.reshape(-1, *z.shape[len(sizes) :])
    pick = lambda z: jnp.take(stack(z), entries, axis=0, mode="fill", fill_value=0)
    return _with(jax.tree.map(pick, tap), view)


def _chosen(which: Any, taps: Taps) -> Tap | None:
    """The tap of a factor that is there with a derivative or without."""
    tap = next((tap for tap in taps if tap is not None), None)
    if tap is None:
        return None
    if which.ndim:
        which = which[tuple(0 if axis in ("wide", "rank") else slice(None) for axis in tap.view.axes)]

    def choose(z):
        along = jnp.broadcast_to(which.reshape(which.shape + (1,) * (z.ndim - which.ndim)), z.shape)
        return jax.lax.select_n(along, *(jax.lax.stop_gradient(z) if t is None else z for t in taps))

    return jax.tree.map(choose, tap)


def _with(tap: Tap, view: View) -> Tap:
    return Tap(tap.zeros, tap.held, tap.rule, view=view, scale=tap.scale)


def _call(name: str, params: Any, operands: Any, taps: Taps, jitted: Any) -> tuple[list[Any], list[Any]]:
    """A function under `jax.jit` or `jax.checkpoint`."""
    program = params["jaxpr"]
    if name in ("jit", "pjit") and not params["inline"]:
        return jitted(params["name"])(program, operands, list(taps))
    run = functools.partial(_run, program, jitted=jitted)
    if "prevent_cse" in params:
        run = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
    return run(operands, list(taps))


def _scan(eqn: Any, operands: list[Any], taps: Taps, jitted: Any) -> tuple[list[Any], list[Any]]:
    params, (heads, carries) = eqn.params, loop_parts(eqn)
    split = lambda z: (z[:heads], z[heads : heads + carries], z[heads + carries :])
    (head, carry, xs), (of_head, of_carry, of_xs) = split(operands), split(list(taps))
    kept = of_carry

    def body(carry, at):
        nonlocal kept
        slices, of_slices = at
        of_slices = [tap and _with(tap, slice_of(tap.view, id(eqn))) for tap in of_slices]
        everything = [*head, *carry, *slices], [*of_head, *of_carry, *of_slices]
        results, following = _run(params["jaxpr"], *everything, jitted)
        is_same = lambda old, new: old and new and old.view == new.view
        kept = [old if is_same(old, new) else None for old, new in zip(of_carry, following, strict=False)]
        return results[:carries], results[carries:]

    of_xs = [tap if tap and slice_of(tap.view, id(eqn)) else None for tap in of_xs]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(body, carry, (xs, of_xs), **options)
    return [*carry, *stacked], [*kept, *[None] * len(stacked)]


def _on_devices(params: Any, operands: list[Any], taps: Taps, jitted: Any) -> list[Any]:
    """A shard_map: a tap is spread over the devices along the batch axes of its factor."""

    def spec_of(tap, spec):
        along = dict(zip(tap.view.axes, spec, strict=False))
        return jax.tree.map(lambda _: partition(*(along.get(axis) for axis in tap.view.batch)), tap)

    specs = params["in_specs"]
    present = {k: tap for k, tap in enumerate(taps) if tap is not None}
    of_taps = {k: spec_of(tap, specs[k]) for k, tap in present.items()}
    run = lambda values, at: _run(params["jaxpr"], values, [at.get(k) for k in range(len(taps))], jitted)[0]
    return jax.shard_map(
        run,
        mesh=params["mesh"],
        in_specs=(list(specs), of_taps),
        out_specs=list(params["out_specs"]),
        axis_names=params.get("newly_manual_axes", params.get("manual_axes")),
        check_vma=params["check_vma"],
    )(operands, present)
