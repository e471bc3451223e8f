"""The contract of converted models: every family, layout, kind and backend gives the same numbers in every mode."""

from __future__ import annotations

import copy
from unittest.mock import Mock

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, backends, make_base, make_converted, make_layout
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DynamicCache,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from benchmarks.plain import Operations
from uniattn_cli.evaluation.cost import cache_bytes
from uniattn_cli.fitting.stream import positions_of
from uniattn_cli.modeling import sharing_uniattn
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates, some_rows
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import count_parameters, kv_bytes, kv_bytes_per_token
from uniattn_cli.models.families import FAMILIES as RECORDS
from uniattn_cli.models.families import family_of
from uniattn_cli.models.parity import prove_parity, shrink_config

families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
cases = pytest.mark.parametrize(("entry", "layout"), CASES, ids=CASE_IDS)
families_and_backends = pytest.mark.parametrize(
    ("entry", "backend"),
    [pytest.param(entry, name, id=f"{entry[0]}-{name}") for entry in FAMILIES for name in backends(entry[1]())],
)
cases_and_backends = pytest.mark.parametrize(
    ("entry", "layout", "backend"),
    [
        pytest.param(entry, layout, name, id=f"{case}-{name}")
        for (entry, layout), case in zip(CASES, CASE_IDS, strict=True)
        for name in backends(entry[1]())
    ],
)
TOKENS = 12


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_tokens(rows=2, tokens=TOKENS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (rows, tokens), generator=generator)


def assert_close(actual, expected):
    difference = (actual - expected).abs()
    assert difference.max() < 2e-5, f"max {difference.max():.1e}, mean {difference.mean():.1e}"


@families_and_backends
def test_identity_layout_is_stock_bit_for_bit(entry, backend):
    base = make_base(entry)
    base.set_attn_implementation(backend)
    ours = build_converted(base, Layout.own(base.config.num_hidden_layers))
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
    monkeypatch.setattr(SharedAttentionMixin, "embed_positions", lambda self, states, *positions: None)
    with pytest.raises(ModelError, match="differs from transformers"):
        prove_parity(config)
    monkeypatch.setattr(SharedAttentionMixin, "embed_positions", right)


PUBLISHED = {
    "Gemma 3 270M": Gemma3TextConfig(
        num_hidden_layers=18, hidden_size=640, num_attention_heads=4, num_key_value_heads=1, sliding_window=512
    ),
    "Gemma 2 2B": Gemma2Config(),
    "Qwen2.5 with windows": Qwen2Config(use_sliding_window=True, max_window_layers=21, num_key_value_heads=4),
    "Qwen3-30B-A3B": Qwen3MoeConfig(num_hidden_layers=48, head_dim=128, mlp_only_layers=[0, 40]),
    "Mixtral 8x7B": MixtralConfig(),
    "Mistral 7B v0.1": MistralConfig(),
    "SmolLM3 3B": SmolLM3Config(),
    "Phi-4-mini": Phi3Config(
        num_attention_heads=24,
        num_key_value_heads=8,
        sliding_window=262144,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "longrope",
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0] * 48,
            "long_factor": [float(n) for n in range(1, 49)],
        },
    ),
    "OLMo 2 7B": Olmo2Config(),
    "OLMo 3 7B": Olmo3Config(
        max_position_embeddings=65536,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
    "Gemma 7B": GemmaConfig(),
    "Granite 3.3 2B": GraniteConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        attention_multiplier=0.015625,
        residual_multiplier=0.22,
        embedding_multiplier=12.0,
        logits_scaling=8.0,
        tie_word_embeddings=True,
    ),
    "GLM-4-9B-0414": Glm4Config(),
    "EXAONE 4.0 32B": Exaone4Config(
        num_hidden_layers=64, hidden_size=5120, num_attention_heads=40, num_key_value_heads=8, sliding_window_pattern=4
    ),
    "EXAONE 4.0 1.2B": Exaone4Config(
        num_hidden_layers=30, num_key_value_heads=8, sliding_window=None, layer_types=["full_attention"] * 30
    ),
    "Command R7B": Cohere2Config(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32),
    "Ministral 3 8B": Ministral3Config(),
    "gpt-oss 20B": GptOssConfig(num_hidden_layers=24, num_local_experts=32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parity_is_proven_for_published_shapes_in_little_time(name):
    config = PUBLISHED[name]
    tiny, shape = shrink_config(config), attention_shape(config)
    small = attention_shape(tiny)
    assert small.layers == 4 and set(small.mask_types) == set(shape.mask_types)
    assert small.group_size == shape.group_size and (small.kv_heads > 1) == (shape.kv_heads > 1)
    assert (small.head_dim * small.query_heads == small.hidden_size) == (
        shape.head_dim * shape.query_heads == shape.hidden_size
    )
    assert bool(getattr(tiny, "sliding_window", None)) == bool(getattr(config, "sliding_window", None))
    assert tiny.tie_word_embeddings == config.tie_word_embeddings
    if config.model_type == "ministral3":
        assert tiny.rope_parameters["original_max_position_embeddings"] < TOKENS
    with torch.device("meta"):
        assert sum(p.numel() for p in AutoModelForCausalLM.from_config(tiny).parameters()) < 3_000_000
    prove_parity(config)


def test_a_configuration_that_gives_no_numbers_is_told_from_wrong_code():
    from uniattn_cli.errors import ModelError

    with pytest.raises(ModelError, match="no finite numbers with the settings"):
        prove_parity(LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 0.0}))


