"""Qwix's LoRA with exact gradients: a `LowRank` beside each weight, in any Flax model that Qwix takes."""

import re
import string
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import errors, nnx
from jaxtyping import Array
from qwix._src.providers.ptq import WithAux
from qwix._src.utils import flax_util

from oplora_jax._jax import Tracer
from oplora_jax.adapters.checks import check_roles
from oplora_jax.adapters.init import beside, init_beside
from oplora_jax.adapters.kernel_axes import add_einsum_increment, add_increment, kernel_roles, without_space
from oplora_jax.matrix import LowRank

# What may lie between a parameter and the weight that is multiplied with.
_SAME_VALUES = ("convert_element_type", "copy", "pvary", "reshard", "sharding_constraint", "stop_gradient")


class LoraProvider(qwix.LoraProvider):
    """`qwix.LoraProvider` with a `LowRank` for each LoRA parameter, so that gradients can be exact.

    It takes the same arguments, rules of `qwix.LoraRule` too, and puts LoRA on the same weights: of dense
    layers, einsums and convolutions, NNX and linen, quantised or not, with Qwix's dropout and initialisers.
    Take gradients by `oplora_jax.nnx.value_and_grad`, or for linen by `oplora_jax.value_and_grad`.

    The parameter of a module's weight "w" is "lora/w" beside it, in NNX an `nnx.LoRAParam`, of the scale
    alpha / rank, and laid out over a mesh as the weight is. `oplora_jax.to_low_rank` makes of all of them a
    dict by the weights' paths, for `oplora_jax.merge` and `oplora_jax.peft.save_adapter`.

    Raises:
      ValueError: in the model's call, by the module's path: a rank above a side of a weight; an einsum that
        is no product with a matrix; a weight that is transposed or scaled before it is used, as merged
        weights would then compute something else; and LoRA in the model already that the rules leave out, or
        give another rank or scale.

    A convolution is computed twice: once with its weight, once with the increment.

    Examples:
      >>> import jax.numpy as jnp
      >>> import qwix
      >>> from flax import nnx
      >>> from oplora_jax.nnx import value_and_grad
      >>> from oplora_jax.qwix import LoraProvider
      >>> model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
      >>> provider = LoraProvider(module_path="layers/0", rank=2, alpha=4)
      >>> model = qwix.apply_lora_to_model(model, provider, jnp.ones((1, 4)), rngs=nnx.Rngs(1))
      >>> model.layers[0].lora["kernel"].get_value().shape
      (4, 6)
      >>> loss, gradients = value_and_grad(lambda model, x: model(x).sum())(model, jnp.ones((1, 4)))
    """

    def process_model_inputs(self, model: Any, args: Any, kwargs: Any) -> Any:
        patterns = [rule.module_path for rule in self._rules if isinstance(rule, qwix.LoraRule)]
        for _, module in nnx.iter_modules(model) if isinstance(model, nnx.Module) else ():
            path = "/".join(map(str, module.qwix_path)) if _has_lora(module) else None
            if path is not None and not any(re.fullmatch(pattern, path) for pattern in patterns):
                raise ValueError(
                    f"{path}: this {type(module).__name__} has LoRA of an earlier provider, which the rules "
                    "of this one leave out: it would have no effect. Give one provider a rule for each"
                )
        return super().process_model_inputs(model, args, kwargs)

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> Array:
        y = super(qwix.LoraProvider, self).dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
        if (weight := self._weight("dot_general", rhs)) is None:
            return y
        equation = _equation(lhs.ndim, rhs.ndim, dimension_numbers)
        return _with_increment(y, equation, lhs, rhs, precision, *weight)

    def einsum(self, einsum_str: str, *operands: Any, **options: Any) -> Array:
        y = super(qwix.LoraProvider, self).einsum(einsum_str, *operands, **options)
        weights = [self._weight("einsum", operand) for operand in operands[1:]]
        if not any(weights):
            return y
        if len(operands) > 2:
            raise ValueError(
                f"{_path()}: the einsum {einsum_str!r} is of {len(operands)} operands; LoRA needs 2"
            )
        return _with_increment(y, _explicit(einsum_str), *operands, options.get("precision"), *weights[0])

    def conv_general_dilated(
        self,
        lhs: Any,
        rhs: Any,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        **options: Any,
    ) -> Array:
        convolve = super(qwix.LoraProvider, self).conv_general_dilated
        settings = (window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers)
        y = convolve(lhs, rhs, *settings, **options)
        if (weight := self._weight("conv_general_dilated", rhs)) is None:
            return y
        outputs = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers).rhs_spec[0]
        roles = "".join("o" if axis == outputs else "i" for axis in range(rhs.ndim))
        lora, x = _lora_and_inputs(*weight, roles, rhs, lhs)
        kernel = add_increment(jnp.zeros(rhs.shape, x.dtype), lora)
        return y + jax.lax.conv_general_dilated(x, kernel, *settings, **options).astype(y.dtype)

    def _weight(self, op: str, rhs: Any) -> tuple[qwix.LoraRule, str] | None:
        """The rule for a weight of the current module, and its name; None for anything else."""
        rule, _ = self._get_current_rule_and_op_id(op, repeated_call=True)
        name = _name_of(rhs) if isinstance(rule, qwix.LoraRule) else None
        return None if name is None else (rule, name)


