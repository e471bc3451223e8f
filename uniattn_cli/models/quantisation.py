"""Quantised weights: what `config.json` says of them, and which ones can be read."""

from __future__ import annotations

import importlib.util
from typing import Any

from uniattn_cli.errors import ModelError
from uniattn_cli.models.text_part import language_settings

# Keys of config.json that say that weights are quantised.
KEYS = ("quantization_config", "compression_config")
# The methods with which converted models were tried, called as their packages are, and the modules in these.
TRIED = {"torchao": "torchao", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}


def quantisation_of(raw: dict[str, Any]) -> str | None:
    """By which method weights are quantised; None for ordinary ones.

    Args:
        raw: the content of `config.json`.
    """
    found = next((part[key] for part in (raw, language_settings(raw)) for key in KEYS if part.get(key)), None)
    method = found.get("quant_method", "unknown method") if isinstance(found, dict) else found
    return None if method is None else str(method)


def check_quantisation(name: str, raw: dict[str, Any], *, allowed: bool) -> None:
    """Rejects quantised weights where they will not do, or that cannot be read here.

    Args:
        name: of the model, for the message.
        raw: the content of `config.json`.
        allowed: whether they will do, since the model is only run.

    Raises:
        ModelError: says what to give or to install instead.
    """
    method = quantisation_of(raw)
    if method is None:
        return
    if not allowed:
        raise ModelError(f"{name} has quantised weights ({method}); give the unquantised model")
    if method not in TRIED:
        raise ModelError(
            f"{name} has quantised weights ({method}), of which only those by {', '.join(TRIED)} can be read; give the "
            "unquantised model"
        )
    if importlib.util.find_spec(TRIED[method]) is None:
        raise ModelError(f"{name} has quantised weights, which need {method}: run pip install {method}")
