"""LoRA on the layers of an existing linen model, whose source stays as it is."""

import dataclasses
import re
import types
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from oplora_jax.adapters.checks import refuse_unsupported
from oplora_jax.adapters.init import Alpha, Rank, checked
from oplora_jax.adapters.paths import Targets, check_patterns, matches, patterns_of
from oplora_jax.linen.apply import LAYERS, SPLIT, WithLoRA, call_with_lora
from oplora_jax.linen.parameters import map_layers, spaced


def loraize(
    model: nn.Module,
    rank: Rank,
    targets: Targets,
    *,
    alpha: Alpha = None,
    dtype: Any = None,
) -> nn.Module:
    """Any linen model with LoRA on the layers whose paths match a pattern; its source stays as it is.

    A chosen `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` or `nn.ConvTranspose` gets a parameter
    `lora`, a `LowRank`, beside its `kernel`; `nn.scan`, `nn.vmap` and `nn.remat` treat it as they do the
    kernel. The rest of the tree is the model's own, so that pretrained parameters fit: `add_lora` adds the
    LoRA parameters to them, `merge` makes plain ones again.

    Args:
      model: any linen module.
      rank: r, at most either side of every kernel chosen.
      targets: one pattern or several, as for `oplora_jax.init_lora`, for the paths of layers as in the tree
        of parameters, such as "encoder/layers_0/attention/query".
      alpha: a positive number; the scale is alpha / rank, or 1 if alpha is None.
      dtype: the LoRA parameters' type, as for `oplora_jax.init_lora`; that of each kernel if None.

    Returns:
      A module to call, apply and bind as the model, with the same methods and attributes: `method="encode"`
      or `method=Model.encode`. For layers of several ranks, loraize it again.

    Raises:
      ValueError: a rank or alpha that is no such number. When the result is initialised: a pattern that
        matches no layer, or one of a class that has no LoRA, such as `nn.Embed`; a layer that has LoRA
        already; a kernel that is too small for the rank, or that is computed from the parameter, as by
        `nn.WeightNorm`. For `nn.map_variables` of your own it comes when the result is applied.

    Convolutions, and layers of a subclass with methods of its own, run with merged weights.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax.linen import loraize
      >>> model = loraize(nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), rank=2, targets="layers_0")
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 4)))["params"]
      >>> sorted(params["layers_0"]), sorted(params["layers_2"])
      (['bias', 'kernel', 'lora'], ['bias', 'kernel'])
    """
    target = Target(patterns_of(targets), *checked(rank, alpha), dtype)
    return LoRA(model.model, (*model.targets, target)) if isinstance(model, LoRA) else LoRA(model, (target,))


def _drop_name(model: nn.Module, at: int, done: set[int]) -> None:
    """Takes the model's own name out of the paths of modules that it was given, where Flax leaves it."""
    fields = [getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ("parent", "name")]
    for child in jax.tree.leaves(fields, is_leaf=lambda z: isinstance(z, nn.Module)):
        if isinstance(child, nn.Module) and child.scope is not None and id(child) not in done:
            done.add(id(child))
            child.scope.path = child.scope.path[:at] + child.scope.path[at + 1 :]
            _drop_name(child, at, done)


class Target(NamedTuple):
    """Which layers have LoRA, of what rank, alpha and type: the arguments of one `loraize`."""

    patterns: tuple[str | re.Pattern, ...]
    rank: int
    alpha: float | None
    dtype: Any


