"""Adapters with heads, biases and embeddings, in both directions between this library and the real PEFT."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: everything here is made on the spot

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oplora_jax import LowRank, is_low_rank
from oplora_jax.peft import load_adapter, save_adapter

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.parity,
    # PEFT 0.21.2 asks for a name that transformers 5.23 has changed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Of LoRA on embeddings PEFT says that it saves their weights too, and that a tied layer stays as it is.
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target:UserWarning"),
]

WIDTH, LAYERS, VOCABULARY = 16, 2, 31
IDS = np.random.default_rng(0).integers(2, VOCABULARY, (3, 7))
IDS[:, -1] = 1  # T5 classifies what ends so
# float32 through two layers, numbers of about 1, of which a merged weight is rounded once more.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1}
SIZES = {
    "Bert": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    | {"intermediate_size": 24},
    "DistilBert": {"dim": WIDTH, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 24},
    "GPT2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2},
    "T5": {"d_model": WIDTH, "num_layers": LAYERS, "num_heads": 2, "d_ff": 24, "d_kv": 8}
    | {"decoder_start_token_id": 0},
}
SIZES["Roberta"] = SIZES["Bert"]
SIZES["Llama"] = SIZES["Bert"] | {"num_key_value_heads": 1}


def build(family, of, **settings):
    """A random model whose layers are far from small: the default of 0.02 would hide the adapter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON | SIZES[family] | settings)
    model = getattr(transformers, f"{family}{of}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def outputs(model):
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(IDS))
    logits = [out.logits] if "logits" in out else [out.start_logits, out.end_logits]
    return np.stack([z.numpy() for z in logits])


def applied(model, adapter):
    """The model with an adapter in its weights, put there by nothing but PyTorch's own layouts."""
    adapter = dict(adapter)
    if hasattr(model, "lm_head"):  # what an adapter says of one of two tied layers is of that one
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        for module, tree in adapter.pop("modules_to_save", {}).items():
            for path, value in jax.tree.leaves_with_path(tree):
                *inner, name = (key.key for key in path)
                layer = model.get_submodule(".".join([module, *inner]))
                parameter = layer.bias if name == "bias" else layer.weight
                transposed = name == "kernel"
                assert not (transposed and isinstance(layer, (torch.nn.Embedding, transformers.Conv1D)))
                copy_to(parameter, value.T if transposed else value)
        for module, node in adapter.items():
            layer = model.get_submodule(module)
            increment = node.scale * np.asarray(node.a) @ np.asarray(node.b)
            if not isinstance(layer, (torch.nn.Embedding, transformers.Conv1D)):
                increment = increment.T
            copy_to(layer.weight, layer.weight.numpy() + increment)
    return model


def copy_to(parameter, value):
    assert parameter.shape == value.shape
    parameter.copy_(torch.from_numpy(np.array(value)))


def moved(adapter):
    """Another adapter with the same parameters."""
    normal = np.random.default_rng(1).standard_normal
    return jax.tree.map(lambda z: z + 0.1 * normal(z.shape, np.float32), adapter)


