"""The encoders of the BERT and RoBERTa family."""

import dataclasses
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments import ExperimentError

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "relu": nn.relu,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and conventions of an encoder, as in its checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    """A multiple of num_attention_heads."""
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
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
        width, heads = self.config.hidden_size, self.config.num_attention_heads
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
        """
        config = self.config
        longest = config.max_position_embeddings - config.position_offset
        if tokens.shape[1] > longest:
            raise ExperimentError(f"rows of {tokens.shape[1]} tokens; the encoder takes at most {longest}")
        embed = partial(_embed, features=config.hidden_size, dtype=self.dtype)
        x = embed(config.vocab_size, name="words")(tokens)
        x += embed(config.max_position_embeddings, name="positions")(_positions(config, tokens))
        x += embed(config.type_vocab_size, name="token_types")(segments)
        x = _norm(config, self.dtype, "norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        for i in range(config.num_hidden_layers):
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
