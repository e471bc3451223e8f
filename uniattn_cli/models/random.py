"""Models of random weights in the shape of well-known ones, for benchmarks of speed and memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import UsageError, suggest
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.of_run import BASE

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel

    from uniattn_cli.modeling.layout_uniattn import Layout

# Sizes of well-known models, for random weights; all as models of the Llama family.
SHAPES = {
    "llama-3.1-70b": {
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def known_config(shape: str, layers: int | None = None) -> LlamaConfig:
    """The configuration of a well-known model.

    Args:
        shape: a key of `SHAPES`.
        layers: make it shallower.

    Raises:
        UsageError: the shape is unknown.
    """
    from transformers import LlamaConfig

    if shape not in SHAPES:
        raise UsageError(f"--shape {shape}: not one of {', '.join(SHAPES)}{suggest(shape, SHAPES)}")
    sizes: dict[str, Any] = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    return LlamaConfig(
        **sizes,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape not in ("llama-3.1-8b", "llama-3.1-70b"),
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )


def random_models(
    config: LlamaConfig, layouts: Mapping[str, Layout], dtype: str, device: torch.device
) -> dict[str, PreTrainedModel]:
    """A base with random weights, and one converted model per layout, which shares all unchanged weights with it.

    Args:
        config: of the base.
        layouts: by the name that the converted model gets.
        dtype: name of a torch dtype.
    """
    import torch
    from transformers import LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            base = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return {BASE: base} | {name: build_converted(base, layout) for name, layout in layouts.items()}


def write_without_weights(
    config: LlamaConfig, layouts: Mapping[str, Layout], dtype: str, folder: Path
) -> dict[str, Path]:
    """Writes directories of a base and of one converted model per layout for engines that draw weights themselves.

    vLLM does so with `--load-format=dummy`. Each has a tokenizer of one word per token, so that a text of N words is a
    prompt of N tokens.

    Args:
        config: of the base.
        layouts: by the name that the converted model gets.
        dtype: name of a torch dtype.
        folder: where the directories are made.

    Returns:
        The directories by name, the base's first.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{index}": index for index in range(config.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1")
    found: dict[str, Path] = {}
    for name, model in random_models(config, layouts, dtype, torch.device("meta")).items():
        # Names may be paths of files.
        found[name] = folder / str(len(found))
        save_checkpoint(model, tokenizer, found[name], weights=False)
    return found
