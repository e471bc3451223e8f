"""The fit: least squares is right, layers get better on tokens they have not seen, and nothing depends on batching."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, REDUCED, TYPICAL, make_base, make_layout, typical_families
from tiny_run import make_model, settings, write_data

from uniattn_cli import convert
from uniattn_cli.errors import ModelError, RecipeError
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.moments import Moments, fit_ridge, reduce_rank, solve_ridge
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.families import check_target, family_of
from uniattn_cli.recipe.schema import ConversionSpec

# What alignment does is for its own tests to show.
QUICK = ConversionSpec(align=5, refine=5)


@pytest.fixture(scope="module")
def windows():
    """Text with structure: a random walk over the vocabulary, so that hidden states are correlated as in language."""
    generator = torch.Generator().manual_seed(11)
    steps = torch.randint(-3, 4, (80, 32), generator=generator)
    return steps.cumsum(1) % 90 + 5


def moments_of(features, targets):
    moments = Moments(features.shape[1], targets.shape[1], torch.device("cpu"))
    for part in range(0, len(features), 7):
        moments.add(features[part : part + 7], targets[part : part + 7])
    return moments


def attention_errors(base, converted, windows):
    """Mean squared difference of the residual streams after the last layer."""
    with torch.no_grad():
        theirs = base.model(windows, use_cache=False).last_hidden_state
        ours = converted.model(windows, use_cache=False).last_hidden_state
    return (theirs - ours).square().mean().item()


def test_moments_solve_the_same_problem_as_all_rows_at_once():
    torch.manual_seed(0)
    features, targets = torch.randn(200, 6), torch.randn(200, 3)
    moments = moments_of(features, targets)
    weights = solve_ridge(moments, 1e-12, [6])
    expected = torch.linalg.lstsq(features.double(), targets.double()).solution
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=1e-5)
    error = (targets.double() - features.double() @ weights).square().sum(1).mean().item()
    assert moments.error(weights) == pytest.approx(error, rel=1e-5)


def test_a_singular_moment_matrix_gives_finite_weights():
    features = torch.randn(50, 1).repeat(1, 5)
    features[:, 4] = 0
    fit = fit_ridge(moments_of(features, features[:, :2]), moments_of(features, features[:, :2]), [4, 1])
    assert fit.weights.isfinite().all()
    assert fit.error_after < 1e-3 * fit.error_before


def test_pure_noise_is_not_fitted():
    torch.manual_seed(0)
    fit = moments_of(torch.randn(12, 40), torch.randn(12, 4))
    held = moments_of(torch.randn(500, 40), torch.randn(500, 4))
    result = fit_ridge(fit, held, [40])
    assert result.strength >= 1.0
    assert result.error_after <= result.error_before


def test_low_rank_is_optimal_among_low_ranks():
    """Reduced-rank regression beats the truncated SVD of the weights where the inputs are not white."""
    torch.manual_seed(1)
    heads, inputs, outputs, rank = 5, 8, 7, 2
    mixing = torch.randn(heads + inputs, heads + inputs) @ torch.diag(torch.logspace(0, 2, heads + inputs))
    features = torch.randn(4000, heads + inputs) @ mixing
    targets = features @ torch.randn(heads + inputs, outputs) + torch.randn(4000, outputs)
    moments = moments_of(features, targets)
    full = solve_ridge(moments, 1e-10, [heads, inputs])
    output, down, up = reduce_rank(full, moments, heads, rank, 1e-10)
    best = moments.error(torch.cat([output, (up @ down).T]))
    assert torch.linalg.matrix_rank(up @ down) == rank
    u, s, v = torch.linalg.svd(full[heads:].T)
    truncated = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    assert best < moments.error(torch.cat([full[:heads], truncated.T]))
    torch.manual_seed(2)
    for _ in range(20):
        nudged = (up + 1e-3 * torch.randn_like(up)) @ (down + 1e-3 * down.std() * torch.randn_like(down))
        assert moments.error(torch.cat([output, nudged.T])) >= best - 1e-9
    whole, down, up = reduce_rank(full, moments, heads, outputs, 1e-10)
    assert moments.error(torch.cat([whole, (up @ down).T])) == pytest.approx(moments.error(full), rel=1e-6)


def is_quick(entry, layout: str, target: str) -> bool:
    """Every layout with the usual target, and with the other one those that have every kind between them."""
    return entry[0] in TYPICAL and (target == "attention" or layout in REDUCED)


@pytest.mark.parametrize(
    ("entry", "layout", "target"),
    [
        pytest.param(*case, target, id=f"{name}-{target}", marks=[] if is_quick(*case, target) else pytest.mark.slow)
        for case, name in zip(CASES, CASE_IDS, strict=True)
        for target in ("attention", "residual")
    ],
)
def test_fitted_error_is_smaller_on_tokens_never_seen(entry, layout, target, windows):
    base = make_base(entry)
    if target == "residual" and family_of(base.config.model_type).post_norm:
        with pytest.raises(RecipeError, match=r"conversion\.target"):
            check_target(base.config.model_type, target)
        return
    layout = make_layout(layout, base.config)
    unfitted = build_converted(base, layout)
    fitted = build_converted(base, layout)
    fits = fit_layers(base, fitted, windows[:64], ConversionSpec(align=0, refine=0, target=target))
    assert [fit.layer for fit in fits] == [index for index in layout.changed if layout[index].kind != "none"]
    # A layer is left as it is where no change helps on tokens held out from its fit.
    better = [fit.error_after < fit.error_before for fit in fits]
    assert all(done or fit.ridge == float("inf") for done, fit in zip(better, fits, strict=True))
    assert sum(better) >= len(fits) - 1
    unseen = windows[64:]
    assert attention_errors(base, fitted, unseen) < attention_errors(base, unfitted, unseen)


@typical_families
def test_the_base_is_left_as_it_was(entry, windows):
    base = make_base(entry)
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    logits = base(windows[:2]).logits
    fit_layers(base, build_converted(base, make_layout("mixed", base.config)), windows, QUICK)
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert torch.equal(base(windows[:2]).logits, logits)


@pytest.mark.parametrize("layout", ["leader", "grouped_several", "mixed"])
def test_batch_size_does_not_matter(layout, windows):
    base = make_base(FAMILIES[0])
    weights = []
    for batch_size in (1, 5, 64):
        model = build_converted(base, make_layout(layout))
        fit_layers(base, model, windows, QUICK, batch_size=batch_size)
        weights.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "self_attn" in n]))
    torch.testing.assert_close(weights[0], weights[1], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(weights[0], weights[2], atol=2e-4, rtol=1e-3)


def test_the_same_seed_gives_the_same_weights(windows):
    base = make_base(FAMILIES[0])
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model = build_converted(base, make_layout("low_rank"))
        fit_layers(base, model, windows, QUICK)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("solve", "refine", "changes"),
    [("both", 0, "oc"), ("output", 0, "o"), ("output", 30, "vo"), ("compensation", 30, "c"), ("none", 30, "")],
)
def test_only_what_is_asked_for_is_solved(solve, refine, changes, windows):
    base = make_base(FAMILIES[0])
    model = build_converted(base, make_layout("leader"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit_layers(base, model, windows, replace(QUICK, solve=solve, refine=refine))
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = set()
    for layer in (2, 3, 5):
        expected |= {f"model.layers.{layer}.self_attn.v_proj.weight"} if "v" in changes else set()
        expected |= {f"model.layers.{layer}.self_attn.o_proj.weight"} if "o" in changes else set()
        expected |= {f"model.layers.{layer}.self_attn.compensation.weight"} if "c" in changes else set()
    assert changed == expected


def test_a_perfectly_redundant_layer_is_reproduced(windows):
    """If a layer's queries and keys are its leader's, sharing loses nothing and the fit has nothing to do."""
    base = make_base(FAMILIES[0])
    with torch.no_grad():
        base.model.layers[1].self_attn.o_proj.weight.zero_()
        base.model.layers[1].mlp.down_proj.weight.zero_()
        base.model.layers[2].input_layernorm.load_state_dict(base.model.layers[1].input_layernorm.state_dict())
        for name in ("q_proj", "k_proj"):
            source = getattr(base.model.layers[1].self_attn, name).state_dict()
            getattr(base.model.layers[2].self_attn, name).load_state_dict(source)
    model = build_converted(base, Layout.from_list([{}, {}, {"leader": 1}, {}, {}, {}]))
    (fit,) = fit_layers(base, model, windows, QUICK)
    assert fit.error_before < 1e-9 and fit.error_after < 1e-9
    torch.testing.assert_close(model(windows[:2]).logits, base(windows[:2]).logits, atol=1e-4, rtol=1e-4)


def test_nothing_to_fit_is_no_error(windows):
    base = make_base(FAMILIES[0])
    assert fit_layers(base, build_converted(base, Layout.own(6)), windows, QUICK) == []


def test_a_single_sequence_is_enough(windows):
    base = make_base(FAMILIES[0])
    model = build_converted(base, make_layout("leader"))
    assert len(fit_layers(base, model, windows[:1], QUICK)) == 3
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("count", [1, 8])
def test_errors_are_relative_to_what_the_base_gives(count, windows):
    """On the held-out sequences where there are any, else on the only one."""
    base = make_base(FAMILIES[0])
    layout = Layout.from_list([{}, {}, {}, {"leader": 1}, {}, {}])
    (fit,) = fit_layers(base, build_converted(base, layout), windows[:count], QUICK)
    outputs = []
    for model in (base, build_converted(base, layout)):
        attention = model.model.layers[3].self_attn
        handle = attention.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        with torch.no_grad():
            model(windows[count - max(1, count // 4) : count], use_cache=False)
        handle.remove()
    theirs, ours = outputs
    expected = ((theirs - ours).square().sum() / theirs.square().sum()).item()
    assert fit.error_before == pytest.approx(expected, rel=1e-4) and expected != 1


def test_the_reference_is_the_solution_through_means_of_positions(windows):
    """UniAttn's own start: pinv of the mean inputs times the mean of what the residual stream lacks, W_o untouched."""
    base = make_base(FAMILIES[0])
    layout = Layout.from_list([{}, {}, {"leader": 1}, {}, {"leader": 3}, {}])
    spec = ConversionSpec(solve="reference")
    assert spec.aim == "residual"
    model = build_converted(base, layout)
    fits = fit_layers(base, model, windows[:20], spec)
    hand = build_converted(base, layout)
    with torch.no_grad():
        for layer in (2, 4):
            seen = {}

            def keep(name, module, args, output, seen=seen):
                seen[name] = (output[0] if isinstance(output, tuple) else output).double()

            def keep_normed(module, args, given, seen=seen):
                seen["x"] = given["hidden_states"].double()

            ours, theirs = hand.model.layers[layer], base.model.layers[layer]
            handles = [
                ours.self_attn.register_forward_hook(functools.partial(keep, "borrowed")),
                ours.self_attn.register_forward_pre_hook(keep_normed, with_kwargs=True),
                theirs.self_attn.register_forward_hook(functools.partial(keep, "own")),
                hand.model.layers[layer - 1].register_forward_hook(functools.partial(keep, "ours")),
                base.model.layers[layer - 1].register_forward_hook(functools.partial(keep, "theirs")),
            ]
            for entry in (base, hand):
                entry(windows[:20], use_cache=False)
            for handle in handles:
                handle.remove()
            missing = seen["theirs"] + seen["own"] - seen["ours"] - seen["borrowed"]
            weight = torch.linalg.pinv(seen["x"].mean(0)) @ missing.mean(0)
            ours.self_attn.compensation.weight.copy_(weight.T)
            fitted = model.model.layers[layer].self_attn
            torch.testing.assert_close(
                fitted.compensation.weight, ours.self_attn.compensation.weight, atol=1e-3, rtol=1e-2
            )
            assert torch.equal(fitted.o_proj.weight, theirs.self_attn.o_proj.weight)
    assert [(fit.layer, fit.ridge) for fit in fits] == [(2, 0.0), (4, 0.0)]