class LoRA(nn.Module):
    """What `loraize` returns: a model whose layers that the targets match have LoRA."""

    model: nn.Module
    targets: tuple[Target, ...]

    def setup(self) -> None:
        self.scope.reservations.pop(self.model.name, None)  # the model may have a module of that name itself
        nn.share_scope(self, self.model)  # the model's parameters are where they are without LoRA
        _drop_name(self.model, len(self.path), set())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        seen: dict[str, list[Target]] = {}
        others: dict[str, type] = {}
        y = self._intercepted(self.model.__call__, args, kwargs, seen, others)
        if all(isinstance(z, Mapping) for z in self.variables.get("params", {}).values()):
            others.pop("", None)  # the model is no layer itself
        for target in self.targets if self.is_initializing() else ():
            refuse_unsupported(target.patterns, seen, others, LAYERS, nn)
            check_patterns(target.patterns, list(seen), "layer")
        return y

    def call_method(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """What a method of the model, or a function of it, returns. It need not use a layer that matches."""
        bound = getattr(self.model, method) if isinstance(method, str) else partial(method, self.model)
        return self._intercepted(bound, args, kwargs, {}, {})

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        return super().apply(variables, *args, method=_of_lora(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        y, variables = super().init_with_output(rngs, *args, method=_of_lora(method), **kwargs)
        return y, map_layers(spaced, variables)

    def __getattr__(self, name: str) -> Any:
        model = vars(self).get("model")
        if isinstance(getattr(type(model), name, None), types.FunctionType):
            return types.MethodType(lambda self, *args, **kw: self.call_method(name, *args, **kw), self)
        try:
            return super().__getattr__(name)  # which runs setup
        except AttributeError:
            if model is None or name.startswith("__"):
                raise
        return _part(self, self._intercepted(getattr, (self.model, name), {}, {}, {}))

    @nn.nowrap
    def _intercepted(
        self,
        function: Any,
        args: Any,
        kwargs: Any,
        seen: dict[str, list[Target]],
        others: dict[str, type],
    ) -> Any:
        """Calls the layers that match with LoRA, and records which layers and other modules there are."""
        if self.scope is None:
            return function(*args, **kwargs)
        root = self.scope.path

        def interceptor(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            layer = context.module
            inside = layer.path[: len(root)] == root
            if inside and not isinstance(layer, LAYERS):
                others.setdefault("/".join(layer.path[len(root) :]), type(layer))
                return call(*args, **kwargs)
            owner = vars(layer).get("_lora_of")  # whose call of this layer, with LoRA, is under way
            if not inside or owner is seen:  # a layer with methods of its own calls others of them
                return call(*args, **kwargs)
            path = "/".join(layer.path[len(root) :])
            targets = seen[path] = [target for target in self.targets if matches(path, target.patterns)]
            if not targets:
                return call(*args, **kwargs)
            if len(targets) > 1 or owner is not None or isinstance(layer, WithLoRA):
                name = f"{path!r}: this {type(layer).__name__}"
                raise ValueError(f"{name} has LoRA already; leave it out of the targets")
            # To a class that computes anything else than these do, a subclass's say, belong merged weights.
            split = type(layer).__call__ in [cls.__call__ for cls in SPLIT]
            if split and context.method_name != "__call__":
                return call(*args, **kwargs)
            object.__setattr__(layer, "_lora_of", seen)
            try:
                return call_with_lora(layer, call, args, kwargs, targets[0][1:], split)
            except ValueError as error:
                raise ValueError(f"{path!r}: {error}") from error
            finally:
                object.__delattr__(layer, "_lora_of")

        with nn.intercept_methods(interceptor):
            return function(*args, **kwargs)


class _Part:
    """A module within a bound model with LoRA, whose calls have LoRA too."""

    def __init__(self, lora: LoRA, module: nn.Module):
        self._lora, self._module = lora, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._lora._intercepted(self._module, args, kwargs, {}, {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _part(self._lora, self._lora._intercepted(getattr, (self._module, name), {}, {}, {}))


def _part(lora: LoRA, value: Any) -> Any:
    """An attribute of a model; modules, in containers too, and methods as of the model with LoRA."""
    if lora.scope is None:
        return value
    if isinstance(getattr(value, "__self__", None), nn.Module):
        return lambda *args, **kwargs: lora._intercepted(value, args, kwargs, {}, {})
    is_module = lambda z: isinstance(z, nn.Module)
    if not any(map(is_module, jax.tree.leaves(value, is_leaf=is_module))):
        return value
    return jax.tree.map(lambda z: _Part(lora, z) if is_module(z) else z, value, is_leaf=is_module)


def _of_lora(method: Any) -> Any:
    """Flax's argument `method`, if it is a function of the model, as one of the model with LoRA."""
    if method is None or isinstance(method, str) or isinstance(getattr(method, "__self__", None), LoRA):
        return method
    function = getattr(method, "__func__", method)
    return lambda lora, *args, **kwargs: lora.call_method(function, *args, **kwargs)
