"""Queries of layers that borrow keys learn the base's maps, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, backends, make_base, make_layout, typical_families
from tiny_run import convert_layers

from uniattn_cli import convert
from uniattn_cli.fitting import align_queries, rows
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.stream import positions_of, run_layer, start_batches
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_attention, build_converted
from uniattn_cli.recipe.schema import ConversionSpec

families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
STEPS = 40


@pytest.fixture(scope="module")
def windows():
    """A random walk over the vocabulary, longer than the windows of families that have them."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(-3, 4, (24, 32), generator=generator).cumsum(1) % 90 + 5


def fitted(base, layout, windows, steps, **options):
    """A converted model and its fits."""
    torch.manual_seed(0)
    model = build_converted(base, layout)
    return model, fit_layers(base, model, windows, ConversionSpec(align=steps, refine=0), batch_size=8, **options)


@typical_families
@pytest.mark.parametrize("name", ["key", "kv", "early"])
def test_maps_come_closer_to_the_base_and_only_their_queries_are_trained(entry, name, windows):
    base = make_base(entry)
    before = {key: weight.clone() for key, weight in base.named_parameters()}
    layout = make_layout(name, base.config)
    model, fits = fitted(base, layout, windows, STEPS)
    plain, without = fitted(base, layout, windows, 0)
    borrowing = [index for index, plan in enumerate(layout) if plan.traits.aligns_queries]
    assert [fit.layer for fit in fits if fit.divergence is not None] == borrowing
    assert all(fit.divergence is None for fit in without)
    for fit in fits:
        # Held-out tokens: a random walk has little in common with the next one, so that not every layer gains much.
        assert fit.divergence[1] < fit.divergence[0], fit
    assert sum(fit.divergence[1] for fit in fits) < 0.8 * sum(fit.divergence[0] for fit in fits)
    theirs = dict(plain.named_parameters())
    trained = {}
    for key, weight in model.named_parameters():
        if not torch.equal(weight, theirs[key]) and not any(part in key for part in ("o_proj", "compensation")):
            assert any(part in key for part in (".q_proj.", ".qkv_proj.", ".q_norm.")), key
            if "q_norm" not in key:
                trained[int(key.split(".")[2])] = weight, theirs[key]
    assert set(trained) == set(borrowing)
    for weight, other in trained.values():
        # Where queries and values are one matrix.
        rows = base.config.num_attention_heads * base.model.layers[0].self_attn.head_dim
        assert torch.equal(weight[rows:], other[rows:])
    assert all(torch.equal(weight, before[key]) for key, weight in base.named_parameters())


@families
def test_the_map_is_that_of_the_attention_backend(entry, windows):
    base = make_base(entry)
    if "eager" not in backends(base.config):
        pytest.skip("this family gives no maps")
    base.set_attn_implementation("eager")
    with torch.no_grad():
        expected = base.model(windows[:3], use_cache=False, output_attentions=True).attentions
        batch = start_batches(base, windows[:3], 0.3, 3)[0]
        for index, layer in enumerate(base.model.layers):
            own = build_attention(base, Layout.own(len(base.model.layers)), index)
            given = align_queries.attention_inputs(layer, batch.base, batch.kwargs[index])
            states = own.project(given["hidden_states"], "qk")
            own.embed_positions(states, *positions_of(given))
            scores = rows.scores(own, states["q"], states["k"])
            found = rows.masked(own, scores, given.get("attention_mask")).softmax(-1)
            found = found[..., : scores.shape[-1]]
            torch.testing.assert_close(found, expected[index][: len(found)], atol=1e-5, rtol=1e-4)
            # FlashAttention is given no mask, and windows as a number.
            without = rows.masked(own, scores, None).softmax(-1)
            torch.testing.assert_close(without[..., : scores.shape[-1]], found)
            batch.base = layer(batch.base, **batch.kwargs[index])


