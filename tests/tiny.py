"""Tiny random models of every family, and layouts for them; all generic tests run over these lists."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from uniattn_cli.modeling.layout_uniattn import Layout

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# One entry per family: name, configuration, model class.
FAMILIES = [
    ("llama", lambda: LlamaConfig(**SIZES, tie_word_embeddings=False), LlamaForCausalLM),
    ("llama_tied_bias", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True), LlamaForCausalLM),
]

LAYOUTS = {
    "leader": [{}, {}, {"leader": 1}, {"leader": 1}, {}, {"leader": 4}],
    "low_rank": [{}, {"leader": 0, "compensation": 4}, {}, {"leader": 2, "compensation": "none"}, {}, {}],
    "grouped_several": [{}, {}, {}, {"heads": "0:3 0:2 1:0 1:1 2:5 2:4"}, {"heads": "1:1 1:0 2:2 2:2 0:4 0:5"}, {}],
    "free_several": [{}, {}, {"heads": "0:3 1:2 1:0 0:1 0:0 1:1"}, {}, {}, {"heads": "3:5 3:4 3:3 3:2 3:1 3:0"}],
    "key": [{}, {}, {"kind": "key", "leader": 1}, {"kind": "key", "heads": "0:2 1:1 0:0"}, {}, {}],
    "kv": [{}, {}, {"kind": "kv", "leader": 1}, {}, {"kind": "kv", "heads": "3:1 1:1 3:0"}, {}],
    "pooled": [{}, {"kind": "pooled", "kv_heads": 1}, {}, {"kind": "pooled", "kv_heads": 1}, {}, {}],
    "linear_none": [{}, {"kind": "linear"}, {}, {"kind": "linear", "compensation": 8}, {"kind": "none"}, {}],
    "mixed": [
        {},
        {},
        {"leader": 1},
        {"kind": "kv", "leader": 1},
        {"kind": "linear"},
        {"heads": "0:0 0:1 1:2 1:3 1:4 1:5"},
    ],
}


def make_base(entry, seed: int = 0):
    """A random stock model in float32, with attention sharp enough that its maps matter."""
    _, config, model_class = entry
    torch.manual_seed(seed)
    model = model_class(config()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(12)
            elif "v_proj.weight" in name or "o_proj.weight" in name:
                parameter.mul_(4)
    return model


def make_layout(name: str) -> Layout:
    return Layout.from_list(LAYOUTS[name])


def randomise_compensation(model, scale: float = 0.05):
    """Gives every W_c random weights, so that a test sees whether they are used."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compensation" in name:
                parameter.normal_(std=scale)
    return model
