"""How the full gradient of a LoRA weight leaves the backward pass: taps.

While it differentiates, `value_and_grad` puts a `Tapped` node in the place of each `LowRank`. Its taps are
arrays of zeros which no forward pass reads, and whose cotangents are x and dy, or x^T dy. Two primitives
carry them, one for `lora_dot` and one for `to_dense`. They are primitives, and not `jax.custom_vjp`
functions, for two reasons: their uses can be counted in a traced program, and a `jax.vmap` over x alone
becomes one more token axis of x, where the rule of a custom VJP would add the examples' captures up.
"""

import dataclasses
import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from oplora_jax.gradients.matmul_order import derivative, dot, multiply
from oplora_jax.matrix import LowRank, check_factors, matmul, transpose
from oplora_jax.metrics import second_moment
from oplora_jax.sharding import entries, explicit_mesh, partition, shard_like, specs_of, under_auto_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tapped(LowRank):
    """A `LowRank` whose tap's cotangent is the gradient of the matrix it stands for.

    tap is () while uses are counted, (x, dy) to capture an outer product, (gradient,) for a dense one, and
    (gradient, x_moment, dy_moment, tokens) for a dense one with the moments of its tokens. With a rule, a
    function (a, b, held, x, dy) that returns the taps' cotangents, they are anything else that is made of
    the factors, of the arrays in held and of the rows of x and dy.
    """

    tap: tuple[Any, ...] = ()
    held: tuple[Any, ...] = ()
    rule: Any = dataclasses.field(default=None, metadata={"static": True})

    def to_dense(self) -> Float[Array, "*batch n m"]:
        return to_dense_p.bind(self.a, self.b, *self.tap, scale=self.scale)


def lora_dot(
    x: Float[Array, "*tokens n"],
    kernel: Float[Array, "*batch n m"],
    lora: LowRank,
    *,
    precision: Any = None,
    out_sharding: NamedSharding | PartitionSpec | None = None,
) -> Float[Array, "*tokens m"]:
    r"""A dense layer with LoRA, :math:`x\,(W + s\,a\,b)`.

    The one function through which a layer applies its LoRA: `value_and_grad` captures the exact gradient of
    the whole weight here, and plain `jax.grad` gives the factors' gradients as usual. It multiplies in the
    order of the fewest operations, forward and backward: with N > n m / (n + m) tokens the weights are
    merged first. In less than float32 they never are, nor on a mesh with explicit axes.

    Args:
      x: inputs with any number of leading axes. If the kernel has batch axes (stacked layers, experts), x
        begins with the same ones.
      kernel: the frozen weight W.
      lora: the increment, a `LowRank` of the kernel's shape. It is cast to the type of x @ kernel.
      precision: of all products, forward and backward, as for `jnp.dot`.
      out_sharding: of the result, as for `jnp.dot`. A mesh with explicit axes asks for it where x @ kernel
        does: where it contracts an axis that is sharded in both. The factors may be sharded in any way.

    Returns:
      x (W + s a b), in the promoted type of x and the kernel, sharded as x @ kernel.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, lora_dot
      >>> lora = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=0.5)
      >>> lora_dot(jnp.ones((4, 3)), jnp.zeros((3, 2)), lora)[0].tolist()
      [1.5, 1.5]

    References:
      The orders, RunLoRA, https://arxiv.org/abs/2312.03415.
    """
    x, kernel = fit(x, kernel, lora)
    # Merged in less than float32, the weights would round small increments away. On a mesh with explicit axes
    # the kernel's own product is the user's to shard.
    on_mesh = out_sharding is not None or explicit_mesh((x, kernel, lora)) is not None
    if jnp.finfo(x.dtype).bits >= 32 and not on_mesh:
        return _bind(x, lora, kernel, precision=precision)
    y = dot(x, kernel, precision=precision, out_sharding=out_sharding)
    return y + shard_like(lora_increment(x, lora, precision=precision), y)


def fit(
    x: Float[Array, "*tokens n"], kernel: Float[Array, "*batch n m"], lora: LowRank
) -> tuple[Array, Array]:
    """x and the kernel in their common type; raises ValueError where they or `lora` do not fit together."""
    check_factors(lora, "lora")
    if jnp.shape(kernel) != lora.shape:
        raise ValueError(f"kernel has shape {jnp.shape(kernel)}, lora {lora.shape}; they must agree")
    batch = lora.shape[:-2]
    if jnp.ndim(x) < 1 + len(batch) or x.shape[-1] != lora.shape[-2] or x.shape[: len(batch)] != batch:
        expected = ", ".join([*map(str, batch), "...", str(lora.shape[-2])])
        raise ValueError(f"x has shape {jnp.shape(x)}; a kernel {lora.shape} takes ({expected})")
    dtype = jnp.result_type(x, kernel)
    return x.astype(dtype), kernel.astype(dtype)


