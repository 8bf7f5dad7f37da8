"""Small encoders with random weights, as folders like those that are downloaded."""

import json

import numpy as np
import tokenizers
from safetensors.numpy import save_file

BERT = {
    "model_type": "bert",
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}


def random_tensors(values):
    """A checkpoint's tensors, as large as makes attention uneven and the activation curved."""
    rng = np.random.default_rng(0)
    d, inner = values["hidden_size"], values["intermediate_size"]
    shapes = {"embeddings.LayerNorm": (d,)}
    parts = ("vocab_size", "max_position_embeddings", "type_vocab_size")
    for part, key in zip(("word", "position", "token_type"), parts, strict=True):
        shapes[f"embeddings.{part}_embeddings"] = (values[key], d)
    for i in range(values["num_hidden_layers"]):
        at = f"encoder.layer.{i}"
        shapes |= {f"{at}.attention.self.{part}": (d, d) for part in ("query", "key", "value")}
        shapes |= {f"{at}.attention.output.dense": (d, d), f"{at}.attention.output.LayerNorm": (d,)}
        shapes |= {f"{at}.intermediate.dense": (inner, d), f"{at}.output.dense": (d, inner)}
        shapes |= {f"{at}.output.LayerNorm": (d,)}
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = rng.normal(0, 0.7, shape).astype(np.float32)
        if "_embeddings" not in name:
            tensors[f"{name}.bias"] = rng.normal(0, 0.5, shape[0]).astype(np.float32)
    return tensors


def write(folder, values, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_tokenizer(folder, words):
    """BERT's tokenizer in lower case, as tokenizer.json."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = {word: vocabulary[word] for word in ("[SEP]", "[CLS]")}
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*special.items())
    tokenizer.add_special_tokens([word for word in words if word.startswith("[")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
