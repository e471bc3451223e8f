"""The models of a benchmark: checkpoints, the stages of a run, or random weights of a known shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import UsageError, suggest
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.loading import build_converted, load_model, locate
from uniattn_cli.recipe.schema import ModelSpec, Recipe
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE = "base"
# Sizes of well-known models, for random weights; all of the Llama family.
SHAPES = {
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


def random_models(
    shape: str,
    groups: Sequence[str],
    compensation: str | int,
    dtype: str,
    device: torch.device,
    layers: int | None = None,
) -> dict[str, PreTrainedModel]:
    """A base with random weights and one converted model per layout, which share all unchanged weights.

    Args:
        shape: a key of `SHAPES`.
        groups: layouts as `parse_groups` takes them.
        compensation: `full`, `none` or a rank.
        dtype: name of a torch dtype.
        layers: make it shallower.

    Raises:
        UsageError: the shape is unknown.
        LayoutError: a layout cannot be read.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape not in SHAPES:
        raise UsageError(f"--shape {shape}: not one of {', '.join(SHAPES)}{suggest(shape, SHAPES)}")
    sizes = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=shape != "llama-3.1-8b",
        attn_implementation="sdpa",
    )
    layouts = {text: parse_groups(text, attention_shape(config), compensation) for text in groups}
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(getattr(torch, dtype))
        with torch.device(device):
            base = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return {BASE: base} | {text: build_converted(base, layout) for text, layout in layouts.items()}


def find_models(run_dir: Any, checkpoints: Sequence[str]) -> dict[str, Any]:
    """Where the models are: the checkpoints named, or base, `converted/` and `trained/` of a run.

    Raises:
        ModelError: a checkpoint is not there.
        RecipeError: there is no recipe and no checkpoint was named, or it is faulty.
    """
    if checkpoints:
        return {text.rstrip("/"): locate(text) for text in checkpoints}
    run = RunDir(run_dir)
    recipe = Recipe.load(run.recipe)
    found = {BASE: locate(recipe.model.name, recipe.model.revision)}
    for stage, name in (("convert", "converted"), ("train", "trained")):
        if run.is_complete(stage):
            found[name] = locate(str(run.output(stage)))
    return found


def load_models(sources: dict[str, Any], dtype: str, device: torch.device) -> dict[str, PreTrainedModel]:
    """Loads them all; they are measured in turn, so they have to fit together.

    Raises:
        ModelError, CheckpointError: as `load_model`.
    """
    spec = ModelSpec(dtype=dtype)
    return {name: load_model(source, spec, device) for name, source in sources.items()}
