"""Attention backends that are compiled or need a GPU give the numbers of the plain ones."""

from __future__ import annotations

import importlib.util
import operator

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, make_converted

from uniattn_cli.models.families import family_of

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
cases = pytest.mark.parametrize(("entry", "layout"), CASES, ids=CASE_IDS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def masked():
    """The second row whole, the first one padded on the left."""
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    return mask


@pytest.mark.slow
@families
@pytest.mark.parametrize("layout", ["mixed", "others"])
def test_flex_attention_equals_plain_attention(entry, layout):
    """On a CPU it works in forward calls only, and compiles for seconds."""
    model = make_converted(entry, layout)
    if model.model.layers[0].self_attn.has_sinks:
        pytest.skip("on a CPU, FlexAttention refuses sinks")
    expected = model(TOKENS, attention_mask=masked(), use_cache=False).logits
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    actual = model(TOKENS, attention_mask=masked(), use_cache=False).logits
    assert (actual[1] - expected[1]).abs().max() < 2e-5
    assert (actual[0, 5:] - expected[0, 5:]).abs().max() < 2e-5


def with_larger_heads(config):
    """FlexAttention on a GPU wants heads of 16 at least."""
    if config.rope_parameters.get("rope_type") == "longrope":
        pytest.skip("its rotary factors fit heads of 8 only")
    config.head_dim = 16
    return config


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("backend", ["flash_attention_2", "flex_attention"])
def test_gpu_backends_equal_plain_attention(entry, layout, backend):
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if backend == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("needs flash_attn")
    name, config, model_class = entry
    if backend not in family_of(config().model_type).backends:
        pytest.skip("the family has other backends")
    model = make_converted((name, lambda: with_larger_heads(config()), model_class), layout)
    expected = model(TOKENS, use_cache=False).logits
    # Flash knows 16 bits only; the tokens of the plain backend in the same dtype are as far from float32.
    dtype = torch.bfloat16 if backend == "flash_attention_2" else torch.float32
    model = model.to("cuda", dtype)
    plain = model(TOKENS.cuda(), use_cache=False).logits.cpu().float()
    model.set_attn_implementation(backend)
    actual = model(TOKENS.cuda(), use_cache=False).logits.cpu().float()
    rounding = max((plain - expected).abs().max().item(), 1e-3)
    assert (actual - expected).abs().max() < 3 * rounding
    if backend == "flash_attention_2":
        return
    model.zero_grad()
    with torch.enable_grad():
        model.train()(TOKENS.cuda(), labels=TOKENS.cuda(), use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["grouped_several", "free_several", "early"])
def test_borrowed_states_are_sliced_in_the_piece_that_reads_them(name):
    """vLLM compiles the pieces between attention calls one by one and moves every `getitem` to what made its input.

    A view that is made there has other strides than the piece that reads it was compiled for.
    """
    crossing = []

    def note_crossings(graph, inputs):
        piece, pieces = 0, {}
        for node in graph.graph.nodes:
            piece += node.target is torch.nn.functional.scaled_dot_product_attention
            pieces[node] = piece
            if node.target is operator.getitem and node.args[0].op != "placeholder":
                made = node.args[0].meta["example_value"]
                if isinstance(made, torch.Tensor) and pieces[node.args[0]] < piece:
                    crossing.append(node)
        assert piece == model.config.num_hidden_layers
        return graph.forward

    model = make_converted(FAMILIES[0], name)
    expected = model(TOKENS, use_cache=False).logits
    found = torch.compile(model, backend=note_crossings, fullgraph=True)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert not crossing
