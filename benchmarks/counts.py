"""What a program costs, as XLA counts it for the compiled program."""

import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun


class Counts(NamedTuple):
    """The cost of one run of a program, and of compiling it."""

    flops: float  # arithmetic operations of the code that XLA makes
    decomposition_flops: float  # those of the decompositions that it leaves to LAPACK and the like
    bytes_accessed: float  # read and written by all operations of the compiled program
    temporary_bytes: int
    peak_bytes: int  # arguments, results and temporary buffers; what is overwritten counts once
    instructions: int  # of the compiled program, those inside of its fusions and loops included
    fusions: int  # different ones: the compiler makes code for one of several that are equal
    compile_seconds: float  # of tracing, lowering and compiling, with empty caches


def count(function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()) -> tuple[Counts, Any]:
    """Compiles a function and counts what it costs.

    XLA counts the body of a loop once, however often it runs, and of a condition the costlier branch. So the
    operations and the bytes accessed are counted in an equivalent program in which every loop of known length
    is unrolled, and every condition has the branch of the fewest operations: that of most steps, where a
    condition guards a start or an update now and then. One on the platform has this platform's. All else is
    counted in the program itself. Decompositions, which XLA calls a library for and counts nothing of, are
    counted by the textbook.

    Args:
      function: what is compiled.
      *arguments: arrays, or their `jax.ShapeDtypeStruct`.
      donated: the indices of the arguments that the program may overwrite.

    Returns:
      The counts, and the compiled program.
    """
    seconds, compiled = compile_anew(function, *arguments, donated=donated)
    program = jax.make_jaxpr(function)(*arguments)
    flops, accessed = _cost(program, compiled)
    counts = Counts(
        flops=flops,
        decomposition_flops=decomposition_flops(program.jaxpr),
        bytes_accessed=accessed,
        temporary_bytes=compiled.memory_analysis().temp_size_in_bytes,
        peak_bytes=peak_memory(compiled),
        instructions=instructions(compiled),
        fusions=distinct_fusions(compiled),
        compile_seconds=seconds,
    )
    return counts, compiled


def operations(function: Callable[..., Any], *arguments: Any) -> float:
    """The operations of a function, those of its decompositions included, as `count` counts them."""
    program = jax.make_jaxpr(function)(*arguments)
    return _cost(program)[0] + decomposition_flops(program.jaxpr)


def _cost(program: ClosedJaxpr, compiled: Any = None) -> tuple[float, float]:
    """(operations, bytes accessed) of a program, with its loops and conditions as in `count`.

    Args:
      program: as it is traced.
      compiled: as it is compiled, if that is there already.
    """
    if compiled is None or _bends(program.jaxpr):
        straight = program.replace(jaxpr=_straight(program.jaxpr))
        with _no_persistent_cache():
            compiled = jax.jit(jaxpr_as_fun(straight)).lower(*program.in_avals).compile()
    found = compiled.cost_analysis()
    # -1 where XLA counts nothing at all.
    return max(0.0, found.get("flops", 0.0)), max(0.0, found.get("bytes accessed", 0.0))


def peak_memory(compiled: Any) -> int:
    """The bytes of a program's arguments, results and temporary buffers; of what it overwrites, once."""
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes


def instructions(compiled: Any) -> int:
    """How many instructions a compiled program has, those inside of its fusions and loops included."""
    return len(re.findall(r"^ +(?:ROOT )?%\S+ = ", compiled.as_text(), re.M))