def lora_increment(
    x: Float[Array, "*tokens n"], lora: LowRank, *, precision: Any = None
) -> Float[Array, "*tokens m"]:
    """x times the increment alone, in the type of x: what `lora_dot` adds to the layer's own product."""
    return _bind(x, lora, precision=precision)


def _bind(x: Array, lora: LowRank, *kernel: Array, precision: Any) -> Array:
    """x times the increment, or times the kernel with it."""
    if precision is None:  # read here: the products are traced later, when the user's context may be over
        precision = jax.config.jax_default_matmul_precision
    a, b = lora.a.astype(x.dtype), lora.b.astype(x.dtype)
    tap, held, rule = (lora.tap, lora.held, lora.rule) if isinstance(lora, Tapped) else ((), (), None)
    if rule is not None:
        held = (lora.a, lora.b, *held)
    parts = {"kernels": len(kernel), "taps": len(tap)}
    return lora_dot_p.bind(
        x, a, b, *kernel, *tap, *held, scale=lora.scale, precision=precision, rule=rule, **parts
    )


def _multiply(
    x: Any,
    a: Any,
    b: Any,
    *rest: Any,
    scale: float,
    kernels: int,
    precision: Any,
    taps: int = 0,
    rule: Any = None,
) -> Array:
    """x (W + s a b), or s x a b without a kernel; of the taps and what is held nothing is read."""
    if kernels:
        return multiply(x, rest[0], a, b, scale, precision)
    return _thin_dot(x, a, b, scale=scale, precision=precision)


