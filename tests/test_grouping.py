"""The fast search finds the optimum, and head maps are the best ones of their family."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from uniattn_cli.fitting.match_maps import Matcher
from uniattn_cli.layouts.fast import frontier
from uniattn_cli.modeling.layout_uniattn import AttentionShape

HEADS = 4


def random_matcher(seed, layers, distance, head_map, sources, types=None):
    similarity = np.random.default_rng(seed).random((layers, distance, HEADS, HEADS))
    shape = AttentionShape(HEADS, 2, 8, 32, types or ("full",) * layers)
    return Matcher(similarity, shape, head_map, sources)


def brute_force(matcher, protect=(), max_group=None):
    """Cost of the best layout for each number of followers, by trying every set of followers and every leader."""
    best: dict[int, float] = {}
    layers = range(matcher.shape.layers)
    for size in range(len(layers)):
        for followers in itertools.combinations([layer for layer in layers if layer not in protect], size):
            options = []
            for layer in followers:
                own = [other for other in matcher.candidates(layer) if other not in followers]
                if max_group is None:
                    match = matcher.match(layer, own)
                    options.append([] if match is None else [(None, 1 - match.score)])
                else:
                    options.append([(other, 1 - matcher.match(layer, [other]).score) for other in own])
            for chosen in itertools.product(*options):
                lenders = [lender for lender, _ in chosen]
                if max_group and any(lenders.count(lender) > max_group for lender in lenders):
                    continue
                cost = sum(cost for _, cost in chosen)
                best[size] = min(best.get(size, np.inf), cost)
    return best


@pytest.mark.parametrize("head_map", ["identity", "grouped", "free"])
@pytest.mark.parametrize("sources", ["one", "several"])
@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_equals_brute_force(head_map, sources, seed):
    types = ("full", "sliding", "full", "full", "sliding", "sliding", "full", "sliding") if seed % 2 else None
    matcher = random_matcher(seed, 8, 3, head_map, sources, types)
    protect = (3,) if seed == 2 else ()
    expected = brute_force(matcher, protect)
    found = {
        choice.changed: sum(1 - s for s in choice.scores.values()) for choice in frontier(matcher, protect=protect)
    }
    assert found.keys() == expected.keys()
    for count, cost in expected.items():
        assert found[count] == pytest.approx(cost, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("largest", [1, 2])
def test_groups_are_no_larger_than_allowed_and_still_optimal(seed, largest):
    matcher = random_matcher(seed, 7, 3, "grouped", "one")
    expected = brute_force(matcher, max_group=largest)
    for choice in frontier(matcher, max_group=largest):
        assert sum(1 - s for s in choice.scores.values()) == pytest.approx(expected[choice.changed], abs=1e-9)
        lenders = [plan.source_layers[0] for plan in choice.layout if plan.kind != "own"]
        assert all(lenders.count(lender) <= largest for lender in lenders)


@pytest.mark.parametrize("sources", ["one", "several"])
@pytest.mark.parametrize("head_map", ["identity", "grouped", "free"])
def test_every_layout_of_the_frontier_is_legal(head_map, sources):
    types = ("sliding", "sliding", "full") * 4
    matcher = random_matcher(5, 12, 4, head_map, sources, types)
    choices = frontier(matcher)
    assert [choice.changed for choice in choices] == list(range(len(choices)))
    for choice in choices:
        assert choice.layout.problems(matcher.shape) == []
        assert len(choice.layout.followers) == choice.changed


@pytest.mark.parametrize("kind", ["key", "kv"])
@pytest.mark.parametrize("head_map", ["identity", "grouped", "free"])
def test_layers_that_borrow_keys_are_found_by_similar_maps(head_map, kind):
    matcher = random_matcher(5, 8, 4, head_map, "several")
    size = matcher.shape.group_size
    # Each group of queries gets one head of keys, however free maps are.
    alike = random_matcher(5, 8, 4, "grouped" if head_map == "free" else head_map, "several")
    for follows, borrows in zip(frontier(alike), frontier(matcher, kind=kind, compensation=4), strict=True):
        assert borrows.scores == follows.scores
        assert borrows.layout.problems(matcher.shape) == []
        for index in follows.layout.changed:
            assert borrows.layout[index].kind == kind and borrows.layout[index].compensation == 4
            firsts = follows.layout[index].sources(matcher.shape)[::size]
            assert list(borrows.layout[index].heads) == [(source, head // size) for source, head in firsts]


def test_a_wider_family_of_maps_is_never_worse():
    scores = {}
    for head_map, sources in (("identity", "one"), ("grouped", "one"), ("grouped", "several"), ("free", "several")):
        matcher = random_matcher(1, 6, 3, head_map, sources)
        scores[head_map, sources] = matcher.match(5, [2, 3, 4]).score
    ordered = list(scores.values())
    assert ordered == sorted(ordered) and ordered[0] < ordered[-1]


def test_grouped_maps_take_whole_groups():
    match = random_matcher(3, 6, 3, "grouped", "several").match(5, [2, 3, 4])
    groups = [(layer, head // 2) for layer, head in match.sources]
    assert groups[0] == groups[1] and groups[2] == groups[3]


def test_identical_layers_score_one():
    similarity = np.tile(np.eye(HEADS), (5, 2, 1, 1))
    matcher = Matcher(similarity, AttentionShape(HEADS, 2, 8, 32, ("full",) * 5), "grouped", "several")
    choice = frontier(matcher)[3]
    assert choice.mean_score == pytest.approx(1)
    assert all(plan.leader is not None for plan in choice.layout if plan.kind != "own")
