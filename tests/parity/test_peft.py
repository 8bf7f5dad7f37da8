"""Adapters in both directions between this library and the real PEFT, on tiny BERT and GPT-2 models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: everything here is made on the spot

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot
from oplora_jax.peft import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21.2 asks for a name that transformers 5.23 has changed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

HEADS, WIDTH, LAYERS, VOCABULARY, TOKENS = 2, 16, 2, 31, 7
# float32 through two layers of 16, numbers of about 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def weights_of(model):
    """The model's parameters as JAX arrays, by PyTorch's names."""
    return {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}


def layer_norm(weights, name, x, eps):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    scale, bias = (weights[f"{name}.{part}"].reshape(1, 1, -1) for part in ("weight", "bias"))
    return (x - mean) / jnp.sqrt(var + eps) * scale + bias


def attention(q, k, v, causal):
    split = lambda z: z.reshape(*z.shape[:2], HEADS, -1).transpose(0, 2, 1, 3)
    q, k, v = split(q), split(k), split(v)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    if causal:
        scores = jnp.where(jnp.tri(TOKENS, dtype=bool)[None, None], scores, -jnp.inf)
    out = jax.nn.softmax(scores) @ v
    return out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], TOKENS, -1)


def bert(weights, lora, ids):
    """transformers.BertModel's last hidden state, LoRA where lora has the module's name."""

    def dense(name, x):
        return adapted(x, weights[f"{name}.weight"].T, weights[f"{name}.bias"], lora.get(name))

    parts = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    words, positions, types = (weights[f"embeddings.{part}.weight"] for part in parts)
    x = (
        words[ids]
        + looked_up(lora, "embeddings.word_embeddings", ids)
        + positions[None, :TOKENS]
        + types[0].reshape(1, 1, -1)
    )
    x = layer_norm(weights, "embeddings.LayerNorm", x, 1e-12)
    for i in range(LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (dense(f"{at}.attention.self.{part}", x) for part in ("query", "key", "value"))
        y = dense(f"{at}.attention.output.dense", attention(q, k, v, causal=False))
        x = layer_norm(weights, f"{at}.attention.output.LayerNorm", x + y, 1e-12)
        y = jax.nn.gelu(dense(f"{at}.intermediate.dense", x), approximate=False)
        x = layer_norm(weights, f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", y), 1e-12)
    return x


def gpt2(weights, lora, ids):
    """transformers.GPT2LMHeadModel's logits."""

    def dense(name, x):  # Conv1D keeps its weight as (in, out)
        return adapted(x, weights[f"{name}.weight"], weights[f"{name}.bias"], lora.get(name))

    at = "transformer"
    x = (
        weights[f"{at}.wte.weight"][ids]
        + looked_up(lora, f"{at}.wte", ids)
        + weights[f"{at}.wpe.weight"][None, :TOKENS]
    )
    for i in range(LAYERS):
        h = f"{at}.h.{i}"
        qkv = dense(f"{h}.attn.c_attn", layer_norm(weights, f"{h}.ln_1", x, 1e-5))
        x = x + dense(f"{h}.attn.c_proj", attention(*jnp.split(qkv, 3, axis=-1), causal=True))
        y = jax.nn.gelu(dense(f"{h}.mlp.c_fc", layer_norm(weights, f"{h}.ln_2", x, 1e-5)), approximate=True)
        x = x + dense(f"{h}.mlp.c_proj", y)
    return layer_norm(weights, f"{at}.ln_f", x, 1e-5) @ weights[f"{at}.wte.weight"].T


def adapted(x, kernel, bias, lora):
    y = x @ kernel if lora is None else lora_dot(x, kernel, lora)
    return y + bias.reshape(1, 1, -1)


def looked_up(lora, name, ids):
    """What LoRA adds to an embedding, (vocabulary, dim)."""
    return lora[name].scale * lora[name].a[ids] @ lora[name].b if name in lora else 0.0


def torch_bert():
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=24,
        max_position_embeddings=TOKENS,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def torch_gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=TOKENS,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


class Family:
    """A model in both frameworks."""

    def __init__(self, make, forward, output, targets, fan_in_fan_out):
        self.make, self.forward, self.output = make, jax.jit(forward), output
        self.targets, self.fan_in_fan_out = targets, fan_in_fan_out

    def model(self):
        """A random model whose layers are far from small: the default of 0.02 would hide the adapter."""
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        return model

    def logits(self, model):
        with torch.no_grad():
            return getattr(model(torch.from_numpy(IDS)), self.output).numpy()

    def check(self, model, lora, weights, base):
        """PEFT's outputs are JAX's, and the adapter is at work."""
        actual = self.logits(model)
        np.testing.assert_allclose(actual, self.forward(weights, lora, IDS), **TOLERANCE)
        assert np.abs(actual - base).max() > 0.1


IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, TOKENS))
BERT = Family(
    torch_bert, bert, "last_hidden_state", ["query", "value", "intermediate.dense", "output.dense"], False
)
GPT2 = Family(torch_gpt2, gpt2, "logits", ["c_attn", "c_proj", "c_fc"], True)
each_family = pytest.mark.parametrize("family", [BERT, GPT2], ids=["bert", "gpt2"])


def kernels(family, weights):
    """A tree of the kernels, as (in, out), of the modules that are adapted; by path."""
    names = [
        name.removesuffix(".weight") for name, w in weights.items() if name.endswith("weight") and w.ndim == 2
    ]
    chosen = [name for name in names if name.endswith(tuple(family.targets)) and "embeddings" not in name]
    turn = (lambda w: w) if family.fan_in_fan_out else jnp.transpose
    return {name.replace(".", "/") + "/kernel": turn(weights[f"{name}.weight"]) for name in chosen}


@each_family
def test_peft_computes_what_is_saved_here(family, tmp_path):
    """Parameters as init_lora makes them, with b no longer zero; ranks and scales differ between layers."""
    model = family.model()
    weights, base = weights_of(model), family.logits(model)
    lora = {}
    for i, (path, kernel) in enumerate(kernels(family, weights).items()):
        keys = jax.random.split(jax.random.key(i))
        [new] = oplora_jax.init_lora(keys[0], {path: kernel}, 1 + i % 3, path, alpha=2.5).values()
        lora[path] = LowRank(new.a, 0.3 * jax.random.normal(keys[1], new.b.shape), new.scale)
    save_adapter(tmp_path, lora, base_model="nowhere/base", fan_in_fan_out=family.fan_in_fan_out)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    by_module = {path.removesuffix("/kernel").replace("/", "."): node for path, node in lora.items()}
    assert {node.a.shape[-1] for node in lora.values()} == {1, 2, 3}
    family.check(loaded, by_module, weights, base)
    adapters = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert {name: module.scaling["default"] for name, module in adapters.items()} == {
        name: node.scale for name, node in by_module.items()
    }
    family.check(loaded.merge_and_unload(), by_module, weights, base)
    # The model's own kernels with the increments added: (in, out), as merge takes them.
    merged = oplora_jax.merge(kernels(family, weights), lora)
    turn = (lambda w: w) if family.fan_in_fan_out else jnp.transpose
    whole = weights | {
        f"{name}.weight": turn(merged[f"{name.replace('.', '/')}/kernel"]) for name in by_module
    }
    np.testing.assert_allclose(family.forward(whole, {}, IDS), family.logits(loaded), **TOLERANCE)


