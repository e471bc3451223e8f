"""The model families that can be converted, as data. torch is not imported here.

To add one: write `modeling/modeling_uniattn_NAME.py` (see the Llama file; what differs is how queries, keys and values
come out of the hidden states), add a record here, and add a tiny model with the family's flags to `tests/tiny.py`: the
tests of every family then run on it.
"""

from __future__ import annotations

from dataclasses import dataclass

from uniattn_cli.errors import ModelError, RecipeError

# What the model types of converted models begin with.
CONVERTED = "uniattn_"
BACKENDS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: `model_type` of the stock configuration.
        prefix: beginning of the class names of the portable model code, as in `UniAttnLlamaForCausalLM`.
        models: well-known models of the family.
        masks: what its layers attend to: `full`, `sliding` (a window), or how layers of both sorts are mixed.
        backends: attention backends that give the family's own numbers.
        post_norm: the attention output is normed or scaled before it is added to the residual stream.
        not_in_engine: why the decoding engine cannot run it; empty where it can.
        in_vllm: vLLM can serve what is made of it.
        packs: its masks keep the rows of a packed sequence apart.
    """

    model_type: str
    prefix: str
    models: str
    masks: str = "full"
    backends: tuple[str, ...] = BACKENDS
    post_norm: bool = False
    not_in_engine: str = ""
    in_vllm: bool = True
    packs: bool = True

    @property
    def module(self) -> str:
        """File of the portable model code, without `.py`."""
        return f"modeling_uniattn_{self.model_type}"

    @property
    def attention(self) -> str | None:
        """The backend to use where `auto` is asked for; None leaves it to transformers."""
        return None if "sdpa" in self.backends else self.backends[0]


# SDPA knows no soft-capping of the scores.
WITHOUT_SDPA = tuple(name for name in BACKENDS if name != "sdpa")
PAIRS = "its rotary embedding turns neighbouring entries of a head"

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "UniAttnLlama", "Llama 1 to 3.x, SmolLM2, TinyLlama, Yi"),
        Family("mistral", "UniAttnMistral", "Mistral 7B, Mistral NeMo, Zephyr", "full or sliding"),
        Family("mixtral", "UniAttnMixtral", "Mixtral 8x7B, 8x22B", "full or sliding"),
        Family("qwen2", "UniAttnQwen2", "Qwen2, Qwen2.5, QwQ", "full, or sliding from some layer on"),
        Family("qwen3", "UniAttnQwen3", "Qwen3 0.6B to 32B", "full, or sliding from a certain layer on"),
        Family("qwen3_moe", "UniAttnQwen3Moe", "Qwen3-30B-A3B, Qwen3-235B-A22B"),
        Family(
            "gemma2", "UniAttnGemma2", "Gemma 2 2B to 27B", "alternating sliding and full", WITHOUT_SDPA, post_norm=True
        ),
        Family("gemma3_text", "UniAttnGemma3Text", "Gemma 3 270M, 1B", "five sliding, then one full", post_norm=True),
        Family("gemma", "UniAttnGemma", "Gemma 1 2B, 7B"),
        Family("phi3", "UniAttnPhi3", "Phi-3, Phi-3.5, Phi-4, Phi-4-mini", "full or sliding"),
        Family("olmo2", "UniAttnOlmo2", "OLMo 2 1B to 32B", post_norm=True),
        Family("olmo3", "UniAttnOlmo3", "OLMo 3 7B, 32B", "three sliding, then one full", post_norm=True),
        Family("granite", "UniAttnGranite", "Granite 3.x 2B, 8B", post_norm=True),
        Family("smollm3", "UniAttnSmolLM3", "SmolLM3 3B", "full, some without positions"),
        Family("glm", "UniAttnGlm", "GLM-4-9B, GLM-Edge", not_in_engine=PAIRS),
        Family("glm4", "UniAttnGlm4", "GLM-4-0414 9B, 32B, GLM-Z1", post_norm=True, not_in_engine=PAIRS),
        Family(
            *("exaone4", "UniAttnExaone4", "EXAONE 4.0 1.2B, 32B", "full, or sliding and full without positions"),
            post_norm=True,
        ),
        Family(
            *("cohere2", "UniAttnCohere2", "Command R7B, Command A", "three sliding, then one full without positions"),
            not_in_engine=PAIRS,
        ),
        Family(
            *("gpt_oss", "UniAttnGptOss", "gpt-oss 20B, 120B", "alternating sliding and full, with sinks"),
            # SDPA and FlashAttention 2 know no sinks; FlashAttention 3 only in a build of its own.
            ("eager", "flex_attention"),
            not_in_engine="its attention maps have sinks",
            in_vllm=False,
            packs=False,
        ),
        Family("ministral", "UniAttnMinistral", "Ministral 8B", "full and sliding"),
        Family("ministral3", "UniAttnMinistral3", "Ministral 3 3B, 8B, 14B"),
    )
}

PARTLY = "some of their layers have no attention map, but linear attention or a state"
LATENT = "their keys and values come from one latent vector, which is what they cache"
# Why models that people ask for cannot be converted; the maintained list of what can is above.
REFUSED = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "kimi_linear", "minimax", "olmo_hybrid"), PARTLY
    ),
    **dict.fromkeys(("granitemoehybrid", "nemotron_h", "jamba", "bamba", "falcon_h1", "zamba2", "lfm2"), PARTLY),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "mistral4", "minicpm3"), LATENT),
    **dict.fromkeys(("nemotron-nas", "deci", "openelm"), "their layers have different numbers of heads"),
    "llama4_text": "their layers attend within chunks, and norm queries and keys that are rotated already",
}


def unsupported(model_type: str) -> str:
    """What is said of a stock model type that cannot be converted, to be read after a name of such models."""
    reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
    return f"not supported{reason}; supported: {', '.join(sorted(FAMILIES))}"


def is_converted(model_type: str) -> bool:
    """Whether a `model_type` is that of converted models."""
    return model_type.startswith(CONVERTED)


def family_of(model_type: str) -> Family:
    """The family of a `model_type`, stock or converted.

    Raises:
        ModelError: the family is not supported.
    """
    stock = model_type.removeprefix(CONVERTED)
    if stock not in FAMILIES:
        raise ModelError(f"models of type '{stock}' are {unsupported(stock)}")
    return FAMILIES[stock]


def check_target(model_type: str, target: str) -> None:
    """Rejects a target of the fit that a family does not support.

    Raises:
        RecipeError: the residual stream, where the attention output is normed or scaled before it gets there.
    """
    if target == "residual" and family_of(model_type).post_norm:
        raise RecipeError(
            f"conversion.target: models of type '{model_type}' normalise or scale attention outputs before adding them "
            "to the residual stream, so the fit cannot target it; use attention"
        )


def check_packing(model_type: str) -> None:
    """Rejects packed sequences for families whose masks in transformers do not know where rows end.

    Raises:
        RecipeError: rows would attend to those before them, in the base too.
    """
    family = family_of(model_type)
    if not family.packs:
        raise RecipeError(
            f"train.packing: transformers cannot keep packed rows apart in models of type '{family.model_type}'; "
            "set it to false"
        )