@families
def test_gradients_are_those_of_the_divergence(entry, windows):
    base = make_base(entry)
    layout = make_layout("key", base.config)
    index = next(index for index, plan in enumerate(layout) if plan.kind == "key")
    model = build_converted(base, layout)
    with torch.no_grad():
        batch = start_batches(base, windows[:3], 0.3, 3)[0]
        for layer, kwargs in zip(model.model.layers[:index], batch.kwargs, strict=False):
            batch.base = run_layer(layer, batch.base, kwargs, uniattn_shared=batch.shared)
        batch.converted = batch.base
        own = build_attention(base, Layout.own(len(base.model.layers)), index)
        layer = model.model.layers[index]
        material = align_queries._prepare(base.model.layers[index], layer, own, index, batch)
        trained = align_queries._Queries(layer.self_attn).trained
        found = align_queries._gradients(trained, layer.self_attn, own, material)
    expected = torch.autograd.grad(align_queries._divergence(layer.self_attn, own, material), trained)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max().item() + 1e-7)


def test_keys_that_are_the_same_need_no_other_queries(windows):
    """Borrowed keys that a rotation of each pair of dimensions makes of the own ones can be met exactly."""
    base = make_base(FAMILIES[0])
    first, second = (base.model.layers[index].self_attn for index in (1, 2))
    layout = Layout.from_list([{}, {}, {"kind": "key", "leader": 1}, {}, {}, {}])
    with torch.no_grad():
        # Layer 1 adds nothing, so that layer 2 sees what it saw, up to the norms' weights.
        base.model.layers[1].mlp.down_proj.weight.zero_()
        first.o_proj.weight.zero_()
        half = second.k_proj.weight.unflatten(0, (-1, 2, second.head_dim // 2))
        # A quarter turn of every pair, which commutes with rotary embedding.
        first.k_proj.weight.copy_(torch.stack((-half[:, 1], half[:, 0]), dim=1).flatten(0, 2))
        base.model.layers[1].input_layernorm.weight.copy_(base.model.layers[2].input_layernorm.weight)
    _, [fit] = fitted(base, layout, windows, 400)
    assert fit.divergence[0] > 0.5 and fit.divergence[1] < 0.05 * fit.divergence[0]


def test_little_memory_takes_fewer_rows_at_once_and_gains_the_same(windows, monkeypatch):
    base = make_base(FAMILIES[0])
    layout = make_layout("kv", base.config)
    monkeypatch.setattr(rows, "STEP_TOKENS", 5 * 32)
    plain = align_queries._gradients
    found = {}
    for most, pieces in ((5, [5]), (2, [2, 2, 1])):
        monkeypatch.setattr(rows, "MOST_SCORES", most * 6 * 32 * 32)
        seen = []
        monkeypatch.setattr(
            align_queries,
            "_gradients",
            lambda *arguments, seen=seen: seen.append(len(arguments[-1])) or plain(*arguments),
        )
        _, found[most] = fitted(base, layout, windows, STEPS)
        assert seen == pieces * (STEPS * len(found[most]))
    for one, two in zip(*found.values(), strict=True):
        assert one.divergence[1] < one.divergence[0]
        assert two.divergence == pytest.approx(one.divergence, rel=0.02)


def test_the_same_seed_gives_the_same_queries(windows):
    base = make_base(FAMILIES[0])
    layout = make_layout("key", base.config)
    one, two = (fitted(base, layout, windows, 10)[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_convert_aligns_and_reports(tiny_runs, tmp_path):
    layers = "[{}, {}, {kind: kv, leader: 1}, {}, {kind: key, leader: 3}, {}]"
    result, fits = convert_layers(tiny_runs / "analysed", tmp_path / "run", layers)
    assert [len(fit["divergence"]) for fit in fits] == [2, 2]
    assert any("aligned queries" in table.title for table in result.tables)
    assert not any("noise" in note for note in result.notes)


@pytest.mark.parametrize(("layer", "count"), [("{kind: early, leader: 3}", 1), ("{leader: 3}", 0)])
def test_queries_that_nothing_aligns_are_told(tiny_runs, monkeypatch, layer, count):
    monkeypatch.chdir(tiny_runs / "analysed")
    layers = f"layout.layers=[{{}}, {{}}, {{}}, {{}}, {layer}, {{}}]"
    result = convert(overrides=[layers, "conversion.align=0"], dry_run=True)
    assert sum("maps are noise, in layers 4" in note for note in result.notes) == count
