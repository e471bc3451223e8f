"""Tiny random models of every family, and layouts for them; all generic tests run over these lists."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GlmConfig,
    GlmForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.families import family_of

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
# Six layers of each sort, heads that are not hidden / heads, and a window shorter than the tests' sequences.
ALTERNATING = SIZES | {"num_hidden_layers": 12, "head_dim": 12, "sliding_window": 5}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 6
GEMMA = ALTERNATING | {"layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 9, "tie_word_embeddings": True}
LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 64.0, "original_max_position_embeddings": 4}
# Queries are scaled from the fifth token on.
FAR = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

# One entry per family, with the flags that it brings: name, configuration, model class.
FAMILIES = [
    ("llama", lambda: LlamaConfig(**SIZES, tie_word_embeddings=False), LlamaForCausalLM),
    ("llama_tied_bias", lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True), LlamaForCausalLM),
    ("mistral", lambda: MistralConfig(**SIZES | {"head_dim": 12}, sliding_window=5), MistralForCausalLM),
    ("mixtral", lambda: MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4), MixtralForCausalLM),
    ("qwen2", lambda: Qwen2Config(**SIZES, tie_word_embeddings=True), Qwen2ForCausalLM),
    ("qwen3", lambda: Qwen3Config(**SIZES | {"head_dim": 12}), Qwen3ForCausalLM),
    (
        "qwen3_moe",
        lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[1]),
        Qwen3MoeForCausalLM,
    ),
    (
        "gemma2",
        lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
        Gemma2ForCausalLM,
    ),
    (
        "gemma3_text",
        lambda: Gemma3TextConfig(**GEMMA, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        Gemma3ForCausalLM,
    ),
    ("phi3", lambda: Phi3Config(**SIZES, rope_scaling=dict(LONGROPE), sliding_window=64), Phi3ForCausalLM),
    ("olmo2", lambda: Olmo2Config(**SIZES), Olmo2ForCausalLM),
    (
        "olmo3",
        lambda: Olmo3Config(
            **ALTERNATING, layer_types=SLIDING_AND_FULL, rope_scaling={"rope_type": "linear", "factor": 8.0}
        ),
        Olmo3ForCausalLM,
    ),
    ("gemma", lambda: GemmaConfig(**SIZES | {"head_dim": 12}, tie_word_embeddings=True), GemmaForCausalLM),
    ("granite", lambda: GraniteConfig(**SIZES, **MULTIPLIERS, tie_word_embeddings=True), GraniteForCausalLM),
    (
        "smollm3",
        lambda: SmolLM3Config(**SIZES | {"num_hidden_layers": 12}, no_rope_layers=[1, 0] * 6),
        SmolLM3ForCausalLM,
    ),
    ("glm", lambda: GlmConfig(**SIZES), GlmForCausalLM),
    ("glm4", lambda: Glm4Config(**SIZES), Glm4ForCausalLM),
    ("exaone4", lambda: Exaone4Config(**ALTERNATING, layer_types=SLIDING_AND_FULL), Exaone4ForCausalLM),
    (
        "cohere2",
        lambda: Cohere2Config(**ALTERNATING | {"head_dim": 8}, layer_types=SLIDING_AND_FULL, logit_scale=0.5),
        Cohere2ForCausalLM,
    ),
    ("ministral", lambda: MinistralConfig(**ALTERNATING, layer_types=SLIDING_AND_FULL), MinistralForCausalLM),
    (
        "gpt_oss",
        lambda: GptOssConfig(
            **ALTERNATING, **EXPERTS, num_local_experts=4, layer_types=SLIDING_AND_FULL, rope_parameters=dict(YARN)
        ),
        GptOssForCausalLM,
    ),
    ("ministral3", lambda: Ministral3Config(**SIZES, rope_parameters=dict(FAR)), Ministral3ForCausalLM),
]

# For six layers of one sort; `make_layout` applies them to each sort of layers that a model has.
LAYOUTS = {
    "leader": [{}, {}, {"leader": 1}, {"leader": 1}, {}, {"leader": 4}],
    "low_rank": [{}, {"leader": 0, "compensation": 4}, {}, {"leader": 2, "compensation": "none"}, {}, {}],
    "grouped_several": [{}, {}, {}, {"heads": "0:3 0:2 1:0 1:1 2:5 2:4"}, {"heads": "1:1 1:0 2:2 2:2 0:4 0:5"}, {}],
    "free_several": [{}, {}, {"heads": "0:3 1:2 1:0 0:1 0:0 1:1"}, {}, {}, {"heads": "3:5 3:4 3:3 3:2 3:1 3:0"}],
    "key": [{}, {}, {"kind": "key", "leader": 1}, {"kind": "key", "heads": "0:2 1:1 0:0"}, {}, {}],
    "kv": [{}, {}, {"kind": "kv", "leader": 1}, {}, {"kind": "kv", "heads": "3:1 1:1 3:0"}, {}],
    "early": [
        {},
        {},
        {"kind": "early", "leader": 1, "compensation": "full"},
        {"kind": "early", "heads": "0:2 1:1 0:0", "compensation": "none"},
        {"kind": "early-kv", "leader": 1, "compensation": 4},
        {"kind": "early-kv", "heads": "0:1 1:1 1:0", "compensation": "full"},
    ],
    "pooled": [{}, {"kind": "pooled", "kv_heads": 1}, {}, {"kind": "pooled", "kv_heads": 1}, {}, {}],
    "linear_none": [{}, {"kind": "linear"}, {}, {"kind": "linear", "compensation": 8}, {"kind": "none"}, {}],
    "others": [
        {},
        {},
        {"kind": "key", "heads": "0:1 1:0 1:1"},
        {"kind": "pooled", "kv_heads": 1},
        {"kind": "none"},
        {"heads": "0:5 1:4 1:3 0:0 1:0 0:2", "compensation": 4},
    ],
    "mixed": [
        {},
        {},
        {"leader": 1},
        {"kind": "kv", "leader": 1},
        {"kind": "linear"},
        {"heads": "0:0 0:1 1:2 1:3 1:4 1:5"},
    ],
}


# Together they have every kind; `LAYOUTS` in full is for one family.
REDUCED = ("mixed", "others", "early")
CASES = [(entry, name) for entry in FAMILIES for name in (LAYOUTS if entry[0] == "llama" else REDUCED)]
CASE_IDS = [f"{entry[0]}-{name}" for entry, name in CASES]
# Between them these have all that sets families apart: windows, norms of queries, fused projections, experts. What does
# not read a family's own code is tried with the others by `make test-slow` only.
TYPICAL = ("llama", "gemma3_text", "phi3", "qwen3_moe")


# What their own code does to a layer is seen in one layout, which has most kinds: the others are tried slowly.
LIKE_OTHERS = ("glm", "glm4", "exaone4", "cohere2", "ministral", "ministral3")


def shown_by_others(entry, layout: str | None) -> bool:
    """Whether a test of a family and a layout of `LAYOUTS` is left to `make test-slow`."""
    return entry[0] in LIKE_OTHERS and layout in LAYOUTS and layout != "mixed"


def _marks(quick: bool) -> list:
    return [] if quick else [pytest.mark.slow]


def families(*quick: str):
    """Tries a test with every family, and with these in the quick suite."""
    return pytest.mark.parametrize(
        "entry", [pytest.param(entry, id=entry[0], marks=_marks(entry[0] in quick)) for entry in FAMILIES]
    )


typical_families = families(*TYPICAL)


def make_base(entry, seed: int = 0):
    """A random stock model in float32, with attention sharp enough that its maps matter, and no weight that is idle."""
    _, config, model_class = entry
    torch.manual_seed(seed)
    config = config()
    config._attn_implementation = backends(config)[-1]
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".self_attn." in name and "norm" in name:
                # Queries and keys have the length that their norm gives them.
                parameter.add_(1 + 0.3 * torch.randn_like(parameter))
            elif "sinks" in name:
                parameter.normal_(std=2.0)
            elif "self_attn" in name and "bias" in name:
                parameter.normal_(std=0.3)
            elif "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(12)
            elif "qkv_proj.weight" in name:
                parameter.mul_(10)
            elif "v_proj.weight" in name or "o_proj.weight" in name:
                parameter.mul_(4)
    return model


def backends(config) -> tuple[str, ...]:
    """The attention backends of a CPU that a family can use."""
    known = family_of(config.model_type).backends
    return tuple(name for name in ("eager", "sdpa") if name in known)


def make_layout(name: str, config=None) -> Layout:
    """A layout of `LAYOUTS`, for six layers of one sort or for each sort of layers that a configuration has."""
    if config is None:
        return Layout.from_list(LAYOUTS[name])
    types = attention_shape(config).mask_types
    entries = [{}] * len(types)
    for sort in set(types):
        layers = [layer for layer, other in enumerate(types) if other == sort]
        for layer, entry in zip(layers, LAYOUTS[name], strict=True):
            entries[layer] = _renumber(entry, layers)
    return Layout.from_list(entries)


def _renumber(entry: dict, layers: list[int]) -> dict:
    changed = dict(entry)
    if "leader" in entry:
        changed["leader"] = layers[entry["leader"]]
    if "heads" in entry:
        pairs = [pair.split(":") for pair in entry["heads"].split()]
        changed["heads"] = " ".join(f"{layers[int(layer)]}:{head}" for layer, head in pairs)
    return changed


def randomise_compensation(model, scale: float = 0.05):
    """Gives every W_c random weights, so that a test sees whether they are used."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "compensation" in name:
                parameter.normal_(std=scale)
    return model


def make_converted(entry, layout: str, *, backend: str | None = None, seed: int = 0):
    """A model of `make_base`, converted, with random compensations.

    It is a copy of one that is built once: building takes longer than most that is asked of so small a model.
    """
    model = copy.deepcopy(_converted(entry, layout, seed))
    if backend is not None:
        model.set_attn_implementation(backend)
    return model


@functools.cache
def _converted(entry, layout: str, seed: int):
    base = make_base(entry, seed)
    return randomise_compensation(build_converted(base, make_layout(layout, base.config)))