def _with_increment(
    y: Array, equation: str, x: Array, weight: Any, precision: Any, rule: qwix.LoraRule, name: str
) -> Array:
    """A product of inputs and a weight, an einsum, with the increment's added."""
    try:
        roles = kernel_roles(equation, weight.ndim)
    except ValueError as error:
        raise ValueError(f"{_path()}: {error}") from error
    lora, x = _lora_and_inputs(rule, name, roles, weight, x)
    return add_einsum_increment(y, equation, x, weight.shape, lora, precision)


def _lora_and_inputs(
    rule: qwix.LoraRule, name: str, roles: str, weight: Any, x: Array
) -> tuple[LowRank, Array]:
    """The LoRA parameter of a weight of the current module, made if need be, and its inputs."""
    module = flax_util.get_current_module()
    linen = isinstance(module, nn.Module)
    boxed = module.get_variable("params", name) if linen else getattr(module, name)
    stored = flax_util.unbox(boxed)
    new = lambda key: _new(key, stored, roles, rule, name)
    lora = _linen_lora(module, name, new) if linen else _nnx_lora(module, name, new, rule)
    lora = without_space(lora, roles)
    try:
        check_roles(lora, roles, _path("lora", name))
    except ValueError as error:
        two = "If the module multiplies with the weight in two ways, leave it out of module_path"
        raise ValueError(f"{error}. {two}") from error
    if rule.dropout > 0:
        x = nnx.Dropout(rule.dropout, deterministic=False)(x, rngs=flax_util.make_rng("dropout"))
    return lora, x


def _linen_lora(module: nn.Module, name: str, new: Callable[[Array], LowRank]) -> LowRank:
    scope = module.scope.push("lora", reuse=True)
    return (
        scope.get_variable("params", name) if scope.has_variable("params", name) else scope.param(name, new)
    )


def _has_lora(module: nnx.Module) -> bool:
    params = getattr(module, "lora", None)
    return isinstance(params, nnx.Dict) and any(isinstance(z, nnx.LoRAParam) for z in params.values())


def _nnx_lora(module: nnx.Module, name: str, new: Callable[[Array], LowRank], rule: qwix.LoraRule) -> LowRank:
    # Below the module's own attributes, where Qwix looks for weights by their shapes.
    params = getattr(module, "lora", None)
    if params is None:
        params = nnx.Dict()
    elif not isinstance(params, nnx.Dict):
        raise ValueError(
            f"{_path()}: this {type(module).__name__} has LoRA already; leave it out of module_path"
        )
    applying = isinstance(module.qwix_rngs, nnx.Rngs)
    if name not in vars(params):
        if not applying:
            raise ValueError(
                f"{_path(name)}: the call that qwix.apply_lora_to_model makes did not use this weight, so it "
                "has no LoRA. Give it inputs with which it does, or leave the module out of module_path"
            )
        try:
            params[name] = nnx.LoRAParam(new(module.qwix_rngs.params()))
            module.lora = params
        except errors.TraceContextError as error:
            raise ValueError(
                f"{_path(name)}: the model calls this module inside of a transformation of JAX, where it "
                "takes no new parameters. Put Flax's in its place, such as nnx.vmap or nnx.remat for "
                "jax.vmap or jax.checkpoint, with the module among the arguments"
            ) from error
    lora = params[name].get_value()
    found, said = (lora.a.shape[-1], lora.scale), (rule.rank, rule.alpha / rule.rank)
    if applying and found != said:
        raise ValueError(
            f"{_path(name)}: this weight has LoRA of rank {found[0]} and scale {found[1]} already; the rule "
            f"says rank {said[0]} and scale {said[1]}"
        )
    return lora


def _new(key: Array, stored: Any, roles: str, rule: qwix.LoraRule, name: str) -> LowRank:
    """The LoRA parameter with which training starts."""
    if isinstance(stored, WithAux):  # quantised: its codes may lie in blocks
        codes, dtype = stored.array.qvalue, stored.array.scale.dtype
        known = codes.shape == stored.shape and not isinstance(codes, Tracer)
        stored = jax.ShapeDtypeStruct(stored.shape, dtype, sharding=codes.sharding if known else None)
    try:
        lora = init_beside(key, stored, roles, rule.rank, rule.alpha, None)
    except ValueError as error:
        raise ValueError(f"{_path(name)}: {error}") from error
    initializers = (rule.lora_a_initializer, rule.lora_b_initializer)

    def filled(initializer: Any, key: Array, factor: Array) -> Array:
        *batch, rows, columns = factor.shape
        keys = jax.random.split(key, batch)
        new = lambda key: initializer(key, (rows, columns), factor.dtype)
        for _ in batch:
            new = jax.vmap(new)
        return new(keys if batch else key)

    a, b = map(filled, initializers, jax.random.split(key), (lora.a, lora.b))
    return beside(stored, lora.with_factors(a, b))


