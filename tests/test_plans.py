"""Plans that are proposed for a layer are legal, whatever its kind."""

from __future__ import annotations

import numpy as np

from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.plans import may_change, proposal
from uniattn_cli.modeling.layout_uniattn import CHANGED_KINDS, AttentionShape, Layout


def matcher_of(kv_heads=3):
    similarity = np.random.default_rng(0).random((6, 3, 6, 6))
    return Matcher(similarity, AttentionShape(6, kv_heads, 8, 48, ("full_attention",) * 6), "grouped", "several")


def test_every_kind_is_proposed_legally():
    matcher = matcher_of()
    layout = Layout.from_list([{}, {}, {"kind": "linear"}, {}, {}, {}])
    lenders = matcher.lenders(layout, 4)
    plans = {kind: proposal(matcher.for_kind(kind), 4, kind, 4, lenders) for kind in CHANGED_KINDS}
    for kind, plan in plans.items():
        assert plan.kind == kind and layout.with_plan(4, plan).problems(matcher.shape) == []
        assert 2 not in plan.source_layers
    ranks = {kind: plan.compensation for kind, plan in plans.items()}
    assert ranks == dict.fromkeys(CHANGED_KINDS, 4) | {"linear": "full", "none": "none"}


def test_nothing_is_proposed_without_lenders_or_heads_to_spare():
    assert proposal(matcher_of(), 4, "key", "full", []) is None
    assert proposal(matcher_of(kv_heads=1), 4, "pooled", "full", [3]) is None


def test_the_first_layer_of_a_mask_type_is_never_changed():
    types = ("sliding_attention", "sliding_attention", "full_attention") * 2
    shape = AttentionShape(6, 3, 8, 48, types)
    assert [may_change(shape, layer) for layer in range(6)] == [False, True, False, True, True, True]
