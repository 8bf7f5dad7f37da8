"""Tunix's models and trainer: exact gradients of all projections, accumulation, checkpoints, meshes."""

import dataclasses
import doctest
import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax import nnx
from jax.sharding import PartitionSpec as P

import oplora_jax
from benchmarks.tunix import BASELINE, VARIANTS, Tunix
from oplora_jax.nnx import value_and_grad
from oplora_jax.qwix import LoraProvider
from tests.arrays import as_kernel, normal_like
from tests.sources import programs

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
]  # what Tunix imports and calls is its own

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    import orbax.checkpoint as ocp
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3
    from tunix.sft import checkpoint_manager, peft_trainer
    from tunix.sft import utils as sft_utils
    from tunix.sft.dpo import dpo_trainer

    from oplora_jax.tunix import CheckpointManager, PeftTrainer

RANK, ALPHA, BATCH, LENGTH, WORDS = 4, 8.0, 4, 8, 48
SIZES = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
OTHERS = {
    "vocab_size": WORDS,
    "num_embed": WORDS,
    "rope_theta": 10_000,
    "norm_eps": 1e-5,
    "sliding_window_size": 4,
    "param_dtype": jnp.float32,
}
MODELS = {  # and how many projections they have in a layer
    "llama3": (llama3.Llama3, llama3.ModelConfig, 7),
    "qwen3": (qwen3.Qwen3, qwen3.ModelConfig, 7),
    "gemma3": (gemma3.Gemma3, gemma3.ModelConfig, 6),
}
PROJECTIONS = r".*layers.*(_proj|_einsum)"


@pytest.fixture(autouse=True)
def as_users_have_jax():
    with jax.numpy_rank_promotion("allow"):
        yield


def model_of(name):
    """A tiny model of random weights; Tunix begins some with zeros."""
    model, config, _ = MODELS[name]
    fields = {field.name for field in dataclasses.fields(config)}
    config = config(**{k: v for k, v in {**SIZES, **OTHERS}.items() if k in fields})
    model = model(config, rngs=nnx.Rngs(0))
    nnx.update(model, normal_like(1, nnx.state(model, nnx.Param), 0.2))
    return model


def with_lora(model, **rule):
    provider = LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=ALPHA, **rule)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())


def inputs_of(batch):
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": sft_utils.build_positions_from_mask(batch.input_mask),
        "attention_mask": sft_utils.make_causal_attn_mask(batch.input_mask),
    }


def batches(count, size=BATCH):
    """Sequences that go on by one step each, as many as there are."""
    rng = np.random.default_rng(0)
    starts, steps = rng.integers(0, WORDS, (count, size, 1)), rng.integers(1, 4, (count, size, 1))
    tokens = (starts + steps * np.arange(LENGTH)) % WORDS
    mask = np.ones(tokens.shape[1:], bool)
    return [peft_trainer.TrainingInput(input_tokens=t.astype(np.int32), input_mask=mask) for t in tokens]


def loss_fn(model, batch):
    return peft_trainer._default_loss_fn(model, **inputs_of(batch))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_all_projections(name):
    """Those of the plain model with the weights merged, to rounding: the models compute in float32."""
    [batch] = batches(1)
    model = with_lora(model_of(name))
    nnx.update(model, normal_like(2, nnx.state(model, nnx.LoRAParam), 0.2))
    lora = oplora_jax.to_low_rank(nnx.state(model, nnx.LoRAParam))
    assert len(lora) == 2 * MODELS[name][2]
    loss, gradients = nnx.jit(value_and_grad(loss_fn))(model, batch)

    graphdef, params = nnx.split(model_of(name))
    merged = oplora_jax.merge(nnx.to_pure_dict(params), lora)

    def plain(merged):
        nnx.replace_by_pure_dict(params, merged)
        return loss_fn(nnx.merge(graphdef, params), batch)

    expected, by_weight = jax.value_and_grad(plain)(merged)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    gradients = {"/".join(map(str, path)): z.get_value() for path, z in nnx.to_flat_state(gradients)}
    for path in lora:
        weight = functools.reduce(
            lambda tree, key: tree[int(key) if key.isdigit() else key], path.split("/"), by_weight
        )
        module, _, name = path.rpartition("/")
        found = as_kernel(gradients[f"{module}/lora/{name}"], lora[path].roles, weight.shape)
        # Relative to the largest: sums of 32 tokens through two layers.
        np.testing.assert_allclose(found, weight, atol=1e-4 * jnp.abs(weight).max(), err_msg=path)


