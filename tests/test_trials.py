"""Trials measure what a really converted model has, leave no trace, and see redundancy that was planted."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, make_base, make_layout

from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.layouts.trials import Trial, Trials
from uniattn_cli.modeling.layout_uniattn import LayerPlan, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.recipe.schema import ConversionSpec

QUICK = ConversionSpec(align=20)


def windows(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, 32), generator=generator).cumsum(1) % 90 + 5


def trials_of(base, rows=24):
    return Trials(base, windows(rows, 1), windows(4, 2), QUICK, batch_size=8)


def following(layout, layer, leader):
    return layout.with_plan(layer, LayerPlan("softmax", leader=leader, compensation="full"))


def divergence_of(base, layout, spec):
    """Of a model that is converted as a whole."""
    model, tokens = build_converted(base, layout), windows(4, 2)
    fit_layers(base, model, windows(24, 1), spec, batch_size=8)
    with torch.no_grad():
        base_logp = base(tokens).logits.log_softmax(-1)
        logp = model(tokens).logits.log_softmax(-1)
    return (base_logp.exp() * (base_logp - logp)).sum(-1).mean().item()


@pytest.mark.parametrize("order", [(2, 3, 5), (5, 2, 3)])
def test_divergence_is_that_of_the_converted_model(order):
    """Whether a layer is changed before or after those that stand behind it."""
    base = make_base(FAMILIES[0])
    trials = trials_of(base)
    for layer in order:
        found = trials.convert(following(trials.layout, layer, 1), keep=True)
    assert trials.layout.changed == [2, 3, 5] and found.layout == trials.layout
    assert found.divergence == pytest.approx(divergence_of(base, trials.layout, trials.spec), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi3", "olmo2"])
def test_divergence_is_that_of_the_converted_model_in_other_families(name):
    """Capped and divided logits, fused projections, norms after the attention block."""
    base = make_base(next(entry for entry in FAMILIES if entry[0] == name))
    layout = make_layout("mixed", base.config)
    trials = trials_of(base)
    measured = trials.convert(layout).divergence
    assert measured == pytest.approx(divergence_of(base, layout, trials.spec), rel=1e-3)


def test_a_trial_leaves_no_trace():
    trials = trials_of(make_base(FAMILIES[0]), 12)
    first, other, again = (trials.convert(following(trials.layout, layer, layer - 1)) for layer in (3, 5, 3))
    assert first.divergence == again.divergence != other.divergence
    assert trials.layout.changed == []


def test_planted_redundancy_costs_nothing():
    base = make_base(FAMILIES[0])
    with torch.no_grad():
        source, copy = base.model.layers[3], base.model.layers[4]
        source.self_attn.o_proj.weight.zero_()
        source.mlp.down_proj.weight.zero_()
        copy.input_layernorm.load_state_dict(source.input_layernorm.state_dict())
        for name in ("q_proj", "k_proj"):
            getattr(copy.self_attn, name).load_state_dict(getattr(source.self_attn, name).state_dict())
    trials = trials_of(base)
    lost = {layer: trials.convert(following(trials.layout, layer, layer - 1)).divergence for layer in range(1, 6)}
    assert lost[3] < 1e-6 and lost[4] < 1e-6 < 1e-4 < min(lost[1], lost[2], lost[5])


def test_a_trial_that_overflows_is_the_worst():
    trials = trials_of(make_base(FAMILIES[0]), 12)
    finals = [states[-1].clone() for states in trials.score_states]
    finals[0][0, 3, 5] = float("nan")
    assert Trial(Layout.own(6), trials._divergences(finals)).divergence == float("inf")
