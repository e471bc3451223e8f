"""Finding, loading, building and saving models: the base, and converted checkpoints that load anywhere."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data import templates
from uniattn_cli.errors import CheckpointError, ModelError, RecipeError
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.costs import context_window
from uniattn_cli.models.families import family_of
from uniattn_cli.recipe.schema import ModelSpec
from uniattn_cli.run.directory import fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# Fields that belong to one class or file and must not travel from the base's configuration to the converted one.
UNPORTABLE_FIELDS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")


@dataclass(frozen=True)
class ConvertedClasses:
    """The classes of one family's converted models."""

    config: type
    model: type
    causal_lm: type


@dataclass(frozen=True)
class Source:
    """Where a model's files are.

    Attributes:
        name: what the user gave.
        path: directory that holds `config.json`.
        fingerprint: identifies the weights; the commit for hub models.
        on_hub: weights and tokenizer may still have to be downloaded.
    """

    name: str
    path: Path
    fingerprint: str
    on_hub: bool = False


def converted_classes(model_type: str) -> ConvertedClasses:
    """Imports, and registers with the Auto classes, the converted classes of a stock or converted model type."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    family = family_of(model_type.removeprefix("uniattn_"))
    module = importlib.import_module(f"uniattn_cli.modeling.{family.module}")
    classes = ConvertedClasses(
        *(getattr(module, family.prefix + suffix) for suffix in ("Config", "Model", "ForCausalLM"))
    )
    AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)
    AutoModel.register(classes.config, classes.model, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
    return classes


def locate(name: str, revision: str | None = None) -> Source:
    """Finds a model directory or a hub model; of the latter only the configuration is fetched.

    Raises:
        ModelError: nothing is there, it is gated, or there is no network and no copy in the cache.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name} is a directory without config.json; give a Hugging Face model directory")
        return Source(name, path, fingerprint(path))
    if path.is_file():
        raise ModelError(f"{name} is a file; give the directory that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such directory")
    return _locate_on_hub(name, revision)


def _locate_on_hub(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    trouble = "cannot be reached"
    try:
        try:
            # Downloads retry for half a minute without a network; this one call tells at once.
            HfApi().model_info(name, revision=revision, timeout=10)
            offline = False
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            raise
        except (*transport_errors(), OfflineModeIsEnabled):
            offline = True
        except HfHubHTTPError as error:
            offline, trouble = True, f"answers with HTTP status {error.response.status_code}"
        except ValueError:
            # A sign-in page or a proxy in the hub's place; it speaks no JSON.
            offline, trouble = True, "does not answer like a hub"
        config = Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=offline))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: accept its terms on its hub page, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(f"{name}: no such model on the hub (private ones need `hf auth login`)") from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision '{revision or 'main'}'") from None
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{name} is not a directory here, not in the cache {constants.HF_HUB_CACHE}, and the hub {trouble}; "
            "check the name, connect, or give a directory that holds the model"
        ) from None
    except EntryNotFoundError:
        raise ModelError(f"{name} has no config.json; it is not a transformers model") from None
    except HfHubHTTPError as error:
        raise ModelError(f"{name}: the hub answers with HTTP status {error.response.status_code}; try later") from None
    except HFValidationError:
        raise ModelError(f"'{name}' is neither a directory nor a valid hub id (OWNER/NAME)") from None
    return Source(name, config.parent, config.parent.name, on_hub=True)


