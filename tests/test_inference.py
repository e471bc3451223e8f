"""The engine: the same text and numbers as transformers, for every family and kind of layer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from uniattn_cli.errors import UsageError
from uniattn_cli.inference.engine import Engine, _generate, decode, engine_for
from uniattn_cli.inference.program import UnsupportedError, map_slots
from uniattn_cli.inference.sampling import Sampling, choose, most_likely
from uniattn_cli.inference.session import Session, rotary_tables
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.costs import kv_bytes_per_token
from uniattn_cli.models.families import family_of

NEW = 32
PROMPT = 13
PADDING = [0, 4, 9]


def make_model(entry, layout_name: str | None):
    return tiny.make_base(entry) if layout_name is None else tiny.make_converted(entry, layout_name)


def past_windows(model) -> int:
    """So many tokens that the first of them lie behind every window."""
    return max(NEW, *(window or 0 for window in layer_windows(model.config)))


def make_prompt(rows: int = 3, seed: int = 1):
    tokens = torch.randint(3, 97, (rows, PROMPT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row, count in enumerate(PADDING[:rows]):
        tokens[row, :count], mask[row, :count] = 0, 0
    return tokens, mask


def generate(model, tokens, mask, new: int = NEW, **options):
    """What transformers says, end-of-sequence tokens ignored unless asked for."""
    options = {"eos_token_id": None} | options
    return model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options)


def assert_greedy(model, sequences, mask):
    """Each new token is the likeliest one that transformers predicts after those before it: one forward pass tells."""
    mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - PROMPT), value=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.equal(sequences[:, PROMPT:], logits[:, PROMPT - 1 : -1].argmax(-1))


# Of one family only short texts can be decoded, which is tried below.
FAMILIES = [
    entry for entry in tiny.FAMILIES if not family_of(entry[1]().model_type).not_in_engine and entry[0] != "ministral3"
]
CASES = [case for case in tiny.CASES if case[0] in FAMILIES]


@pytest.mark.parametrize(("entry", "layout"), CASES, ids=[f"{entry[0]}-{layout}" for entry, layout in CASES])
def test_greedy_text_of_a_padded_batch_is_that_of_transformers(entry, layout):
    model = make_model(entry, layout)
    tokens, mask = make_prompt()
    found = decode(model, tokens, mask, max_new_tokens=past_windows(model), engine="engine")
    assert found.path == "engine"
    assert_greedy(model, found.sequences, mask)


@pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
def test_greedy_text_of_stock_models_is_that_of_transformers(entry):
    model = make_model(entry, None)
    tokens, mask = make_prompt()
    found = decode(model, tokens, mask, max_new_tokens=past_windows(model), engine="engine")
    assert_greedy(model, found.sequences, mask)


@pytest.mark.parametrize("layout", ["free_several", "mixed", "others"])
def test_recomputing_the_map_gives_the_text_of_reusing_it(layout):
    engine = Engine(make_model(tiny.FAMILIES[0], layout))
    tokens, mask = make_prompt()
    texts = []
    for reuse in (True, False):
        session = engine.session(3, PROMPT + 32, 32, reuse=reuse)
        session.prefill(tokens, mask.sum(-1))
        for _ in range(31):
            session.advance()
        texts.append(session.state.output)
    assert torch.equal(*texts)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_a_prompt_in_pieces_gives_the_logits_of_a_prompt_at_once(family, chunk):
    engine = Engine(make_model(named(family), "mixed").double())
    tokens, mask = make_prompt()
    logits = []
    for size in (chunk, None):
        session = engine.session(3, PROMPT + 4, 4)
        session.prefill(tokens, mask.sum(-1), chunk=size)
        session.advance()
        logits.append(session.logits)
    # Norms of most families are float32 whatever the model is.
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def named(family):
    return next(entry for entry in tiny.FAMILIES if entry[0] == family)


@pytest.mark.parametrize("name", tiny.LAYOUTS)
def test_caches_hold_what_the_layout_predicts(name):
    engine = Engine(make_model(tiny.FAMILIES[0], name))
    session = engine.session(2, 128, 8)
    program = engine.program
    per_token = kv_bytes_per_token(program.layout, attention_shape(program.config), 4)
    assert session.caches.nbytes == session.caches.flat.nbytes == 2 * 128 * per_token


def test_maps_share_places_when_their_last_borrower_is_done():
    chain = [{}, {"leader": 0}, {}, {"leader": 2}, {}, {"heads": "4:0 4:1 2:2 2:3 4:4 4:5"}, {"leader": 4}]
    slots, count = map_slots(Layout.from_list(chain))
    assert count == 2
    assert slots[0] == slots[2] != slots[4]
    assert map_slots(Layout.from_list([{}, {"kind": "kv", "leader": 0}])) == ({}, 0)


@pytest.mark.parametrize("layout", ["leader", "low_rank", "mixed"])
def test_compensation_is_part_of_one_product_and_no_copy(layout):
    model = make_model(tiny.FAMILIES[0], layout)
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tokens, _ = make_prompt()
    with torch.no_grad():
        before = model(tokens).logits
    program, again = Engine(model).program, Engine(model).program
    # The model is what it was, and its weights are the engine's.
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    for layer, block in zip(program.layers, model.model.layers, strict=True):
        if layer.extra:
            storage = layer.output.untyped_storage().data_ptr()
            assert block.self_attn.o_proj.weight.untyped_storage().data_ptr() == storage
            assert layer.takes_input == (layer.plan.compensation == "full")
            assert again.layers[layer.index].output.data_ptr() == layer.output.data_ptr()
    assert any(layer.extra for layer in program.layers)


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen3", "phi3", "olmo2"])
@pytest.mark.parametrize("layout", ["early", "low_rank"])
def test_weights_that_are_trained_later_are_those_of_the_engine(family, layout):
    model = make_model(named(family), layout)
    engine = engine_for(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    assert engine_for(model) is engine
    assert engine._compare(model) < 1e-5


@pytest.mark.parametrize("family", ["llama_tied_bias", "qwen3", "phi3"])
@pytest.mark.parametrize("layout", ["early", "low_rank"])
def test_a_model_that_has_been_decoded_can_be_saved(family, layout, tmp_path):
    model = make_model(named(family), layout)
    tokens, _ = make_prompt()
    Engine(model)
    assert not all(parameter.is_contiguous() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_models_that_share_weights_share_the_fused_ones():
    base = tiny.make_base(tiny.FAMILIES[0])
    converted = build_converted(base, tiny.make_layout("leader"))
    programs = [Engine(model).program for model in (base, converted)]
    first = [program.layers[0] for program in programs]
    assert first[0].project.data_ptr() == first[1].project.data_ptr()
    assert first[0].feed.gate_up.data_ptr() == first[1].feed.gate_up.data_ptr()


def test_text_ends_where_that_of_transformers_ends():
    model = make_model(tiny.FAMILIES[0], "mixed")
    tokens, mask = make_prompt()
    free = decode(model, tokens, mask, max_new_tokens=24).tokens
    stop = [int(free[0, 4]), int(free[1, 9]), int(free[2, 2])]
    found = decode(model, tokens, mask, max_new_tokens=24, eos_token_id=stop, pad_token_id=0)
    wanted = generate(model, tokens, mask, 24, eos_token_id=stop)
    assert torch.equal(found.sequences, wanted)
    assert found.tokens.shape[1] < 24


def test_every_token_is_told_when_it_is_known():
    model = make_model(tiny.FAMILIES[0], None)
    tokens, mask = make_prompt()
    told = []
    found = decode(model, tokens, mask, max_new_tokens=5, on_tokens=lambda new: told.append(new.clone()))
    assert torch.equal(torch.stack(told, dim=1), found.tokens)


def test_sampling_follows_the_distribution_and_the_seed():
    logits = torch.tensor([[2.0, 1.0, 0.0, -3.0]])
    noise = torch.rand(20000, generator=torch.Generator().manual_seed(0))
    rows = logits.expand(len(noise), -1)

    def shares(**settings):
        return torch.bincount(choose(rows, Sampling(**settings), noise), minlength=4) / len(noise)

    torch.testing.assert_close(shares(temperature=1.0), logits[0].softmax(0), atol=0.01, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits[0] / 2).softmax(0), atol=0.01, rtol=0)
    # The first two reach 0.67 and 0.91; as in transformers the token that passes top_p stays.
    nucleus = logits[0, :2].softmax(0)
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.8)[:2], nucleus, atol=0.01, rtol=0)
    assert shares(temperature=1.0, top_p=0.8)[2:].sum() == 0
    assert shares(temperature=1.0, top_p=0.1)[0] == 1
    assert shares()[0] == 1


def test_sampled_text_depends_on_the_seed_alone():
    model = make_model(tiny.FAMILIES[0], "mixed")
    tokens, mask = make_prompt()

    def text(seed, engine="engine"):
        options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9}
        return decode(model, tokens, mask, seed=seed, engine=engine, **options).tokens

    assert torch.equal(text(3), text(3))
    assert not torch.equal(text(3), text(4))
    assert torch.equal(text(3), text(3, "transformers"))


def test_what_the_engine_cannot_run_goes_to_transformers_and_says_why():
    # The rotary frequencies of this family change at some length.
    name, config, model_class = named("phi3")

    def short():
        changed = config()
        changed.original_max_position_embeddings = 24
        return changed

    model = tiny.make_base((name, short, model_class))
    tokens, mask = make_prompt()
    found = decode(model, tokens, mask, max_new_tokens=40)
    assert found.path == "transformers"
    assert "24 tokens" in found.reason
    assert torch.equal(found.sequences, generate(model, tokens, mask, 40))
    with pytest.raises(UnsupportedError, match="24 tokens"):
        decode(model, tokens, mask, max_new_tokens=40, engine="engine")


@pytest.mark.parametrize("layout", [None, "mixed"])
def test_queries_that_are_scaled_by_position_are_decoded_where_they_are_not(layout):
    name, config, model_class = named("ministral3")

    def known(tokens):
        changed = config()
        changed.rope_parameters["original_max_position_embeddings"] = tokens
        return changed

    tokens, mask = make_prompt()
    model = make_model((name, lambda: known(PROMPT + NEW), model_class), layout)
    assert_greedy(model, decode(model, tokens, mask, max_new_tokens=NEW, engine="engine").sequences, mask)
    model = make_model((name, lambda: known(PROMPT + NEW - 1), model_class), layout)
    found = decode(model, tokens, mask, max_new_tokens=NEW)
    assert found.path == "transformers" and f"by their position from {PROMPT + NEW - 1} tokens on" in found.reason


@pytest.mark.parametrize("family", [entry[0] for entry in tiny.FAMILIES if entry not in FAMILIES])
def test_families_that_the_engine_cannot_run_are_named_with_the_reason(family):
    reason = family_of(family).not_in_engine or "its queries are scaled by their position from 4 tokens on"
    tokens, mask = make_prompt()
    for layout in (None, "mixed"):
        model = make_model(named(family), layout)
        assert decode(model, tokens, mask, max_new_tokens=2).path == "transformers"
        with pytest.raises(UnsupportedError, match=reason):
            decode(model, tokens, mask, max_new_tokens=2, engine="engine")


def test_a_model_that_gives_other_numbers_is_refused():
    model = make_model(tiny.FAMILIES[0], None)
    # A change that the engine cannot see.
    model.model.layers[1].self_attn.register_forward_hook(lambda module, given, output: (output[0] * 1.1, output[1]))
    with pytest.raises(UnsupportedError, match="differ from transformers"):
        Engine(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "left"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"engine": "fast"}, "engine"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty"),
    ],
)
def test_impossible_arguments_are_told(change, message):
    arguments = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 2} | change
    with pytest.raises(UsageError, match=message):
        decode(make_model(tiny.FAMILIES[0], None), **arguments)


def test_the_way_through_transformers_ends_and_tells_like_the_engine():
    model = make_model(tiny.FAMILIES[0], "mixed")
    tokens, mask = make_prompt()
    free = decode(model, tokens, mask, max_new_tokens=24).tokens
    stop = [int(free[0, 4]), int(free[1, 9]), int(free[2, 2])]
    found, told = [], []
    for engine in ("engine", "transformers"):
        rows = []
        options = {
            "eos_token_id": stop,
            "pad_token_id": 0,
            "on_tokens": lambda new, rows=rows: rows.append(new.clone()),
        }
        found.append(decode(model, tokens, mask, max_new_tokens=24, engine=engine, **options).tokens)
        told.append(torch.stack(rows, dim=1))
    assert torch.equal(*found)
    assert torch.equal(*told)
    assert torch.equal(told[0], found[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "qwen3_moe"])
def test_a_step_that_asks_the_host_for_nothing_gives_the_same_text(family):
    """What a captured graph does: lengths are known on the device alone, and the whole cache is looked at."""
    engine = Engine(make_model(named(family), "others"))
    tokens, mask = make_prompt()
    texts = []
    for as_graph in (False, True):
        session = engine.session(3, PROMPT + 80, 40)
        if as_graph:
            session.use_graph, session.graph = True, SimpleNamespace(replay=session._advance)
            session.tables, session._prepare_tables = rotary_tables(engine.program, 128), lambda longest, new: None
        session.prefill(tokens, mask.sum(-1))
        for _ in range(39):
            session.advance()
        texts.append(session.state.output)
    assert torch.equal(*texts)


def test_a_session_can_be_used_again():
    engine = Engine(make_model(tiny.FAMILIES[0], "mixed"))
    session = engine.session(3, PROMPT + 20, 20, stop=[5])
    texts = []
    for seed in (1, 2, 1):
        tokens, mask = make_prompt(seed=seed)
        session.prefill(tokens, mask.sum(-1))
        for _ in range(19):
            session.advance()
        texts.append(session.state.output.clone())
    assert torch.equal(texts[0], texts[2])
    assert not torch.equal(texts[0], texts[1])


def test_a_kept_session_gives_the_text_of_a_new_one():
    """Where steps are captured the last session is kept; it has more room than was asked for."""
    model = make_model(tiny.FAMILIES[0], "mixed")
    engine = Engine(model)
    options = {"stop": [5], "pad": 0}
    found = []
    for kept in (True, False):
        engine.graphs = kept
        for seed, new in ((1, 9), (2, 12), (1, 9)):
            tokens, mask = make_prompt(seed=seed)
            sampling = Sampling(temperature=0.8, seed=seed)
            session = engine.borrow(3, PROMPT + new, new, sampling=sampling, **options)
            # There is nothing to capture on a CPU.
            session.use_graph = False
            found.append((_generate(session, tokens, mask.sum(-1), new, None), session))
    assert found[0][1] is found[1][1] is found[2][1]
    for index in range(3):
        assert torch.equal(found[index][0], found[index + 3][0])


def test_a_family_that_the_engine_does_not_know_goes_to_transformers():
    config = GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokens, mask = make_prompt()
    for _ in range(2):
        found = decode(model, tokens, mask, max_new_tokens=6)
        assert found.path == "transformers"
        assert "gpt2" in found.reason
    assert torch.equal(found.sequences, generate(model, tokens, mask, 6))


def test_an_engine_is_made_again_when_the_weights_have_moved():
    model = make_model(tiny.FAMILIES[0], "mixed")
    first = engine_for(model)
    assert engine_for(model) is first
    model.double()
    second = engine_for(model)
    assert second is not first
    assert second.program.dtype == torch.float64


@pytest.mark.parametrize("vocabulary", [64, 1000, 6400])
def test_the_likeliest_token_is_the_first_of_equals(vocabulary):
    torch.manual_seed(0)
    logits = torch.randint(0, 5, (7, vocabulary)).float()
    wanted = torch.tensor([row.tolist().index(row.max()) for row in logits])
    assert torch.equal(most_likely(logits), wanted)
    assert torch.equal(most_likely(-logits.abs()), (-logits.abs()).argmax(-1))


def test_warming_up_leaves_no_trace(monkeypatch):
    """As on a GPU, but the step is run instead of captured."""
    engine = Engine(make_model(tiny.FAMILIES[0], "leader"))
    engine.graphs = True
    monkeypatch.setattr(Session, "_capture", lambda self: SimpleNamespace(replay=self._advance))
    settings = {"sampling": Sampling(), "stop": [], "pad": 0}
    engine.warm_up(1, 13, 8, **settings)
    session = engine.borrow(1, 13, 8, **settings)
    assert session.graph is not None, "it is the session that is borrowed next"
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    found = _generate(session, prompt, None, 8, None)
    plain = engine.session(1, 13, 8, graph=False)
    assert torch.equal(found, _generate(plain, prompt, None, 8, None))