def distinct_fusions(compiled: Any) -> int:
    """How many different fused computations a compiled program has, whatever their names."""
    text = re.sub(r", (metadata|backend_config|frontend_attributes)=\{.*", "", compiled.as_text())
    bodies = dict(re.findall(r"^%(\S+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    distinct = set()
    for name in re.findall(r" fusion\(.*calls=%([\w.-]+)", text):
        names: dict[str, int] = {}
        number = lambda found, names=names: str(names.setdefault(found[0], len(names)))
        distinct.add(re.sub(r"%[\w.-]+", number, bodies[name]))
    return len(distinct)


def compile_anew(
    function: Callable[..., Any], *arguments: Any, donated: tuple[int, ...] = ()
) -> tuple[float, Any]:
    """(the seconds to trace, lower and compile a function with empty caches, the compiled program)."""
    _start_compiler()
    jax.clear_caches()  # of the functions inside too, which it may share with others
    with _no_persistent_cache():
        began = time.perf_counter()
        compiled = jax.jit(function, donate_argnums=donated).lower(*arguments).compile()
        return time.perf_counter() - began, compiled


@functools.cache
def _start_compiler() -> None:
    """Has the first program of a process compiled, which takes longer than a later one."""
    jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32")).compile()


@contextmanager
def _no_persistent_cache() -> Iterator[None]:
    before = jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()  # what JAX has found out about the cache it does not look up again
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _bends(program: Jaxpr) -> bool:
    """Whether XLA's counts of a program are not those of what runs."""
    return any(
        eqn.primitive.name == "cond"
        or (eqn.primitive.name == "scan" and eqn.params["length"] > 1)
        or any(map(_bends, _inside(eqn)))
        for eqn in program.eqns
    )


def _inside(eqn: Any) -> list[Jaxpr]:
    """The sub-programs of an operation."""
    values = [z for value in eqn.params.values() for z in (value if type(value) is tuple else (value,))]
    return [
        z.jaxpr if isinstance(z, ClosedJaxpr) else z for z in values if isinstance(z, ClosedJaxpr | Jaxpr)
    ]


def _straight(program: Jaxpr) -> Jaxpr:
    """The program with its loops unrolled and the shortest branches alone, sub-programs included."""
    eqns = []
    for eqn in program.eqns:
        params = {name: _straight_param(value) for name, value in eqn.params.items()}
        if eqn.primitive.name == "scan":
            params["unroll"] = max(1, params["length"])
        elif eqn.primitive.name == "cond":
            branches = params["branches"]
            params["branches"] = (branches[_branch(eqn)],) * len(branches)
        eqns.append(eqn.replace(params=params))
    return program.replace(eqns=eqns)


def _straight_param(value: Any) -> Any:
    if isinstance(value, ClosedJaxpr):
        return value.replace(jaxpr=_straight(value.jaxpr))
    if isinstance(value, Jaxpr):
        return _straight(value)
    if type(value) is tuple:
        return tuple(_straight_param(z) for z in value)
    return value


def _branch(eqn: Any) -> int:
    """Which branch of a condition counts."""
    branches = eqn.params["branches"]
    platforms = eqn.params.get("branches_platforms")
    if platforms is not None:  # jax.lax.platform_dependent
        return next(i for i, z in enumerate(platforms) if z is None or jax.default_backend() in z)
    return min(range(len(branches)), key=lambda i: _size(branches[i].jaxpr))


def _size(program: Jaxpr) -> int:
    inside = (_size(z) for eqn in program.eqns for z in _inside(eqn))
    return len(program.eqns) + sum(inside)


def decomposition_flops(program: Jaxpr) -> float:
    """The operations of a program's decompositions and triangular solves, by the textbook's leading terms.

    Conditions count as in `count`.

    References:
      Golub and Van Loan, Matrix Computations, 4th edition: Cholesky 4.2, QR 5.2, eigenvalues 8.3, SVD 8.6.
    """
    total = 0.0
    for eqn in program.eqns:
        inside = [decomposition_flops(z) for z in _inside(eqn)]
        if eqn.primitive.name == "cond":
            total += inside[_branch(eqn)]
        elif eqn.primitive.name in _DECOMPOSITIONS:
            *batch, rows, columns = eqn.invars[0].aval.shape
            operations = _DECOMPOSITIONS[eqn.primitive.name]
            total += math.prod(batch) * operations(eqn, max(rows, columns), min(rows, columns))
        else:
            total += eqn.params.get("length", 1) * sum(inside)
    return total


def _right_sides(eqn: Any) -> int:
    """How many systems a triangular solve solves."""
    *_, rows, columns = eqn.invars[1].aval.shape
    return columns if eqn.params["left_side"] else rows


# Of a matrix with n rows and m <= n columns, or the other way round.
_DECOMPOSITIONS: dict[str, Callable[[Any, int, int], float]] = {
    "cholesky": lambda _, n, m: m**3 / 3,
    "triangular_solve": lambda eqn, n, m: m**2 * _right_sides(eqn),
    "qr": lambda _, n, m: 4 * n * m**2 - 4 * m**3 / 3,  # R, and then Q
    "eigh": lambda _, n, m: 9 * m**3,
    "svd": lambda eqn, n, m: (
        14 * n * m**2 + 8 * m**3 if eqn.params["compute_uv"] else 4 * n * m**2 - 4 * m**3 / 3
    ),
}
