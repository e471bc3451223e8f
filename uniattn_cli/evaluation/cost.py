"""What a model costs: parameters, bytes on disk, and KV-cache bytes, by formula and on a real cache."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uniattn_cli.errors import ModelError
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layout_of
from uniattn_cli.models.costs import cache_bytes, count_parameters, kv_bytes_per_token
from uniattn_cli.models.loading import read_config
from uniattn_cli.models.quantisation import quantisation_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHT_FILES = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin")
SEQUENCES = 2
TOKENS = 24
STEPS = 4  # of these tokens, how many arrive one at a time


@dataclass(frozen=True)
class Size:
    """What a model takes, apart from time.

    Attributes:
        parameters: tied ones counted once.
        checkpoint_bytes: bytes of the weight files.
        kv_bytes: bytes per token of one sequence, measured on a cache.
        kv_bytes_predicted: the same by formula; always equal.
        dtype: of the loaded weights and of the cache.
        dtype_on_disk: of the weight files, as the configuration says.
        attention: backend.
        kinds: number of layers of each kind.
    """

    parameters: int
    checkpoint_bytes: int
    kv_bytes: float
    kv_bytes_predicted: int
    dtype: str
    dtype_on_disk: str
    attention: str
    kinds: dict[str, int]


def measure_size(name: str, model: PreTrainedModel, folder: Path) -> Size:
    """Counts and measures.

    Args:
        name: for messages.
        model: loaded from `folder`.

    Raises:
        ModelError: the cache holds something else than the layout predicts; no saving may be published then.
    """
    config = model.config
    layout = layout_of(config)
    predicted = kv_bytes_per_token(layout, attention_shape(config), model.dtype.itemsize)
    measured = measure_kv_bytes(model)
    if measured != predicted:
        raise ModelError(
            f"{name}: measured != predicted: the KV cache takes {measured:g} bytes per token, the layout predicts "
            f"{predicted}; nothing is published (please report this)"
        )
    return Size(
        parameters=count_parameters(config, layout)
        if quantisation_of(read_config(folder))
        else sum(parameter.numel() for parameter in model.parameters()),
        checkpoint_bytes=weight_file_bytes(folder),
        kv_bytes=measured,
        kv_bytes_predicted=predicted,
        dtype=str(model.dtype).removeprefix("torch."),
        dtype_on_disk=dtype_on_disk(folder) or str(model.dtype).removeprefix("torch."),
        attention=config._attn_implementation,
        kinds=dict(Counter(plan.kind for plan in layout)),
    )


def measure_kv_bytes(model: PreTrainedModel) -> float:
    """Bytes that each token of each sequence takes in a dynamic cache, from a prompt and a few single tokens."""
    import torch
    from transformers import DynamicCache

    # A sliding layer keeps one token less than its window; below that it costs the same as a full one.
    tokens = min(TOKENS, (getattr(model.config, "sliding_window", None) or TOKENS + 1) - 1)
    ids = torch.arange(SEQUENCES * tokens, device=model.device).view(SEQUENCES, tokens) % model.config.vocab_size
    cache = DynamicCache(config=model.config)
    prompt = max(tokens - STEPS, 1)
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        for position in range(prompt, tokens):
            model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
    return cache_bytes(cache) / (SEQUENCES * tokens)


def weight_file_bytes(folder: Path) -> int:
    """Bytes of the weight files, counting one format where a directory holds several."""
    for pattern in WEIGHT_FILES:
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    return 0


def dtype_on_disk(folder: Path) -> str | None:
    """The dtype that `config.json` names, if it does; of quantised weights, by which method they are."""
    config = read_config(folder)
    return quantisation_of(config) or config.get("dtype") or config.get("torch_dtype")
