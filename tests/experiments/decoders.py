"""Small decoders with random weights, as folders and GGUF files like those that are downloaded."""

import gguf
import numpy as np
import tokenizers

LLAMA = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 12,
    "rms_norm_eps": 2**-7,
    "rope_theta": 50.0,
    "tie_word_embeddings": False,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}


def random_tensors(values):
    """A checkpoint's tensors, as large as makes attention uneven and the gate curved."""
    rng = np.random.default_rng(0)
    d, inner, size = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    heads, groups = values["num_attention_heads"] * size, values["num_key_value_heads"] * size
    shapes = {"model.embed_tokens.weight": (values["vocab_size"], d), "model.norm.weight": (d,)}
    if not values["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (values["vocab_size"], d)
    for i in range(values["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for part, rows in (("q", heads), ("k", groups), ("v", groups)):
            shapes[f"{at}.self_attn.{part}_proj.weight"] = (rows, d)
            if values["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{part}_proj.bias"] = (rows,)
        shapes |= {f"{at}.self_attn.o_proj.weight": (d, heads), f"{at}.mlp.down_proj.weight": (d, inner)}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (inner, d) for part in ("gate", "up")}
        shapes |= {f"{at}.{part}_layernorm.weight": (d,) for part in ("input", "post_attention")}
    return {name: rng.normal(0.3, 0.6, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path, values, tensors, *, kind=gguf.GGMLQuantizationType.F32, keys=None, tokenizer=None):
    """A GGUF file as llama.cpp's converter writes it; matrices of the kind.

    Args:
      keys: more of the architecture's, and others in place of those of the values; None leaves one out.
      tokenizer: its keys without "tokenizer.ggml".
    """
    name, layers = values["model_type"], values["num_hidden_layers"]
    arch = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[name]
    names = gguf.get_tensor_name_map(arch, layers)
    writer = gguf.GGUFWriter(path, name)
    own = {
        "block_count": layers,
        "context_length": 64,
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": values["head_dim"],
        "attention.value_length": values["head_dim"],
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "rope.freq_base": values["rope_theta"],
        **(keys or {}),
    }
    for key, value in {f"{name}.{key}": value for key, value in own.items()}.items():
        _add(writer, key, value)
    for key, value in (tokenizer or {}).items():
        _add(writer, f"tokenizer.ggml.{key}", value)
    for tensor_name, tensor in tensors.items():
        if name == "llama" and tensor_name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = len(tensor) // values["head_dim"]  # halves of a head become neighbours
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        data = gguf.quants.quantize(tensor, kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32)
        raw = None if tensor.ndim == 1 else kind
        new = names.get_name(tensor_name, try_suffixes=(".weight", ".bias")) or tensor_name
        writer.add_tensor(new, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def tokenizer_keys(pairs, control=("<|endoftext|>",), added=(), **others):
    """A tokenizer of byte pairs, in GGUF; it does not know the byte 4. None leaves out a key."""
    letters = sorted({*tokenizers.pre_tokenizers.ByteLevel.alphabet()} - {"\u0104"})
    words = [*control, *letters, *(merge.replace(" ", "") for merge in pairs), *added]
    kinds = {**dict.fromkeys(control, 3), **dict.fromkeys(added, 4)}
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": words,
        "token_type": [kinds.get(word, 1) for word in words],
        "merges": list(pairs),
        "unknown_token_id": 0,
        **others,
    }
