"""The language model inside a multi-modal one, as a model of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import ModelError
from uniattn_cli.models.families import FAMILIES, unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys under which a config.json holds its language model, and other parts.
LANGUAGE = ("text_config", "llm_config", "language_config")
OTHERS = ("vision_config", "audio_config")
# Logits of the part and of the whole differ by kernels at most, which in bfloat16 is about a hundredth.
TOLERANCE = 0.05


def is_multi_modal(raw: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a language model with parts for something else."""
    return raw["model_type"] not in FAMILIES and any(isinstance(raw.get(key), dict) for key in (*LANGUAGE, *OTHERS))


def language_settings(raw: dict[str, Any]) -> dict[str, Any]:
    """What a `config.json` says of the language model: all of it, or that part of a multi-modal one."""
    parts = [raw[key] for key in LANGUAGE if isinstance(raw.get(key), dict)]
    return parts[0] if parts and is_multi_modal(raw) else raw


def check_separable(name: str, raw: dict[str, Any]) -> None:
    """Rejects multi-modal models that transformers does not know as a language model beside others.

    Args:
        name: of the model, for the message.
        raw: content of its `config.json`.

    Raises:
        ModelError: names the type of its language model, and the way out.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if raw["model_type"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return
    raise ModelError(
        f"{name} is a multi-modal model ('{raw['model_type']}') that cannot be taken apart here; save its language "
        f"model, of type '{language_settings(raw).get('model_type', 'unknown')}', as a model of its own and give that"
    )


def text_config(name: str, whole: Any) -> Any:
    """The configuration of the language model in a multi-modal one.

    Args:
        name: of the model, for the message.
        whole: configuration of the multi-modal model.

    Raises:
        ModelError: it is of a family that is not supported.
    """
    config = whole.get_text_config(decoder=True)
    if config.model_type not in FAMILIES:
        raise ModelError(
            f"{name} is a multi-modal model ('{whole.model_type}') whose language model is of type "
            f"'{config.model_type}', which is {unsupported(config.model_type)}"
        )
    # These two are the whole's to say, and the part's own copies are often wrong.
    config.tie_word_embeddings = whole.tie_word_embeddings
    config.dtype = whole.dtype or config.dtype
    return config


def text_part(name: str, whole: PreTrainedModel) -> PreTrainedModel:
    """The language model in a multi-modal one, around the same weights; shown to give the same logits.

    Args:
        name: of the model, for the message.
        whole: the multi-modal model.

    Raises:
        ModelError: it does more with text than its language model alone.
    """
    import torch
    from transformers import AutoModelForCausalLM

    decoder, head = whole.get_decoder(), whole.get_output_embeddings()
    # As the weights are, whatever the configuration says.
    decoder.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    with torch.device("meta"):
        part = AutoModelForCausalLM.from_config(decoder.config)
    same = type(part.model) is type(decoder)
    if same:
        part.model, part.lm_head = decoder, head
        part.generation_config = whole.generation_config
        tokens = torch.arange(100, 116, device=whole.device)[None] % decoder.config.vocab_size
        with torch.no_grad():
            expected, found = (model.eval()(tokens, use_cache=False).logits.float() for model in (whole, part))
        same = bool((found - expected).norm() <= TOLERANCE * expected.norm())
    if not same:
        raise ModelError(
            f"{name}: its language model alone ('{decoder.config.model_type}') does not give the logits of the "
            f"multi-modal model ('{whole.config.model_type}'), so it cannot be converted; give a model of text only"
        )
    return part
