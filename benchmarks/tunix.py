"""`python -m benchmarks tunix`: a step of Tunix's trainer with all projections of a language model."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console

import oplora_jax
from benchmarks import report
from benchmarks.counts import compile_anew, count
from benchmarks.steps import RATE, Prepared, at_least
from benchmarks.timing import runner
from experiments import ExperimentError
from experiments.training import size_in_bytes

ALPHA = 16.0
PROJECTIONS = r".*_proj"


class Variant(NamedTuple):
    """An optimizer, and whose LoRA parameters it trains: Qwix's pairs of arrays or ours."""

    name: str
    gradient: str
    optimizer: Callable[[float], optax.GradientTransformation]  # of the pairs' scale
    exact: bool
    moments: str | None = None


BASELINE = Variant("adamw", "factors", lambda scale: optax.adamw(RATE), False)
VARIANTS = (
    Variant("oplora", "exact", lambda scale: oplora_jax.oplora(RATE), True),
    Variant("scaled_oplora", "exact", lambda scale: oplora_jax.scaled_oplora(RATE), True, "diagonal"),
    Variant(
        "pair_factors(oplora)",
        "factors",
        lambda scale: oplora_jax.pair_factors(oplora_jax.oplora(RATE), scale=scale),
        False,
    ),
)


NAMES = tuple(variant.name for variant in VARIANTS)


@dataclasses.dataclass(frozen=True)
class Tunix:
    """A training step of Tunix's Llama3 in the sizes of SmolLM2-135M, with random weights.

    LoRA on the seven projections of each layer, by Qwix. AdamW on Qwix's own factors, in Tunix's own trainer,
    is what the others are held against.
    """

    layers: int = 30
    """How many; 210 projections."""
    sequences: int = 2
    """In the batch."""
    length: int = 128
    """Tokens of each."""
    rank: int = 8
    """Of the LoRA parameters."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(help=", ".join(NAMES))] = NAMES
    pairs: int = 5
    """Measured steps of each method, in turn with one of AdamW's; 0 for the counts alone."""
    output: Path = Path("outputs/benchmark")
    """Folder for tunix.csv and tunix.png."""

    def run(self, console: Console) -> None:
        """Measures, prints a table, and writes it and a figure."""
        at_least(1, layers=self.layers, sequences=self.sequences, length=self.length, rank=self.rank)
        if unknown := sorted(set(self.methods) - set(NAMES)):
            raise ExperimentError(f"no method {', '.join(unknown)}; expected {', '.join(NAMES)}")
        chosen = [variant for variant in VARIANTS if variant.name in self.methods]
        if importlib.util.find_spec("tunix") is None:
            raise ExperimentError("Tunix is not installed; pip install 'oplora-jax[tunix]'")
        with warnings.catch_warnings():  # what Tunix imports and calls is its own
            warnings.simplefilter("ignore")
            report.compare_variants(self, "tunix", self.prepare, [BASELINE, *chosen], console)

    def prepare(self, variant: Variant) -> Prepared:
        """Compiles the step of a trainer."""
        graphdef, state, frozen, step_of = self._trainer(variant)
        batch = np.arange(self.sequences * self.length, dtype=np.int32).reshape(self.sequences, self.length)

        def step(state: Any, frozen: Any, tokens: Any) -> tuple[Any, Any]:
            model, optimizer = nnx.merge(graphdef, state, frozen)
            loss, _, _ = step_of(model, optimizer, tokens)
            return nnx.state((model, optimizer), trained), loss

        arguments = (step, state, frozen, batch)
        counts, compiled = count(*arguments, donated=(0,))
        copy = lambda: jax.tree.map(lambda z: z.copy(), state)
        return Prepared(
            counts,
            size_in_bytes(nnx.filter_state(state, nnx.optimizer.OptState)),
            lambda: runner(compiled, copy(), frozen, batch),
            lambda: compile_anew(*arguments, donated=(0,))[0],
        )

    def _trainer(self, variant: Variant) -> tuple[Any, Any, Any, Callable[..., Any]]:
        """(graph, what is trained, what is frozen, the step of a trainer)."""
        import qwix
        from tunix.models.llama3 import model as llama3
        from tunix.sft import peft_trainer, utils

        from oplora_jax.qwix import LoraProvider
        from oplora_jax.tunix import PeftTrainer

        config = llama3.ModelConfig(
            num_layers=self.layers,
            vocab_size=49152,
            embed_dim=576,
            hidden_dim=1536,
            num_heads=9,
            head_dim=64,
            num_kv_heads=3,
            rope_theta=100_000,
            norm_eps=1e-5,
            weight_tying=True,
        )
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
        provider = (LoraProvider if variant.exact else qwix.LoraProvider)(
            module_path=PROJECTIONS, rank=self.rank, alpha=ALPHA
        )
        model = qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **model.get_model_input())
        settings = peft_trainer.TrainingConfig(eval_every_n_steps=1)
        optimizer = variant.optimizer(ALPHA / self.rank)
        if variant.exact:
            trainer = PeftTrainer(model, optimizer, settings, moments=variant.moments)
        else:
            trainer = peft_trainer.PeftTrainer(model, optimizer, settings)

        def inputs(tokens: Any) -> dict[str, Any]:
            mask = jax.numpy.ones(tokens.shape, bool)
            return {
                "input_tokens": tokens,
                "input_mask": mask,
                "positions": utils.build_positions_from_mask(mask),
                "attention_mask": utils.make_causal_attn_mask(mask),
            }

        trainer.with_gen_model_input_fn(inputs)
        graphdef, state, frozen = nnx.split((trainer.model, trainer.optimizer), trained, ...)
        return graphdef, state, frozen, trainer.create_train_step_fn()


def trained(path: Any, value: Any) -> bool:
    """Whether a variable is a LoRA parameter or of the optimizer's state."""
    return isinstance(value, nnx.LoRAParam | nnx.optimizer.OptState)