@each_family
@pytest.mark.parametrize("use_rslora", [False, True])
def test_jax_computes_what_peft_saved(family, use_rslora, tmp_path):
    """Random factors of PEFT's own, with patterns; loaded here, and written again for PEFT."""
    model = family.model()
    weights, base = weights_of(model), family.logits(model)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        target_modules=family.targets,
        rank_pattern={family.targets[0]: 2, r"\d\..*" + family.targets[1]: 3},
        alpha_pattern={f"1\\..*{family.targets[-1]}": 2.5, family.targets[0]: 7},
        init_lora_weights=False,
        fan_in_fan_out=family.fan_in_fan_out,
    )
    adapted_model = peft.get_peft_model(model, config)
    adapted_model.save_pretrained(tmp_path / "peft")
    lora = load_adapter(tmp_path / "peft", names=lambda module: module)
    assert len(lora) == len(kernels(family, weights)) and {z.a.shape[-1] for z in lora.values()} == {2, 3, 4}
    family.check(adapted_model, lora, weights, base)

    save_adapter(tmp_path / "again", lora, fan_in_fan_out=family.fan_in_fan_out)
    again = peft.PeftModel.from_pretrained(family.model(), tmp_path / "again")
    family.check(again, lora, weights, base)
    states = [peft.get_peft_model_state_dict(m) for m in (adapted_model, again)]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_names_that_end_alike(tmp_path):
    """PEFT's patterns match at the end of a module's name: each of ours is meant for one module."""

    class Block(torch.nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.q = torch.nn.Linear(4, 4)
            if depth:
                self.inner = Block(depth - 1)

    names = ["q", "inner.q", "inner.inner.q"]
    lora = {
        name: LowRank(jnp.ones((4, i + 1)), jnp.ones((i + 1, 4)), 0.1 * (i + 1))
        for i, name in enumerate(names)
    }
    save_adapter(tmp_path, lora)
    model = Block(2)
    peft.PeftModel.from_pretrained(model, tmp_path)
    for name, node in lora.items():
        module = model.get_submodule(name)
        assert module.scaling["default"] == node.scale and module.r["default"] == node.a.shape[-1]


def test_bfloat16(tmp_path):
    model = BERT.model().to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted_model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted_model.save_pretrained(tmp_path)
    lora = load_adapter(tmp_path, names=lambda module: module)
    for name, node in lora.items():
        module = model.get_submodule(name)
        assert node.a.dtype == jnp.bfloat16 == node.b.dtype
        for factor, of in ((node.a, module.lora_A), (node.b, module.lora_B)):
            np.testing.assert_array_equal(factor.astype(jnp.float32).T, of["default"].weight.float().detach())
    assert len(lora) == LAYERS


@pytest.mark.parametrize("family, module", [(BERT, "embeddings.word_embeddings"), (GPT2, "transformer.wte")])
def test_an_embedding_is_adapted_by_rows(family, module, tmp_path):
    """PEFT's lora_embedding_A and _B are (r, vocabulary) and (dim, r); a tied output layer stays as it is."""
    model = family.model()
    weights, base = weights_of(model), family.logits(model)
    config = peft.LoraConfig(r=2, target_modules=[module], lora_alpha=5, init_lora_weights=False)
    theirs = peft.get_peft_model(model, config)
    theirs.save_pretrained(tmp_path / "peft")
    path = module.replace(".", "/") + "/embedding"
    lora = load_adapter(tmp_path / "peft")
    assert lora[path].shape == (VOCABULARY, WIDTH) and list(lora) == [path]
    family.check(theirs, {module: lora[path]}, weights, base)
    new = LowRank(-lora[path].a, lora[path].b + 0.1, 0.7)
    save_adapter(tmp_path / "ours", {path: new})
    ours = peft.PeftModel.from_pretrained(family.model(), tmp_path / "ours")
    family.check(ours, {module: new}, weights, base)


def test_a_head_in_jax(tmp_path):
    """A head that was trained here is PEFT's, and PEFT's is one here."""

    def make():
        torch.manual_seed(1)
        config = BERT.make().config
        return transformers.BertForTokenClassification(config).eval()

    def forward(weights, lora, head, ids):
        weights = {name.removeprefix("bert."): w for name, w in weights.items()}
        lora = {name.removeprefix("bert."): z for name, z in lora.items()}
        return bert(weights, lora, ids) @ head["kernel"] + head["bias"].reshape(1, 1, -1)

    def check(model, lora, head):
        with torch.no_grad():
            logits = model(torch.from_numpy(IDS)).logits.numpy()
        np.testing.assert_allclose(logits, forward(weights_of(make()), lora, head, IDS), **TOLERANCE)

    normal = lambda *shape: jnp.asarray(np.random.default_rng(2).standard_normal(shape, np.float32))
    names = [f"bert.encoder.layer.{i}.attention.self.value" for i in range(LAYERS)]
    lora = {name: LowRank(normal(WIDTH, 3), normal(3, WIDTH), 0.5) for name in names}
    head = {"kernel": normal(WIDTH, 2), "bias": normal(2)}
    save_adapter(tmp_path / "ours", lora, task_type="TOKEN_CLS", modules_to_save={"classifier": head})
    model = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    check(model, lora, head)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                parameter.mul_(0.9)
    model.save_pretrained(tmp_path / "peft")
    new = load_adapter(tmp_path / "peft", names=lambda module: module)
    [[module, new_head]] = new.pop("modules_to_save").items()
    assert module == "classifier" and float(abs(new_head["kernel"] - head["kernel"]).max()) > 0.1
    check(model, new, new_head)


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "tokens": ({"trainable_token_indices": {"word_embeddings": [1]}}, "trainable_token_indices is"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED.keys())
def test_adapters_of_peft_that_are_refused(settings, message, tmp_path):
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["query"]} | settings)
    peft.get_peft_model(BERT.model(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path)
