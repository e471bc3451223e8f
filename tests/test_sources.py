"""Heads matched by output: what is compared is what a converted model computes, and the choice is the best there is."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from tiny import FAMILIES, TYPICAL, families, make_base, make_layout

from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.fitting.match_outputs import (
    RIDGE,
    Block,
    BlockChoice,
    Borrowing,
    Limits,
    SourceChooser,
    candidate_blocks,
)
from uniattn_cli.fitting.moments import Moments
from uniattn_cli.fitting.stream import attention_inputs, run_layer, start_batches
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import BORROWING_KINDS, LayerPlan, Layout
from uniattn_cli.models.building import build_attention, build_converted
from uniattn_cli.recipe.schema import ConversionSpec

MAPS = ("softmax grouped", "softmax free", "key", "kv")
PLENTY = Limits(features=4096, tokens=4096)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def windows(rows, seed, length=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, length), generator=generator).cumsum(1) % 90 + 5


def random_blocks(shape, index, name, seed):
    """A random head map of layer `index` as blocks: any head of any earlier layer of its sort."""
    pick = random.Random(seed)
    earlier = [layer for layer in range(index) if shape.mask_types[layer] == shape.mask_types[index]]
    blocks = []
    for unit in range(shape.query_heads if name == "softmax free" else shape.kv_heads):
        if name == "softmax free":
            heads = (pick.randrange(shape.query_heads),)
        else:
            group = pick.randrange(shape.kv_heads)
            first = group * shape.group_size
            heads = tuple(range(first, first + shape.group_size)) if name == "softmax grouped" else (group,)
        blocks.append(Block(unit, pick.choice(earlier), heads))
    return blocks


def arrive(base, model, tokens, index):
    """A batch before layer `index`, after all layers before it, which lend all that they have."""
    for layer in model.model.layers:
        layer.self_attn.lend_to(None)
    (batch,) = start_batches(base, tokens, 0.0, len(tokens))
    for before in range(index):
        layer = model.model.layers[before]
        batch.converted = run_layer(layer, batch.converted, batch.kwargs[before], uniattn_shared=batch.shared)
    batch.base = batch.converted
    return batch


@families(*TYPICAL, "gpt_oss")
@pytest.mark.parametrize("name", MAPS)
def test_features_are_what_the_output_projection_of_a_converted_model_sees(entry, name):
    base = make_base(entry)
    shape, tokens, kind = attention_shape(base.config), windows(3, 1), name.split()[0]
    for index in {shape.layers - 1, shape.layers - 2}:
        for seed in range(2):
            blocks = random_blocks(shape, index, name, seed)
            heads = tuple((block.source, head) for block in blocks for head in block.heads)
            layout = Layout.own(shape.layers).with_plan(index, LayerPlan(kind, heads=heads))
            assert layout.problems(shape) == []
            model = build_converted(base, layout)
            attention, seen = model.model.layers[index].self_attn, []
            handle = getattr(attention, attention.output_name).register_forward_pre_hook(
                lambda module, args, seen=seen: seen.append(args[0])
            )
            model(tokens, use_cache=False)
            handle.remove()
            batch = arrive(base, model, tokens, index)
            layer = model.model.layers[index]
            given = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
            own = build_attention(base, Layout.own(shape.layers), index)
            problem = Borrowing(base.model.layers[index], layer, own, index, kind, shape)
            found = problem.features(given, batch.shared, blocks)
            torch.testing.assert_close(found, seen[0].flatten(0, 1), atol=1e-5, rtol=1e-5)


# --- the choice among blocks ------------------------------------------------------------------------------------------


def random_problem(seed, units=3, options=4, size=2, hidden=5, rows=60, targets=4):
    """Correlated features of `units` times `options` blocks and x, and a target that depends on some of them."""
    generator = torch.Generator().manual_seed(seed)
    width = units * options * size + hidden
    features = torch.randn(rows, width, generator=generator) @ torch.randn(width, width, generator=generator)
    used = torch.randn(width, targets, generator=generator) * (torch.rand(width, 1, generator=generator) < 0.3)
    target = features @ used + torch.randn(rows, targets, generator=generator)
    moments = Moments(width, targets, torch.device("cpu"))
    moments.add(features, target)
    blocks = [Block(unit, source, (source,)) for unit in range(units) for source in range(options)]
    return moments, BlockChoice(moments, hidden, blocks), features.double(), target.double()


def explained_directly(features, target, hidden, size, chosen):
    """Energy explained by x and the chosen blocks together less that by x alone, with the same ridge, from all rows."""
    start = features.shape[1] - hidden
    diagonal = features.square().sum(0)
    penalty = torch.cat(
        [(RIDGE * diagonal[:start].mean()).expand(start), (RIDGE * diagonal[start:].mean()).expand(hidden)]
    )

    def energy(columns):
        part = features[:, columns]
        stacked = torch.cat([part, penalty[columns].sqrt().diag()])
        padded = torch.cat([target, torch.zeros(len(columns), target.shape[1], dtype=target.dtype)])
        weights = torch.linalg.lstsq(stacked, padded).solution
        return (part @ weights * target).sum().item()

    x = list(range(start, start + hidden))
    taken = [place for number in chosen for place in range(number * size, (number + 1) * size)]
    return energy(taken + x) - energy(x)


@pytest.mark.parametrize("seed", range(3))
def test_gains_equal_direct_least_squares(seed):
    _, choice, features, target = random_problem(seed)
    numbers = range(len(choice.blocks))
    for chosen in ([], [1], [0, 6], [2, 5, 9]):
        before = explained_directly(features, target, 5, 2, chosen) if chosen else 0.0
        if chosen:
            assert choice.explained(chosen) == pytest.approx(before, rel=1e-5)
        candidates = [number for number in numbers if number not in chosen]
        expected = [explained_directly(features, target, 5, 2, [*chosen, number]) - before for number in candidates]
        scale = max(expected)
        assert choice.gains(chosen, candidates).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5 * scale)


def test_a_block_that_is_zero_or_there_twice_adds_nothing():
    moments, _, features, target = random_problem(0)
    features[:, 2:4] = features[:, :2]
    features[:, 4:6] = 0
    moments = Moments(features.shape[1], target.shape[1], torch.device("cpu"))
    moments.add(features, target)
    choice = BlockChoice(moments, 5, [Block(0, source, (0,)) for source in range(12)])
    gains = choice.gains([0], [1, 2, 3])
    assert gains.isfinite().all()
    # The ridge leaves a little that a second copy can explain.
    assert gains[0] < 0.01 * gains[2] and gains[1] == 0


def every_choice(choice):
    by_unit = {}
    for number, block in enumerate(choice.blocks):
        by_unit.setdefault(block.unit, []).append(number)
    return list(itertools.product(*by_unit.values()))


@pytest.mark.parametrize("seed", range(12))
def test_no_single_exchange_is_better_than_the_choice(seed):
    _, choice, _, _ = random_problem(seed)
    explained, found = choice.descend(range(len(choice.blocks)))
    numbers = [choice.blocks.index(block) for block in found]
    assert [block.unit for block in found] == [0, 1, 2]
    assert explained == pytest.approx(choice.explained(numbers))
    for other in every_choice(choice):
        if sum(a != b for a, b in zip(other, numbers, strict=True)) == 1:
            assert choice.explained(other) <= explained * (1 + 1e-9)


def test_the_choice_is_nearly_always_the_best_of_all():
    shares = []
    for seed in range(30):
        _, choice, _, _ = random_problem(seed)
        best = max(choice.explained(numbers) for numbers in every_choice(choice))
        shares.append(choice.descend(range(len(choice.blocks)))[0] / best)
    assert max(shares) == pytest.approx(1) and min(shares) > 0.9
    assert sum(share > 1 - 1e-9 for share in shares) >= 20


# --- the chooser ------------------------------------------------------------------------------------------------------


def matcher_of(base, head_map="grouped", sources="several", seed=0, distance=3):
    """Similarities that have nothing to do with the model."""
    shape = attention_shape(base.config)
    size = (shape.layers, distance, shape.query_heads, shape.query_heads)
    return Matcher(np.random.default_rng(seed).random(size), shape, head_map, sources)


def planted(places):
    """A model whose layer 4 has, group by group, the maps of the groups (layer, group) named: layers 2 and 3 add
    nothing to the hidden states, so that what arrives at 2, 3 and 4 is the same."""
    base = make_base(FAMILIES[0])
    layers = base.model.layers
    for index in (2, 3):
        layers[index].self_attn.o_proj.weight.zero_()
        layers[index].mlp.down_proj.weight.zero_()
    for index in (3, 4):
        layers[index].input_layernorm.load_state_dict(layers[2].input_layernorm.state_dict())
    for unit, (layer, group) in enumerate(places):
        for name, rows in (("q_proj", 16), ("k_proj", 8)):
            source = getattr(layers[layer].self_attn, name).weight
            target = getattr(layers[4].self_attn, name).weight
            target[unit * rows : (unit + 1) * rows] = source[group * rows : (group + 1) * rows]
    return base


def fitted(base, layout, chooser=None):
    model = build_converted(base, layout)
    (fit,) = fit_layers(base, model, windows(60, 3), ConversionSpec(refine=0), chooser=chooser)
    return model.config.layout, fit


@pytest.mark.parametrize("places", [((3, 2), (2, 0), (3, 0)), ((2, 1), (2, 1), (3, 1))])
def test_planted_redundancy_is_found_where_similarity_misleads(places):
    base = planted(places)
    matcher = matcher_of(base)
    match = matcher.match(4, matcher.candidates(4))
    by_similarity = Layout.own(6).with_plan(4, LayerPlan("softmax", heads=match.sources, compensation="full"))
    _, before = fitted(base, by_similarity)
    layout, after = fitted(base, by_similarity, SourceChooser(matcher, matcher.lenders, PLENTY))
    assert layout.problems(attention_shape(base.config)) == []
    assert [(layer, head // 2) for layer, head in layout[4].heads[::2]] == list(places)
    # Within a group, each head is borrowed once.
    assert all(len(set(layout[4].heads[start : start + 2])) == 2 for start in (0, 2, 4))
    assert after.error_after < 0.02 * before.error_after


@pytest.mark.parametrize("head_map", ["grouped", "free"])
@pytest.mark.parametrize("sources", ["one", "several"])
@pytest.mark.parametrize("kind", BORROWING_KINDS)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_choices_are_legal_whatever_the_limits(head_map, sources, kind, seed):
    base = make_base(FAMILIES[0])
    shape = attention_shape(base.config)
    layout = Layout.own(6)
    for layer in (4, 5):
        layout = layout.with_plan(layer, LayerPlan(kind, leader=3, compensation="full"))
    matcher = matcher_of(base, head_map, sources, seed)
    # So few features that each unit may keep two blocks only.
    chooser = SourceChooser(matcher, matcher.lenders, Limits(features=1, tokens=256))
    model = build_converted(base, layout)
    fit_layers(base, model, windows(20, 3), ConversionSpec(align=4, refine=0), chooser=chooser)
    found = model.config.layout
    assert found.problems(shape) == [] and found.changed == [4, 5]
    for layer in found.changed:
        assert found[layer].kind == kind and found[layer].compensation == "full"
        assert sources == "several" or len(found[layer].source_layers) == 1
        assert min(found[layer].source_layers) >= layer - matcher.max_distance


def test_one_source_is_the_layer_that_explains_most():
    base = planted(((2, 2), (2, 0), (2, 1)))
    matcher = matcher_of(base, sources="one")
    layout = Layout.own(6).with_plan(4, LayerPlan("softmax", leader=3, compensation="full"))
    found, fit = fitted(base, layout, SourceChooser(matcher, matcher.lenders, PLENTY))
    assert found[4].source_layers == (2,) and fit.error_after < 0.01


def test_an_identity_map_and_layers_that_borrow_nothing_are_left_alone():
    base = make_base(FAMILIES[0])
    identity = matcher_of(base, "identity")
    layout = make_layout("others")
    for matcher in (identity, matcher_of(base)):
        model = build_converted(base, layout)
        fit_layers(
            base,
            model,
            windows(12, 3),
            ConversionSpec(refine=0),
            chooser=SourceChooser(matcher, matcher.lenders, PLENTY),
        )
        kept = layout.changed if matcher is identity else [3, 4]
        assert all(model.config.layout[layer] == layout[layer] for layer in kept)


def test_a_leader_farther_away_than_was_measured_is_kept():
    base = make_base(FAMILIES[0])
    matcher = matcher_of(base, distance=2)
    layout = Layout.from_list([{}] + [{"leader": 0}] * 5)

    def leaders(layout, layer):
        return [other for other in layout[layer].source_layers if layer - other <= 2]

    model = build_converted(base, layout)
    fits = fit_layers(
        base, model, windows(12, 3), ConversionSpec(refine=0), chooser=SourceChooser(matcher, leaders, PLENTY)
    )
    assert [fit.layer for fit in fits] == [1, 2, 3, 4, 5]
    assert [plan.source_layers for plan in model.config.layout][1:] == [(0,)] * 5
    assert [plan.leader for plan in model.config.layout][3:] == [0] * 3


def test_the_same_sources_whether_searched_or_converted():
    """What the choice is made from does not depend on what was borrowed before."""
    base = make_base(FAMILIES[0])
    matcher = matcher_of(base)
    chooser = SourceChooser(matcher, matcher.lenders, PLENTY)
    plans = [LayerPlan("softmax", leader=leader, compensation="full") for leader in (1, 3)]
    found = [fitted(base, Layout.own(6).with_plan(4, plan), chooser)[0][4] for plan in plans]
    assert found[0] == found[1]


def test_candidates_are_the_most_similar_blocks():
    base = make_base(FAMILIES[0])
    matcher = matcher_of(base)
    shape = matcher.shape
    blocks = candidate_blocks(matcher, 5, [4, 3, 2], "softmax", 3 * shape.query_heads * shape.head_dim)
    assert len(blocks) == 3 * shape.kv_heads
    for unit in range(shape.kv_heads):
        scores = {}
        for source in (4, 3, 2):
            for group in range(shape.kv_heads):
                table = matcher.similarity[5, 4 - source, unit * 2 : unit * 2 + 2, group * 2 : group * 2 + 2]
                scores[source, group] = table.max(1).sum()
        best = sorted(scores, key=scores.get, reverse=True)[:3]
        assert [(block.source, block.heads[0] // 2) for block in blocks if block.unit == unit] == best
