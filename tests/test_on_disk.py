"""Models whose layers stay in their files: read one at a time, written one at a time, and equal to the byte."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, families, make_base, make_layout, typical_families
from tiny_run import CPU, settings
from torch import nn

import uniattn_cli
from uniattn_cli.analysis.measure import measure
from uniattn_cli.errors import CheckpointError
from uniattn_cli.fitting.fit import fit_layers
from uniattn_cli.fitting.stream import Passage, start_batches
from uniattn_cli.models.building import build_converted
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import window_loss
from uniattn_cli.models.on_disk import Shards, is_on_disk
from uniattn_cli.models.residence import layer_by_layer
from uniattn_cli.recipe.schema import AnalysisSpec, ConversionSpec, ModelSpec

PLACE, PLACE_OF_LAYERS = torch.device("cpu"), torch.device("cpu:0")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def windows(rows):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-3, 4, (rows, 32), generator=generator).cumsum(1) % 90 + 5


def load(folder, **kwargs):
    return load_model(locate(str(folder)), ModelSpec(), PLACE, **kwargs)


def bytes_of(module: nn.Module) -> int:
    """Memory that a module's parameters hold."""
    return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())


def files_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@typical_families
def test_a_fit_that_reads_and_writes_one_layer_at_a_time_is_that_of_the_whole_model(entry, tmp_path):
    make_base(entry).save_pretrained(tmp_path / "model")
    results = []
    for on_disk in (False, True):
        base = load(tmp_path / "model", layers_on_disk=on_disk)
        layout = make_layout("mixed", base.config)
        converted = build_converted(base, layout)
        passage = Passage(start_batches(base, windows(3), 0.0, 2))
        folder = tmp_path / str(on_disk)
        folder.mkdir()
        shards, sizes = Shards(folder, len(layout)), []

        def watch(index, base_layer, layer, fitted, *, base=base, passage=passage, shards=shards, sizes=sizes):
            if fitted:
                passage.step(layer, index, make_layout("mixed", base.config))
                # Of each layer one at most is in memory; the others have no more than a number for each weight.
                sizes.append([bytes_of(each) for each in base.model.layers if each is not base_layer])
                shards.add_layer(index, layer)

        fits = fit_layers(base, converted, windows(12), ConversionSpec(align=3, refine=3), watch=watch)
        loss = passage.loss(converted, windows(3))
        shards.finish(converted)
        if on_disk:
            assert max(map(max, sizes)) < 400 and max(map(bytes_of, converted.model.layers)) < 400
        assert is_on_disk(converted)
        with layer_by_layer(converted, None):
            assert window_loss(converted, windows(3), batch_size=2) == loss
        converted.save_pretrained(folder, state_dict={})
        results.append((fits, loss, files_of(folder)))
    (fits, loss, weights), (other_fits, other_loss, other_weights) = results
    assert fits == other_fits and loss == other_loss and set(weights) == set(other_weights)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def test_a_conversion_from_disk_is_the_one_in_memory(tiny_runs, tmp_path):
    layers = json.dumps(make_layout("mixed").to_list())
    found = []
    for offload in ("never", "disk"):
        run = shutil.copytree(tiny_runs / "analysed", tmp_path / offload)
        changed = settings(layout__layers=layers, conversion__offload=offload)
        result = uniattn_cli.convert(run_dir=run, overrides=changed, options=CPU)
        found.append((result.losses, result.fits, files_of(run / "converted")))
    (losses, fits, weights), (other_losses, other_fits, other_weights) = found
    assert losses == other_losses and fits == other_fits and set(weights) == set(other_weights)
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())
    names = sorted(path.name for path in (tmp_path / "disk" / "converted").glob("*.safetensors"))
    assert names == [f"model-{number:05d}-of-00007.safetensors" for number in range(1, 8)]
    tokens = windows(2)
    logits = [load(tmp_path / name / "converted")(tokens).logits for name in ("never", "disk")]
    assert torch.equal(*logits)


def test_a_damaged_layer_is_told_when_it_is_read(tmp_path):
    folder = tmp_path / "model"
    make_base(FAMILIES[0]).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.4.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    base = load(folder, layers_on_disk=True)
    with pytest.raises(CheckpointError, match=r"weight model\.layers\.4\.mlp\.up_proj\.weight"):
        with layer_by_layer(base, None):
            base(windows(1))


@families("llama", "gemma3_text", "gpt_oss")
def test_an_analysis_that_reads_layers_measures_what_one_of_the_whole_model_does(entry, tmp_path):
    make_base(entry).save_pretrained(tmp_path)
    spec, source = AnalysisSpec(tokens=160, length=32), locate(str(tmp_path))
    found = []
    # Another device than the plain CPU to PyTorch, so that all is copied to it and back.
    for on_disk, how in ((False, {}), (True, {"at_once": 2}), (False, {"at_once": 3, "device": PLACE_OF_LAYERS})):
        found.append(measure(load(tmp_path, layers_on_disk=on_disk), windows(5), spec, source, **how)[0])
    for other in found[1:]:
        for name, values in found[0].heads.items():
            assert values == pytest.approx(other.heads[name], abs=1e-4), name
        for name in ("before", "after"):
            one, two = (torch.tensor(each.output_error[name]) for each in (found[0], other))
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, equal_nan=True)