def _thin_dot(x: Any, a: Any, b: Any, *, scale: float, precision: Any) -> Array:
    """s (x a) b, sharded as the tokens of x and the columns of b."""
    product = lambda x, a, b: dot(dot(x, a, precision=precision) * scale, b, precision=precision)
    return under_auto_sharding(product, lambda: partition(*entries(x)[:-1], entries(b)[-1]), x, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _captured(taps, precision, rule, x, y, held, *tap):
    """Zeros like y. The cotangents of the taps are what is captured of x and of the cotangent of y."""
    return jnp.zeros_like(y)


def _captured_fwd(taps, precision, rule, x, y, held, *tap):
    return jnp.zeros_like(y), (x, y, held)


def _captured_bwd(taps, precision, rule, residuals, dy):
    x, y, held = residuals
    capture = partial(_capture, taps, precision, rule)
    dx, no_dy, *captured = under_auto_sharding(capture, lambda: specs_of((x, y, *taps)), x, y, held, dy)
    return dx, no_dy, jax.tree.map(_no_cotangent, held), *captured


def _capture(taps, precision, rule, x, y, held, dy):
    """The cotangents of x and y, which are zero, and of the taps."""
    batch = held[0].shape[:-2] if rule else taps[0].shape[:-2]
    rows = [z.reshape(*batch, -1, z.shape[-1]) for z in (x, dy)]
    cotangents = rule(*held[:2], held[2:], *rows) if rule else _captures(*rows, taps, precision)
    captured = [c.reshape(tap.shape).astype(tap.dtype) for c, tap in zip(cotangents, taps, strict=True)]
    primals = [jnp.zeros(tap.shape, tap.dtype) for tap in taps]
    return jnp.zeros_like(x), jnp.zeros_like(y), *_over_devices(captured, primals)


def _no_cotangent(z: Array) -> Any:
    floating = jnp.issubdtype(z.dtype, jnp.inexact)
    return jnp.zeros_like(z) if floating else np.zeros(z.shape, jax.dtypes.float0)


def _captures(x: Array, dy: Array, taps: tuple[Any, ...], precision: Any) -> tuple[Array, ...]:
    """The cotangents of the taps, from the rows of x and dy."""
    if len(taps) == 2:
        return x, dy
    product = matmul(transpose(x), dy, precision)
    if len(taps) < 4:
        return (product,)[: len(taps)]
    gradient, x_moment, _, tokens = taps
    structure = "dense" if len(x_moment.shape) == len(gradient.shape) else "diagonal"
    moments = (second_moment(rows, structure) for rows in (x, dy))
    return product, *moments, jnp.full(tokens.shape, x.shape[-2], tokens.dtype)


def _over_devices(cotangents: list[Array], primals: list[Array]) -> list[Array]:
    """The sums over the devices of a `jax.shard_map` that see the same primals; otherwise the cotangents."""
    add_zeros = lambda at: [p + jnp.zeros_like(c) for p, c in zip(at, cotangents, strict=True)]
    return jax.vjp(add_zeros, primals)[1](cotangents)[0]


_captured.defvjp(_captured_fwd, _captured_bwd)


def _lora_dot_jvp(primals, tangents, *, scale, kernels, precision, taps, rule):
    x, a, b, *rest = primals
    dx, da, db, *drest = (None if isinstance(tangent, ad.Zero) else tangent for tangent in tangents)
    ends = kernels, kernels + taps
    (kernel, tap, held), (dkernel, dtap, _) = (
        (z[: ends[0]], z[slice(*ends)], z[ends[1] :]) for z in (rest, drest)
    )
    out = _multiply(x, a, b, *kernel, scale=scale, kernels=kernels, precision=precision)
    terms = []
    if any(tangent is not None for tangent in (dx, da, db, *dkernel)):
        if kernels:
            terms.append(derivative((x, *kernel, a, b), (dx, *dkernel, da, db), scale, precision))
        else:
            multiply_thin = partial(_thin_dot, scale=scale, precision=precision)
            terms.extend(_thin_derivative(multiply_thin, (x, a, b), (dx, da, db)))
    if any(tangent is not None for tangent in dtap):
        captured = partial(_captured, tuple(map(jax.typeof, tap)), precision, rule, x, out, tuple(held))
        along = tuple(map(_instantiate, tap, dtap))
        terms.append(jax.jvp(captured, tuple(tap), along)[1])
    return out, functools.reduce(ad.add_tangents, terms)


def _thin_derivative(function, primals, tangents):
    """The derivatives of s (x a) b along x and along the factors, as far as there are tangents."""
    (x, a, b), (dx, da, db) = primals, tangents
    if dx is not None:
        yield jax.jvp(lambda x: function(x, a, b), (x,), (dx,))[1]
    if da is not None or db is not None:
        along = _instantiate(a, da), _instantiate(b, db)
        yield jax.jvp(lambda a, b: function(x, a, b), (a, b), along)[1]


def _instantiate(primal, tangent):
    return jnp.zeros_like(primal) if tangent is None else tangent


def _lora_dot_batch(arguments, axes, **parameters):
    x, *lora = arguments
    x_axis, *lora_axes = axes
    batch_ndim = lora[0].ndim - 2
    if all(axis is None for axis in lora_axes):  # one more axis of tokens, behind the batch axes
        x = jnp.moveaxis(x, x_axis, batch_ndim)
        return lora_dot_p.bind(x, *lora, **parameters), batch_ndim
    return lora_dot_p.bind(*_all_batched(arguments, axes), **parameters), 0


def _all_batched(arguments, axes):
    [size] = {z.shape[axis] for z, axis in zip(arguments, axes, strict=True) if axis is not None}
    return [
        jnp.broadcast_to(z, (size, *z.shape)) if axis is None else jnp.moveaxis(z, axis, 0)
        for z, axis in zip(arguments, axes, strict=True)
    ]


def _dense(a: Array, b: Array, *tap: Array, scale: float) -> Array:
    del tap
    return LowRank(a, b, scale).to_dense()


def _to_dense_jvp(primals, tangents, *, scale):
    a, b, *_ = primals
    da, db, *dtap = tangents
    out = to_dense_p.bind(a, b, scale=scale)
    outs = [shard_like(t.astype(out.dtype), out) for t in dtap if not isinstance(t, ad.Zero)]
    if any(not isinstance(t, ad.Zero) for t in (da, db)):
        along = tuple(map(ad.instantiate_zeros, (da, db)))
        outs.append(jax.jvp(partial(_dense, scale=scale), (a, b), along)[1])
    return out, functools.reduce(ad.add_tangents, outs)


def _to_dense_batch(arguments, axes, *, scale):
    return to_dense_p.bind(*_all_batched(arguments, axes), scale=scale), 0


def _primitive(name: str, function: Any, jvp: Any, batch: Any, parameters: tuple[str, ...]) -> Primitive:
    """A primitive that computes `function`, with its own rules for derivatives and vmap."""
    primitive, cached = Primitive(name), jax.jit(function, static_argnames=parameters)
    primitive.def_impl(cached)

    def abstract(*avals, **parameters):
        [out] = jax.make_jaxpr(partial(cached, **parameters))(*avals).out_avals
        return out

    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = batch
    return primitive


lora_dot_p = _primitive(
    "lora_dot",
    _multiply,
    _lora_dot_jvp,
    _lora_dot_batch,
    ("scale", "kernels", "precision", "taps", "rule"),
)
to_dense_p = _primitive("lora_to_dense", _dense, _to_dense_jvp, _to_dense_batch, ("scale",))