@cases
def test_removed_projections_are_gone_and_counts_are_predicted(entry, layout):
    model = make_converted(entry, layout)
    config = model.config
    shape, layout = attention_shape(config), make_layout(layout, config)
    names = {name for name, _ in model.named_parameters()}
    for index, plan in enumerate(layout):
        attention = model.model.layers[index].self_attn
        for projection in plan.traits.removed:
            assert not hasattr(attention, projection)
            assert not any(f"layers.{index}.self_attn.{projection}" in name for name in names)
        heads = {"q_proj": shape.query_heads, "k_proj": plan.kv_heads or shape.kv_heads}
        heads["v_proj"] = heads["k_proj"]
        rows = sum(count for name, count in heads.items() if name not in plan.traits.removed)
        assert sum(_rows(attention)) == rows * shape.head_dim
    predicted = count_parameters(entry[1](), layout)
    assert sum(parameter.numel() for parameter in model.parameters()) == predicted


def _rows(attention):
    names = ("q_proj", "k_proj", "v_proj", "qkv_proj")
    return [getattr(attention, name).weight.shape[0] for name in names if hasattr(attention, name)]


@cases_and_backends
def test_equals_the_formula_from_materialised_maps(entry, layout, backend):
    """Runs the model with every follower's map taken from the source heads' materialised maps instead."""
    model = make_converted(entry, layout, backend=backend)
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
            attention.forward = _from_maps(attention, maps, attention.plan.sources(shape))
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


@pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
def test_early_queries_come_from_the_lenders_input(entry):
    """Maps of layers that ask early, from nothing but the inputs of their lenders' attention."""
    model = make_converted(entry, "early", backend="eager")
    given, maps = {}, {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: given.__setitem__(index, {"args": args, **kwargs}),
            with_kwargs=True,
        )
        layer.self_attn.register_forward_hook(
            lambda module, args, output, index=index: maps.__setitem__(index, output[1])
        )
    model(random_tokens(), use_cache=False)
    inputs = {
        index: each["hidden_states"] if "hidden_states" in each else each["args"][0] for index, each in given.items()
    }
    checked = 0
    for index, plan in enumerate(model.config.layout):
        if not plan.traits.early:
            continue
        shape, attention = attention_shape(model.config), model.model.layers[index].self_attn
        for unit, (source, head) in enumerate(plan.sources(shape)):
            lender = model.model.layers[source].self_attn
            states = attention.project(inputs[source], "q") | lender.project(inputs[source], "k")
            attention.embed_positions(states, *positions_of(given[index]))
            group = slice(unit * shape.group_size, (unit + 1) * shape.group_size)
            scores = states["q"][:, group] @ states["k"][:, head : head + 1].mT * attention.scaling
            cap = attention.attention_arguments().get("softcap")
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            scores = scores + given[index]["attention_mask"]
            if attention.has_sinks:
                scores = torch.cat([scores, attention.sinks[None, group, None, None].expand(2, -1, TOKENS, 1)], dim=-1)
            assert_close(maps[index][:, group], scores.softmax(-1)[..., :TOKENS])
            checked += 1
    assert checked