def transport_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises without a network; it has changed its HTTP client from httpx to httpx2."""
    found = [name for name in ("httpx", "httpx2") if importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name).TransportError for name in found)


def _fetch(source: Source, *, weights: bool = True) -> Path:
    """The directory with all files of a model; downloads what a hub model still lacks, with or without its weights."""
    if not source.on_hub:
        return source.path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(source.name, revision=source.fingerprint, allow_patterns=patterns))
    except (*transport_errors(), LocalEntryNotFoundError):
        raise ModelError(f"{source.name}: the download was interrupted; run the same command again") from None


def load_config(source: Source, *, converted: bool = False) -> Any:
    """Reads the configuration of a model that this tool can handle.

    Args:
        converted: expect a converted checkpoint instead of a base model.

    Raises:
        ModelError: not a causal LM, an unsupported family, or quantised weights.
        CheckpointError: the file is damaged, or of a newer format.
    """
    raw = _raw_config(source)
    model_type = raw.get("model_type") or "unknown"
    if converted and not model_type.startswith("uniattn_"):
        raise CheckpointError(f"{source.name} is not a converted checkpoint (model_type '{model_type}')")
    if not converted:
        family_of(model_type)
        architectures = raw.get("architectures") or []
        if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ModelError(f"{source.name} is not a causal language model but {architectures[0]}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown method")
        raise ModelError(f"{source.name} has quantised weights ({method}); give the unquantised model")
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if converted:
        converted_classes(model_type)
    try:
        return AutoConfig.from_pretrained(source.path)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source.path / 'config.json'} is not valid: {_last_line(error)}") from None


def _raw_config(source: Source) -> dict[str, Any]:
    path = source.path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} cannot be read: it holds a {type(raw).__name__}, not an object")
    return raw


def _read_model_type(source: Source) -> str:
    return _raw_config(source).get("model_type") or ""


def check_lengths(config: Any, lengths: Mapping[str, int]) -> None:
    """Refuses sequences that are longer than the model's window, where every model is equally bad.

    Args:
        config: of the model.
        lengths: tokens by the setting that asks for them.

    Raises:
        RecipeError: one line for each setting that asks for too many.
    """
    window = context_window(config)
    faults = [
        f"{key} is {length}, but the model's window is {window}"
        for key, length in lengths.items()
        if window and length > window
    ]
    if faults:
        raise RecipeError(faults)


def load_tokenizer(source: Source, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model.

    Args:
        source: result of `locate`; weights of hub models are not downloaded.
        chat_template: `data.chat_template` of the recipe, which replaces the tokenizer's own.

    Raises:
        ModelError: the directory holds none, or one with more tokens than the model knows.
        DataError: there is no such template.
    """
    from transformers import AutoTokenizer

    raw = _raw_config(source)
    model_type = raw.get("model_type") or ""
    if model_type.startswith("uniattn_"):
        # Tokenizers are chosen by the configuration; unless it is ours, the user is asked to trust the copied code.
        converted_classes(model_type)
    path = _fetch(source, weights=False)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"{source.name} has no tokenizer; copy tokenizer.json and tokenizer_config.json into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source.name} has no tokenizer that can be loaded: {_last_line(error)}") from None
    known = raw.get("vocab_size")
    # Added tokens are not counted: some published models have one more of them than embeddings, and never use it.
    if isinstance(known, int) and tokenizer.vocab_size > known:
        raise ModelError(
            f"{source.name}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}; they do not "
            "belong together"
        )
    templates.apply(tokenizer, chat_template)
    return tokenizer


