"""Text classification: a pretrained encoder, with LoRA on its queries and values."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Bool, Float, Int

from experiments import ExperimentError, metrics, sentences, tokens
from experiments.data import hold_out, subset
from experiments.models.checkpoints import bundled_folder, load_encoder
from experiments.models.encoder import Classifier, EncoderConfig
from experiments.sentences import SPECS, Sentences
from experiments.task import Task, Trainable, divide, is_full, join
from oplora_jax.linen import loraize

TARGETS = ("attention/query", "attention/value")
VALIDATION = 1000  # training examples at most
SHORTEST = 16  # tokens that a batch has room for; longer ones have a power of two: few shapes to compile


class Batch(NamedTuple):
    """Examples padded to one length."""

    tokens: Int[np.ndarray, "B L"]
    mask: Bool[np.ndarray, "B L"]
    segments: Int[np.ndarray, "B L"]
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Text(Task):
    """Fine-tune a pretrained encoder on labelled sentences.

    LoRA of rank 8 on the queries and values, or in full training their kernels, and a new classification head
    train; the rest is frozen. The learning rates fall linearly to zero, gradients are clipped to norm 1.
    Learning rates are chosen on examples held out from the training ones.
    """

    data: Literal["bundled", "glue", "tfds"] = "bundled"
    """Film reviews that a package ships, GLUE in its official folders, or from TensorFlow Datasets."""
    dataset: Literal["movies", "cola", "sst2", "mrpc", "stsb", "rte", "qnli", "mnli", "qqp"] | None = None
    """Of GLUE; sst2 if not given. The bundled one is movies."""
    data_dir: Path | None = None
    """Folder of CoLA/train.tsv and so on, or of TensorFlow Datasets; its default if not given."""
    weights: Path | None = None
    """Folder of a BERT or RoBERTa checkpoint and its tokenizer; the bundled MiniLM if not given."""
    examples: int | None = None
    """Examples to train on, always the same ones; all if not given."""
    epochs: int = 3
    """Passes over the training examples."""
    batch_size: int = 32
    """Examples in a batch."""
    max_length: int = 128
    """Tokens of an example; what is longer is cut."""
    pooling: Literal["mean", "first"] = "mean"
    """What the head sees: the mean over the tokens, or the first one, as the papers do with RoBERTa."""
    dropout: float = 0.1
    """Rate in the encoder and the head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's weights and computation; LoRA and the head are float32."""
    others_rate: float = 1e-3
    """Of AdamW, which trains the head whatever the method."""

    rank = 8
    evaluations = 4
    decay = True
    max_norm = 1.0

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return f"text_{self._dataset}"

    @property
    def protocol(self) -> str:
        """Whose learning rates are taken: the papers' for GLUE are those of RoBERTa."""
        return "text" if self.weights is None else "glue"

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that are reported, the main one first."""
        return (*(f"test_{name}" for name in SPECS[self._dataset].metrics), "train_loss")

    @property
    def _dataset(self) -> str:
        return self.dataset or ("movies" if self.data == "bundled" else "sst2")

    def load(self, seed: int) -> tuple[Sentences, dict[str, Sentences]]:
        """(what to train on, what to evaluate on by its metrics' prefix); the same for every seed.

        GLUE's development sets are for the test.
        """
        if (self._dataset == "movies") != (self.data == "bundled"):
            raise ExperimentError(
                f"dataset is {self._dataset} and data is {self.data}; movies are bundled, the others come "
                "with --data glue --data-dir DIR or --data tfds"
            )
        if self.data == "glue" and self.data_dir is None:
            raise ExperimentError(
                "data-dir is not given: the folder of CoLA/train.tsv, SST-2/train.tsv and so on"
            )
        if not 0 <= self.dropout < 1:
            raise ExperimentError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        folder = self._weights
        config, _ = _pretrained(folder, self.dtype)
        longest = config.max_position_embeddings - config.position_offset
        if self.max_length > longest:
            raise ExperimentError(f"max-length is {self.max_length}; the encoder in {folder} takes {longest}")
        tokenizer = tokens.load_tokenizer(folder)
        tokens.check_vocabulary(tokenizer, config.vocab_size, folder)
        if self.data == "bundled":
            train, test = sentences.load_movies(tokenizer, self.max_length)
        else:
            source = self._dataset, self.data_dir, tokenizer, self.max_length, self.data == "tfds"
            train, test = sentences.load_glue(*source)
        train, held_out = hold_out(train, test, VALIDATION)
        return subset(train, self.examples), held_out

    def lengths(self, data: Sentences) -> Int[np.ndarray, " N"]:
        """How many tokens each example has."""
        return np.array([len(row) for row in data.tokens])

    def take(self, data: Sentences, indices: Int[np.ndarray, " B"]) -> Batch:
        """A batch, padded."""
        config, _ = _pretrained(self._weights, self.dtype)
        return _padded(data, indices, config.pad_token_id, self.max_length)

    def init(self, seed: Any, full: bool) -> tuple[Trainable, dict[str, Any]]:
        """(what is trained, what is frozen), by path."""
        config, encoder = _pretrained(self._weights, self.dtype)
        row = jnp.zeros((1, 1), jnp.int32)
        leaves = tuple(f"{target}/{'kernel' if full else 'lora'}" for target in TARGETS)

        @jax.jit  # the encoder's own random start is never computed
        def new(key):
            params = self._model(config, full).init(key, row, row == 0, row)["params"]
            flat = flatten_dict(params, sep="/")
            return {path: leaf for path, leaf in flat.items() if path not in pretrained}

        pretrained = flatten_dict({"encoder": encoder}, sep="/")
        flat = {**pretrained, **new(jax.random.key(seed))}
        return divide(flat, lambda path: path.endswith(leaves), lambda path: path.startswith("head_"))

    def loss(
        self, trainable: Any, frozen: Any, batch: Batch, weights: Float[Array, " B"], key: Any = None
    ) -> Float[Array, ""]:
        """The cross-entropy, or the squared error of a score, averaged over a batch's examples of weight 1.

        key draws what is dropped; nothing is without one.
        """
        outputs = self._outputs(trainable, frozen, batch, key)
        if outputs.shape[1] == 1:
            losses = (outputs[:, 0] - batch.labels) ** 2
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, batch.labels)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def evaluate(self, trainable: Any, frozen: Any, data: Sentences) -> dict[str, float]:
        """The metrics of the data set."""
        order = np.argsort(self.lengths(data), kind="stable")
        outputs = np.empty((len(order), SPECS[self._dataset].outputs), np.float32)
        for start in range(0, len(order), 2 * self.batch_size):
            rows = np.take(order, np.arange(start, start + 2 * self.batch_size), mode="clip")
            outputs[rows] = _forward(self, trainable, frozen, self.take(data, rows))
        return metrics.score(SPECS[self._dataset].metrics, outputs, data.labels)

    def _outputs(self, trainable, frozen, batch, key=None):
        config, _ = _pretrained(self._weights, self.dtype)
        return self._model(config, is_full(trainable)).apply(
            {"params": join(trainable, frozen)},
            batch.tokens,
            batch.mask,
            batch.segments,
            deterministic=key is None,
            rngs=None if key is None else {"dropout": key},
        )

    def _model(self, config: EncoderConfig, full: bool) -> Any:
        outputs = SPECS[self._dataset].outputs
        model = Classifier(config, outputs, self.pooling, self.dropout, jnp.dtype(self.dtype))
        return model if full else loraize(model, self.rank, TARGETS, alpha=self.rank, dtype=jnp.float32)

    @property
    def _weights(self) -> Path:
        return bundled_folder() if self.weights is None else self.weights


@functools.cache
def _pretrained(folder: Path, dtype: str) -> tuple[EncoderConfig, Any]:
    with jax.ensure_compile_time_eval():  # it may be asked for while a step is traced
        return load_encoder(folder, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=0)
def _forward(task, trainable, frozen, batch):
    return task._outputs(trainable, frozen, batch)


def _padded(data: Sentences, rows: Int[np.ndarray, " B"], pad: int, longest: int) -> Batch:
    counts = np.array([len(data.tokens[row]) for row in rows])
    length = min(max(SHORTEST, 1 << (int(counts.max()) - 1).bit_length()), longest)
    mask = np.arange(length) < counts[:, None]
    ids, segments = np.full(mask.shape, pad, np.int32), np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([data.tokens[row] for row in rows])
    segments[mask] = np.concatenate([data.segments[row] for row in rows])
    return Batch(ids, mask, segments, data.labels[rows])
