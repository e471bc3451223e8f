"""The streaming statistics equal a direct computation, and say the right thing about special cases."""

from __future__ import annotations

import copy
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import FAMILIES, SIZES, make_base
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

from uniattn_cli.analysis import borrowing, similarity
from uniattn_cli.analysis.borrowing import RIDGE, BorrowingError, RatioMean, held_out, sketch_of
from uniattn_cli.analysis.capture import capture
from uniattn_cli.analysis.maps import SequenceMaps
from uniattn_cli.analysis.measure import measure
from uniattn_cli.analysis.measured import Measured
from uniattn_cli.analysis.plots import plot_depth
from uniattn_cli.analysis.similarity import FIRST_ROW, MapStatistics, SequenceMean
from uniattn_cli.commands.analyze import neighbours_table, resolution_note
from uniattn_cli.errors import ModelError, StageError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.recipe.schema import AnalysisSpec

LAYERS, HEADS, DISTANCE, ROWS, TOP = 6, 6, 3, 5, 4
# Analysis knows no families. These mask, project or bound scores in other ways than those that can be converted.
OTHERS = [
    ("mistral_window", lambda: MistralConfig(**SIZES, sliding_window=12), MistralForCausalLM),
    ("gemma2", lambda: Gemma2Config(**SIZES, sliding_window=12, query_pre_attn_scalar=8), Gemma2ForCausalLM),
    ("phi3_fused", lambda: Phi3Config(**SIZES), Phi3ForCausalLM),
]
families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
everything = pytest.mark.parametrize("entry", FAMILIES + OTHERS, ids=[entry[0] for entry in FAMILIES + OTHERS])


@pytest.fixture(autouse=True)
def no_grad():
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
            result.add(captured.take())
    return result


def borrow(model, sequences, distance=DISTANCE):
    """Errors of borrowing as tensors [borrower, source], fitted and judged as `measure` does it."""
    judges = held_out(len(sequences))
    types = attention_shape(model.config).mask_types
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in range(model.config.num_hidden_layers)]
        result = BorrowingError(projections, types, distance)
        for group in ([i for i in range(len(sequences)) if i not in judges], judges):
            for index in group:
                model(sequences[index][None], use_cache=False)
                result.add(captured.take())
            result.solve()
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in result.results().items()}


def analysed(model, count=4, length=24, **settings):
    """Everything that `analyze` measures of a tiny model."""
    spec = AnalysisSpec(max_distance=DISTANCE, rows=ROWS, top_k=TOP, **settings)
    source = SimpleNamespace(name="tiny", fingerprint="f")
    return measure(model, torch.stack(tokens_of(*[length] * count)), spec, source)


def direct_maps(model, sequence):
    """[layers, heads, rows, keys] in float64 from the eager backend's own output."""
    original = model.config._attn_implementation
    model.set_attn_implementation("eager")
    maps = model(sequence[None], use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(original)
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


@everything
def test_streaming_equals_direct_computation(entry, monkeypatch):
    """With many tiles and with one."""
    model = make_base(entry)
    depth = model.config.num_hidden_layers
    sequences = tokens_of(24, 40, 31)
    whole = [direct_maps(model, sequence) for sequence in sequences]
    heads, layers = {}, {}
    for suffix, change in (("", lambda maps: maps), ("_no_sink", without_sink)):
        for name in ("cosine", "js"):
            heads[name + suffix] = torch.zeros(depth, DISTANCE, HEADS, HEADS, dtype=torch.float64)
        for name in ("cosine", "js", "averaged_cosine"):
            layers[name + suffix] = torch.zeros(depth, depth, dtype=torch.float64)
        for maps in map(change, whole):
            rows = torch.linspace(FIRST_ROW, maps.shape[2] - 1, ROWS).long()
            for later in range(depth):
                for distance in range(1, min(DISTANCE, later) + 1):
                    p, q = maps[later][:, None], maps[later - distance][None]
                    cosines = cosine(p, q)[..., FIRST_ROW:].mean(-1)
                    heads["cosine" + suffix][later, distance - 1] += cosines / len(sequences)
                    heads["js" + suffix][later, distance - 1] += js(p, q)[..., rows].mean(-1) / len(sequences)
                p, mean = maps[later][None], maps.mean(1)
                cosines = cosine(p, maps)[..., FIRST_ROW:].mean((1, 2))
                layers["cosine" + suffix][later] += cosines / len(sequences)
                layers["js" + suffix][later] += js(p, maps)[..., rows].mean((1, 2)) / len(sequences)
                averaged = cosine(mean[later][None], mean)[..., FIRST_ROW:].mean(-1)
                layers["averaged_cosine" + suffix][later] += averaged / len(sequences)
    sink = sum(m[..., FIRST_ROW:, 0].mean((1, 2)) for m in whole) / len(whole)
    for tile in (1, 1 << 30):
        monkeypatch.setattr(similarity, "TILE_BYTES", tile)
        result = stream(model, sequences)
        for name, expected in heads.items():
            torch.testing.assert_close(result.heads[name].mean, expected, atol=1e-5, rtol=0)
        for name, expected in layers.items():
            torch.testing.assert_close(result.layers[name].mean, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.sink.mean, sink, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [1, 4000, 1 << 30])
def test_products_by_rows_are_the_same_products(tile, monkeypatch):
    monkeypatch.setattr(similarity, "TILE_BYTES", tile)
    features = torch.rand(12, 7, 31)
    torch.testing.assert_close(similarity.gram_by_rows(features), similarity.gram(features))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_measures_the_same():
    model = make_base(FAMILIES[0])
    here, _ = analysed(model, length=60)
    there, _ = analysed(model.cuda(), length=60)
    for name, values in here.heads.items():
        torch.testing.assert_close(torch.tensor(there.heads[name]), torch.tensor(values), atol=1e-4, rtol=0)
    for name, values in here.output_error.items():
        found, expected = torch.tensor(there.output_error[name]), torch.tensor(values)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3, equal_nan=True)


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