@families
def test_one_tensor_is_rotated_as_two_are(entry):
    attention = make_converted(entry, "mixed").model.layers[0].self_attn
    if attention.rotate_half is None:
        pytest.skip("the family's rotation of two tensors is used")
    queries, keys = torch.randn(2, 6, 5, 16), torch.randn(2, 3, 5, 16)
    cos, sin = torch.randn(2, 1, 5, 16)
    both = attention.rotate(queries, keys, cos, sin)
    assert torch.equal(attention.rotate_alone(queries, cos, sin), both[0])
    assert torch.equal(attention.rotate_alone(keys, cos, sin), both[1])


def step_operations(model) -> list[int]:
    """Operations of each layer's attention for one new token."""
    tokens, cache, operations = random_tokens(), DynamicCache(config=model.config), Operations()
    model(tokens[:, :-1], past_key_values=cache)
    counts: list[int] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *given: counts.append(operations.count))
        layer.self_attn.register_forward_hook(lambda *given: counts.append(operations.count))
    with operations:
        model(tokens[:, -1:], past_key_values=cache)
    return [after - before for before, after in zip(counts[::2], counts[1::2], strict=True)]


@pytest.mark.parametrize(
    ("entry", "layout"),
    # Others have one product for queries, keys and values, norms over all heads, or layers that rotate nothing.
    [
        pytest.param(entry, layout, id=name)
        for (entry, layout), name in zip(CASES, CASE_IDS, strict=True)
        if entry[0] in ("llama", "qwen3", "gemma3_text")
    ],
)
def test_no_layer_computes_more_for_a_token_than_its_base(entry, layout):
    """A token of a small model takes as long as a GPU needs to be given its kernels."""
    base, model = step_operations(make_base(entry)), make_converted(entry, layout)
    for plan, most, found in zip(model.config.layout, base, step_operations(model), strict=True):
        # Pooled layers compute all that their base does, and W_c.
        allowed = 2 if plan.kind == "pooled" and plan.compensation == "full" else 0
        assert found <= most + allowed


def test_only_checkpoints_with_new_kinds_need_new_code():
    assert make_layout("others").format_version == 1 and make_layout("early").format_version == 2


@cases_and_backends
def test_cached_modes_equal_uncached(entry, layout, backend):
    model = make_converted(entry, layout, backend=backend)
    tokens = random_tokens()
    expected = model(tokens, use_cache=False).logits
    steps = DynamicCache(config=model.config)
    assert_close(
        torch.cat([model(tokens[:, i : i + 1], past_key_values=steps).logits for i in range(TOKENS)], 1), expected
    )
    chunks = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=chunks).logits for part in (tokens[:, :5], tokens[:, 5:7], tokens[:, 7:])]
    assert_close(torch.cat(parts, 1), expected)
    assert cache_bytes(steps) == kv_bytes(model.config, model.config.layout, TOKENS, 4) * len(tokens)
    if not any(layer_windows(model.config)):
        predicted = kv_bytes_per_token(model.config.layout, attention_shape(model.config), 4)
        assert cache_bytes(steps) == predicted * tokens.numel()


@cases
def test_heads_read_where_they_lie_equal_gathered_ones(entry, layout, monkeypatch):
    model = make_converted(entry, layout)
    several = sum(len(layer.self_attn.parts) > 1 for layer in model.model.layers)
    if model.config._attn_implementation != "sdpa" or not several:
        pytest.skip("heads of several places are read where they lie by SDPA")
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def decoded(call_bytes: int) -> torch.Tensor:
        monkeypatch.setattr(sharing_uniattn, "CALL_BYTES", {"other": call_bytes})
        cache = DynamicCache(config=model.config)
        model(tokens[:, :-2], attention_mask=mask[:, :-2], position_ids=positions[:, :-2], past_key_values=cache)
        steps = []
        for end in (TOKENS - 1, TOKENS):
            place = slice(end - 1, end)
            inputs = {"attention_mask": mask[:, :end], "position_ids": positions[:, place]}
            steps.append(model(tokens[:, place], past_key_values=cache, **inputs).logits)
        return torch.cat(steps, 1)

    whole, spied = decoded(1 << 40), Mock(wraps=sharing_uniattn.SharedAttentionMixin._attend_in_parts)
    monkeypatch.setattr(sharing_uniattn.SharedAttentionMixin, "_attend_in_parts", lambda *args: spied(*args))
    assert_close(decoded(0), whole)
    assert spied.call_count == 2 * several


