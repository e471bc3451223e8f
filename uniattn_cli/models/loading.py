"""Finding, loading, building and saving models: the base, and converted checkpoints that load anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import CheckpointError, ModelError, RecipeError
from uniattn_cli.models.building import converted_classes
from uniattn_cli.models.families import family_of, is_converted
from uniattn_cli.models.hub import Source, context_window, fetch
from uniattn_cli.models.on_disk import load_arguments, stored, take_over
from uniattn_cli.models.quantisation import check_quantisation, quantisation_of
from uniattn_cli.models.text_part import (
    check_separable,
    is_multi_modal,
    language_settings,
    text_config,
    text_part,
)
from uniattn_cli.models.weight_files import AGAIN, check_dtypes, check_numbers, check_weight_files, has_own_head
from uniattn_cli.recipe.schema import ModelSpec
from uniattn_cli.run.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What transformers raises for settings that make no sense, once it uses them.
NONSENSE = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
# Keys of config.json that give single layers sizes of their own, or take parts from them.
PER_LAYER = ("per_layer_config", "block_configs")
# Sizes that some models list layer by layer.
SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim")
# Layers that have an attention map over what came before, and so something to share.
LAYER_TYPES = ("full_attention", "sliding_attention")
# Settings of rotary embeddings that something is divided by.
DIVISORS = (
    *("rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
    *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
)


def load_config(source: Source, *, converted: bool | None = False, quantised: bool = False) -> Any:
    """Reads the configuration of a model that this tool can handle.

    Args:
        converted: whether to expect a converted checkpoint or a base model; None takes either.
        quantised: whether quantised weights will do, which can be run and neither fitted nor trained.

    Raises:
        ModelError: not a causal LM, an unsupported family or type of rotary embedding, layers of different shapes, or
            quantised weights where they will not do, or by a method that was not tried or is not installed.
        CheckpointError: the file is damaged, or of a newer format.
    """
    raw = read_config(source.path)
    _check_type(source, raw, converted)
    check_quantisation(source.name, raw, allowed=quantised)
    _check_settings(source, raw)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.path)
        if is_multi_modal(raw):
            config = text_config(source.name, config)
    except (StrictDataclassError, *NONSENSE) as error:
        raise CheckpointError(f"{source.path / 'config.json'} is not valid: {last_line(error)}") from None
    _check_layer_types(source, config)
    _check_rope(source, config)
    if config.tie_word_embeddings and has_own_head(source.path):
        config.tie_word_embeddings = False
    # That of the machine where it was written, which may not be here.
    config._attn_implementation = None
    return config


def _check_type(source: Source, raw: dict[str, Any], converted: bool | None) -> None:
    """Rejects models of another type than expected, and of types that are not supported."""
    model_type = raw["model_type"]
    if converted and not is_converted(model_type):
        raise CheckpointError(f"{source.name} is not a converted checkpoint (model_type '{model_type}')")
    if converted is False and is_converted(model_type):
        raise ModelError(f"the model is already converted ('{model_type}'); give its base model")
    if is_converted(model_type):
        converted_classes(model_type)
    elif is_multi_modal(raw):
        check_separable(source.name, raw)
    else:
        family_of(model_type)
        given = raw.get("architectures") or []
        architectures = [str(name) for name in given] if isinstance(given, list) else [str(given)]
        if architectures and not any(name.endswith("ForCausalLM") for name in architectures):
            raise ModelError(f"{source.name} is not a causal language model but a {architectures[0]}")


def _check_settings(source: Source, raw: dict[str, Any]) -> None:
    """Rejects layers that are not alike, but for those that this tool has made so."""
    if is_converted(raw["model_type"]):
        return
    settings = language_settings(raw)
    for key in (*PER_LAYER, *SIZES):
        if settings.get(key) and (key in PER_LAYER or isinstance(settings[key], list)):
            raise ModelError(
                f"{source.name} has layers of different shapes ({key} in its config.json), which cannot share; give a "
                "model whose layers are all alike"
            )


def _check_layer_types(source: Source, config: Any) -> None:
    """Rejects layers without an attention map, which the code of a family would run as if they had one."""
    others = set(getattr(config, "layer_types", None) or ()).difference(LAYER_TYPES)
    if others:
        raise ModelError(
            f"{source.path / 'config.json'}: layer_types has '{min(others)}', and layers of type '{config.model_type}' "
            f"can only be {' or '.join(LAYER_TYPES)}; correct it, or give another model"
        )


def _check_rope(source: Source, config: Any) -> None:
    """Rejects rotary embeddings of which transformers only warns: of unknown types, and with impossible numbers."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = config.rope_parameters or {}
    # One set of settings, or one for each type of layer.
    sets = [entry for entry in settings.values() if isinstance(entry, dict)] or [settings]
    known = ("default", *ROPE_INIT_FUNCTIONS)
    for entry in sets:
        kind = entry.get("rope_type", "default")
        if kind not in known:
            raise ModelError(
                f"{source.path / 'config.json'}: this version of transformers knows no rotary embeddings of type "
                f"'{kind}' (only {', '.join(known)}); update transformers, or give another model"
            )
        for name in DIVISORS:
            values = entry.get(name)
            wrong = [each for each in (values if isinstance(values, list) else [values]) if _is_not_positive(each)]
            if name == "rope_theta" and entry.get(name, name) is None:  # the others may be left open
                wrong = ["null"]
            if wrong:
                raise ModelError(
                    f"{source.path / 'config.json'}: {name} of its rotary embeddings is {wrong[0]} and must be greater "
                    "than zero; correct it, or copy the file again"
                )