def trained(steps, data, optimizer=None, trainer=PeftTrainer, model=None, **config):
    """A trainer behind its steps on tiny Llama3, and its losses."""

    class Hooks:
        def __init__(self):
            self.losses = []

        def __getattr__(self, name):
            return lambda *args: None

        def on_train_step_end(self, trainer, step, loss):
            self.losses.append(float(loss))

    hooks = Hooks()
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=1000, max_steps=steps, pbar_description=None, **config
    )
    model = with_lora(model_of("llama3")) if model is None else model
    trainer = trainer(model, optimizer or oplora_jax.oplora(0.3), config).with_gen_model_input_fn(inputs_of)
    trainer.with_training_hooks(hooks)
    trainer.train(data)
    return trainer, hooks.losses


def lora_of(trainer):
    return np.concatenate([np.ravel(z) for z in jax.tree.leaves(nnx.state(trainer.model, nnx.LoRAParam))])


OPTIMIZERS = {
    "oplora": (oplora_jax.oplora(0.3), {}),
    "clipped": (optax.chain(oplora_jax.clip_by_global_norm(0.5), oplora_jax.oplora(0.3)), {}),
    "scaled": (oplora_jax.scaled_oplora(3e-3), {"gradient": "dense", "moments": "diagonal"}),
    "scheduled": (optax.inject_hyperparams(oplora_jax.oplora)(optax.linear_schedule(0.3, 0.1, 20)), {}),
    "lora_rite": (oplora_jax.lora_rite(3e-3), {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training(name):
    """The steps are those of a plain loop with the same gradients."""
    optimizer, kind = OPTIMIZERS[name]
    data = batches(1) * 12
    _, losses = trained(12, data, optimizer, functools.partial(PeftTrainer, **kind))
    assert losses[-1] < losses[0]
    model = with_lora(model_of("llama3"))
    by_hand = nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, by_hand, batch):
        loss, gradients = value_and_grad(loss_fn, **kind)(model, batch)
        by_hand.update(model, gradients)
        return loss

    expected = [float(step(model, by_hand, batch)) for batch in data]
    np.testing.assert_allclose(losses, expected, rtol=1e-4)  # two programs in float32, twelve steps
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)


def test_accumulation():
    """k batches are one of k times the size: the mean of the gradients, formed or not."""
    small = batches(6)
    join = lambda *z: np.concatenate(z)
    large = [jax.tree.map(join, *small[i : i + 2]) for i in range(0, 6, 2)]
    for kind in ("outer", "dense"):
        trainer = functools.partial(PeftTrainer, gradient=kind)
        one, losses = trained(3, small, trainer=trainer, gradient_accumulation_steps=2)
        other, expected = trained(3, large, trainer=trainer)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        np.testing.assert_allclose(lora_of(one), lora_of(other), atol=1e-5)
    assert len(trained(9, small[:5], gradient_accumulation_steps=2)[1]) == 2  # and a rest
    uneven = [*batches(1), *batches(1, 2)]
    with pytest.raises(ValueError, match="the batches of a step must have one shape"):
        trained(1, uneven, gradient_accumulation_steps=2)


@pytest.mark.parametrize("accumulated", [None, 2])
def test_auxiliary_data(accumulated, monkeypatch):
    """Tunix's hook for it gets that of each batch."""
    seen, data = [], batches(4)
    hook = "_post_process_train_step"
    monkeypatch.setattr(peft_trainer.PeftTrainer, hook, lambda self, aux: seen.append(float(aux)))

    def trainer(*args):
        def with_aux(model, **inputs):
            return peft_trainer._default_loss_fn(model, **inputs), inputs["input_tokens"].sum()

        return PeftTrainer(*args).with_loss_fn(with_aux, has_aux=True)

    trained(4 // (accumulated or 1), data, trainer=trainer, gradient_accumulation_steps=accumulated)
    assert seen == [float(batch.input_tokens.sum()) for batch in data]


@pytest.mark.parametrize("accumulated", [None, 2])
def test_resumed(accumulated, tmp_path):
    """An interrupted run ends with the parameters of one that was not, bit for bit."""
    data = batches(12)
    options = ocp.CheckpointManagerOptions(save_interval_steps=2)
    config = {"gradient_accumulation_steps": accumulated}
    whole, losses = trained(6, data, **config)
    config |= {"checkpoint_root_directory": str(tmp_path), "checkpointing_options": options}
    trained(3, data, **config)
    rest, last = trained(6, data, **config)
    assert last == losses[3:]
    np.testing.assert_array_equal(lora_of(rest), lora_of(whole))
    assert optax.tree.get(rest.optimizer.opt_state, "count").get_value() == 6


class Shifted(PeftTrainer):
    """A trainer whose own methods take one batch."""

    def _prepare_inputs(self, input_data):
        return dataclasses.replace(input_data, input_tokens=(input_data.input_tokens + 1) % WORDS)

    def _post_process_train_step(self, aux):
        assert np.shape(aux) == ()
        self.seen = [*getattr(self, "seen", []), float(aux)]


@pytest.mark.parametrize("accumulated", [None, 2])
def test_subclasses(accumulated):
    def trainer(*args):
        with_aux = lambda model, **inputs: (
            peft_trainer._default_loss_fn(model, **inputs),
            inputs["input_tokens"].sum(),
        )
        return Shifted(*args).with_loss_fn(with_aux, has_aux=True)

    data = batches(4)
    found, _ = trained(
        4 // (accumulated or 1), data, trainer=trainer, gradient_accumulation_steps=accumulated
    )
    assert found.seen == [float(((batch.input_tokens + 1) % WORDS).sum()) for batch in data]


def test_preferences():
    """Tunix's DPO; accumulation needs arrays of one size, which its batches do not have."""

    class Dpo(dpo_trainer.DPOTrainer, PeftTrainer):
        pass

    def train(accumulated):
        tokens = [batch.input_tokens for batch in batches(4)]
        names = ("prompt", "chosen", "rejected")
        parts = lambda z: {"prompt": z[:, :3], "chosen": z[:, 3:6], "rejected": z[:, :2:-1][:, :3]}
        data = [
            dpo_trainer.TrainingInput(
                **{f"{name}_ids": parts(z)[name] for name in names},
                **{f"{name}_mask": np.ones((BATCH, 3), bool) for name in names},
            )
            for z in tokens
        ]
        config = dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=10, pbar_description=None, gradient_accumulation_steps=accumulated
        )
        trainer = Dpo(with_lora(model_of("llama3")), model_of("llama3"), oplora_jax.oplora(0.3), config)
        trainer.train(data * 5)
        return trainer.metrics_logger.get_metric_history("", "loss", "train")

    losses = train(None)
    assert abs(losses[0] - np.log(2)) < 1e-5 and losses[-1] < 0.99 * losses[0]
    with pytest.raises(ValueError, match=r"must have one size of their first axis: .*take larger batches"):
        train(2)


def placed(model):
    """As Tunix puts a model on a mesh."""
    state = nnx.state(model)
    nnx.update(model, jax.lax.with_sharding_constraint(state, nnx.get_partition_spec(state)))
    return model


@pytest.mark.parametrize("again", [False, True])
def test_on_a_mesh(again, tmp_path):
    """The factors lie as their weights' axes, or everywhere if Tunix has placed them; training, resuming."""
    data = batches(8)
    expected, _ = trained(4, data, gradient_accumulation_steps=2)
    config = {
        "gradient_accumulation_steps": 2,
        "checkpoint_root_directory": str(tmp_path),
        "checkpointing_options": ocp.CheckpointManagerOptions(save_interval_steps=1),
    }
    with jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
        make = lambda: (placed if again else lambda z: z)(with_lora(placed(model_of("llama3"))))
        model = make()
        lora = model.layers[0].attn.q_proj.lora["w"].get_value()
        specs = (P(), P()) if again else (P("fsdp"), P(None, "tp"))
        assert (lora.a.sharding.spec, lora.b.sharding.spec) == specs
        trained(2, data, model=model, **config)
        found, losses = trained(4, data, model=make(), **config)
    assert len(losses) == 2
    np.testing.assert_allclose(lora_of(found), lora_of(expected), atol=1e-5)  # sums in another order


def test_models_with_factors_of_their_own():
    """Qwix's own LoRA trains as with Tunix's trainer: the gradients are those of `jax.grad`."""

    def lora():
        model = model_of("llama3")
        provider = qwix.LoraProvider(module_path=PROJECTIONS, rank=RANK, alpha=ALPHA)
        return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())

    optimizer = oplora_jax.pair_factors(oplora_jax.oplora(0.3), scale=ALPHA / RANK)
    ours, _ = trained(3, batches(3), optimizer, model=lora())
    theirs, _ = trained(3, batches(3), optimizer, peft_trainer.PeftTrainer, model=lora())
    np.testing.assert_allclose(lora_of(ours), lora_of(theirs), atol=1e-6)


