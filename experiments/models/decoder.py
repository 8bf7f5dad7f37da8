"""The causal language models of the Llama family."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and conventions of a decoder, as in its checkpoint's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """A divisor of num_attention_heads: so many queries in a row share a key and a value."""
    head_dim: int
    """Even: a head's first half is turned against its second."""
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    """The base of the rotary embedding's wavelengths."""
    tie_word_embeddings: bool = False
    """Whether the embeddings are the head, too."""
    attention_bias: bool = False
    """Of queries, keys and values, not of attention's output: Qwen2's."""


# Llama's start, for what no checkpoint gives.
_dense = partial(nn.Dense, use_bias=False, kernel_init=nn.initializers.normal(0.02))


def _rotary(config: DecoderConfig, length: int) -> Float[np.ndarray, "2 L half"]:
    """The cosines and sines of each position's angles: computed in float64, as positions may be large."""
    rates = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(length)[:, None] * rates
    return np.stack([np.cos(angles), np.sin(angles)])


def _rotated(x: Float[Array, "N L h c"], rotary: Float[Array, "2 L half"]) -> Float[Array, "N L h c"]:
    """Heads turned by their positions, in float32 at least."""
    cos, sin = rotary[:, None, :, None]
    one, other = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([one * cos - other * sin, other * cos + one * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nn.Module):
    """Causal attention, where groups of queries share a key and a value."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N L d"], rotary: Float[Array, "2 L half"]) -> Float[Array, "N L d"]:
        """The heads' outputs, mixed by a dense layer."""
        config = self.config

        def heads(name, count):
            width, bias = count * config.head_dim, config.attention_bias
            y = _dense(width, use_bias=bias, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], count, config.head_dim)

        query = _rotated(heads("query", config.num_attention_heads), rotary)
        key = _rotated(heads("key", config.num_key_value_heads), rotary)
        mixed = jax.nn.dot_product_attention(
            query, key, heads("value", config.num_key_value_heads), is_causal=True
        )
        return _dense(x.shape[-1], dtype=self.dtype, name="output")(mixed.reshape(*x.shape[:2], -1))


class MLP(nn.Module):
    """SwiGLU: a perceptron whose hidden units are gated by as many others."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N L d"]) -> Float[Array, "N L d"]:
        """The outputs of its dense layer "down"."""
        dense = partial(_dense, dtype=self.dtype)
        gate, up = (dense(self.config.intermediate_size, name=name)(x) for name in ("gate", "up"))
        return dense(x.shape[-1], name="down")(nn.silu(gate) * up)


class Layer(nn.Module):
    """Attention and a perceptron, each with a residual connection and an RMSNorm in front of it."""

    config: DecoderConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "N L d"], rotary: Float[Array, "2 L half"]
    ) -> tuple[Float[Array, "N L d"], None]:
        """The hidden states behind the layer, as a scan's carry."""
        norm = partial(nn.RMSNorm, epsilon=self.config.rms_norm_eps, dtype=self.dtype)
        x += Attention(self.config, self.dtype, name="attention")(norm(name="attention_norm")(x), rotary)
        x += MLP(self.config, self.dtype, name="mlp")(norm(name="mlp_norm")(x))
        return x, None


class Decoder(nn.Module):
    """The language model, whose "layers" are scanned: their parameters are stacked along a first axis.

    Attributes:
      config: its sizes and conventions.
      dtype: of the computation; norms, rotary embedding and logits are in float32 at least, softmax in that.
      remat: whether the backward pass computes each layer again rather than keep what is inside it.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        initial = nn.initializers.normal(0.02)
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, self.dtype, embedding_init=initial)
        self.layers = nn.scan(
            nn.remat(Layer, prevent_cse=False) if self.remat else Layer,  # a scan needs no guard against CSE
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},  # of LoRA's inputs, with Qwix
            in_axes=nn.broadcast,
            length=config.num_hidden_layers,
        )(config, self.dtype)
        self.norm = nn.RMSNorm(config.rms_norm_eps, self.dtype)
        if not config.tie_word_embeddings:
            self.head = _dense(config.vocab_size, dtype=self.dtype, dot_general=self._dot_general)

    def __call__(self, tokens: Int[Array, "N L"]) -> Float[Array, "N L vocab"]:
        """The logits of the token behind each, which sees itself and those before."""
        return self.logits(self.hidden_states(tokens))

    def hidden_states(self, tokens: Int[Array, "N L"]) -> Float[Array, "N L d"]:
        """The last hidden states, which `logits` makes logits of, for some of them or in chunks."""
        rotary = jnp.asarray(_rotary(self.config, tokens.shape[1]), self._exact)
        x, _ = self.layers(self.embed(tokens), rotary)
        return self.norm(x)

    def logits(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch vocab"]:
        """The logits of hidden states, in float32, or in float64 if that is the model's type."""
        if not self.config.tie_word_embeddings:
            return self.head(x)
        table = self.embed.embedding.astype(self.dtype)
        return self._dot_general(x, table, (((x.ndim - 1,), (1,)), ((), ())))

    @property
    def _exact(self):
        return jnp.promote_types(self.dtype, jnp.float32)

    def _dot_general(self, *args, **kwargs):
        return jax.lax.dot_general(*args, **{**kwargs, "preferred_element_type": self._exact})
