"""Generation in every mode gives the tokens of the model without a cache, and every cache has the bytes predicted."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, REDUCED, make_base, make_converted, typical_families
from transformers import DynamicCache, StaticCache

from uniattn_cli.evaluation.cost import cache_bytes
from uniattn_cli.models.costs import kv_bytes

families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
cases = pytest.mark.parametrize(("entry", "layout"), CASES, ids=CASE_IDS)
# Together these have every kind; modes that take long are not tried on the other layouts.
reduced = pytest.mark.parametrize("layout", REDUCED)
# Compiling takes seconds a model; these differ most in how their layers are made.
QUICKLY_COMPILED = ("llama",)
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def random_tokens(rows=2, tokens=12, seed=1):
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def by_name(name):
    return next(entry for entry in FAMILIES if entry[0] == name)


# --- modes ------------------------------------------------------------------------------------------------------------


@typical_families
@reduced
def test_assisted_decoding_equals_greedy(entry, layout):
    """With a stock assistant, whose guesses are mostly wrong, and a converted one, whose guesses are often right."""
    model = make_converted(entry, layout)
    prompt = random_tokens(rows=1)
    expected = model.generate(prompt, max_new_tokens=8, use_cache=False, **GREEDY)
    near = make_converted(entry, layout)
    near.lm_head.weight = torch.nn.Parameter(near.lm_head.weight + 0.01 * torch.randn_like(near.lm_head.weight))
    for assistant in (make_base(entry, seed=5), near):
        assert torch.equal(model.generate(prompt, assistant_model=assistant, max_new_tokens=8, **GREEDY), expected)


@families
def test_a_converted_model_assists_its_base(entry):
    base = make_base(entry)
    prompt = random_tokens(rows=1)
    expected = base.generate(prompt, max_new_tokens=10, use_cache=False, **GREEDY)
    assistant = make_converted(entry, "others")
    assert torch.equal(base.generate(prompt, assistant_model=assistant, max_new_tokens=10, **GREEDY), expected)


@typical_families
@reduced
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_chat_goes_on_with_the_cache_of_the_last_turn(entry, layout, kind):
    model = make_converted(entry, layout)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=48)
    whole = random_tokens()
    for seed in (2, 3):
        expected = model.generate(whole, max_new_tokens=4, use_cache=False, **GREEDY)
        done = model.generate(
            whole, past_key_values=cache, max_new_tokens=4, return_dict_in_generate=True, disable_compile=True, **GREEDY
        )
        assert torch.equal(done.sequences, expected)
        cache = done.past_key_values
        whole = torch.cat([done.sequences, random_tokens(tokens=5, seed=seed)], dim=1)


@typical_families
@reduced
@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beam", "static"])
def test_left_padded_prompts_are_continued_like_prompts_alone(entry, layout, mode):
    model = make_converted(entry, layout)
    tokens = random_tokens()
    mask = torch.ones_like(tokens)
    tokens[0, :5], mask[0, :5] = 0, 0
    together = model.generate(tokens, attention_mask=mask, max_new_tokens=5, disable_compile=True, **GREEDY, **mode)
    plain = {"num_beams": mode.get("num_beams", 1), "use_cache": False}
    assert torch.equal(together[:1, 5:], model.generate(tokens[:1, 5:], max_new_tokens=5, **GREEDY, **plain))
    assert torch.equal(together[1:], model.generate(tokens[1:], max_new_tokens=5, **GREEDY, **plain))


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry[0], marks=[] if entry[0] in QUICKLY_COMPILED else pytest.mark.slow)
        for entry in FAMILIES
    ],
)
@pytest.mark.parametrize("layout", ["mixed", pytest.param("others", marks=pytest.mark.slow)])
def test_compiled_static_decoding_has_no_graph_break(entry, layout):
    model = make_converted(entry, layout)
    tokens = random_tokens()
    expected = model(tokens, use_cache=False).logits
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens[:, :8], past_key_values=cache)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for position in range(8, 12):
        step = compiled(tokens[:, position : position + 1], past_key_values=cache).logits
        assert (step[:, 0] - expected[:, position]).abs().max() < 2e-5


# --- bytes ------------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cache_bytes_are_predicted_beyond_the_window(entry, layout, kind):
    """A prompt longer than any window, then single tokens, in three rows."""
    model = make_converted(entry, layout)
    rows, tokens = 3, 19
    ids = random_tokens(rows, tokens)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=tokens)
    model(ids[:, :16], past_key_values=cache)
    for position in range(16, tokens):
        model(ids[:, position : position + 1], past_key_values=cache)
    assert cache_bytes(cache) == rows * kv_bytes(model.config, model.config.layout, tokens, 4)


def test_a_sliding_cache_is_bounded_by_its_window():
    model = make_converted(by_name("gemma3_text"), "mixed")
    cache = DynamicCache(config=model.config)
    tokens = random_tokens(rows=1, tokens=40)
    model(tokens[:, :30], past_key_values=cache)
    sizes = []
    for position in range(30, 40):
        model(tokens[:, position : position + 1], past_key_values=cache)
        assert cache_bytes(cache) == kv_bytes(model.config, model.config.layout, position + 1, 4)
        sizes.append(cache_bytes(cache))
    # Only full layers grow: two own ones, two softmax followers; three heads of size 12 in float32.
    assert set(b - a for a, b in itertools.pairwise(sizes)) == {(2 * 2 + 2) * 3 * 12 * 4}