@cases
def test_left_padded_rows_equal_rows_alone(entry, layout):
    model = make_converted(entry, layout)
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    tokens[0, :5], mask[0, :5] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batch = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert_close(batch[0, 5:], model(tokens[:1, 5:], use_cache=False).logits[0])
    assert_close(batch[1], model(tokens[1:], use_cache=False).logits[0])


@cases
def test_packed_sequences_equal_sequences_alone(entry, layout):
    model = make_converted(entry, layout)
    if not family_of(model.config.model_type).packs:
        pytest.skip("stock cannot keep packed rows apart; `check_packing` refuses")
    tokens = random_tokens(rows=1, tokens=20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    assert_close(packed[:, :8], model(tokens[:, :8], use_cache=False).logits)
    assert_close(packed[:, 8:], model(tokens[:, 8:], use_cache=False).logits)


@cases
def test_generation_with_cache_equals_without(entry, layout):
    model = make_converted(entry, layout)
    prompt = random_tokens()

    def generate(rows: int = 2, **mode) -> torch.Tensor:
        torch.manual_seed(3)
        common = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
        return model.generate(prompt[:rows], attention_mask=torch.ones_like(prompt[:rows]), **common | mode)

    greedy = generate(use_cache=False)
    assert torch.equal(generate(cache_implementation="static"), greedy)
    assert torch.equal(generate(rows=1, prompt_lookup_num_tokens=2), greedy[:1])
    for mode in ({"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        assert torch.equal(generate(**mode), generate(**mode, use_cache=False)), mode


@cases
def test_gradients_with_checkpointing_equal_gradients_without(entry, layout):
    model = make_converted(entry, layout).train()
    tokens = random_tokens()
    with torch.enable_grad():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    # The norm before a dropped attention block is not used by anything.
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    dropped = [index for index, plan in enumerate(model.config.layout) if plan.kind == "none"]
    unused = [name for name, _ in model.named_parameters() if name not in plain]
    assert all(any(f"layers.{index}.input_layernorm" in name for index in dropped) for name in unused), unused
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if ".self_attn." in name)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with torch.enable_grad():
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert name not in plain or torch.equal(parameter.grad, plain[name]), name


def catch_shared(model) -> list[SharedStates]:
    """What the layers of each later forward call lend to each other."""
    caught: list[SharedStates] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["uniattn_shared"]), with_kwargs=True
    )
    return caught


@pytest.mark.parametrize("layout", ["leader", "mixed"])
def test_checkpointing_lets_go_what_was_lent(layout):
    model = make_converted(FAMILIES[0], layout).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    caught = catch_shared(model)
    tokens = random_tokens()
    with torch.enable_grad():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        assert caught[0].keys
        loss.backward()
    assert len(set(map(id, caught))) == 1 < len(caught), "the first layer was computed twice, with one holder"
    assert not (caught[0].queries or caught[0].keys or caught[0].values)


def test_a_second_backward_pass_with_checkpointing_is_refused():
    model = make_converted(FAMILIES[0], "leader").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens = random_tokens()
    with torch.enable_grad():
        loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="have been freed; with gradient checkpointing"):
            loss.backward()


@families
def test_autocast_lends_what_attention_takes(entry):
    model = make_converted(entry, "leader").train()
    base = make_base(entry).train()
    caught, tokens = catch_shared(model), random_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, use_cache=False)
        wanted = base(tokens, use_cache=False, output_hidden_states=True).hidden_states
        found = model(tokens, use_cache=False, output_hidden_states=True).hidden_states
    # Sinks are parameters.
    parts = [part for shared in caught for name, part in vars(shared).items() if name != "sinks"]
    lent = [states for part in parts for states in part.values()]
    assert lent and all(states.dtype == torch.bfloat16 for states in lent)
    first = next(index for index, plan in enumerate(model.config.layout) if plan.kind != "own")
    for index in range(first + 1):
        assert torch.equal(found[index], wanted[index]), "leaders compute what the base computes"


