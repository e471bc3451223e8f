"""Queries matched to borrowed keys in closed form: exact where keys are functions of one another, used everywhere."""

from __future__ import annotations

import pytest
import torch
from test_sources import PLENTY, arrive, matcher_of, windows
from tiny import FAMILIES, make_base

from uniattn_cli.fitting.align_queries import _Queries
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_keys import InputMatches, KeyMatches, matched, unrotated
from uniattn_cli.fitting.match_outputs import Block, Borrowing, SourceChooser, candidate_blocks
from uniattn_cli.fitting.stream import attention_inputs, positions_of, start_batches
from uniattn_cli.layouts.trials import Trials
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.modeling.sharing_uniattn import SharedStates
from uniattn_cli.models.building import build_attention, build_converted
from uniattn_cli.recipe.schema import ConversionSpec

families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def own_states(base, index, tokens=None):
    """A batch before layer `index`, the layer's own attention module, what it is called with, and its states."""
    shape = attention_shape(base.config)
    own = build_attention(base, Layout.own(shape.layers), index)
    batch = start_batches(base, windows(6, 1) if tokens is None else tokens, 0.0, 6)[0]
    batch.held = False
    given = attention_inputs(base.model.layers[index], batch.base, batch.kwargs[index])
    return batch, own, given, own.project(given["hidden_states"], "qk")


@families
def test_rotary_embedding_is_undone(entry):
    base = make_base(entry)
    for index in range(2):
        _, own, given, states = own_states(base, index)
        rotated = dict(states)
        own.embed_positions(rotated, *positions_of(given))
        torch.testing.assert_close(
            unrotated(own, rotated["k"], given["position_embeddings"]), states["k"], atol=1e-5, rtol=1e-5
        )


@families
def test_keys_that_are_functions_of_the_borrowed_ones_are_met(entry):
    """Lent heads: a linear function of the own keys in another order, shifted; and noise."""
    base = make_base(entry)
    index = len(base.model.layers) - 1
    _, own, given, states = own_states(base, index)
    keys = states["k"].float()
    generator = torch.Generator().manual_seed(0)
    heads, dim = keys.shape[1], keys.shape[-1]
    turns = 2 * torch.linalg.qr(torch.randn(heads, dim, dim, generator=generator)).Q
    order = torch.randperm(heads, generator=generator)
    lent = {"k": (keys @ turns + torch.randn(heads, 1, dim, generator=generator))[:, order]}
    own.embed_positions(lent, *positions_of(given))
    shared = SharedStates()
    shared.lend(0, None, torch.randn(keys.shape, generator=generator), None)
    shared.lend(1, None, lent["k"].to(states["k"].dtype), None)
    matches = KeyMatches(own, [0, 1])
    matches.add(given, shared)
    pairs = [(1, order.tolist().index(unit)) for unit in range(heads)]
    for unit, (source, head) in enumerate(pairs):
        assert matches.unexplained(source, head, unit) < 0.02
        assert matches.unexplained(0, head, unit) > 0.1
    # A query has the same scores as before with all keys, but for a number that is the same for all of them.
    units = torch.tensor([head for _, head in pairs])
    queries = matched(states["q"], matches.maps(pairs)).float()
    unturned = unrotated(own, lent["k"], given["position_embeddings"])[:, units]
    group = queries.shape[1] // heads
    found = queries @ unturned.repeat_interleave(group, 1).mT
    wanted = states["q"].float() @ keys.repeat_interleave(group, 1).mT
    found, wanted = (scores - scores.mean(-1, keepdim=True) for scores in (found, wanted))
    assert (found - wanted).square().mean() < 0.02 * wanted.square().mean()


@families
def test_weights_give_the_matched_queries(entry):
    """W_q with B in it is B after W_q; where queries are normed, up to their length."""
    base = make_base(entry)
    index = len(base.model.layers) - 1
    shape = attention_shape(base.config)
    lender = next(i for i in range(shape.layers) if shape.mask_types[i] == shape.mask_types[index])
    layout = Layout.own(shape.layers).with_plan(index, LayerPlan("key", leader=lender))
    model = build_converted(base, layout)
    attention = model.model.layers[index].self_attn
    _, _, given, states = own_states(base, index)
    maps = torch.randn(shape.kv_heads, shape.head_dim, shape.head_dim, generator=torch.Generator().manual_seed(0))
    wanted = matched(states["q"], maps)
    weights = _Queries(attention)
    weights.match(maps, None)
    weights.round()
    found = attention.project(given["hidden_states"], "q")["q"]
    if weights.norm is not None:
        whole = (1, 3) if weights.norm.weight.numel() > shape.head_dim else 3
        wanted, found = (each / each.norm(dim=whole, keepdim=True) for each in (wanted, found))
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["key", "kv", "early", "early-kv"])
def test_features_are_those_of_a_layer_with_matched_queries(kind):
    base = make_base(FAMILIES[0])
    shape, index = attention_shape(base.config), 5
    blocks = [Block(0, 3, (2,)), Block(1, 2, (0,)), Block(2, 3, (1,))]
    pairs = [(block.source, block.heads[0]) for block in blocks]
    model = build_converted(base, Layout.own(6).with_plan(index, LayerPlan(kind, heads=tuple(pairs))))
    layer = model.model.layers[index]
    tokens = windows(3, 1)
    batch = arrive(base, model, tokens, index)
    own = build_attention(base, Layout.own(6), index)
    matches = KeyMatches.of(base.model.layers[index], own, index, [batch], [2, 3])
    given = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
    inputs = None
    if layer.self_attn.plan.traits.early:
        inputs = InputMatches.of(base.model.layers[index], own, index, [batch], [2, 3], 1)
    problem = Borrowing(base.model.layers[index], layer, own, index, kind, shape, matches, inputs)
    found = problem.features(given, batch.shared, blocks)
    weights = _Queries(layer.self_attn)
    weights.match(matches.maps(pairs), inputs)
    seen = []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(tokens, use_cache=False)
    torch.testing.assert_close(found, seen[0].flatten(0, 1), atol=1e-5, rtol=1e-4)


