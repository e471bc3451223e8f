"""The thorough search measures what a really converted model has, and finds redundancy that was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import FAMILIES, make_base, make_layout

from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.budget import Budget
from uniattn_cli.layouts.greedy import ThoroughSearch
from uniattn_cli.layouts.thorough import proposer
from uniattn_cli.layouts.trials import Trial
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import CHANGED_KINDS, AttentionShape, LayerPlan, Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.recipe.schema import ConversionSpec, LayoutSpec

QUICK = ConversionSpec(align=20)


def windows(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (rows, 32), generator=generator).cumsum(1) % 90 + 5


def nearest_leader(layout, layer):
    own = [index for index in range(layer) if layout[index].kind == "own"]
    return [LayerPlan("softmax", leader=own[-1], compensation="full")] if own else []


def divergence(base, model, tokens):
    with torch.no_grad():
        base_logp = base(tokens).logits.log_softmax(-1)
        logp = model(tokens).logits.log_softmax(-1)
    return (base_logp.exp() * (base_logp - logp)).sum(-1).mean().item()


def test_divergence_is_that_of_the_converted_model():
    base = make_base(FAMILIES[0])
    fit, score, spec = windows(24, 1), windows(4, 2), QUICK
    search = ThoroughSearch(base, fit, score, spec, nearest_leader, batch_size=8)
    steps = search.run(lambda layout: len(layout.changed) >= 3)
    assert [len(step.layout.changed) for step in steps] == [1, 2, 3]
    for step in steps[:2]:
        assert step.measured >= 1
    model = build_converted(base, steps[-1].layout)
    fit_layers(base, model, fit, search.spec, batch_size=8)
    assert steps[-1].divergence == pytest.approx(divergence(base, model, score), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi3", "olmo2"])
def test_divergence_is_that_of_the_converted_model_in_other_families(name):
    """Capped and divided logits, fused projections, norms after the attention block."""
    base = make_base(next(entry for entry in FAMILIES if entry[0] == name))
    layout = make_layout("mixed", base.config)
    fit, score, spec = windows(24, 1), windows(4, 2), QUICK
    search = ThoroughSearch(base, fit, score, spec, nearest_leader, batch_size=8)
    measured = search.measure(layout)
    model = build_converted(base, layout)
    fit_layers(base, model, fit, search.spec, batch_size=8)
    assert measured == pytest.approx(divergence(base, model, score), rel=1e-3)


def test_a_candidate_leaves_no_trace():
    base = make_base(FAMILIES[0])
    search = ThoroughSearch(base, windows(12, 1), windows(4, 2), QUICK, nearest_leader, batch_size=8)
    layouts = [search.candidate_layout(layer, nearest_leader(search.layout, layer)[0]) for layer in (3, 5, 3)]
    first, other, again = (search.measure(layout) for layout in layouts)
    assert first == again and first != other
    assert search.layout.changed == []


def test_planted_redundancy_is_found_first():
    base = make_base(FAMILIES[0])
    with torch.no_grad():
        source, copy = base.model.layers[3], base.model.layers[4]
        source.self_attn.o_proj.weight.zero_()
        source.mlp.down_proj.weight.zero_()
        copy.input_layernorm.load_state_dict(source.input_layernorm.state_dict())
        for name in ("q_proj", "k_proj"):
            getattr(copy.self_attn, name).load_state_dict(getattr(source.self_attn, name).state_dict())
    search = ThoroughSearch(base, windows(24, 1), windows(4, 2), QUICK, nearest_leader, batch_size=8)
    (step,) = search.run(lambda layout: len(layout.changed) >= 1)
    assert step.divergence < 1e-6
    assert step.layer in (3, 4)


def test_protected_layers_stay():
    base = make_base(FAMILIES[0])
    search = ThoroughSearch(base, windows(12, 1), windows(2, 2), QUICK, nearest_leader, batch_size=8)
    steps = search.run(lambda layout: len(layout.changed) >= 2, protect=(1, 2, 3))
    assert {step.layer for step in steps} <= {4, 5}


def test_borrowers_of_a_changed_source_get_new_sources():
    base = make_base(FAMILIES[0])
    search = ThoroughSearch(base, windows(12, 1), windows(2, 2), QUICK, nearest_leader, batch_size=8)
    search.measure(search.candidate_layout(4, LayerPlan("softmax", leader=3, compensation="full")), keep=True)
    layout = search.candidate_layout(3, LayerPlan("softmax", leader=2, compensation="full"))
    assert layout[4].leader == 2 and layout[3].leader == 2
    assert layout.problems(search.shape) == []
    assert search.measure(layout) > 0


def make_proposer(kinds, types=None):
    similarity = np.random.default_rng(0).random((6, 3, 6, 6))
    shape = AttentionShape(6, 3, 8, 48, types or ("full_attention",) * 6)
    return proposer(Matcher(similarity, shape, "grouped", "several"), kinds, 4), shape


def test_every_kind_is_proposed_legally():
    kinds = CHANGED_KINDS
    propose, shape = make_proposer(kinds)
    layout = Layout.from_list([{}, {}, {"kind": "linear"}, {}, {}, {}])
    plans = propose(layout, 4)
    assert tuple(plan.kind for plan in plans) == kinds
    for plan in plans:
        changed = Layout((*layout.plans[:4], plan, *layout.plans[5:]))
        assert changed.problems(shape) == []
        assert 2 not in plan.source_layers
    assert {plan.kind: plan.compensation for plan in plans} == dict.fromkeys(kinds, 4) | {
        "linear": "full",
        "none": "none",
    }


def test_the_first_layer_of_a_mask_type_is_never_changed():
    types = ("sliding_attention", "sliding_attention", "full_attention") * 2
    propose, _ = make_proposer(("linear", "none"), types)
    assert propose(Layout.own(6), 0) == propose(Layout.own(6), 2) == []
    assert len(propose(Layout.own(6), 1)) == 2


@pytest.mark.parametrize(
    ("spec", "entries"),
    [
        (LayoutSpec(followers=2), [{}, {"leader": 0}, {"leader": 0}, {}, {}, {}]),
        (LayoutSpec(kv=0.75), [{}, {"leader": 0}, {"leader": 0}, {"leader": 0}, {}, {}]),
        (LayoutSpec(kv=0.75), [{}, {"leader": 0}, {"kind": "linear"}, {}, {}, {}]),
        (LayoutSpec(params=0.97), [{}, {"kind": "none"}, {}, {}, {}, {}]),
    ],
)
def test_budgets_are_met_exactly_when_they_are(spec, entries):
    base = make_base(FAMILIES[0])
    met = Budget.of(spec, attention_shape(base.config), base.config).met
    assert met(Layout.from_list(entries))
    last = max(index for index, entry in enumerate(entries) if entry)
    assert not met(Layout.from_list([{} if index == last else entry for index, entry in enumerate(entries)]))


def test_mixed_kinds_are_searched_by_damage_per_byte():
    base = make_base(FAMILIES[0])
    propose, _ = make_proposer(("softmax", "kv", "linear", "none"))
    search = ThoroughSearch(base, windows(24, 1), windows(4, 2), QUICK, propose, batch_size=8)
    met = Budget.of(LayoutSpec(kv=0.7), search.shape, base.config).met
    steps = search.run(met)
    assert met(steps[-1].layout) and steps[-1].layout.problems(search.shape) == []
    assert all(not met(step.layout) for step in steps[:-1])
    model = build_converted(base, steps[-1].layout)
    fit_layers(base, model, windows(24, 1), search.spec, batch_size=8)
    assert steps[-1].divergence == pytest.approx(divergence(base, model, windows(4, 2)), rel=1e-3)


def test_a_search_after_another_is_as_if_it_were_the_first():
    base = make_base(FAMILIES[0])
    propose, _ = make_proposer(("softmax", "kv", "linear"))
    two = [ThoroughSearch(base, windows(16, 1), windows(4, 2), QUICK, propose, batch_size=8) for _ in "ab"]

    def done(layout):
        return len(layout.changed) >= 3

    tried = []
    first = two[0].run(done, kinds=("kv", "linear"), tried=lambda layer, plan: tried.append((layer, plan.kind)))
    assert len(tried) == sum(step.measured for step in first)
    assert set(tried) == {(layer, kind) for layer in range(1, 6) for kind in ("kv", "linear")}
    before = {name: value.clone() for name, value in base.state_dict().items()}
    two[0].reset()
    assert two[0].layout == Layout.own(6) and two[0].divergence == 0
    tokens = windows(2, 5)
    assert torch.equal(two[0].model(tokens).logits, base(tokens).logits)
    again, fresh = (search.run(done, kinds=("softmax",)) for search in two)
    assert [(step.layout, step.divergence) for step in again] == [(step.layout, step.divergence) for step in fresh]
    two[0].reset()
    repeated = two[0].run(done, kinds=("kv", "linear"))
    assert [(step.layout, step.divergence) for step in repeated] == [(step.layout, step.divergence) for step in first]
    # What the first step measures is known from the first time.
    assert repeated[0].measured == 0 < first[0].measured
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_candidate_that_overflows_is_the_worst():
    base = make_base(FAMILIES[0])
    search = ThoroughSearch(base, windows(12, 1), windows(4, 2), QUICK, nearest_leader, batch_size=8)
    finals = [states[-1].clone() for states in search.score_states]
    finals[0][0, 3, 5] = float("nan")
    assert Trial(search.layout, search._divergences(finals)).divergence == float("inf")