def test_top_k_overlap_of_layers_and_without_the_first_key():
    model = make_base(FAMILIES[0])
    (sequence,) = tokens_of(30)
    result = stream(model, [sequence]).layers["top_k_no_sink"].mean
    maps = without_sink(direct_maps(model, sequence))
    rows = torch.linspace(FIRST_ROW, 29, ROWS).long()
    chosen = torch.zeros_like(maps).scatter_(-1, maps.topk(TOP).indices, 1.0)[:, :, rows]
    expected = (chosen[5] * chosen[1]).sum(-1).mean() / TOP
    assert result[5, 1].item() == pytest.approx(expected.item(), abs=1e-6)


def test_layer_similarity_is_the_mean_over_same_heads():
    result = stream(make_base(FAMILIES[0]), tokens_of(24, 24))
    heads = result.heads["cosine"].mean[4, 1].diagonal().mean()
    assert result.layers["cosine"].mean[4, 2].item() == pytest.approx(heads.item(), abs=1e-6)


def identical_layers():
    """A model whose layers all do the same to the same hidden states, since none of them adds anything to speak of."""
    model = make_base(FAMILIES[0])
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)
        for layer in model.model.layers:
            layer.self_attn.load_state_dict(model.model.layers[0].self_attn.state_dict())
            layer.input_layernorm.load_state_dict(model.model.layers[0].input_layernorm.state_dict())
            layer.self_attn.o_proj.weight.copy_(model.model.layers[0].self_attn.o_proj.weight)
            layer.mlp.down_proj.weight.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-12)
    return model


def test_identical_layers_have_similarity_one_and_no_error():
    model = identical_layers()
    result = stream(model, tokens_of(24))
    for name in ("cosine", "cosine_no_sink", "js", "js_no_sink", "top_k", "top_k_no_sink"):
        same = result.heads[name].mean[1:, 0].diagonal(dim1=-2, dim2=-1)
        assert same.min().item() == pytest.approx(1, abs=1e-5), name
        assert result.layers[name].mean.min().item() == pytest.approx(1, abs=1e-5), name
    errors = borrow(model, tokens_of(24, 24))
    for name in ("before", "after"):
        assert errors[name].nan_to_num().max().item() == pytest.approx(0, abs=1e-9), name
        assert errors[name][1, 0].isfinite()


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