@families
def test_an_input_that_follows_from_the_lenders_is_met(entry):
    """Queries from the lender's input are those from the own one, where that is a linear function of it."""
    base = make_base(entry)
    index = len(base.model.layers) - 1
    shape = attention_shape(base.config)
    lender = next(i for i in range(shape.layers) if shape.mask_types[i] == shape.mask_types[index])
    batch, own, given, states = own_states(base, index)
    turn = torch.linalg.qr(torch.randn(shape.hidden_size, shape.hidden_size)).Q
    lent = given["hidden_states"] @ turn
    shift = 0.3 if own.project(torch.zeros_like(lent), "q")["q"].any() else 0.0  # what only a bias can undo
    batch.shared.inputs[lender] = lent + shift
    inputs = InputMatches.of(base.model.layers[index], own, index, [batch], [lender], 1)
    torch.testing.assert_close(inputs.estimate(lender, lent + shift), given["hidden_states"], atol=2e-2, rtol=2e-2)
    layout = Layout.own(shape.layers).with_plan(index, LayerPlan("early", leader=lender))
    attention = build_converted(base, layout).model.layers[index].self_attn
    weights = _Queries(attention)
    weights.match(torch.eye(shape.head_dim).expand(shape.kv_heads, -1, -1), inputs)
    weights.round()
    found, wanted = attention.early_queries(batch.shared.inputs, lent.device), states["q"]
    if weights.norm is not None:
        whole = (1, 3) if weights.norm.weight.numel() > shape.head_dim else 3
        wanted, found = (each / each.norm(dim=whole, keepdim=True) for each in (wanted, found))
    torch.testing.assert_close(found, wanted, atol=3e-2, rtol=3e-2)


def test_the_head_with_the_most_telling_keys_is_borrowed():
    """Maps are said to be alike elsewhere; keys of one layer are those of the follower, each pair turned and scaled."""
    base = make_base(FAMILIES[0])
    first, second = (base.model.layers[index].self_attn for index in (2, 4))
    for index in (2, 3):
        base.model.layers[index].mlp.down_proj.weight.zero_()
        base.model.layers[index].self_attn.o_proj.weight.zero_()
    generator = torch.Generator().manual_seed(3)
    # Rotations of the pairs of dimensions that rotary embedding rotates: it does not stand in their way.
    real, imaginary = torch.randn(2, 3, 4, 1, generator=generator)
    one, two = second.k_proj.weight.view(3, 2, 4, -1)[[2, 0, 1]].unbind(1)
    turned = torch.cat((real * one - imaginary * two, imaginary * one + real * two), dim=1)
    first.k_proj.weight.copy_(turned.flatten(0, 1))
    base.model.layers[2].input_layernorm.weight.copy_(base.model.layers[4].input_layernorm.weight)
    matcher = matcher_of(base)
    layout = Layout.own(6).with_plan(4, LayerPlan("key", leader=3, compensation="full"))
    found = {}
    for match_keys in (True, False):
        model = build_converted(base, layout)
        chooser = SourceChooser(matcher, matcher.lenders, PLENTY, match_keys=match_keys)
        [fit] = fit_layers(base, model, windows(20, 3), ConversionSpec(align=60, refine=0), chooser=chooser)
        found[match_keys] = model.config.layout[4].heads, fit
    heads, fit = found[True]
    assert heads == ((2, 1), (2, 2), (2, 0))
    assert fit.divergence[1] < 0.05 * fit.divergence[0]
    assert fit.error_after < 0.2 * found[False][1].error_after
    # With room for few candidates, those are the ones that are kept.
    shape = attention_shape(base.config)
    own = build_attention(base, Layout.own(6), 4)
    batch = arrive(base, build_converted(base, Layout.own(6)), windows(20, 3), 4)
    matches = KeyMatches.of(base.model.layers[4], own, 4, [batch], [1, 2, 3])
    blocks = candidate_blocks(matcher, 4, [3, 2, 1], "key", 1, matches=matches)
    assert len(blocks) == 2 * shape.kv_heads and {Block(0, 2, (1,)), Block(1, 2, (2,)), Block(2, 2, (0,))} <= {*blocks}


def test_trials_align_for_a_part_of_the_steps(monkeypatch):
    base = make_base(FAMILIES[0])
    steps = []
    from uniattn_cli.fitting import fit

    plain = fit.align_queries
    monkeypatch.setattr(fit, "align_queries", lambda *arguments: steps.append(arguments[-1]) or plain(*arguments))
    divergences = {}
    for align in (40, 0):
        trials = Trials(base, windows(12, 3), windows(6, 4), ConversionSpec(align=align))
        layout = Layout.own(6).with_plan(4, LayerPlan("key", leader=3, compensation="full"))
        divergences[align] = trials.convert(layout).divergence
        assert set(steps) == {10} if align else not steps
        steps.clear()
    assert divergences[40] < divergences[0]