def _name_of(weight: Any) -> str | None:
    """The name of a weight in the current module; None for an array that is none.

    Raises:
      ValueError: what Qwix takes for a weight is not the parameter as it is, or may be two.
    """
    module = flax_util.get_current_module()
    if isinstance(module, nn.Module):
        params = module.variables.get("params", {})
    else:
        params = {name: z for name, z in vars(module).items() if isinstance(z, nnx.Param | WithAux)}
    params = {name: flax_util.unbox(z) for name, z in params.items()}
    # Qwix itself finds neither NumPy's arrays nor casts of one of several weights of a shape.
    alike = [name for name, z in params.items() if getattr(z, "shape", None) == weight.shape]
    arrays = [name for name in alike if isinstance(params[name], jax.Array | np.ndarray)]
    same = [name for name in arrays if weight is params[name]]
    same = same or [
        name for name in arrays if not isinstance(weight, WithAux) and _is_stored(weight, params[name])
    ]
    if len(same) > 1:
        raise ValueError(
            f"{_path()}: the weights {', '.join(same)} are equal, and cast: it cannot be told which of them "
            "is used. Put jax.jit, or nnx.jit, around the call"
        )
    if same:
        return same[0]
    try:
        name = flax_util.find_param(weight, WithAux)
    except ValueError:  # one of several of a shape, and not as it is
        name = None
    if name is not None and not isinstance(params[name], WithAux):
        raise ValueError(
            f"{_path(name)}: the module multiplies with an array of this weight's shape that is not the "
            "weight itself, but made of it or another: merged weights would compute something else than "
            "LoRA. Leave the module out of module_path; what is no weight at all, another batch size tells"
            " apart, and a weight that is handed to a function under jax.jit, disable_jit=True"
        )
    return name


def _is_stored(weight: Any, stored: Any) -> bool:
    """Whether a weight is a parameter as it is, or cast."""
    weight, stored = _origin(weight), _origin(stored)
    if weight is stored or isinstance(weight, Tracer) or isinstance(stored, Tracer):
        return weight is stored
    return weight.shape == stored.shape and np.array_equal(weight, stored.astype(weight.dtype))


def _origin(array: Any) -> Any:
    """The array whose values a traced one has: under derivatives and vmap too, as far as there are traces."""
    while isinstance(array, Tracer):
        made = getattr(array, "parent", getattr(array, "recipe", None))  # a recipe in the scans of linen
        if hasattr(made, "primitive"):
            inner = made.in_tracers[0] if made.primitive.name in _SAME_VALUES and made.in_tracers else array
        elif hasattr(array, "parent"):
            inner = array.get_const()  # what the traced function closes over, if it is that
            inner = array if inner is None else inner
        else:  # of a derivative, or of vmap
            inner = getattr(array, "primal", getattr(array, "val", array))
        if inner is array:
            break
        array = inner
    return array


def _path(*names: str) -> str:
    return "/".join(map(str, (*flax_util.get_current_module_path(), *names)))


def _equation(x_ndim: int, weight_ndim: int, dimension_numbers: Any) -> str:
    """A `dot_general` as an einsum: batch axes first, then the others of the inputs and of the weight."""
    (x_contracted, weight_contracted), (x_batch, weight_batch) = dimension_numbers
    x, weight = string.ascii_letters[:x_ndim], list(string.ascii_letters[x_ndim : x_ndim + weight_ndim])
    for i, j in zip((*x_contracted, *x_batch), (*weight_contracted, *weight_batch), strict=True):
        weight[j] = x[i]
    kept = [x[i] for i in range(x_ndim) if i not in (*x_contracted, *x_batch)]
    features = [weight[j] for j in range(weight_ndim) if j not in (*weight_contracted, *weight_batch)]
    return f"{x},{''.join(weight)}->{''.join([x[i] for i in x_batch] + kept + features)}"


def _explicit(equation: str) -> str:
    """An einsum with its outputs written, which are by default what comes once, in the alphabet's order."""
    if "->" in equation:
        return equation
    letters = [c for c in equation if c.isalpha()]
    once = "".join(sorted(c for c in letters if letters.count(c) == 1))
    return f"{equation}->{'...' if '...' in equation else ''}{once}"
