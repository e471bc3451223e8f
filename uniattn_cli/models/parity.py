"""Proof that converted code with nothing shared equals stock, on a tiny random model of the checkpoint's own sort."""

from __future__ import annotations

import copy
from typing import Any

from uniattn_cli.errors import ModelError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import UNPORTABLE_FIELDS, build_converted
from uniattn_cli.models.families import family_of

TOKENS = 24
HEAD_DIM = 16
# Whatever else is a size. Windows are shorter than `TOKENS`, so that it matters where they are applied; so is what a
# model knows of positions, where it scales queries beyond that.
SIZES = {
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 7


def prove_parity(config: Any) -> None:
    """Proves on a tiny random model of this configuration that converted code with nothing shared equals stock.

    Raises:
        ModelError: outputs differ, so that the installed transformers must not be used with this family; or stock's
            own are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tiny = shrink_config(config)
    attention = family_of(config.model_type).attention
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        stock = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32, attn_implementation=attention).eval()
        ours = build_converted(stock, Layout.own(tiny.num_hidden_layers))
        tokens = torch.randint(3, tiny.vocab_size, (2, TOKENS))
        expected = stock(tokens).logits
        difference = (expected - ours(tokens).logits).abs().max().item()
    if not expected.isfinite().all():
        raise ModelError(
            f"models of type '{config.model_type}' compute no finite numbers with the settings in config.json, in "
            "transformers' own code too; compare the file with the published one"
        )
    if difference != 0.0:
        import transformers

        raise ModelError(
            f"converted code of '{config.model_type}' differs from transformers {transformers.__version__} by "
            f"{difference:.1e}; nothing was converted, please report this"
        )


def shrink_config(config: Any, layers: int = 4) -> Any:
    """A copy of a configuration with tiny sizes, all its flags, and at least one layer of each sort."""
    fields = copy.deepcopy(config.to_dict())
    for name in UNPORTABLE_FIELDS:
        fields.pop(name, None)
    chosen = _representative_layers(attention_shape(config).mask_types, layers)
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            fields[name] = [value[layer] for layer in chosen]
    if fields.get("mlp_only_layers"):
        fields["mlp_only_layers"] = [new for new, old in enumerate(chosen) if old in fields["mlp_only_layers"]]
    if fields.get("num_experts_per_tok"):
        fields["num_experts_per_tok"] = min(2, fields["num_experts_per_tok"])
    if fields.get("sliding_window"):
        fields["sliding_window"] = WINDOW
    _shrink_heads(config, fields)
    fields |= {name: value for name, value in SIZES.items() if name in fields}
    return type(config)(**fields | {"num_hidden_layers": len(chosen)})


def _representative_layers(types: tuple[str, ...], layers: int) -> list[int]:
    """The first layer of each mask type, filled up with the first others, in order."""
    firsts = [types.index(name) for name in dict.fromkeys(types)]
    others = [layer for layer in range(len(types)) if layer not in firsts]
    return sorted(firsts + others[: max(0, layers - len(firsts))])


def _shrink_heads(config: Any, fields: dict[str, Any]) -> None:
    """Fewer and smaller heads, in groups of the same size; other heads than hidden / heads stay other ones."""
    shape = attention_shape(config)
    kv_heads = min(2, shape.kv_heads)
    heads = kv_heads * shape.group_size
    plain = shape.head_dim * shape.query_heads == shape.hidden_size
    fields.update(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        hidden_size=heads * (HEAD_DIM if plain else HEAD_DIM + HEAD_DIM // 2),
    )
    if "head_dim" in fields or not plain:
        fields["head_dim"] = HEAD_DIM
    for rope in _rope_settings(fields.get("rope_parameters") or {}):
        frequencies = int(HEAD_DIM * (rope.get("partial_rotary_factor") or 1.0)) // 2
        for name in ("short_factor", "long_factor"):
            if rope.get(name):
                rope[name] = (rope[name] * frequencies)[:frequencies]
        if rope.get("llama_4_scaling_beta"):
            rope["original_max_position_embeddings"] = WINDOW


def _rope_settings(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings of the rotary embedding, which may be one per layer type."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]
