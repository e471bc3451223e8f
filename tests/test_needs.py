"""What a conversion is said to take is what it takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, make_base, make_layout

from benchmarks import needs as published
from benchmarks.runner import Results
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.needs import conversion_needs, needs_table
from uniattn_cli.fitting.solve import Problem
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.placement import Placement
from uniattn_cli.recipe.schema import ConversionSpec, EvaluationSpec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SPEC, SCORED = ConversionSpec(tokens=640, length=32, refine=0), EvaluationSpec(tokens=128, length=32, batch_size=2)


def needs_of(config, layout, placed):
    found = conversion_needs(config, layout, placed, 4, SPEC, SCORED, 128)
    return {(need.purpose, need.place): need.size for need in found}


def bytes_of(*parameters):
    return sum({id(each): each.nbytes for each in parameters}.values())


@pytest.mark.parametrize("name", ["mixed", "early"])
def test_weights_states_and_sums_are_those_of_the_conversion(name, monkeypatch):
    base = make_base(FAMILIES[0])
    layout = make_layout(name, base.config)
    needs = needs_of(base.config, layout, Placement(CPU))
    widths: list[int] = []
    create = Problem.like.__func__
    monkeypatch.setattr(
        Problem, "like", classmethod(lambda cls, x, *rest: widths.append(x.shape[-1]) or create(cls, x, *rest))
    )
    model = build_converted(base, layout)
    tokens = torch.arange(640).view(20, 32) % 90 + 5
    fit_layers(base, model, tokens, SPEC)
    size = base.config.hidden_size
    assert needs["sums and solutions of a fit", "cpu"] == 8 * max(widths) * (5 * max(widths) + 6 * size)
    assert needs["hidden states between layers", "cpu"] == 3 * (640 + 128) * size * 4
    assert needs["the checkpoint", "disk"] == bytes_of(*model.parameters())
    own = [p for layer in layout.changed for p in model.model.layers[layer].self_attn.parameters()]
    shared = set(map(id, base.parameters()))
    # All that a changed layer has is counted, because all of it may be fitted.
    most = bytes_of(*base.parameters()) + bytes_of(*own)
    assert needs["weights", "cpu"] == most >= bytes_of(*base.parameters(), *(p for p in own if id(p) not in shared))


def test_what_is_on_disk_or_in_the_computer_is_not_on_the_device():
    config = make_base(FAMILIES[0]).config
    layout = make_layout("leader", config)
    whole = needs_of(config, layout, Placement(GPU))
    offloaded = needs_of(config, layout, Placement(CPU, GPU))
    on_disk = needs_of(config, layout, Placement(CPU, GPU, on_disk=True))
    assert ("weights", "device") in whole and ("weights", "cpu") in offloaded
    assert not any(purpose == "weights" for purpose, _ in on_disk)
    layer = ("one layer, and what is outside of layers", "device")
    assert offloaded[layer] == on_disk[layer] < whole["weights", "device"]
    for purpose in ("hidden states between layers", "what layers lend"):
        assert whole[purpose, "device"] == on_disk[purpose, "cpu"]
    # Layer 1 lends to 2 and 3, then layer 4 to 5: queries and keys of one layer at a time.
    heads = config.num_attention_heads + config.num_key_value_heads
    assert whole["what layers lend", "device"] == (640 + 2 * 128) * heads * config.head_dim * 4


def test_the_table_adds_up():
    config = make_base(FAMILIES[0]).config
    needs = conversion_needs(config, make_layout("leader", config), Placement(CPU, GPU), 10**6, SPEC, SCORED, 128)
    table = needs_table(needs, {"device": 5 * 10**9, "cpu": 10**9, "disk": 10**9}, "somewhere")
    assert table.columns == ["", "device", "CPU", "disk"]
    for column in (1, 2, 3):
        cells = [row[column].replace(",", "") for row in table.rows]
        *parts, total, free = (float(cell) for cell in cells if cell != "–")
        assert sum(parts) == pytest.approx(total, abs=0.05)
        assert free == (5 if column == 1 else 1)


@pytest.mark.slow
def test_the_published_table_is_what_shapes_give(tmp_path):
    results = Results(tmp_path / "needs.json", ("rows",), markdown=published.markdown)
    published.compute(argparse.Namespace(), results)
    folder = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
    assert json.loads((folder / "needs.json").read_text())["rows"] == results.content["rows"]
    assert (folder / "needs.md").read_text() == (tmp_path / "needs.md").read_text()