SEQUENCES, TOKENS, ANSWERS = "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"
QUERY = {"target_modules": ["query", "value"]}
LM_HEAD = {"task_type": "CAUSAL_LM", "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
CASES = {
    "bert": ("Bert", SEQUENCES, {}, QUERY | {"task_type": "SEQ_CLS"}, ["classifier"]),
    "bert, tokens": ("Bert", TOKENS, {}, QUERY | {"task_type": "TOKEN_CLS"}, ["classifier"]),
    "bert, answers": ("Bert", ANSWERS, {}, QUERY | {"task_type": "QUESTION_ANS"}, ["qa_outputs"]),
    "a head of two layers": ("Roberta", SEQUENCES, {}, QUERY | {"task_type": "SEQ_CLS"}, ["classifier"]),
    "roberta, answers": ("Roberta", ANSWERS, {}, QUERY | {"task_type": "QUESTION_ANS"}, ["qa_outputs"]),
    "every linear layer but the head's": (
        *("Roberta", SEQUENCES, {}),
        *({"task_type": "SEQ_CLS", "target_modules": "all-linear"}, ["classifier"]),
    ),
    "two heads, found by their ends": (
        *("DistilBert", SEQUENCES, {}),
        *({"task_type": "SEQ_CLS", "target_modules": ["q_lin"]}, ["classifier", "pre_classifier"]),
    ),
    "score": (
        *("Llama", SEQUENCES, {}),
        *({"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "use_rslora": True}, ["score"]),
    ),
    "a head by the config alone": ("Bert", SEQUENCES, {}, QUERY | {"modules_to_save": ["classifier"]}, None),
    "conv1d": (
        *("GPT2", SEQUENCES, {}),
        {"task_type": "SEQ_CLS", "target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}
        | {"bias": "lora_only"},
        None,
    ),
    "t5": (
        *("T5", SEQUENCES, {}),
        {"task_type": "SEQ_CLS", "target_modules": ["q", "wo"], "modules_to_save": ["classification_head"]},
        ["classification_head"],
    ),
    "biases with LoRA": (
        *("Bert", SEQUENCES, {}, QUERY | {"task_type": "SEQ_CLS", "bias": "lora_only"}),
        None,
    ),
    "every bias": ("Bert", SEQUENCES, {}, QUERY | {"task_type": "SEQ_CLS", "bias": "all"}, None),
    "every bias and a pooler": (
        *("Bert", SEQUENCES, {}),
        QUERY | {"task_type": "SEQ_CLS", "bias": "all", "modules_to_save": ["pooler"]},
        None,
    ),
    "norms": (
        *("Llama", "ForCausalLM", {}),
        {"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": ["norm", "layernorm"]},
        None,
    ),
    "embeddings saved": (
        *("Llama", "ForCausalLM", {}),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        ["lm_head", "model.embed_tokens"],
    ),
    "tied embeddings saved": (
        *("Llama", "ForCausalLM", {"tie_word_embeddings": True}),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ["lm_head", "model.embed_tokens"],
    ),
    "LoRA on embeddings": (
        *("Llama", "ForCausalLM", {}),
        LM_HEAD | {"alpha_pattern": {"lm_head": 3}, "rank_pattern": {"model.embed_tokens": 4}},
        ["lm_head", "model.embed_tokens"],
    ),
    "LoRA on one of two tied layers": (
        *("Llama", "ForCausalLM", {"tie_word_embeddings": True}),
        *(LM_HEAD | {"target_modules": ["embed_tokens"]}, ["model.embed_tokens"]),
    ),
    "LoRA on tied layers": (
        *("Llama", "ForCausalLM", {"tie_word_embeddings": True}),
        *(LM_HEAD | {"ensure_weight_tying": True}, ["lm_head", "model.embed_tokens"]),
    ),
    "LoRA on bert's embeddings": (
        *("Bert", TOKENS, {}),
        {"task_type": "TOKEN_CLS", "target_modules": ["word_embeddings", "position_embeddings"]},
        ["classifier"],
    ),
}


@pytest.mark.parametrize("family, of, model, settings, modules", CASES.values(), ids=CASES.keys())
def test_logits(family, of, model, settings, modules, tmp_path, request):
    """What is read of PEFT has its logits, and of another adapter, written here, PEFT has the logits."""
    make = lambda: build(family, of, **model)
    theirs = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 2, "init_lora_weights": False} | settings))
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path / "peft")
    adapter = load_adapter(tmp_path / "peft", names=lambda module: module)
    if modules is not None:
        assert sorted(adapter["modules_to_save"]) == modules
    assert np.abs(outputs(theirs) - outputs(make())).max() > 0.02
    np.testing.assert_allclose(outputs(applied(make(), adapter)), outputs(theirs), **TOLERANCE)

    ours, embeddings = moved(adapter), [name for name in adapter if "embed" in name]
    if "tied" in request.node.name and embeddings:  # the base weights of PEFT's model are still one
        ours["modules_to_save"] = adapter["modules_to_save"]
    path = lambda module: f"{module}/embedding" if module in embeddings else f"{module}/kernel"
    lora = {path(module): node for module, node in ours.items() if is_low_rank(node)}
    save_adapter(
        tmp_path / "ours",
        lora,
        names=lambda path: path.rpartition("/")[0],
        task_type=settings.get("task_type"),
        fan_in_fan_out=family == "GPT2",
        modules_to_save=ours.get("modules_to_save"),
    )
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    np.testing.assert_allclose(outputs(loaded), outputs(applied(make(), ours)), **TOLERANCE)
    assert np.abs(outputs(loaded) - outputs(theirs)).max() > 0.01
    # The same numbers after PEFT has read and written them.
    loaded.save_pretrained(tmp_path / "again")
    again = load_adapter(tmp_path / "again", names=lambda module: module)
    if "modules_to_save" not in again and embeddings:
        del ours[
            "modules_to_save"
        ]  # PEFT adds the weights of an embedding only where the whole name is short
    assert set(again) == set(ours)
    for name, node in ours.items():
        jax.tree.map(np.testing.assert_array_equal, again[name], node)


@pytest.mark.parametrize("last", ["lora", "kernel", "w", "weight"])
def test_peft_finds_modules_by_their_usual_paths(last, tmp_path):
    lora = {
        f"model/layers/{i}/self_attn/q_proj/{last}": LowRank(jnp.ones((WIDTH, 2)), jnp.ones((2, WIDTH)))
        for i in range(LAYERS)
    }
    save_adapter(tmp_path, lora, task_type="CAUSAL_LM")
    model = build("Llama", "ForCausalLM")
    before = outputs(model)
    assert np.abs(outputs(peft.PeftModel.from_pretrained(model, tmp_path)) - before).max() > 0.1


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_module_wrapped_twice_is_refused(task, tmp_path):
    """PEFT takes every module whose name ends so, and saves other numbers than it computes with."""
    settings = {"target_modules": ["query"], "modules_to_save": ["embeddings"]}
    model = peft.get_peft_model(build("Bert", SEQUENCES), peft.LoraConfig(task_type=task, **settings))
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"PEFT saves both bert\.embeddings and bert\.embeddings\.\w+_embeddings"
    ):
        load_adapter(tmp_path)


def test_a_task_without_its_head_is_an_adapter_of_lora_alone(tmp_path):
    """PEFT writes it for a model that has none."""
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(build("Bert", "Model"), config).save_pretrained(tmp_path)
    assert len(load_adapter(tmp_path)) == LAYERS
