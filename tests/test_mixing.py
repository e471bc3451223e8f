"""Several data sets in one: exact shares, repetition and sampling, and a held-out part that weights leave alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data import load, make_tokenizer, write

from uniattn_cli.data import sequences, splits, windows
from uniattn_cli.data.mixing import draw, shares
from uniattn_cli.errors import DataError, RecipeError
from uniattn_cli.recipe.schema import DatasetSpec, DataSpec, Recipe

SIZES = st.lists(st.tuples(st.integers(1, 500), st.floats(0.01, 100)), min_size=1, max_size=6)


@given(SIZES)
def test_shares_are_whole_exact_and_never_none(sets):
    sizes, weights = zip(*sets, strict=True)
    counts = shares(sizes, weights)
    assert sum(counts) == max(sum(sizes), len(sizes)) and min(counts) >= 1
    for count, weight in zip(counts, weights, strict=True):
        exact = sum(sizes) * weight / sum(weights)
        # One row is moved at most, and one more for each set that would have had none.
        assert abs(count - exact) <= 1 + len(sizes)
    assert shares(sizes, [None] * len(sizes)) == list(sizes)


def test_a_draw_repeats_evenly_and_samples_the_rest():
    rows = list(range(10))
    assert draw(rows, 10, 0) == rows
    assert sorted(Counter(draw(rows, 34, 0)).values()) == [3] * 6 + [4] * 4
    sample = draw(rows, 4, 0)
    assert len(set(sample)) == 4 and sample == draw(rows, 4, 0)
    assert any(draw(rows, 4, seed) != sample for seed in range(1, 5))


@pytest.fixture
def files(tmp_path):
    large = write(tmp_path / "large.jsonl", *({"prompt": f"l{i}", "completion": "a"} for i in range(300)))
    small = write(tmp_path / "small.jsonl", *({"prompt": f"s{i}", "completion": "b"} for i in range(40)))
    return large, small


def mix(files, *weights, part="train", seed=0, holdout=0.1, **settings):
    specs = tuple(DatasetSpec(source=file, weight=weight) for file, weight in zip(files, weights, strict=True))
    return splits.load_mix(specs, part, holdout=holdout, seed=seed, **settings)


def prompts(rows) -> list[str]:
    return [messages[0]["content"] for messages in rows["messages"]]


def test_weights_are_shares_of_the_rows_and_leave_their_number_alone(files):
    plain, weighted = mix(files, None, None), mix(files, 1, 3)
    rows, (large, small) = weighted.rows, weighted.shares
    assert len(rows) == len(plain.rows) == large.rows + small.rows
    assert (large.drawn, small.drawn) == (round(len(rows) / 4), len(rows) - round(len(rows) / 4))
    counted = Counter(prompts(rows))
    sampled = [name for name in counted if name[0] == "l"]
    repeated = {name: count for name, count in counted.items() if name[0] == "s"}
    assert len(sampled) == large.drawn and all(counted[name] == 1 for name in sampled)
    assert len(repeated) == small.rows and max(repeated.values()) - min(repeated.values()) == 1
    assert "a sample of" in str(large) and f"each of its {small.rows} about" in str(small)
    # The units of weights mean nothing, and neither does the order of a file.
    assert prompts(mix(files, 10, 30).rows) == prompts(rows)


def test_a_mix_is_the_same_for_a_seed_and_another_for_another(files):
    first = prompts(mix(files, 1, 1).rows)
    assert prompts(mix(files, 1, 1).rows) == first
    other = prompts(mix(files, 1, 1, seed=1).rows)
    assert set(other) != set(first) and len(other) == len(first)


def test_heldout_rows_do_not_depend_on_weights_and_are_in_no_mix(files):
    heldout = prompts(mix(files, None, None, part="heldout").rows)
    assert prompts(mix(files, 1, 50, part="heldout").rows) == heldout and len(heldout) > 10
    assert not set(heldout) & set(prompts(mix(files, 1, 50).rows))


def test_calibration_takes_no_row_twice(files):
    rows = mix(files, 1, 3, repeat=False).rows
    assert max(Counter(prompts(rows)).values()) == 1
    mixed = prompts(mix(files, 1, 3).rows)
    assert prompts(rows) == list(dict.fromkeys(mixed))
    spec = DataSpec(train=tuple(DatasetSpec(source=file, weight=1.0) for file in files), holdout=0.1)
    seen = windows.calibration_windows(spec, make_tokenizer(), tokens=10**6, length=16, seed=0)
    text = make_tokenizer().decode(seen.flatten())
    assert max(text.count(f"user\ns{i}<") for i in range(40)) == 1


def test_tokenised_rows_are_counted_by_data_set(files):
    rows = mix(files, 1, 1)
    result = sequences.tokenize(rows, make_tokenizer(), max_length=500, loss="responses")
    assert {name: counts.rows for name, counts in result.sources.items()} == {
        share.source: share.drawn for share in rows.shares
    }
    for name in ("rows", "used", "tokens", "supervised", "lost"):
        assert sum(getattr(counts, name) for counts in result.sources.values()) == getattr(result.counts, name)


def test_one_source_with_other_splits_is_two_data_sets():
    assert splits.label(DatasetSpec(source="a/b", config="x", split="test")) == "a/b (x, test)"


def faults(text: str) -> list[str]:
    from uniattn_cli.recipe.files import _yaml

    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree(_yaml().load("model: {name: m}\n" + text))
    return caught.value.faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: [{source: a, weight: 1}, b]}", "give every data set a weight, or none"),
        ("data: {train: [{source: a, weight: 0}]}", "weight must be greater than 0"),
        ("data: {text: [{source: a, weight: 1}]}", "only training rows are mixed by weight"),
        ("data: {text: [{source: a, heldout: false}]}", "data.text[0].heldout: only rows of data.train are held out"),
        ("data: {train: [{source: a, heldout: false}]}", "heldout is false for every data set"),
        ("data: {train: [{source: a, columns: {promt: q}}]}", "unknown name 'promt' (did you mean 'prompt'?)"),
        ("data: {train: [{source: a, columns: {prompt: 3}}]}", "columns.prompt must be the name of a column, not 3"),
        ("data: {train: [{source: a, columns: [q]}]}", "columns must be a mapping, not a list"),
    ],
)
def test_contradictions_are_told(text, message):
    assert any(message in fault for fault in faults(text)), faults(text)


def test_a_weighted_data_set_without_rows_is_told(tmp_path, files):
    only = write(tmp_path / "one.jsonl", {"prompt": "q", "completion": "a"})
    assert len(load(only, holdout=1e-9)) == 1
    specs = (DatasetSpec(source=files[0], weight=1.0), DatasetSpec(source=only, weight=1.0))
    with pytest.raises(DataError, match=r"one\.jsonl: no training rows at data\.holdout 1\.0"):
        splits.load_mix(specs, "train", holdout=1.0, seed=0)
