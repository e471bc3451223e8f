"""Building a converted model from a base, and saving it."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from uniattn_cli.errors import CheckpointError
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.families import family_of, is_converted
from uniattn_cli.models.on_disk import is_on_disk
from uniattn_cli.run.files import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin

# Fields that belong to one class or file and must not travel from the base's configuration to the converted one.
UNPORTABLE_FIELDS = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map")
# A tokenizer is there if one of these is.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
# What else can belong to one; templates have files of their own.
BESIDE_TOKENIZER = ("merges.txt", "tekken.json", "added_tokens.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ConvertedClasses:
    """The classes of one family's converted models."""

    config: Any
    model: Any
    causal_lm: Any


def converted_classes(model_type: str) -> ConvertedClasses:
    """Imports, and registers with the Auto classes, the converted classes of a stock or converted model type."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    family = family_of(model_type)
    module = importlib.import_module(f"uniattn_cli.modeling.{family.module}")
    classes = ConvertedClasses(
        *(getattr(module, family.prefix + suffix) for suffix in ("Config", "Model", "ForCausalLM"))
    )
    AutoConfig.register(classes.config.model_type, classes.config, exist_ok=True)
    AutoModel.register(classes.config, classes.model, exist_ok=True)
    AutoModelForCausalLM.register(classes.config, classes.causal_lm, exist_ok=True)
    return classes


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
    zero. Memory is that of the base plus the changed layers' own weights. Where layers of the base are on disk, those
    are missing until `build_attention` makes them, once their layer is in memory.
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
    if not is_on_disk(base):
        for layer, stock_layer in zip(model.model.layers, base.model.layers, strict=True):
            layer.self_attn.take_weights(stock_layer.self_attn)
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.eval()


def build_attention(base: PreTrainedModel, layout: Layout, index: int) -> SharedAttentionMixin:
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
        module._parameters[last] = cast("torch.nn.Parameter", value)


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, weights: bool = True
) -> None:
    """Writes a Hugging Face directory: weights, unless they are left out, configuration, model code, tokenizer."""
    if is_converted(model.config.model_type):
        converted_classes(model.config.model_type)
    with _valid_generation_config(model):
        model.save_pretrained(directory, state_dict=None if weights else {})
    _save_tokenizer(tokenizer, directory)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Copies the files that a tokenizer was loaded from, and writes the chat template that it has now.

    transformers would write files of its own version: with another class, which other versions and engines do not know,
    and without `add_bos_token`. It writes them here for a tokenizer that was made in memory.
    """
    origin = Path(tokenizer.name_or_path)
    names = [name for name in (*TOKENIZER_FILES, *BESIDE_TOKENIZER) if (origin / name).is_file()]
    if not tokenizer.name_or_path or not names:
        tokenizer.save_pretrained(directory)
        return
    for name in names:
        shutil.copyfile(origin / name, directory / name)
    tokenizer.save_chat_templates(directory, {}, None, save_jinja_files=True)
    settings = directory / "tokenizer_config.json"
    content = read_json(settings, "copy it again", CheckpointError) if settings.is_file() else {}
    if content.pop("chat_template", None) is not None:
        # What lies in a file of its own may be another one, and counts.
        write_json(settings, content)


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
