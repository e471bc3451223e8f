"""Converted models with quantised weights and quantised KV caches, compared with the base under the same."""

from __future__ import annotations

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, SIZES, make_base, make_layout, randomise_compensation
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache
from transformers.cache_utils import QuantizedLayer

from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import kv_bytes_per_token

TOKENS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
ONE_HEAD = ("one_head", lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}), LlamaForCausalLM)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def converted_model(entry, layout):
    base = make_base(entry)
    return randomise_compensation(build_converted(base, make_layout(layout, base.config)))


@pytest.mark.parametrize("layout", ["leader", "low_rank"])
def test_every_projection_is_of_the_class_that_quantisers_look_for(layout):
    model = converted_model(FAMILIES[0], layout)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


class ExactLayer(QuantizedLayer):
    """Stores what it is given as the backends do, in a form that loses nothing, and like them refuses empty tensors."""

    def _quantize(self, tensor, axis):
        assert tensor.numel(), "nothing to quantise"
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


def exact_cache(config, residual):
    """The quantised cache of transformers around exact layers."""
    cache = QuantizedCache.__new__(QuantizedCache)
    super(QuantizedCache, cache).__init__(
        layers=[ExactLayer(residual_length=residual) for _ in range(config.num_hidden_layers)]
    )
    return cache


@pytest.mark.parametrize("residual", [1, 4])
@pytest.mark.parametrize(
    ("entry", "layout"),
    [*[case for case in CASES if case[0][0] in ("llama", "phi3", "qwen3_moe")], (ONE_HEAD, "leader")],
    ids=[*[name for name in CASE_IDS if name.split("-")[0] in ("llama", "phi3", "qwen3_moe")], "one_head"],
)
def test_a_quantised_cache_holds_what_a_layer_caches(entry, layout, residual):
    model = converted_model(entry, layout)
    cache = exact_cache(model.config, residual)
    chunks = [model(part, past_key_values=cache).logits for part in TOKENS.split([7, 1, 2, 1, 5], dim=1)]
    assert (torch.cat(chunks, 1) - model(TOKENS, use_cache=False).logits).abs().max() < 2e-5
    stored = [
        tensor
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)
    ]
    per_token = kv_bytes_per_token(model.config.layout, attention_shape(model.config), 4)
    assert sum(tensor.nbytes for tensor in stored) == per_token * TOKENS.numel()
