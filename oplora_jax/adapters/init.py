"""LoRA parameters of their own, beside a model that stays untouched."""

import math
import operator
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, PRNGKeyArray

from oplora_jax._jax import Tracer
from oplora_jax.adapters.kernel_axes import axes_of, kept_roles, matrix_shape, said_roles, stacked
from oplora_jax.adapters.paths import Targets, check_patterns, leaf_name, matches, path_name, patterns_of
from oplora_jax.matrix import LowRank
from oplora_jax.sharding import merged, partition

Rank: TypeAlias = ArrayLike  # a whole number
Alpha: TypeAlias = ArrayLike | None


def init_lora(
    key: PRNGKeyArray,
    params: Any,
    rank: Rank,
    targets: Targets | Mapping[str | re.Pattern, str],
    *,
    alpha: Alpha = None,
    batch_axes: int = 0,
    output_axes: int = 1,
    dtype: Any = None,
) -> dict[str, LowRank]:
    """New LoRA parameters for the kernels of a model whose paths match a pattern; the model stays as it is.

    Use them in `lora_dot`, or through `merge`. The left factor a is random (He's uniform) and b is zero:
    training starts at the model as it is.

    Args:
      key: a random key.
      params: any tree. Its kernels are the arrays of two or more axes. One of more than two, such as a
        convolution's, is the matrix of all its leading axes by its last, unless `targets`, `batch_axes` or
        `output_axes` say otherwise.
      rank: r, at most either side of every kernel chosen.
      targets: one pattern or several, each of which must match, for paths such as
        "encoder/layer_0/query/kernel". A string is whole components of the path, such as "query" or
        "layer_0/query", or a glob for the whole path, such as `"encoder/*/kernel"`, in which `*` stands for
        any characters, "/" too. A regular expression, which may match anywhere in the path, is given as one:
        `re.compile("query|value")`. Or a dict from patterns to the roles of the kernels' axes: a letter for
        each, such as "oio" ("b" a batch axis, "i" of inputs, "o" of outputs), or the einsum that the kernel
        is the second operand of, such as "BTD,NDH->BTNH". Axes in front of those stack layers.
      alpha: a positive number; the scale s is alpha / rank, or 1 if alpha is None.
      batch_axes: how many of the first axes of the kernels stack layers, each with its own factors. Leave it
        out with a dict of targets.
      output_axes: how many of the last axes of the kernels are outputs: 2 for the query kernel (inputs,
        heads, size of a head) of an attention. Leave it out with a dict of targets.
      dtype: the parameters' type; that of each kernel if None, which a float8 kernel does not allow. Take
        float32 over a bfloat16 model: bfloat16 rounds away steps of less than 2^-9 of a number.

    Returns:
      A dict from the chosen kernels' paths to their `LowRank` parameters. On a mesh a is sharded as the
      inputs of its kernel and b as the outputs; under `jax.jit` that needs explicit axes.

    Raises:
      ValueError: a pattern that matches no kernel; what are no roles of a kernel's axes, or several for one;
        a kernel with too few axes, too small for the rank, or of integers, as a quantised one's; a rank or
        alpha that is no such number.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import oplora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 6)), "bias": jnp.zeros(6)}}
      >>> lora = oplora_jax.init_lora(jax.random.key(0), params, rank=2, targets="dense/kernel")
      >>> {path: p.shape for path, p in lora.items()}
      {'dense/kernel': (4, 6)}

      The queries of Gemma, whose kernel (heads, inputs, size of a head) has outputs on both sides:

      >>> params = {"q_einsum": {"w": jnp.ones((2, 8, 4))}}
      >>> lora = oplora_jax.init_lora(jax.random.key(0), params, 3, {"q_einsum/w": "BTD,NDH->BTNH"})
      >>> lora["q_einsum/w"].shape, lora["q_einsum/w"].roles
      ((8, 8), 'oio')
    """
    by_pattern = targets if isinstance(targets, Mapping) else None
    if by_pattern is not None and (batch_axes, output_axes) != (0, 1):
        given = f"batch_axes={batch_axes} and output_axes={output_axes}"
        raise ValueError(f"targets has the roles of the kernels' axes; leave out {given}")
    patterns = patterns_of(targets if by_pattern is None else [*by_pattern])
    kernels = [(path, z) for path, z in jax.tree.leaves_with_path(params) if np.ndim(z) >= 2]
    check_patterns(patterns, [leaf_name(path) for path, _ in kernels], "kernel")
    chosen = [(path, kernel) for path, kernel in kernels if matches(leaf_name(path), patterns)]
    lora = {}
    for (key_path, kernel), one_key in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        path = path_name(key_path)
        try:
            if by_pattern is None:
                roles = _in_order(kernel, batch_axes, output_axes)
            else:
                roles = _roles_said(leaf_name(key_path), kernel.ndim, by_pattern)
            lora[path] = init_beside(one_key, kernel, roles, rank, alpha, dtype)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return lora


