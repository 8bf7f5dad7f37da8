"""Tunix's trainer with exact gradients."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.sft import checkpoint_manager, peft_trainer

from oplora_jax.gradients.clipping import global_norm
from oplora_jax.gradients.value_and_grad import Kind
from oplora_jax.metrics import Structure
from oplora_jax.nnx.gradients import value_and_grad


class PeftTrainer(peft_trainer.PeftTrainer):
    """`tunix.PeftTrainer` whose steps take the exact gradients of the full weights.

    The model has `LowRank` parameters, by `oplora_jax.qwix.LoraProvider` or `oplora_jax.nnx.loraize`; the
    optimizer is one of this package. Everything else is Tunix's: losses, hooks, metrics, evaluation, meshes
    and checkpoints. The metric "grad_norm" is the norm of the full weights' gradient.

    Tunix's other trainers take exact gradients as `class Dpo(DPOTrainer, PeftTrainer)`, this one last.

    Args:
      model: as for Tunix's.
      optimizer: as for Tunix's. To clip, `optax.chain` it behind `oplora_jax.clip_by_global_norm`.
      training_config: as for Tunix's. With `gradient_accumulation_steps` k, k batches of the same shapes are
        one step of one compiled program, which runs the loss on one after the other; a rest of fewer than k
        batches is left out, and a step's training hooks are called once for the k of them.
      *args: Tunix's others.
      gradient: as for `oplora_jax.value_and_grad`.
      moments: as for `oplora_jax.value_and_grad`: "diagonal" for `scaled_oplora`.
      **kwargs: Tunix's others.

    Raises:
      ValueError: batches that are accumulated and differ in shape, or whose arrays differ in the size of
        their first axis, or that come from data hooks.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from tunix.sft.peft_trainer import TrainingConfig
      >>> import oplora_jax
      >>> from oplora_jax.tunix import PeftTrainer
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
      >>> _ = oplora_jax.nnx.loraize(model, rank=2, targets="layers/0", rngs=nnx.Rngs(1))
      >>> config = TrainingConfig(eval_every_n_steps=10, max_steps=5, pbar_description=None)
      >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1.0) ** 2)
      >>> trainer = PeftTrainer(model, oplora_jax.oplora(0.1), config).with_loss_fn(loss_fn)
      >>> batch = {"x": jnp.ones((8, 4))}
      >>> before = loss_fn(model, **batch)
      >>> trainer.train([batch] * 5)
      >>> bool(loss_fn(model, **batch) < before)
      True
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        training_config: peft_trainer.TrainingConfig,
        *args: Any,
        gradient: Kind = "auto",
        moments: Structure | None = None,
        **kwargs: Any,
    ):
        self._microbatches = training_config.gradient_accumulation_steps or 1
        # The base class would add gradients up by optax.MultiSteps, which outer products do not take.
        training_config = dataclasses.replace(training_config, gradient_accumulation_steps=None)
        super().__init__(model, optimizer, training_config, *args, **kwargs)
        self._kind = {"gradient": gradient, "moments": moments}

    def train(self, train_ds: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """Tunix's loop, over k batches at a time."""
        if self._microbatches > 1:
            if self.data_hooks is not None:
                raise ValueError(
                    "data hooks load one batch at a time; with gradient_accumulation_steps="
                    f"{self._microbatches} give the batches to train() instead"
                )
            train_ds = _groups(train_ds, self._microbatches)
        prepare, post_process = self._prepare_inputs, self._post_process_train_step

        def prepare_all(data: Any) -> Any:
            return _side_by_side([*map(prepare, data)]) if isinstance(data, _Group) else prepare(data)

        def post_process_all(aux: Any) -> None:
            for part in [aux] if self._microbatches == 1 else map(_at(aux), range(self._microbatches)):
                post_process(part)

        # On the trainer itself: a subclass may have methods of its own, which are for one batch.
        self._prepare_inputs, self._post_process_train_step = prepare_all, post_process_all
        try:
            super().train(train_ds, *args, **kwargs)
        finally:
            del self._prepare_inputs, self._post_process_train_step

    def _train_step(self, model: nnx.Module, optimizer: nnx.Optimizer, inputs: Any) -> tuple[Any, Any, Any]:
        loss_fn = lambda model, inputs: self.loss_fn(model, **self.gen_model_input_fn(inputs))
        wrt = nnx.LoRAParam if self._lora_enabled else nnx.Param
        microbatches = self._microbatches if self._microbatches > 1 else None
        settings = {"has_aux": self._has_aux, "wrt": wrt, "microbatches": microbatches, **self._kind}
        out, gradients = value_and_grad(loss_fn, **settings)(model, inputs)
        loss, aux = out if self._has_aux else (out, None)
        optimizer.update(model, gradients)
        return loss, aux, global_norm(gradients)

    def _shard_optimizer(self, mesh: Mesh) -> None:
        _on_one_mesh(self.optimizer)

    @property
    def checkpoint_manager(self) -> "CheckpointManager":
        return self._checkpoints

    @checkpoint_manager.setter
    def checkpoint_manager(self, manager: Any) -> None:
        # Set by the base class, which restores at once.
        manager.__class__ = CheckpointManager
        self._checkpoints = manager


class CheckpointManager(checkpoint_manager.CheckpointManager):
    """Tunix's checkpoint manager, which restores each array to where it lies on the mesh.

    `PeftTrainer` has it: the two factors of a LoRA parameter may lie apart.
    """

    def maybe_restore(
        self,
        model: nnx.Module,
        optimizer: nnx.Optimizer | None = None,
        step: int | None = None,
        restore_only_lora_params: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        step = self.latest_step() if step is None else step
        if step is None:
            return 0, {}
        metadata = self._checkpoint_manager.metadata(step)
        items = {"model_params": (model, nnx.LoRAParam if restore_only_lora_params else ...)}
        if optimizer is not None and "optimizer_state" in metadata.item_metadata:
            _on_one_mesh(optimizer)
            items["optimizer_state"] = (optimizer, nnx.optimizer.OptState)
        states = {name: nnx.state(*of) for name, of in items.items()}
        restore = lambda state: ocp.args.PyTreeRestore(
            item=state, restore_args=ocp.checkpoint_utils.construct_restore_args(state)
        )
        restored = self._checkpoint_manager.restore(
            step, args=ocp.args.Composite(**{name: restore(state) for name, state in states.items()})
        )
        for name, (owner, _) in items.items():
            nnx.update(owner, restored[name])
        return step, metadata.custom_metadata or {}


def _on_one_mesh(optimizer: nnx.Optimizer) -> None:
    """Puts the state's arrays that are not on the parameters' mesh, such as counts, on all devices of it.

    The others were made of the parameters and lie as they do.
    """
    state = nnx.state(optimizer, nnx.optimizer.OptState)
    on_mesh = lambda z: isinstance(z.sharding, NamedSharding)
    meshes = [z.sharding.mesh for z in jax.tree.leaves(state) if on_mesh(z)]
    if meshes:
        everywhere = NamedSharding(meshes[0], PartitionSpec())
        put = lambda z: z if on_mesh(z) else jax.device_put(z, everywhere)
        nnx.update(optimizer, jax.tree.map(put, state))


def _at(stacked: Any) -> Callable[[int], Any]:
    return lambda index: jax.tree.map(lambda z: z[index], stacked)


class _Group(tuple):
    """The batches of one step."""


def _groups(batches: Iterable[Any], size: int) -> Iterator[_Group]:
    iterator = iter(batches)
    while len(group := _Group(itertools.islice(iterator, size))) == size:
        yield group


def _side_by_side(batches: list[Any]) -> Any:
    """k batches as one whose every k-th example is of the same: those that value_and_grad takes together."""
    shapes = [jax.tree.map(np.shape, batch) for batch in batches]
    if any(shape != shapes[0] for shape in shapes):
        listed = "; ".join(map(str, shapes))
        raise ValueError(
            f"with gradient_accumulation_steps={len(batches)} the batches of a step must have "
            f"one shape: {listed}"
        )
    sizes = {np.shape(array)[:1] for array in jax.tree.leaves(batches[0])}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            f"with gradient_accumulation_steps={len(batches)} the arrays of a batch must have one size of "
            f"their first axis: {shapes[0]}. Leave it out and take larger batches"
        )
    join = lambda *arrays: np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    return jax.tree.map(join, *batches)
