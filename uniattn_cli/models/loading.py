"""Finding, loading, building and saving models: the base, and converted checkpoints that load anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import CheckpointError, ModelError, RecipeError
from uniattn_cli.models.building import converted_classes
from uniattn_cli.models.families import family_of
from uniattn_cli.models.hub import Source, _fetch, context_window
from uniattn_cli.recipe.schema import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


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


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that belongs to a model.

    Args:
        source: result of `locate`; weights of hub models are not downloaded.

    Raises:
        ModelError: the directory holds none, or one with more tokens than the model knows.
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


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