def _is_not_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not value > 0


def loading_notes(source: Source, config: Any) -> list[str]:
    """What a user should know of how a model was read: only in part, or otherwise than its configuration says.

    Args:
        config: of the loaded model.
    """
    from transformers import AutoConfig

    stated, notes = AutoConfig.from_pretrained(source.path), []
    if stated.model_type != config.model_type:
        notes.append(
            f"{source.name} is a multi-modal model ('{stated.model_type}'); only its language model, of type "
            f"'{config.model_type}', is used"
        )
    if stated.tie_word_embeddings and not config.tie_word_embeddings:
        notes.append(
            f"{source.name} has a head of its own, although its config.json says tie_word_embeddings: true; it is "
            "kept, and what is made of it says false"
        )
    return notes


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's `config.json`; its `model_type` is a string.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / "config.json"
    raw = read_json(path, AGAIN, CheckpointError)
    raw["model_type"] = raw.get("model_type") or "unknown"
    if not isinstance(raw["model_type"], str):
        raise CheckpointError(f"{path} is damaged (its model_type is not a string); {AGAIN}")
    return raw


def check_lengths(config: Any, lengths: Mapping[str, int]) -> None:
    """Rejects sequences longer than the model's context window, beyond which every model is equally bad.

    Args:
        config: of the model.
        lengths: tokens by the setting that asks for them.

    Raises:
        RecipeError: one line for each setting that asks for too many.
    """
    window = context_window(config)
    faults = [
        f"{key} is {length}, but the model's context window is {window}"
        for key, length in lengths.items()
        if window and length > window
    ]
    if faults:
        raise RecipeError(faults)


def load_model(
    source: Source, spec: ModelSpec, device: torch.device, *, layers_on_disk: bool = False
) -> PreTrainedModel:
    """Loads a base or converted model in evaluation mode and refuses any weight that is missing or left over.

    Quantised ones are for running only; whoever changes weights asks `load_config` first.

    Args:
        source: result of `locate`.
        spec: dtype and attention backend are taken from here.
        device: where the model goes.
        layers_on_disk: decoder layers stay in their files (`models.on_disk`); not for multi-modal models.

    Raises:
        ModelError: the weights cannot be read, or the backend is not available.
        CheckpointError: weight files are missing or damaged; weights are missing, unexpected, of another shape, or not
            finite.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = load_config(source, converted=None, quantised=True)
    raw = read_config(source.path)
    multi_modal, quantised = is_multi_modal(raw), quantisation_of(raw) is not None
    family = family_of(config.model_type)
    backend = spec.attention if spec.attention != "auto" else family.attention
    if backend is not None and backend not in family.backends:
        raise ModelError(
            f"models of type '{family.model_type}' give wrong results with attention backend '{backend}'; "
            f"set model.attention to {' or '.join(family.backends)}"
        )
    dtype = "auto" if spec.dtype == "auto" else getattr(torch, spec.dtype)
    folder = fetch(source)
    files = check_weight_files(folder)
    if not quantised:
        check_dtypes(files)
    if (settings := folder / "generation_config.json").is_file():
        read_json(settings, AGAIN, CheckpointError)  # transformers goes on without a damaged one
    # Quantised weights are laid out for the device that they are loaded onto.
    places: dict[str, Any] = {"device_map": {"": device}} if quantised else {}
    unpacked = None
    if layers_on_disk:
        places, unpacked = load_arguments(AutoModelForCausalLM, config)
    try:
        # With `output_loading_info` there are two results, which its annotation does not say.
        loaded: Any = (AutoModelForImageTextToText if multi_modal else AutoModelForCausalLM).from_pretrained(
            folder,
            config=None if multi_modal else config,
            dtype=dtype,
            attn_implementation={"text_config": backend} if multi_modal and backend else backend,
            **places,
            output_loading_info=True,
            # Reported below, in one line.
            ignore_mismatched_sizes=True,
        )
        model, info = loaded
    except (OSError, ImportError, SafetensorError) as error:
        raise ModelError(f"{source.name} cannot be loaded: {last_line(error)}") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{source.name}: its .bin file is damaged, or holds more than weights, which is not loaded because it may "
            "be a program; give the model as safetensors"
        ) from None
    except NONSENSE as error:
        raise CheckpointError(
            f"{source.name} is damaged or does not match its configuration: {last_line(error)}"
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
            raise CheckpointError(f"{source.name} is damaged: {word} weight {names[0]}{more}; copy the model again")
    if unpacked is not None:
        take_over(model, source.name, unpacked)
    # Those on disk are looked at when they are read.
    check_numbers([each for each in model.named_parameters() if stored(each[1]) is None], source.name)
    if multi_modal:
        model = text_part(source.name, model)
    if model.config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        # Only now does one see it in weights that were downloaded just now, or are not in safetensors files.
        model.config.tie_word_embeddings = False
    return (model if quantised else model.to(device)).eval()


def last_line(error: BaseException) -> str:
    """What an error of a library says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = lines[-1] if lines else ""
    # Of a key that is missing, the message is the key alone.
    return f"{type(error).__name__} {words}".rstrip() if not words or isinstance(error, LookupError) else words
