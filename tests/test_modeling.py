"""The contract of converted models: every family, layout, kind and backend gives the same numbers in every mode."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, LAYOUTS, make_base, make_layout, randomise_compensation
from transformers import DynamicCache

from uniattn_cli.accounting import count_parameters, kv_bytes_per_token
from uniattn_cli.checkpoint import build_converted, prove_parity
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import REMOVED_PROJECTIONS, Layout

families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
layouts = pytest.mark.parametrize("layout", LAYOUTS)
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])
TOKENS = 12


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def converted_model(entry, layout, backend="sdpa"):
    base = make_base(entry)
    base.set_attn_implementation(backend)
    return randomise_compensation(build_converted(base, make_layout(layout)))


def random_tokens(rows=2, tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, tokens), generator=generator)


def assert_close(actual, expected):
    difference = (actual - expected).abs()
    assert difference.max() < 2e-5, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@families
@backends
def test_identity_layout_is_stock_bit_for_bit(entry, backend):
    base = make_base(entry)
    base.set_attn_implementation(backend)
    ours = build_converted(base, Layout.own(6))
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    assert torch.equal(ours(tokens).logits, base(tokens).logits)
    assert torch.equal(ours(tokens, attention_mask=mask).logits, base(tokens, attention_mask=mask).logits)


@families
def test_parity_proof_accepts_the_real_code_and_notices_a_wrong_one(entry, monkeypatch):
    from uniattn_cli.errors import ModelError
    from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin

    config = make_base(entry).config
    prove_parity(config)
    right = SharedAttentionMixin.embed_positions
    monkeypatch.setattr(SharedAttentionMixin, "embed_positions", lambda self, states, position: None)
    with pytest.raises(ModelError, match="differs from stock"):
        prove_parity(config)
    monkeypatch.setattr(SharedAttentionMixin, "embed_positions", right)


@families
@layouts
def test_removed_projections_are_gone_and_counts_are_predicted(entry, layout):
    model = converted_model(entry, layout)
    names = {name for name, _ in model.named_parameters()}
    for index, plan in enumerate(make_layout(layout)):
        for projection in REMOVED_PROJECTIONS[plan.kind]:
            assert not hasattr(model.model.layers[index].self_attn, projection)
            assert not any(f"layers.{index}.self_attn.{projection}" in name for name in names)
    predicted = count_parameters(make_base(entry).config, make_layout(layout))
    assert sum(parameter.numel() for parameter in model.parameters()) == predicted


@families
@layouts
@backends
def test_equals_the_formula_from_materialised_maps(entry, layout, backend):
    """Runs the model with every follower's map taken from the source heads' materialised maps instead."""
    model = converted_model(entry, layout, backend)
    tokens = random_tokens()
    expected = model(tokens, use_cache=False).logits
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    shape = attention_shape(model.config)
    maps = {}
    for index, layer in enumerate(eager.model.layers):
        attention = layer.self_attn
        if attention.plan.kind in ("linear", "none"):
            continue
        if attention.plan.kind == "softmax":
            attention.forward = _from_maps(attention, maps, attention.plan.sources(shape.query_heads))
        else:
            attention.register_forward_hook(
                lambda module, args, output, index=index: maps.__setitem__(index, output[1])
            )
    assert_close(eager(tokens, use_cache=False).logits, expected)


def _from_maps(attention, maps, sources):
    def forward(hidden_states, **kwargs):
        values = attention.project(hidden_states, "v")["v"]
        group = len(sources) // values.shape[1]
        heads = [maps[layer][:, head] @ values[:, index // group] for index, (layer, head) in enumerate(sources)]
        output = attention.o_proj(torch.cat(heads, dim=-1))
        if attention.compensation is not None:
            output = output + attention.compensation(hidden_states)
        return output, None

    return forward


@families
@layouts
@backends
def test_cached_modes_equal_uncached(entry, layout, backend):
    model = converted_model(entry, layout, backend)
    tokens = random_tokens()
    expected = model(tokens, use_cache=False).logits
    steps = DynamicCache(config=model.config)
    assert_close(
        torch.cat([model(tokens[:, i : i + 1], past_key_values=steps).logits for i in range(TOKENS)], 1), expected
    )
    chunks = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=chunks).logits for part in (tokens[:, :5], tokens[:, 5:7], tokens[:, 7:])]
    assert_close(torch.cat(parts, 1), expected)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in steps.layers if layer.is_initialized)
    predicted = kv_bytes_per_token(make_layout(layout), attention_shape(model.config), 4)
    assert stored == predicted * tokens.numel()


@families
@layouts
def test_left_padded_rows_equal_rows_alone(entry, layout):
    model = converted_model(entry, layout)
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    tokens[0, :5], mask[0, :5] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert_close(batch[0, 5:], model(tokens[:1, 5:], use_cache=False).logits[0])
    assert_close(batch[1], model(tokens[1:], use_cache=False).logits[0])


@families
@layouts
def test_packed_sequences_equal_sequences_alone(entry, layout):
    model = converted_model(entry, layout)
    tokens = random_tokens(rows=1, tokens=20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    assert_close(packed[:, :8], model(tokens[:, :8], use_cache=False).logits)
    assert_close(packed[:, 8:], model(tokens[:, 8:], use_cache=False).logits)


@families
@layouts
@pytest.mark.parametrize(
    "mode",
    [
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"do_sample": True, "top_k": 5},
    ],
    ids=["beam", "static", "prompt_lookup", "sampling"],
)
def test_generation_with_cache_equals_without(entry, layout, mode):
    model = converted_model(entry, layout)
    prompt = random_tokens(rows=1 if "prompt_lookup_num_tokens" in mode else 2)
    common = {"max_new_tokens": 8, "attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None}
    torch.manual_seed(3)
    cached = model.generate(prompt, **(common | mode))
    plain = {key: value for key, value in mode.items() if key in ("num_beams", "do_sample", "top_k")}
    torch.manual_seed(3)
    assert torch.equal(cached, model.generate(prompt, **(common | plain), use_cache=False))


@families
@layouts
def test_gradients_with_checkpointing_equal_gradients_without(entry, layout):
    model = converted_model(entry, layout).train()
    tokens = random_tokens()
    with torch.enable_grad():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    # The norm before a dropped attention block is not used by anything.
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert all("layers.4.input_layernorm" in n for n, _ in model.named_parameters() if n not in plain)
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "self_attn" in name)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.enable_grad():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert name not in plain or torch.equal(parameter.grad, plain[name]), name


def test_reentrant_checkpointing_is_refused():
    model = converted_model(FAMILIES[0], "leader")
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@families
def test_unchanged_weights_are_shared_with_the_base(entry):
    base = make_base(entry)
    model = build_converted(base, make_layout("leader"))
    assert model.model.layers[0].mlp.up_proj.weight is base.model.layers[0].mlp.up_proj.weight
    changed = model.model.layers[2].self_attn
    assert changed.v_proj.weight is base.model.layers[2].self_attn.v_proj.weight
    assert changed.o_proj.weight.data_ptr() != base.model.layers[2].self_attn.o_proj.weight.data_ptr()
    assert changed.compensation.weight.abs().max() == 0


def test_pooled_heads_are_means_of_their_group():
    base = make_base(FAMILIES[0])
    model = build_converted(base, make_layout("pooled"))
    expected = base.model.layers[1].self_attn.k_proj.weight.view(3, 8, 48).mean(0)
    assert_close(model.model.layers[1].self_attn.k_proj.weight, expected)


def test_compiled_static_decoding_has_no_graph_break():
    model = converted_model(FAMILIES[0], "mixed")
    tokens = random_tokens()
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens[:, :8], past_key_values=cache)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    step = compiled(tokens[:, 8:9], past_key_values=cache).logits
    assert_close(step[:, 0], model(tokens[:, :9], use_cache=False).logits[:, -1])