def test_reentrant_checkpointing_is_refused():
    model = make_converted(FAMILIES[0], "leader")
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})


@families
def test_unchanged_weights_are_shared_with_the_base(entry):
    base = make_base(entry)
    layout = make_layout("mixed", base.config)
    model = build_converted(base, layout)
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    for name, parameter in ours.items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        changed = layer is not None and layout[layer].kind != "own" and ".self_attn." in name
        if not changed:
            assert parameter is theirs[name], name
        elif "compensation" in name:
            assert parameter.abs().max() == 0
        elif "o_proj" in name:
            assert parameter.data_ptr() != theirs[name].data_ptr() and torch.equal(parameter, theirs[name])
        elif "qkv_proj" not in name:
            assert parameter is theirs[name], name


def test_pooled_heads_are_means_of_their_group():
    base = make_base(FAMILIES[0])
    model = build_converted(base, make_layout("pooled"))
    expected = base.model.layers[1].self_attn.k_proj.weight.view(3, 8, 48).mean(0)
    assert_close(model.model.layers[1].self_attn.k_proj.weight, expected)


def test_a_fused_projection_keeps_the_rows_of_its_kind():
    base = make_base(by_name("phi3"))
    kinds = [{}, {}, {"leader": 1}, {"kind": "key", "leader": 1}, {"kind": "kv", "leader": 1}, {"kind": "pooled"}]
    kinds[5]["kv_heads"] = 1
    model = build_converted(base, Layout.from_list(kinds))
    rows = [layer.self_attn.qkv_proj.weight.split([48, 24, 24]) for layer in base.model.layers]
    ours = [layer.self_attn.qkv_proj.weight for layer in model.model.layers]
    assert torch.equal(ours[2], rows[2][2])
    assert torch.equal(ours[3], torch.cat([rows[3][0], rows[3][2]]))
    assert torch.equal(ours[4], rows[4][0])
    means = [part.view(3, 8, 48).mean(0) for part in rows[5][1:]]
    assert_close(ours[5], torch.cat([rows[5][0], *means]))


def test_norms_over_all_heads_shrink_with_pooled_heads():
    base = make_base(by_name("olmo2"))
    attention = build_converted(base, make_layout("pooled")).model.layers[1].self_attn
    assert_close(attention.k_norm.weight, base.model.layers[1].self_attn.k_norm.weight.view(3, 8).mean(0))


def test_borrowing_across_sorts_of_layers_is_refused():
    for name in ("gemma2", "gemma3_text", "smollm3"):
        base = make_base(by_name(name))
        layout = Layout.from_list([{}, {}, {"leader": 1}] + [{}] * 9)
        with pytest.raises(ValueError, match="borrows from layer 1, whose mask type is"):
            build_converted(base, layout)


def test_every_family_has_a_tiny_model():
    assert {entry[1]().model_type for entry in FAMILIES} == set(RECORDS)


def by_name(name):
    return next(entry for entry in FAMILIES if entry[0] == name)


def test_adapters_and_hooks_see_queries_of_which_some_heads_are_asked_for():
    """A plain matrix is cut; whatever wraps one, or listens to it, is called."""
    torch.manual_seed(0)
    inputs, rows = torch.randn(2, 3, 5), slice(2, 6)

    class Adapted(torch.nn.Linear):
        def forward(self, given):
            return super().forward(given) + 1

    plain, adapted = torch.nn.Linear(5, 8), Adapted(5, 8)
    torch.testing.assert_close(some_rows(plain, inputs, rows), plain(inputs)[..., rows])
    torch.testing.assert_close(some_rows(adapted, inputs, rows), adapted(inputs)[..., rows])
    plain.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(some_rows(plain, inputs, rows), plain(inputs)[..., rows])
    rounded = torch.nn.Linear(5, 8)
    # As compressed-tensors does, which rounds inputs and scales weights there.
    rounded.forward = lambda given: torch.nn.functional.linear(given.round(), rounded.weight, rounded.bias)
    torch.testing.assert_close(some_rows(rounded, inputs, rows), rounded(inputs)[..., rows])