def load_model(source: Source, spec: ModelSpec, device: torch.device) -> PreTrainedModel:
    """Loads a base or converted model in evaluation mode and refuses any weight that is missing or left over.

    Args:
        source: result of `locate`.
        spec: dtype and attention backend are taken from here.
        device: where the model goes.

    Raises:
        ModelError: the weights cannot be read, or the backend is not available.
        CheckpointError: weights are missing, unexpected or of another shape.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    config = load_config(source, converted=_read_model_type(source).startswith("uniattn_"))
    family = family_of(config.model_type.removeprefix("uniattn_"))
    backend = spec.attention if spec.attention != "auto" else family.attention
    if backend is not None and backend not in family.backends:
        raise ModelError(
            f"models of type '{family.model_type}' give other numbers with attention backend '{backend}'; "
            f"use {' or '.join(family.backends)} (model.attention)"
        )
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            _fetch(source),
            config=config,
            dtype=dtype,
            attn_implementation=backend,
            output_loading_info=True,
            # Reported below, in one line.
            ignore_mismatched_sizes=True,
        )
    except (OSError, ImportError, SafetensorError) as error:
        raise ModelError(f"{source.name} cannot be loaded: {_last_line(error)}") from None
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{source.name} is damaged or does not fit its configuration: {_last_line(error)}"
        ) from None
    wrong = {key: sorted(str(name) for name in info.get(key) or ()) for key in ("missing_keys", "unexpected_keys")}
    wrong["mismatched_keys"] = sorted(
        f"{name} (stored {list(stored)}, expected {list(expected)})"
        for name, stored, expected in info.get("mismatched_keys") or ()
    )
    for key, names in wrong.items():
        if names:
            word = key.removesuffix("_keys")
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source.name}: {word} weight {names[0]}{more}; the checkpoint is damaged")
    return model.to(device).eval()


def make_config(base_config: Any, layout: Layout) -> Any:
    """The configuration of a base converted to a layout.

    Raises:
        ValueError: the layout is illegal for the model.
    """
    fields = copy.deepcopy(base_config.to_dict())
    for name in UNPORTABLE_FIELDS:
        fields.pop(name, None)
    config = converted_classes(base_config.model_type).config(**fields)
    config._attn_implementation = base_config._attn_implementation
    config.set_layout(layout)
    return config


def build_converted(base: PreTrainedModel, layout: Layout) -> PreTrainedModel:
    """A converted model that shares all unchanged weights with the base.

    Output projections of changed layers are copies, so that fitting them leaves the base as it is; compensations are
    zero. Memory is that of the base plus the changed layers' own weights.
    """
    import torch

    config = make_config(base.config, layout)
    with torch.device("meta"):
        model = converted_classes(base.config.model_type).causal_lm(config)
    stock = dict(base.named_parameters(remove_duplicate=False))
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in stock and stock[name].shape == parameter.shape:
            _set_tensor(model, name, stock[name])
    # Not every version of transformers keeps all its frequencies in buffers.
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    for name, buffer in base.named_buffers():
        _set_tensor(model, name, buffer)
    for layer, stock_layer in zip(model.model.layers, base.model.layers, strict=True):
        layer.self_attn.take_weights(stock_layer.self_attn)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.eval()


def build_attention(base: PreTrainedModel, layout: Layout, index: int) -> torch.nn.Module:
    """The attention module of one layer of a converted model, as `build_converted` would make it.

    It takes its place in a model that was built with another layout; unchanged weights are shared with the base.
    """
    import torch

    with torch.device("meta"):
        classes = converted_classes(base.config.model_type)
        attention = classes.model.attention_class(make_config(base.config, layout), index)
    stock_attention = base.model.layers[index].self_attn
    stock = dict(stock_attention.named_parameters())
    for name, parameter in list(attention.named_parameters()):
        if name in stock and stock[name].shape == parameter.shape:
            _set_tensor(attention, name, stock[name])
    for name, buffer in stock_attention.named_buffers():
        _set_tensor(attention, name, buffer)
    attention.take_weights(stock_attention)
    return attention.eval()


def _set_tensor(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    *parents, last = name.split(".")
    module = model.get_submodule(".".join(parents))
    if last in module._buffers:
        module._buffers[last] = value
    else:
        module._parameters[last] = value


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a complete Hugging Face directory: weights, configuration, model code, tokenizer, generation settings."""
    if model.config.model_type.startswith("uniattn_"):
        converted_classes(model.config.model_type)
    with _valid_generation_config(model):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def _valid_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Some published bases ship sampling settings without sampling, which transformers refuses to save."""
    settings = model.generation_config
    before = settings.do_sample
    if not before and any(getattr(settings, name, None) is not None for name in ("temperature", "top_p", "top_k")):
        settings.do_sample = True
    try:
        yield
    finally:
        settings.do_sample = before


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