def _in_order(kernel: Any, batch_axes: int, output_axes: int) -> str:
    """The roles of a kernel's axes in the order batch, inputs, outputs."""
    inputs = kernel.ndim - batch_axes - output_axes
    if min(batch_axes, inputs - 1, output_axes - 1) < 0:
        given = f"batch_axes={batch_axes} and output_axes={output_axes}"
        raise ValueError(f"the kernel is {kernel.shape}; {given} leave no axis of inputs or outputs")
    return "b" * batch_axes + "i" * inputs + "o" * output_axes


def _roles_said(name: str, ndim: int, by_pattern: Mapping[str | re.Pattern, str]) -> str:
    """The roles of a kernel's axes, in which all patterns that match it agree."""
    found: dict[str, str] = {}
    said = []
    for pattern, roles in by_pattern.items():
        if matches(name, [pattern]):
            try:
                roles = said_roles(roles, ndim)
            except ValueError as error:
                raise ValueError(f"targets[{pattern!r}]: {error}") from error
            found.setdefault(stacked(roles, ndim), roles)
            said.append(f"{roles!r} by targets[{pattern!r}]")
    if len(found) > 1:
        raise ValueError(
            f"the roles of its axes are {' and '.join(said)}; expected the same by all that match"
        )
    [roles] = found.values()
    return roles


def init_beside(key: PRNGKeyArray, kernel: Any, roles: str, rank: Rank, alpha: Alpha, dtype: Any) -> LowRank:
    """LoRA's usual start for a kernel whose last axes have these roles; axes in front stack layers."""
    rank, alpha = checked(rank, alpha)
    *batch, n, m = matrix_shape(kernel.shape, stacked(roles, kernel.ndim))
    if not 1 <= rank <= min(n, m):
        raise ValueError(f"rank is {rank}; a kernel ({n}, {m}) takes 1 to {min(n, m)}")
    dtype = _factors_dtype(kernel.dtype, dtype)
    a = he_uniform(key, (*batch, n, rank), dtype)
    b = jnp.zeros((*batch, rank, m), dtype)
    return beside(kernel, LowRank(a, b, 1.0 if alpha is None else alpha / rank, kept_roles(roles)))


def checked(rank: Rank, alpha: Alpha) -> tuple[int, float | None]:
    """Both as Python's numbers; raises ValueError for what is no rank or alpha. How large: see the kernel."""
    try:
        whole = None if isinstance(rank, bool) else operator.index(rank)
    except TypeError:
        whole = None
    if whole is None:
        raise ValueError(f"rank is {rank!r}; expected a whole number")
    number = positive_number(alpha)
    if number is None and alpha is not None:
        raise ValueError(f"alpha is {alpha!r}; expected a positive number that is known when traced, or None")
    return whole, number


def positive_number(value: Any) -> float | None:
    """A finite positive scalar, an array's too, as Python's; None for anything else, traced ones too."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return None
    real = any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer))
    number = float(array) if real and array.ndim == 0 else 0.0
    return number if 0 < number < math.inf else None


def _factors_dtype(of_kernel: Any, dtype: Any) -> Any:
    """The type of a LoRA parameter beside a kernel of some type; raises ValueError where there is none."""
    if not jnp.issubdtype(of_kernel, jnp.floating):
        raise ValueError(
            f"the kernel is {of_kernel}; LoRA begins beside a floating-point one. Dequantise it first, or "
            "leave it out of the targets"
        )
    found = of_kernel if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating) or found.itemsize < 2:
        given = "the kernel's type" if dtype is None else "dtype"
        raise ValueError(
            f"{given} is {found}; expected dtype=jnp.float32, or another type of 16 bits or more"
        )
    return found


def he_uniform(key: PRNGKeyArray, shape: tuple[int, ...], dtype: Any) -> Array:
    """The left factor at the start."""
    return jax.nn.initializers.he_uniform(batch_axis=tuple(range(len(shape) - 2)))(key, shape, dtype)


def beside(kernel: Any, lora: LowRank) -> LowRank:
    """A LoRA parameter, spread out as its kernel is."""
    traced = isinstance(kernel, Tracer)
    sharding = jax.typeof(kernel).sharding if traced else getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding) or (traced and not sharding.mesh.explicit_axes):
        return lora
    spec = tuple(sharding.spec)
    spec += (None,) * (kernel.ndim - len(spec))
    roles = axes_of(kernel.shape, lora)
    batch, rows, columns = ([e for e, r in zip(spec, roles, strict=True) if r == role] for role in "bio")
    put = jax.sharding.reshard if traced else jax.device_put
    batch = [None] * (lora.a.ndim - 2 - len(batch)) + batch
    place = lambda factor, *some: put(factor, NamedSharding(sharding.mesh, partition(*batch, *some)))
    return lora.with_factors(place(lora.a, merged(rows), None), place(lora.b, None, merged(columns)))