def test_what_a_step_costs():
    """As XLA counts it: exact gradients of all projections beside AdamW on Qwix's factors."""
    workload = Tunix(layers=1)
    plain, ours = (workload.prepare(variant).counts for variant in (BASELINE, VARIANTS[0]))
    assert VARIANTS[0].name == "oplora"
    assert ours.flops < 1.05 * plain.flops
    assert ours.temporary_bytes < 1.05 * plain.temporary_bytes


def test_what_the_trainer_needs_of_tunix():
    """By name: a version of Tunix that moves one of these fails here."""
    parameters = lambda function: list(inspect.signature(function).parameters)
    base = peft_trainer.PeftTrainer
    assert parameters(base.__init__)[:4] == ["self", "model", "optimizer", "training_config"]
    assert parameters(base._train_step) == ["self", "model", "optimizer", "inputs"]
    assert parameters(base._prepare_inputs) == ["self", "input_data"]
    assert parameters(base._post_process_train_step) == ["self", "aux"]
    assert parameters(base._shard_optimizer) == ["self", "mesh"]
    assert parameters(base.train)[:2] == ["self", "train_ds"]
    restore = ["self", "model", "optimizer", "step", "restore_only_lora_params"]
    assert parameters(checkpoint_manager.CheckpointManager.maybe_restore) == restore
    trainer, _ = trained(1, batches(1))
    for name in ("_lora_enabled", "_has_aux", "loss_fn", "gen_model_input_fn", "data_hooks"):
        assert hasattr(trainer, name), f"Tunix's trainer has no {name} any more"
    assert type(trainer.checkpoint_manager) is CheckpointManager
    assert hasattr(trainer.checkpoint_manager, "_checkpoint_manager")


def test_data_hooks_load_no_groups():
    with pytest.raises(ValueError, match="data hooks load one batch at a time"):
        config = peft_trainer.TrainingConfig(eval_every_n_steps=10, gradient_accumulation_steps=2)
        trainer = PeftTrainer(with_lora(model_of("llama3")), oplora_jax.oplora(0.3), config)
        trainer.with_data_hooks(object())
        trainer.train([])


def test_the_docstrings_example():
    failed, attempted = doctest.testmod(oplora_jax.tunix)
    assert failed == 0 < attempted


def test_the_program_of_the_site():
    [program] = [z for z, _ in programs("docs/how-to/qwix-tunix.md") if "oplora_jax.tunix" in z]
    scope: dict = {"__name__": "page"}
    exec(compile(program, "docs/how-to/qwix-tunix.md", "exec"), scope)
    assert scope["trainer"].train_steps == 20
    assert scope["history"][-1] < 0.8 * scope["history"][0]
    assert len(oplora_jax.to_low_rank(nnx.state(scope["trainer"].model, nnx.LoRAParam))) == 14
