"""What changed layers project is trained on their outputs, on tokens that do not decide, and only where it helps."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, TYPICAL, make_base, make_layout
from tiny_run import convert_layers

from uniattn_cli.fitting import fit, moments, refine
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.stream import attention_inputs, base_step, run_layer, start_batches
from uniattn_cli.models.building import build_converted
from uniattn_cli.recipe.schema import ConversionSpec

STEPS = 60


@pytest.fixture(scope="module")
def windows():
    """A random walk over the vocabulary, longer than the windows of families that have them."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(-3, 4, (264, 32), generator=generator).cumsum(1) % 90 + 5


def fitted(base, layout, windows, steps=STEPS, **spec):
    """A converted model and its fits."""
    torch.manual_seed(0)
    model = build_converted(base, layout)
    return model, fit_layers(base, model, windows, ConversionSpec(align=0, refine=steps, **spec), batch_size=64)


def attending(layout):
    """Changed layers that still attend."""
    return [index for index in layout.changed if layout[index].traits.attends]


def attention_error(base, model, windows, layer):
    """Squared error of a layer's attention output, relative to the base's."""
    seen = []
    for entry in (base, model):
        keep = lambda module, args, output: seen.append(output[0])  # noqa: E731
        handle = entry.model.layers[layer].self_attn.register_forward_hook(keep)
        with torch.no_grad():
            entry(windows, use_cache=False)
        handle.remove()
    theirs, ours = seen
    return ((theirs - ours).float().square().sum() / theirs.float().square().sum()).item()


def refined_cases():
    """Early layers in each typical family, other kinds in one."""
    for name, families in (("early", TYPICAL), ("leader", ["llama"]), ("others", ["llama"])):
        for entry in FAMILIES:
            if entry[0] in families:
                marks = [pytest.mark.slow] if entry[0] == "gemma3_text" else []
                yield pytest.param(entry, name, id=f"{entry[0]}-{name}", marks=marks)


