"""Layouts: reading, writing, invariants, shorthands, accounting and pictures."""

from __future__ import annotations

import pytest

from uniattn_cli.errors import LayoutError
from uniattn_cli.layouts.picture import draw_layout
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.layout_uniattn import (
    BORROWING_KINDS,
    CHANGED_KINDS,
    KINDS,
    AttentionShape,
    LayerPlan,
    Layout,
)
from uniattn_cli.models.costs import kv_bytes_per_token

SHAPE = AttentionShape(query_heads=4, kv_heads=2, head_dim=8, hidden_size=32, mask_types=("full",) * 8)
MIXED = AttentionShape(4, 2, 8, 32, ("sliding", "sliding", "full", "sliding", "sliding", "full", "sliding", "sliding"))


def leaders(layout: Layout) -> dict[int, int]:
    return {index: plan.leader for index, plan in enumerate(layout) if plan.kind != "own"}


def test_a_layout_survives_writing_and_reading():
    entries = [
        {},
        {"leader": 0},
        {"kind": "softmax", "heads": "0:1 0:0 0:3 0:2", "compensation": 3},
        {"kind": "kv", "leader": 0, "compensation": "none"},
        {"kind": "key", "heads": [[0, 1], [0, 0]]},
        {"kind": "pooled", "kv_heads": 1},
        {"kind": "linear"},
        {"kind": "none"},
    ]
    layout = Layout.from_list(entries)
    assert layout.problems(SHAPE) == []
    assert Layout.from_list(layout.to_list()) == layout
    assert layout[1] == LayerPlan("softmax", leader=0, compensation="full")
    assert layout.last_use == {0: 4}
    assert layout.followers == [1, 2]


def test_layers_without_positions_share_the_cache_length_of_the_others_but_no_maps():
    shape = AttentionShape(4, 2, 8, 32, ("full", "full/no_rope", "full", "full/no_rope"))
    assert Layout.from_list([{}, {"kind": "none"}, {"leader": 0}, {"kind": "linear"}]).problems(shape) == []
    (problem,) = Layout.from_list([{}, {"leader": 0}, {}, {}]).problems(shape)
    assert problem == "layer 1: borrows from layer 0, whose mask type is 'full', not 'full/no_rope'"


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"leader": 0}] + [{}] * 7, "layer 0: the first layer with mask type 'full' must be 'own'"),
        ([{}] * 7 + [{"leader": 7}], "layer 7: borrows from layer 7, which is not an earlier layer"),
        ([{}, {"leader": 0}, {"leader": 1}] + [{}] * 5, "layer 2: borrows from layer 1, which is itself 'softmax'"),
        ([{}] * 7, "the layout has 7 entries, the model has 8 layers"),
        ([{}] * 7 + [{"heads": "0:0 0:1"}], "the head map has 2 entries, kind 'softmax' needs 4"),
        ([{}] * 7 + [{"heads": "0:0 0:1 0:2 0:4"}], "borrows head 4, but heads are numbered 0 to 3"),
        ([{}] * 7 + [{"kind": "softmax"}], "needs a leader or a head map"),
        ([{}] * 7 + [{"kind": "pooled", "kv_heads": 2}], "kv_heads must divide 2 and be smaller"),
        ([{}] * 7 + [{"kind": "linear", "compensation": "none"}], "nothing but its compensation"),
        ([{}] * 7 + [{"leader": 0, "compensation": 33}], "a rank from 1 to 32, not 33"),
        ([{}] * 7 + [{"kind": "none", "leader": 0}], "a 'none' layer borrows nothing"),
        ([{}] * 7 + [{"kind": "softmaks", "leader": 0}], "unknown kind 'softmaks'"),
    ],
)
def test_each_broken_invariant_is_named(entries, words):
    problems = Layout.from_list(entries).problems(SHAPE)
    assert any(words in problem for problem in problems), problems


def test_sharing_across_mask_types_is_a_problem():
    layout = Layout.from_list([{}, {}, {}, {"leader": 2}, *[{}] * 4])
    assert layout.problems(MIXED) == ["layer 3: borrows from layer 2, whose mask type is 'full', not 'sliding'"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("every:4", {1: 0, 2: 0, 3: 0, 5: 4, 6: 4, 7: 4}),
        ("every:3", {1: 0, 2: 0, 4: 3, 5: 3, 7: 6}),
        ("paper", {5: 4, 6: 4, 7: 4}),
        ("2-7:3", {3: 2, 4: 2, 6: 5, 7: 5}),
        ("1-3,5-6", {2: 1, 3: 1, 6: 5}),
    ],
)
def test_shorthands(text, expected):
    assert leaders(parse_groups(text, SHAPE)) == expected


@pytest.mark.parametrize("kind", ["softmax", "key", "kv", "pooled", "linear", "none"])
def test_another_kind_of_layer_may_stand_where_layers_would_follow(kind):
    followers = parse_groups("paper", SHAPE, 8)
    layout = parse_groups(f"{kind}@paper", SHAPE, 8)
    assert layout.changed == followers.changed and layout.problems(SHAPE) == []
    assert {layout[index].kind for index in layout.changed} == {kind}
    if kind in BORROWING_KINDS:
        assert leaders(layout) == leaders(followers)
    assert layout[5].compensation == ("none" if kind == "none" else 8)
    # A linear map is all that a linear layer has.
    without = parse_groups(f"{kind}@paper", SHAPE, "none")
    assert without[5].compensation == ("full" if kind == "linear" else "none")


