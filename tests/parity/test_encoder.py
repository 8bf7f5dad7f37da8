"""The hidden states of the real transformers' BERT and RoBERTa."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: everything here is on this machine

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import ExperimentError
from experiments.models.checkpoints import bundled_folder, load_encoder
from experiments.models.encoder import Encoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,  # so large that attention is uneven
}
CASES = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "bert_masked_lm": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SIZES, hidden_act="gelu_new")
    ),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5)
    ),
    "xlm_roberta_classifier": lambda: transformers.XLMRobertaForSequenceClassification(
        transformers.XLMRobertaConfig(**SIZES, type_vocab_size=2, hidden_act="relu")
    ),
    "camembert": lambda: transformers.CamembertModel(transformers.CamembertConfig(**SIZES)),
}
# float32 through at most six layers, numbers of about 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def check(model, folder, tokens, mask, segments):
    """load_encoder's hidden states of the real tokens are those of transformers' model."""
    with torch.no_grad():
        expected = model.base_model.eval()(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            token_type_ids=torch.tensor(segments),
        ).last_hidden_state.numpy()
    config, params = load_encoder(folder, jnp.float32)
    found = Encoder(config).apply({"params": params}, *map(jnp.asarray, (tokens, mask, segments)))
    np.testing.assert_allclose(np.asarray(found)[mask], expected[mask], **TOLERANCE)


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", CASES)
def test_random_models(tmp_path, name, sharded):
    torch.manual_seed(0)
    model = CASES[name]()
    model.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if sharded else {}))
    assert (tmp_path / "model.safetensors").is_file() != sharded
    rng = np.random.default_rng(0)
    config = model.config
    mask = np.arange(9) < np.array([9, 4, 6])[:, None]
    tokens = np.where(mask, rng.integers(3, config.vocab_size, mask.shape), config.pad_token_id)
    check(model, tmp_path, tokens, mask, rng.integers(0, config.type_vocab_size, mask.shape))


def test_bundled_encoder():
    tokenizers = pytest.importorskip("tokenizers")
    try:
        folder = bundled_folder()
    except ExperimentError as error:
        pytest.skip(str(error))
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pairs = [
        ("A man is playing a guitar.", "Someone makes music."),
        ("Short.", "Very short."),
        ("The tokenizer splits unusual words, such as hyperparameter.", "It does."),
    ]
    rows = tokenizer.encode_batch(pairs)
    tokens, mask, segments = (
        np.array([getattr(row, part) for row in rows]) for part in ("ids", "attention_mask", "type_ids")
    )
    mask = mask.astype(bool)
    assert not mask.all() and segments.any()
    check(transformers.AutoModel.from_pretrained(folder), folder, tokens, mask, segments)