@pytest.mark.parametrize(("entry", "name"), refined_cases())
def test_errors_are_smaller_on_unseen_tokens_and_the_base_is_left_alone(entry, name, windows):
    base = make_base(entry)
    before = {key: weight.clone() for key, weight in base.named_parameters()}
    layout = make_layout(name, base.config)
    model, fits = fitted(base, layout, windows[:128], STEPS // 2)
    plain, without = fitted(base, layout, windows[:128], 0)
    assert [found.layer for found in fits if found.refined is not None] == attending(layout)
    assert all(found.refined is None for found in without)
    # What arrives at the first of them is the same.
    first, unrefined = (next(fit for fit in some if fit.layer == attending(layout)[0]) for some in (fits, without))
    assert first.refined == (pytest.approx(unrefined.error_after, rel=1e-4), first.error_after)
    assert first.error_before == pytest.approx(unrefined.error_before, rel=1e-4)
    assert all(found.refined[1] <= found.refined[0] for found in fits if found.refined is not None)
    errors = [
        [attention_error(base, other, windows[256:], layer) for layer in layout.changed] for other in (model, plain)
    ]
    assert sum(errors[0]) < sum(errors[1])
    assert all(torch.equal(weight, before[key]) for key, weight in base.named_parameters())


@pytest.mark.parametrize("entry", [entry for entry in FAMILIES if entry[0] in ("llama", "phi3")], ids=["llama", "phi3"])
def test_all_that_a_layer_projects_is_trained_and_nothing_else(entry, windows):
    base = make_base(entry)
    layout = make_layout("others")
    model, fits = fitted(base, layout, windows[:128], STEPS // 2)
    plain, _ = fitted(base, layout, windows[:128], 0)
    kept = [found.layer for found in fits if found.refined and found.refined[1] < found.refined[0]]
    assert kept
    theirs = dict(plain.named_parameters())
    changed = {key for key, weight in model.named_parameters() if not torch.equal(weight, theirs[key])}
    expected = {
        f"model.layers.{index}.self_attn.{name}.weight"
        for index in kept
        for name, _ in model.model.layers[index].self_attn.named_children()
        if name != "compensation"
    }
    assert expected <= changed
    # What is solved only follows what arrives.
    assert all("o_proj" in key or "compensation" in key for key in changed - expected)


@pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
@pytest.mark.parametrize("name", ["free_several", "early", "others"])
def test_the_output_is_that_of_the_layer_itself(entry, name, windows):
    base = make_base(entry)
    layout = make_layout(name, base.config)
    model = build_converted(base, layout)
    with torch.no_grad():
        [batch] = start_batches(base, windows[:1], 0.3, 3)
        for index, layer in enumerate(model.model.layers):
            if index in attending(layout):
                batch.target = base_step(base.model.layers[index], batch.base, batch.kwargs[index])[1]
                attention = layer.self_attn
                if attention.compensation is not None:
                    for parameter in attention.compensation.parameters():
                        parameter.normal_(std=0.1)
                rows = refine._prepare(layer, index, batch)
                kwargs = attention_inputs(layer, batch.converted, batch.kwargs[index], batch.shared)
                expected = batch.target - attention(**kwargs)[0]
                found = rows["target"] - refine._output(attention, rows)
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            batch.base, _ = base_step(base.model.layers[index], batch.base, batch.kwargs[index])
            batch.converted = run_layer(layer, batch.converted, batch.kwargs[index], uniattn_shared=batch.shared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_float32_and_rounded(dtype, windows):
    base = make_base(FAMILIES[0])
    layout = make_layout("low_rank")
    expected = [found.refined for found in fitted(base, layout, windows[:128], STEPS // 2)[1]]
    model, fits = fitted(base.to(dtype), layout, windows[:128], STEPS // 2)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    for ours, theirs in zip(fits, expected, strict=True):
        assert ours.refined == pytest.approx(theirs, rel=0.05)
        assert ours.refined[1] < ours.refined[0]


def test_what_makes_held_out_tokens_worse_is_not_kept(windows, monkeypatch):
    base = make_base(FAMILIES[0])
    layout = make_layout("low_rank")
    plain = fitted(base, layout, windows, 0)[0].state_dict()

    def ruin(layer, *arguments):
        for module in (layer.self_attn.v_proj, layer.self_attn.o_proj):
            module.weight = torch.nn.Parameter(torch.zeros_like(module.weight))

    monkeypatch.setattr(fit, "refine", ruin)
    model, fits = fitted(base, layout, windows)
    assert all(found.refined == (found.error_after, found.error_after) for found in fits)
    assert all(torch.equal(weight, plain[key]) for key, weight in model.state_dict().items())


def test_training_sees_nothing_of_the_held_out_tokens(windows, monkeypatch):
    base = make_base(FAMILIES[0])
    layout = make_layout("leader")
    original, results = fit.refine, []

    def keep(layer, *arguments):
        original(layer, *arguments)
        results.append([parameter.clone() for parameter in layer.self_attn.parameters()])

    monkeypatch.setattr(fit, "refine", keep)
    # Held-out tokens choose the strength of the regression, and nothing else is theirs.
    monkeypatch.setattr(moments, "RIDGES", (0.1,))
    # Of 20 sequences they are the last three.
    others = torch.cat([windows[:17], windows[40:43]])
    for some in (windows[:20], others):
        fitted(base, layout, some, 5)
    # Later layers are given what came of all tokens.
    first, other = results[0], results[len(results) // 2]
    assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_convert_refines_and_reports(tiny_runs, tmp_path):
    layers = "[{}, {}, {kind: kv, leader: 1}, {kind: key, leader: 1}, {kind: linear}, {leader: 1}]"
    result, fits = convert_layers(tiny_runs / "analysed", tmp_path / "run", layers)
    assert [fit["refined"] and len(fit["refined"]) for fit in fits] == [2, 2, None, 2]
    [table] = [table for table in result.tables if "refined" in table.title]
    assert [row[:2] for row in table.rows] == [["2", "kv"], ["3", "key"], ["5", "softmax"]]