def test_inputs_that_span_one_direction_give_finite_weights(windows):
    """All tokens alike, so that every second-moment matrix is singular."""
    base = make_base(FAMILIES[0])
    with torch.no_grad():
        base.model.embed_tokens.weight.copy_(base.model.embed_tokens.weight[5].expand(97, -1))
        for name in ("mixed", "others"):
            for solve in ("both", "reference"):
                model = build_converted(base, make_layout(name))
                fits = fit_layers(base, model, windows[:12], replace(QUICK, solve=solve))
                assert all(parameter.isfinite().all() for parameter in model.parameters())
                if solve == "both":
                    # What is the same for all tokens, x alone can make up for.
                    assert all(fit.error_after <= min(1e-4, fit.error_before) for fit in fits), fits
                if solve == "both" and name == "mixed":
                    expected, found = base(windows[12:14]).logits, model(windows[12:14]).logits
                    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_sums_of_half_precision_states_do_not_overflow(windows):
    """Hidden states near the largest float16 number, as some models have them in a few channels."""
    base = make_base(FAMILIES[0])
    with torch.no_grad():
        for layer in base.model.layers:
            layer.input_layernorm.weight[:3] = 200
            layer.self_attn.v_proj.weight[:, :3] *= 8
            layer.self_attn.o_proj.weight.mul_(4)
    fits = {}
    for dtype in (torch.float32, torch.float16):
        model = build_converted(base.to(dtype), make_layout("mixed"))
        fits[dtype] = fit_layers(base, model, windows[:40], QUICK)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        largest = max(base.model.layers[2].self_attn(**_inputs(base, windows[:4], 2))[0].abs().max().item(), 0)
        assert largest**2 > torch.finfo(torch.float16).max
    for full, half in zip(*fits.values(), strict=True):
        assert half.error_after == pytest.approx(full.error_after, rel=0.2, abs=0.02)