def in_float32(states):
    """The same states as a float32 model would have given them, with attention by the textbook."""
    result = copy.copy(states)
    result.queries, result.keys, result.values = (t.float() for t in (states.queries, states.keys, states.values))
    result.output, result.inputs = states.output.float(), states.inputs.float()

    def attend(own, values):
        group = len(own.queries) // len(own.keys)
        scores = own.queries @ own.keys.repeat_interleave(group, 0).transpose(1, 2) * own.scaling
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        maps = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (maps @ values.repeat_interleave(group, 1)).transpose(1, 2)

    result.call = attend
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_accumulated_in_float32_and_scores_do_not_overflow(dtype):
    model = make_base(FAMILIES[0]).to(dtype)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(60)
            layer.self_attn.k_proj.weight.mul_(60)
    kinds = (lambda layers: layers), (lambda layers: [in_float32(state) for state in layers])
    statistics = [MapStatistics(DISTANCE, ROWS, TOP) for _ in kinds]
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in sorted(captured.projections)]
        errors = [BorrowingError(projections, ["full"] * len(projections), DISTANCE) for _ in kinds]
        for held, sequence in enumerate(tokens_of(24, 24)):
            model(sequence[None], use_cache=False)
            states = captured.take()
            largest = max((s.queries.float().norm(dim=-1).max() * s.keys.float().norm(dim=-1).max()) for s in states)
            assert largest > torch.finfo(torch.float16).max
            for change, similarity, error in zip(kinds, statistics, errors, strict=True):
                similarity.add(change(states))
                if held:
                    error.solve()
                error.add(change(states))
    for name, entry in statistics[0].heads.items():
        assert entry.mean.isfinite().all() and entry.mean.dtype == torch.float64, name
        torch.testing.assert_close(entry.mean, statistics[1].heads[name].mean, atol=1e-6, rtol=0)
    found, expected = (entry.results() for entry in errors)
    for name in ("before", "after"):
        assert found[name][1][0] > 0
        # The borrowed outputs come from the model's own backend, rounded to the model's own precision.
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(expected[name]), atol=0.01, rtol=0.02, equal_nan=True
        )


@families
def test_capturing_changes_nothing_and_cleans_up(entry):
    model = make_base(entry)
    backend = model.config._attn_implementation
    (sequence,) = tokens_of(24)
    plain = model(sequence[None]).logits
    with capture(model) as captured:
        assert torch.equal(model(sequence[None]).logits, plain)
        assert len(captured.take()) == model.config.num_hidden_layers
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config._attn_implementation == backend
    assert torch.equal(model(sequence[None]).logits, plain)


# --- the output error of borrowing ------------------------------------------------------------------------------------


