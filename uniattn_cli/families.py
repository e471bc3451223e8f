"""The model families that can be converted, as data. torch is not imported here.

To add one: write `modeling/modeling_uniattn_NAME.py` (see the Llama file; what differs is how queries, keys and values
come out of the hidden states), add a record here, and add a tiny model to `tests/tiny.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniattn_cli.errors import ModelError


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: `model_type` of the stock configuration.
        module: file of the portable model code, without `.py`.
        prefix: beginning of its class names, as in `UniAttnLlamaForCausalLM`.
        attention: the backend to use where `auto` is asked for; None leaves it to transformers.
    """

    model_type: str
    module: str
    prefix: str
    attention: str | None = None


FAMILIES = {
    family.model_type: family
    for family in (Family(model_type="llama", module="modeling_uniattn_llama", prefix="UniAttnLlama"),)
}


def family_of(model_type: str) -> Family:
    """The record of a stock `model_type`.

    Raises:
        ModelError: the family is not supported, or the model is already converted.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith("uniattn_"):
        raise ModelError(f"the model is already converted ('{model_type}'); give the base model it was made from")
    known = ", ".join(sorted(FAMILIES))
    raise ModelError(f"models of type '{model_type}' are not supported; supported: {known}")