def _inputs(model, tokens, layer):
    """What the attention module of a layer is called with."""
    seen = {}
    handle = model.model.layers[layer].self_attn.register_forward_pre_hook(
        lambda module, args, given: seen.update(given), with_kwargs=True
    )
    model(tokens, use_cache=False)
    handle.remove()
    return seen


def test_hidden_states_that_overflow_are_told(windows):
    base = make_base(FAMILIES[0]).to(torch.float16)
    with torch.no_grad():
        for projection in (base.model.layers[1].mlp.gate_proj, base.model.layers[1].mlp.up_proj):
            projection.weight.mul_(1000)
        base.model.layers[1].mlp.down_proj.weight.mul_(1000)
    with pytest.raises(ModelError, match=r"cannot fit layer 2: .* overflow in float16; set model\.dtype"):
        fit_layers(base, build_converted(base, make_layout("leader")), windows[:8], QUICK)


def test_nothing_is_converted_where_the_code_does_not_equal_stock(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"model:\n  name: {model}\n")
    overrides = [*settings(), "layout.head_map=identity"]
    before = {path.name for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(SharedAttentionMixin, "embed_positions", lambda self, states, *positions: None)
        with pytest.raises(ModelError, match=r"'llama' differs from transformers .*; nothing was converted"):
            convert(run_dir=tmp_path, groups="every:3", overrides=overrides)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert convert(run_dir=tmp_path, groups="every:3", overrides=overrides).directory.is_dir()
