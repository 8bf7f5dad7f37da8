"""LoRA adapters of Hugging Face PEFT, read and written without PyTorch.

The format is that of https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
import safetensors.numpy

from oplora_jax.adapters.paths import leaf_name, weight_name
from oplora_jax.adapters.peft_config import (
    EMBEDDINGS,
    check_config,
    heads_of,
    ranks_and_alphas,
    trained_config,
)
from oplora_jax.adapters.peft_tensors import lora_tensors, read_lora, read_trained, trained_tensors
from oplora_jax.matrix import LowRank, check_factors, is_low_rank

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The last part of a path where it names a parameter of a layer: in Flax, Qwix, Equinox.
_EMBEDDING = ("embedding", "input_embedding")
_PARAMETERS = ("kernel", "lora", "w", "weight", *_EMBEDDING)
_TRAINED = "modules_to_save"

Names = Mapping[str, str | Sequence[str]] | Callable[[str], Any]


def save_adapter(
    folder: str | os.PathLike[str],
    lora: Any,
    *,
    names: Names | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    fan_in_fan_out: bool = False,
    modules_to_save: Mapping[str, Any] | None = None,
) -> None:
    """LoRA parameters written as a PEFT adapter, which `peft.PeftModel.from_pretrained` loads.

    The factors are written bit for bit.

    Args:
      folder: made if need be; its adapter_model.safetensors and adapter_config.json are replaced.
      lora: LoRA parameters by path, as `init_lora` and `to_low_rank` return them, or any tree with `LowRank`
        nodes, of any ranks and scales. Their `roles` are not written. Other leaves are not written either,
        but for those under a key "modules_to_save", where `load_adapter` puts them.
      names: the PyTorch module of each path, a dict or a function of the path: "layer_0/query/kernel" may be
        "bert.encoder.layer.0.attention.self.query". For a parameter of stacked layers, (layers, n, m), one
        name per layer. By default "a/b/kernel" is the module "a.b", and so are "a/b/lora", "a/b/w",
        "a/b/weight" and "a/b/embedding".
      base_model: the base model's name or folder, for the config.
      task_type: for the config: "CAUSAL_LM", "SEQ_CLS" and PEFT's others. Those of classification and of
        answering questions need the trained head.
      fan_in_fan_out: True where the modules are `Conv1D`, as GPT-2's; PEFT only warns without it.
      modules_to_save: what is trained besides LoRA, by the PyTorch module's whole name: all the parameters of
        a head or an embedding, `{"classifier": {"kernel": (in, out), "bias": (out,)}}`, deeper where it has
        layers, `{"classifier": {"dense": {...}, "out_proj": {...}}}`; or a bias alone,
        `{"encoder.query": {"bias": (m,)}}`. A dense layer's "kernel" is written as its weight, transposed;
        "embedding", "scale" and "weight" as a weight laid out as in PyTorch, which convolutions have to be;
        other names as they are.

    Raises:
      ValueError: no LoRA parameter, names that are missing, repeated or too few, factors that do not fit; a
        task without its head, a module in modules_to_save without parameters or with LoRA parameters inside.

    An embedding's LoRA parameter is one whose path is ".../embedding" or ".../input_embedding", or whose
    module has a usual name, such as embed_tokens, word_embeddings or wte. It is for the lookups alone: a tied
    output layer that is to have it too takes `p.T`.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.peft import load_adapter, save_adapter
      >>> lora = {"query/kernel": LowRank(jnp.ones((4, 2)), jnp.ones((2, 6)), scale=4.0)}
      >>> names = {"query/kernel": "model.layers.0.self_attn.q_proj"}
      >>> head = {"kernel": jnp.ones((6, 3)), "bias": jnp.zeros(3)}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   save_adapter(folder, lora, names=names, task_type="SEQ_CLS", modules_to_save={"score": head})
      ...   loaded = load_adapter(folder, names=names)
      >>> {name: z.shape for name, z in loaded.pop("modules_to_save")["score"].items()}
      {'bias': (3,), 'kernel': (6, 3)}
      >>> {path: (p.shape, p.scale) for path, p in loaded.items()}
      {'query/kernel': ((4, 6), 4.0)}
    """
    modules: dict[str, LowRank] = {}
    embeddings = set()
    for path, node in jax.tree.leaves_with_path(lora, is_leaf=is_low_rank):
        if not is_low_rank(node):
            continue
        name = leaf_name(path)
        check_factors(node, name)
        for module, layer in _layers(name, node, names):
            if module in modules:
                raise ValueError(f"{name}: another parameter has the module name {module!r} as well")
            modules[module] = layer
            if name.rpartition("/")[2] in _EMBEDDING or module.rpartition(".")[2] in EMBEDDINGS:
                embeddings.add(module)
    if not modules:
        raise ValueError("no LoRA parameters: save_adapter takes a dict or a tree with LowRank nodes")
    if modules_to_save is None and isinstance(lora, Mapping):
        modules_to_save = lora.get(_TRAINED)
    trained, weights = trained_tensors(modules_to_save or {}, modules, fan_in_fan_out)
    parameters = {
        module: [leaf_name(path) for path, _ in jax.tree.leaves_with_path(tree)]
        for module, tree in (modules_to_save or {}).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **ranks_and_alphas(modules),
        "use_rslora": False,
        "target_modules": sorted(modules),
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        **trained_config(parameters, modules, task_type),
    }
    tensors = lora_tensors(modules, embeddings) | trained
    metadata = {"format": "pt", **weights}  # and what JAX calls the weights, for load_adapter
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    _replace(folder, _WEIGHTS, safetensors.numpy.save(tensors, metadata=metadata))
    _replace(folder, _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_adapter(folder: str | os.PathLike[str], *, names: Names | None = None) -> dict[str, Any]:
    """The LoRA parameters of a PEFT adapter, and what was trained besides them.

    Args:
      folder: with adapter_model.safetensors and adapter_config.json.
      names: as for `save_adapter` if a dict, in which names that the adapter lacks are ignored; a function
        takes the PyTorch module's name instead, and returns the path. By default the module "a.b" is the path
        "a/b/kernel", or "a/b/embedding" if it is an embedding. Where a path has several names, their layers
        are stacked.

    Returns:
      A dict from paths to `LowRank` parameters in the file's types, whose scale is lora_alpha / r, or
      lora_alpha / sqrt(r) with use_rslora. That of an embedding is (vocabulary, dim), as its weight is.
      `dataclasses.replace` gives one its `roles`, where need be. What the file has besides, if anything, is
      under the key "modules_to_save", by module as `save_adapter` takes it: heads, embeddings, biases, and
      the weights of lm_head and of embeddings with LoRA, which PEFT adds.

    Raises:
      FileNotFoundError: a file that is missing.
      ValueError: anything besides plain LoRA of dense layers and embeddings and parameters as they are, which
        would be left out otherwise; an r or lora_alpha that is no positive number, factors that do not fit, a
        module without a name, or layers of a stack that do not match.

    Names and layouts under "modules_to_save" are those that `save_adapter` was given. Of PEFT's own files
    dense layers with LoRA, lm_head, and those of a classifier, score, qa_outputs or classification_head have
    a "kernel", (in, out). A file does not tell what other modules are: their parameters keep PyTorch's names
    and layouts, a "weight" (out, in) for a dense layer.

    Examples:
      >>> import tempfile, jax.numpy as jnp
      >>> from oplora_jax import LowRank
      >>> from oplora_jax.peft import load_adapter, save_adapter
      >>> with tempfile.TemporaryDirectory() as folder:
      ...   save_adapter(folder, {"encoder.query": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)))})
      ...   {path: p.shape for path, p in load_adapter(folder).items()}
      {'encoder/query/kernel': (3, 2)}
    """
    folder = pathlib.Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            found = ", ".join(sorted(os.listdir(folder))) if folder.is_dir() else "no such folder"
            raise FileNotFoundError(f"{folder}: no {name}; found {found or 'nothing'}")
    config = json.loads((folder / _CONFIG).read_text())
    check_config(config, folder / _CONFIG)
    with safetensors.safe_open(folder / _WEIGHTS, framework="numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        weights = file.metadata() or {}
    modules, embeddings = read_lora(tensors, config)
    saved = [*heads_of(config.get("task_type")), *(config.get("modules_to_save") or ())]
    conv1d = bool(config.get("fan_in_fan_out"))
    trained = read_trained(tensors, weights, modules, embeddings, saved, conv1d)
    if isinstance(names, Mapping):
        lora: dict[str, Any] = _by_dict(modules, names)
    else:
        lora = {}
        for module, node in modules.items():
            usual = module.replace(".", "/") + ("/embedding" if module in embeddings else "/kernel")
            path = usual if names is None else names(module)
            if not isinstance(path, str) or path in lora:
                raise ValueError(f"names({module!r}) is {path!r}; expected a path of its own for each module")
            lora[path] = node
    return lora | {_TRAINED: trained} if trained else lora


def _layers(path: str, node: LowRank, names: Names | None) -> list[tuple[str, LowRank]]:
    """(module name, matrix) of each layer of a parameter."""
    if isinstance(names, Mapping) and path not in names:
        raise ValueError(f"{path}: no module name; names has {', '.join(sorted(names)) or 'none'}")
    if names is None:
        layer, _, last = weight_name(path).rpartition("/")
        given = (layer if layer and last in _PARAMETERS else path).replace("/", ".")
    else:
        given = names[path] if isinstance(names, Mapping) else names(path)
    if node.a.ndim == 2 and isinstance(given, str):
        return [(given, node)]
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if not several or node.a.ndim != 3 or len(given) != len(node.a):
        of_each = f"a module name for each of the {node.shape[:-2]} layers"
        expected = "one module name" if node.a.ndim == 2 else of_each
        raise ValueError(f"{path}: a parameter {node.shape} needs {expected}; names gives {given!r}")
    return [(name, node.with_factors(*factors)) for name, *factors in zip(given, node.a, node.b, strict=True)]


def _replace(folder: str | os.PathLike[str], name: str, content: bytes) -> None:
    """Writes a file, so that whoever reads it sees the old one or the new one."""
    temporary = pathlib.Path(folder, f".{name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, temporary.with_name(name))
    finally:
        temporary.unlink(missing_ok=True)


def _by_dict(modules: dict[str, LowRank], names: Mapping[str, Any]) -> dict[str, LowRank]:
    """The modules by the paths of a dict {path: module or modules}."""
    wanted = {path: [of] if isinstance(of, str) else list(of) for path, of in names.items()}
    counts = collections.Counter(module for several in wanted.values() for module in several)
    repeated = [module for module, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: names has this module more than once")
    unnamed = [module for module in modules if module not in counts]
    if unnamed:
        raise ValueError(f"{', '.join(unnamed)}: no path; names has the modules {', '.join(counts)}")
    lora = {}
    for path, several in wanted.items():
        nodes = [modules[module] for module in several if module in modules]
        if nodes and len(nodes) < len(several):
            absent = ", ".join(module for module in several if module not in modules)
            raise ValueError(f"{path}: the adapter lacks some of its layers, {absent}")
        kinds = sorted({str((z.a.shape, z.b.shape, z.a.dtype, z.b.dtype, z.scale)) for z in nodes})
        if len(kinds) > 1:
            raise ValueError(f"{path}: layers of one stack differ in shape, type or scale: {kinds}")
        if nodes:
            stack = lambda *factors: jnp.stack(factors)
            lora[path] = nodes[0] if isinstance(names[path], str) else jax.tree.map(stack, *nodes)
    return lora
