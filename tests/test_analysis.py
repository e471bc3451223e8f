"""The streaming statistics equal a direct computation, and say the right thing about special cases."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import FAMILIES, make_base

from uniattn_cli.analysis import statistics
from uniattn_cli.analysis.capture import capture
from uniattn_cli.analysis.statistics import FIRST_ROW, MapStatistics, SequenceMean

LAYERS, HEADS, DISTANCE, ROWS, TOP = 6, 6, 3, 5, 4
families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def tokens_of(*lengths):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 97, (length,), generator=generator) for length in lengths]


def stream(model, sequences):
    result = MapStatistics(DISTANCE, ROWS, TOP)
    with capture(model) as captured:
        for sequence in sequences:
            model(sequence[None], use_cache=False)
            result.add([captured.layers[layer] for layer in range(model.config.num_hidden_layers)])
    return result


def direct_maps(model, sequence):
    """[layers, heads, rows, keys] in float64 from the eager backend's own output."""
    backend = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(sequence[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(backend)
    assert len(maps) == model.config.num_hidden_layers
    return torch.stack([entry[0] for entry in maps]).double()


def js(p, q):
    def entropy(x):
        return -(x * x.clamp_min(1e-300).log()).sum(-1)

    return 1 - (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / math.log(2)


def cosine(p, q):
    return (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))


def without_sink(maps):
    rest = maps[..., 1:]
    return rest / rest.sum(-1, keepdim=True)


@families
@pytest.mark.parametrize("tile", [1, 1 << 30], ids=["many_tiles", "one_tile"])
def test_streaming_equals_direct_computation(entry, tile, monkeypatch):
    monkeypatch.setattr(statistics, "TILE_BYTES", tile)
    model = make_base(entry)
    layers = model.config.num_hidden_layers
    sequences = tokens_of(24, 40, 31)
    result = stream(model, sequences)
    for suffix, change in (("", lambda maps: maps), ("_no_sink", without_sink)):
        expected_cosine = torch.zeros(layers, DISTANCE, HEADS, HEADS, dtype=torch.float64)
        expected_js = torch.zeros_like(expected_cosine)
        for sequence in sequences:
            maps = change(direct_maps(model, sequence))
            rows = torch.linspace(FIRST_ROW, len(sequence) - 1, ROWS).long()
            for later in range(layers):
                for distance in range(1, min(DISTANCE, later) + 1):
                    p, q = maps[later][:, None], maps[later - distance][None]
                    cosines = cosine(p, q)[..., FIRST_ROW:].mean(-1)
                    expected_cosine[later, distance - 1] += cosines / len(sequences)
                    expected_js[later, distance - 1] += js(p, q)[..., rows].mean(-1) / len(sequences)
        torch.testing.assert_close(result.heads["cosine" + suffix].mean, expected_cosine, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.heads["js" + suffix].mean, expected_js, atol=1e-5, rtol=0)
    maps = [direct_maps(model, sequence) for sequence in sequences]
    averaged = sum(cosine(m.mean(1)[:, None], m.mean(1)[None])[..., FIRST_ROW:].mean(-1) for m in maps) / len(maps)
    torch.testing.assert_close(result.layers["averaged_cosine"].mean, averaged, atol=1e-5, rtol=0)
    sink = sum(m[..., FIRST_ROW:, 0].mean((1, 2)) for m in maps) / len(maps)
    torch.testing.assert_close(result.sink.mean, sink, atol=1e-5, rtol=0)


def test_top_k_overlap_counts_common_keys():
    model = make_base(FAMILIES[0])
    (sequence,) = tokens_of(30)
    result = stream(model, [sequence]).heads["top_k"].mean
    maps = direct_maps(model, sequence)
    rows = torch.linspace(FIRST_ROW, 29, ROWS).long()
    overlaps = []
    for row in rows:
        left = set(maps[3, 2, row].topk(TOP).indices.tolist())
        right = set(maps[1, 4, row].topk(TOP).indices.tolist())
        overlaps.append(len(left & right) / TOP)
    assert result[3, 1, 2, 4].item() == pytest.approx(sum(overlaps) / ROWS, abs=1e-6)


def test_layer_similarity_is_the_mean_over_same_heads():
    result = stream(make_base(FAMILIES[0]), tokens_of(24, 24))
    heads = result.heads["cosine"].mean[4, 1].diagonal().mean()
    assert result.layers["cosine"].mean[4, 2].item() == pytest.approx(heads.item(), abs=1e-6)


def test_identical_layers_have_similarity_one():
    model = make_base(FAMILIES[0])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
        for layer in model.model.layers[1:]:
            layer.self_attn.load_state_dict(model.model.layers[0].self_attn.state_dict())
            layer.input_layernorm.load_state_dict(model.model.layers[0].input_layernorm.state_dict())
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    result = stream(model, tokens_of(24))
    for name in ("cosine", "cosine_no_sink", "js", "js_no_sink", "top_k"):
        same = result.heads[name].mean[1:, 0].diagonal(dim1=-2, dim2=-1)
        assert same.min().item() == pytest.approx(1, abs=1e-5), name


def test_one_sequence_has_no_standard_error_and_several_have():
    model = make_base(FAMILIES[0])
    assert stream(model, tokens_of(24)).layers["cosine"].stderr.isnan().all()
    several = stream(model, tokens_of(24, 24, 24)).layers["cosine"].stderr
    assert (several[2, 1] > 0) and several.isfinite().all()


def test_standard_error_is_the_textbook_one():
    values = torch.randn(9, 4, dtype=torch.float64)
    mean = SequenceMean()
    for value in values:
        mean.add(value)
    torch.testing.assert_close(mean.mean, values.mean(0))
    torch.testing.assert_close(mean.stderr, values.std(0) / 3)


def test_half_precision_scores_do_not_overflow():
    model = make_base(FAMILIES[0]).half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
            layer.self_attn.k_proj.weight.mul_(60)
    result = stream(model, tokens_of(24))
    for name, entry in result.heads.items():
        assert entry.mean.isfinite().all(), name


@families
def test_capturing_changes_nothing_and_cleans_up(entry):
    model = make_base(entry)
    backend = model.config._attn_implementation
    (sequence,) = tokens_of(24)
    plain = model(sequence[None]).logits
    with capture(model) as captured:
        assert torch.equal(model(sequence[None]).logits, plain)
        assert len(captured.layers) == model.config.num_hidden_layers
    assert model.config._attn_implementation == backend
    assert torch.equal(model(sequence[None]).logits, plain)