def direct_borrowing(model, sequences):
    """`before` and `after` by the book in float64: maps of the eager backend, values and inputs from hooks."""
    types = attention_shape(model.config).mask_types
    depth = len(types)
    judges = held_out(len(sequences))
    tokens = []
    for sequence in sequences:
        maps = direct_maps(model, sequence)
        with capture(model) as captured:
            model(sequence[None], use_cache=False)
            states = captured.take()
        values = [state.values.double().repeat_interleave(HEADS // len(state.values), 0) for state in states]
        projections = [layer.self_attn.o_proj.weight.double().T for layer in model.model.layers]
        outputs = [
            [(maps[i] @ values[j]).transpose(0, 1).flatten(1) @ projections[j] for i in range(depth)]
            for j in range(depth)
        ]
        tokens.append(([state.inputs.double() for state in states], outputs))
    before = torch.full((depth, depth), math.nan, dtype=torch.float64)
    after = before.clone()
    for j in range(depth):
        for i in range(max(0, j - DISTANCE), j):
            if types[i] != types[j]:
                continue
            inputs = [entry[0][j] for entry in tokens]
            own = [entry[1][j][j] for entry in tokens]
            errors = [entry[1][j][j] - entry[1][j][i] for entry in tokens]
            before[j, i] = torch.cat(errors).square().sum() / torch.cat(own).square().sum()
            x, r = (torch.cat([part[n] for n in range(len(tokens)) if n not in judges]) for part in (inputs, errors))
            system = x.T @ x
            weights = torch.linalg.solve(system + RIDGE * system.diagonal().mean() * torch.eye(len(system)), x.T @ r)
            left = torch.cat([errors[n] - inputs[n] @ weights for n in judges])
            after[j, i] = left.square().sum() / torch.cat([own[n] for n in judges]).square().sum()
    return before, after


@everything
def test_output_error_equals_direct_computation(entry, monkeypatch):
    """With many tiles and with one."""
    model = make_base(entry)
    sequences = tokens_of(24, 40, 31, 28, 36, 33)
    before, after = direct_borrowing(model, sequences)
    assert before[2, 0] > 1e-3
    for tile in (1, 1 << 30):
        monkeypatch.setattr(borrowing, "TILE_BYTES", tile)
        found = borrow(model, sequences)
        torch.testing.assert_close(found["before"], before, atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(found["after"], after, atol=1e-5, rtol=1e-5, equal_nan=True)
        assert found["before_stderr"][2, 0] > 0


def test_layers_of_other_mask_types_are_not_borrowed_from():
    model = make_base(OTHERS[1])
    types = attention_shape(model.config).mask_types
    assert len(set(types)) == 2
    found = borrow(model, tokens_of(24, 24))["before"]
    for j in range(LAYERS):
        for i in range(LAYERS):
            assert found[j, i].isfinite() == (0 < j - i <= DISTANCE and types[i] == types[j])


def test_compensation_explains_what_is_linear_in_the_input():
    """Compensations are judged on sequences that they have not seen, and can be no better than the data allow."""
    model = make_base(FAMILIES[0])
    found = borrow(model, tokens_of(*[60] * 16))
    measured = found["before"].isfinite()
    assert (found["after"][measured] < found["before"][measured]).float().mean() > 0.5
    few = borrow(model, tokens_of(24, 60))
    assert few["after"][measured].mean() > found["after"][measured].mean()


@pytest.mark.parametrize("value", [1.0, 0.0], ids=["constant", "zero"])
def test_a_singular_second_moment_matrix(value):
    """All tokens alike: the inputs span one direction, or none."""
    model = make_base(FAMILIES[0])
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[5].expand(97, -1))
        for layer in model.model.layers:
            layer.input_layernorm.weight.mul_(value)
            layer.self_attn.q_proj.weight.add_(0.1)
    found = borrow(model, tokens_of(24, 30, 28))
    if value:
        # Maps differ in position only, values not at all, so nothing can be lost by borrowing.
        assert found["before"][1, 0].item() == pytest.approx(0, abs=1e-8)
        assert found["after"][1, 0].item() == pytest.approx(0, abs=1e-8)
    else:
        assert found["before"].isnan().all() and found["after"].isnan().all()


def test_inputs_of_one_direction_still_give_a_compensation():
    """Moments of rank one from inputs that have nothing to do with the outputs, as a dead norm would leave them."""
    model = make_base(FAMILIES[0])
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in sorted(captured.projections)]
        result = BorrowingError(projections, ["full"] * len(projections), DISTANCE)
        for sequence in tokens_of(30, 26):
            model(sequence[None], use_cache=False)
            states = captured.take()
            for state in states:
                state.inputs = torch.ones_like(state.inputs)
            result.add(states)
            result.solve()
    found = torch.tensor(result.results()["after"])
    assert found.isfinite().sum() == 5 + 4 + 3
    assert (found[found.isfinite()] < 2).all()


def test_one_sequence_has_no_error_after_compensation():
    found = borrow(make_base(FAMILIES[0]), tokens_of(24))
    assert found["before"][1, 0] > 0 and found["before_stderr"].isnan().all() and found["after"].isnan().all()
    assert held_out(1) == [] and held_out(2) == [1] and held_out(9) == [1, 5]


def test_the_sketch_is_unbiased_and_exact_for_narrow_models():
    assert torch.equal(sketch_of(48), torch.eye(48))
    sketch = sketch_of(600)
    torch.testing.assert_close(sketch.T @ sketch, torch.eye(256) * 600 / 256, atol=1e-5, rtol=0)
    vectors = torch.randn(2000, 600, generator=torch.Generator().manual_seed(1))
    ratio = (vectors @ sketch).square().sum() / vectors.square().sum()
    assert ratio.item() == pytest.approx(1, abs=0.01)


def test_a_sketched_error_is_close_to_the_exact_one(monkeypatch):
    model = make_base(FAMILIES[0])
    sequences = tokens_of(*[60] * 4)
    exact = borrow(model, sequences)
    monkeypatch.setattr(borrowing.sketch_of, "__defaults__", (24, 0))
    sketched = borrow(model, sequences)
    torch.testing.assert_close(sketched["before"], exact["before"], atol=0, rtol=0.3, equal_nan=True)
    assert not torch.equal(sketched["before"].nan_to_num(), exact["before"].nan_to_num())


def test_ratio_of_means_and_its_standard_error():
    generator = torch.Generator().manual_seed(3)
    below = torch.rand(400, 1, generator=generator, dtype=torch.float64) + 1
    above = 0.3 * below + 0.1 * torch.randn(400, 1, generator=generator, dtype=torch.float64)
    ratio = RatioMean()
    for a, b in zip(above, below, strict=True):
        ratio.add(a, b)
    assert ratio.mean.item() == pytest.approx((above.mean() / below.mean()).item())
    assert ratio.stderr.item() == pytest.approx(0.1 / 1.5 / 20, rel=0.15)


# --- padding, order, memory -------------------------------------------------------------------------------------------


@everything
def test_padding_counts_for_nothing(entry):
    model = make_base(entry)
    sequences = tokens_of(24, 37, 30)
    alone, errors = stream(model, sequences), borrow(model, sequences)
    for side in ("left", "right"):
        result, borrowed = measured_together(model, sequences, side)
        for name, found in result.layers.items():
            torch.testing.assert_close(found.mean, alone.layers[name].mean, atol=1e-5, rtol=0)
        for name, found in result.heads.items():
            torch.testing.assert_close(found.mean, alone.heads[name].mean, atol=1e-5, rtol=0)
        for name, values in borrowed.results().items():
            found = torch.tensor(values, dtype=torch.float64)
            torch.testing.assert_close(found, errors[name], atol=1e-5, rtol=1e-4, equal_nan=True)


def measured_together(model, sequences, side):
    """Statistics and errors of three sequences that one forward pass computes, padded on one side to 37 tokens."""
    padded = torch.zeros(3, 37, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, sequence in enumerate(sequences):
        place = slice(37 - len(sequence), None) if side == "left" else slice(len(sequence))
        padded[row, place], mask[row, place] = sequence, 1
    result = MapStatistics(DISTANCE, ROWS, TOP)
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in sorted(captured.projections)]
        borrowed = BorrowingError(projections, attention_shape(model.config).mask_types, DISTANCE)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        model(padded, attention_mask=mask, position_ids=positions, use_cache=False)
        for row in (0, 2, 1):
            if row in held_out(3):
                borrowed.solve()
            states = captured.take(mask, row)
            result.add(states)
            borrowed.add(states)
    return result, borrowed


def test_a_window_that_no_mask_tells_of():
    """FlashAttention takes the window as an option; the maps must be those of the mask that says the same."""
    model = make_base(OTHERS[0])
    (sequence,) = tokens_of(30)
    with capture(model) as captured:
        model(sequence[None], use_cache=False)
        masked = captured.take()
        unmasked = captured.take()
    for state in unmasked:
        assert state.mask is not None and state.window is None
        state.mask, state.window = None, 12
    maps = [SequenceMaps(states).rows(slice(0, 30), 30) for states in (masked, unmasked)]
    torch.testing.assert_close(maps[0], maps[1])


def test_the_order_of_sequences_means_nothing():
    model = make_base(FAMILIES[0])
    sequences = tokens_of(24, 40, 31, 28)
    one, other = stream(model, sequences), stream(model, sequences[::-1])
    for name, entry in one.heads.items():
        torch.testing.assert_close(entry.mean, other.heads[name].mean, atol=1e-12, rtol=0)
        torch.testing.assert_close(entry.stderr, other.heads[name].stderr, atol=1e-7, rtol=0)
    errors = borrow(model, sequences)["before"], borrow(model, sequences[::-1])["before"]
    torch.testing.assert_close(*errors, atol=1e-12, rtol=0, equal_nan=True)


def test_sequences_too_short_to_compare_are_passed_over():
    model = make_base(FAMILIES[0])
    with_short = stream(model, tokens_of(24, FIRST_ROW, 30))
    assert with_short.layers["cosine"].count == 2
    assert stream(model, tokens_of(FIRST_ROW + 2)).layers["cosine"].mean.isfinite().all()


def live_bytes():
    """Bytes of all tensors that something still refers to."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) is torch.Tensor:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_the_number_of_sequences():
    model = make_base(FAMILIES[0])
    held, result = [], MapStatistics(DISTANCE, ROWS, TOP)
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in sorted(captured.projections)]
        errors = BorrowingError(projections, ["full"] * len(projections), DISTANCE)
        for index, sequence in enumerate(tokens_of(*[64] * 8)):
            if index == 6:
                errors.solve()
            model(sequence[None], use_cache=False)
            states = captured.take()
            result.add(states)
            errors.add(states)
            del states
            captured.clear()
            held.append(live_bytes())
    assert held[1] == held[5]
    assert held[7] <= held[5] + 4096  # the sums of `after` are a few numbers per pair


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.bytes = max(self.bytes, item.numel() * item.element_size())
        return result


def test_maps_are_never_held_beyond_a_tile(monkeypatch):
    monkeypatch.setattr(similarity, "TILE_BYTES", 1 << 16)
    monkeypatch.setattr(borrowing, "TILE_BYTES", 1 << 16)
    model = make_base(FAMILIES[0])
    with capture(model) as captured:
        projections = [captured.projections[layer] for layer in sorted(captured.projections)]
        errors = BorrowingError(projections, ["full"] * len(projections), DISTANCE)
        model(tokens_of(240)[0][None], use_cache=False)
        states = captured.take()
        with LargestTensor() as largest:
            MapStatistics(DISTANCE, 2, TOP).add(states)
            errors.add(states)
    all_maps = 4 * LAYERS * HEADS * 240 * 240
    # Inputs and outputs of all layers are the largest things left.
    assert largest.bytes < all_maps / 20


# --- what analyze makes of it -----------------------------------------------------------------------------------------


def test_measured_survives_its_file(tmp_path):
    measured, notes = analysed(make_base(FAMILIES[0]))
    assert notes == [] and measured.forward_ratio > 0
    measured.save(tmp_path, {})
    loaded = Measured.load(tmp_path)
    assert set(loaded.output_error) == {"before", "before_stderr", "after", "after_stderr"}
    for name, rows in measured.output_error.items():
        for j, row in enumerate(rows):
            for i, value in enumerate(row):
                inside = 0 < j - i <= DISTANCE and not math.isnan(value)
                assert loaded.output_error[name][j][i] == (pytest.approx(value, rel=1e-5) if inside else None)
    assert loaded.output_error["before"][1][0] is not None
    assert loaded.output_error["after_stderr"][1][0] is None  # one sequence judges
    assert neighbours_table(loaded) == neighbours_table(measured)
    plot_depth(loaded, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 10_000
    text = (tmp_path / "analysis.json").read_text()
    (tmp_path / "analysis.json").write_text(text.replace('"schema": 2', '"schema": 1'))
    with pytest.raises(StageError, match="has schema 1; run `uniattn analyze --force` again"):
        Measured.load(tmp_path)


def test_tables_say_how_sure_their_numbers_are():
    model = make_base(FAMILIES[0])
    table = neighbours_table(analysed(model, count=8)[0])
    assert table.columns[-2:] == ["output error", "compensated"]
    assert "95 % intervals: ± 0." in table.title
    measured, notes = analysed(model, count=1)
    table = neighbours_table(measured)
    assert "±" not in table.title and all(row[-1] == "-" and row[-2] != "-" for row in table.rows)
    assert notes == ["one sequence: no confidence intervals, and no errors after compensation"]
    assert resolution_note(measured) == []


def test_a_sample_too_small_is_told_with_the_tokens_that_would_do():
    measured, _ = analysed(make_base(FAMILIES[0]), count=3)
    width, spread = measured.resolution()
    assert 0 < width and 0 < spread < 1
    (note,) = resolution_note(measured)
    wanted = int(note.split("--tokens ")[1])
    assert wanted == pytest.approx(measured.tokens * (width / (0.25 * spread)) ** 2, rel=0.1)
    assert wanted > measured.tokens
    for values in measured.heads_stderr.values():
        values *= (measured.tokens / wanted) ** 0.5
    assert resolution_note(measured) == []


def test_the_output_error_is_left_out_where_the_projection_is_unknown():
    model = make_base(FAMILIES[0])
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    measured, (note,) = analysed(model)
    assert measured.output_error is None and "layer 0 changes what its heads found" in note
    assert neighbours_table(measured).columns[-1] == "top-k"

    model = make_base(FAMILIES[0])
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Sequential(layer.self_attn.o_proj)
    measured, (note,) = analysed(model)
    assert measured.output_error is None and "no linear output projection named o_proj" in note


def test_compensation_is_left_out_where_its_sums_would_not_fit(monkeypatch):
    monkeypatch.setattr("uniattn_cli.analysis.measure.MOMENT_BYTES", 1000)
    measured, (note,) = analysed(make_base(FAMILIES[0]))
    assert "errors after compensation were not measured" in note
    assert measured.output_error["before"][1][0] > 0 and math.isnan(measured.output_error["after"][1][0])


def test_maps_that_overflow_are_an_error():
    model = make_base(FAMILIES[0]).to(torch.float16)
    for projection in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        projection.weight.mul_(1000)
    model.model.layers[1].mlp.down_proj.weight.mul_(1000)
    with pytest.raises(ModelError, match=r"not finite: hidden states overflow in float16; use --dtype bfloat16"):
        analysed(model)