@pytest.mark.parametrize("kind", CHANGED_KINDS)
def test_each_kind_has_a_default_compensation_of_its_own(kind):
    expected = "none" if kind in ("early", "early-kv", "none") else "full"
    parsed = parse_groups(f"{kind}@paper", SHAPE)
    entries = [{key: value for key, value in plan.to_dict().items() if key != "compensation"} for plan in parsed]
    for layout in (parsed, Layout.from_list(entries), Layout.from_list(entries, "auto")):
        assert {layout[index].compensation for index in layout.changed} == {expected}
    # What is asked for counts more, where the kind leaves a choice.
    for asked in ("full", "none", 3):
        again = Layout.from_list(entries, asked)
        assert again == parse_groups(f"{kind}@paper", SHAPE, asked) and again.problems(SHAPE) == []
        optional = KINDS[kind].compensation == "optional"
        assert not optional or {again[index].compensation for index in again.changed} == {asked}


def test_pooled_layers_keep_heads_that_divide_those_of_the_model():
    shape = AttentionShape(query_heads=18, kv_heads=9, head_dim=8, hidden_size=32, mask_types=("full",) * 4)
    assert parse_groups("pooled@every:2", shape)[1].kv_heads == 3
    alone = AttentionShape(query_heads=4, kv_heads=1, head_dim=8, hidden_size=32, mask_types=("full",) * 4)
    with pytest.raises(LayoutError, match="must divide 1 and be smaller"):
        parse_groups("pooled@every:2", alone)


def test_shorthands_group_each_mask_type_by_itself():
    assert leaders(parse_groups("every:2", MIXED)) == {1: 0, 4: 3, 7: 6, 5: 2}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("evry:4", "not one of auto, paper"),
        ("every:1", "at least 2 layers"),
        ("4-9", "layer 9 does not exist"),
        ("5-5", "not an ascending range"),
        ("1-4,3-6", "layer 3 is in two groups"),
        ("keys@paper", r"'keys' is not one of softmax, key, .* \(did you mean 'key'"),
        ("key@auto", "use --groups auto --kinds key$"),
        ("linear@auto", "use --groups auto --kinds linear --search scores"),
        ("key@", "--groups key@: the part after @ must be paper, every:N"),
        ("key@kv@paper", "the part after @ must be paper, every:N"),
        ("key@papr", "--groups key@papr: not one of auto, paper"),
        ("key@3-99", "--groups key@3-99: layer 99 does not exist"),
        ("every:99", "--groups every:99: a group of 99 is larger than the 8 layers to be grouped"),
        ("kv@2-5:5", "--groups kv@2-5:5: a group of 5 is larger than the 4 layers to be grouped"),
    ],
)
def test_wrong_shorthands_say_what_is_wrong(text, words):
    with pytest.raises(LayoutError, match=words):
        parse_groups(text, SHAPE)


def test_a_list_across_mask_types_is_refused_with_the_layer():
    with pytest.raises(LayoutError, match="layer 5: borrows from layer 4, whose mask type is 'sliding', not 'full'"):
        parse_groups("4-5", MIXED)


def test_a_layout_file_may_be_a_list_or_a_recipe_or_a_checkpoint_config(tmp_path):
    layout = parse_groups("every:4", SHAPE)
    import json

    for name, content in (
        ("list.json", layout.to_list()),
        ("recipe.yaml", {"layout": {"layers": layout.to_list()}}),
        ("config.json", {"uniattn": {"layers": layout.to_list()}}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        assert parse_groups(str(tmp_path / name), SHAPE) == layout
    for entry, words in (
        ("leder: 3", "unknown key 'leder'"),
        ("kind: [key]", r"kind must be one of .*, not \['key'\]"),
    ):
        (tmp_path / "bad.yaml").write_text(f"layers: [{{{entry}}}]")
        with pytest.raises(LayoutError, match=f"layer 0: {words}"):
            parse_groups(str(tmp_path / "bad.yaml"), SHAPE)


def test_kv_bytes_count_what_each_kind_caches():
    entries = [{}, {"leader": 0}, {"kind": "key", "leader": 0}, {"kind": "kv", "leader": 0}]
    entries += [{"kind": "pooled", "kv_heads": 1}, {"kind": "linear"}, {"kind": "none"}, {}]
    heads = 4 + 2 + 2 + 0 + 2 + 0 + 0 + 4
    assert kv_bytes_per_token(Layout.from_list(entries), SHAPE, 2) == heads * 8 * 2


def test_the_picture_shows_lenders_and_borrowers():
    picture = draw_layout(Layout.from_list([{}, {"leader": 0}, {}, {"heads": "2:0 2:1 0:2 2:3"}, {"kind": "linear"}]))
    assert "AaBbl" in picture
    assert all(len(line) <= 78 for line in draw_layout(Layout.own(100)).splitlines())


def test_a_picture_explains_the_layers_that_lend_to_another_kind():
    assert "capital letters lend to later layers, k key" in draw_layout(
        Layout.from_list([{}, {"kind": "key", "leader": 0}])
    )
