"""Checkpoints load anywhere with the right numbers, and never load wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LAYOUTS, make_base, make_layout, randomise_compensation
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from uniattn_cli.checkpoint import build_converted, load_config, load_model, locate, save_checkpoint
from uniattn_cli.errors import CheckpointError, ModelError
from uniattn_cli.modeling.layout_uniattn import REMOVED_PROJECTIONS
from uniattn_cli.recipe import ModelSpec

CPU = torch.device("cpu")
families = pytest.mark.parametrize("entry", FAMILIES, ids=[entry[0] for entry in FAMILIES])
TOKENS = torch.tensor([[5, 17, 80, 33, 4, 9, 61, 22]])

FRESH = """
import builtins, sys, torch
real = builtins.__import__
def guarded(name, *args, **kwargs):
    if name.split(".")[0] == "uniattn_cli":
        raise ImportError("this process must not need the package")
    return real(name, *args, **kwargs)
builtins.__import__ = guarded
from transformers import AutoModel, AutoModelForCausalLM
directory, out = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
tokens = torch.tensor([[5, 17, 80, 33, 4, 9, 61, 22]])
with torch.no_grad():
    logits = model(tokens).logits
    hidden = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()(tokens).last_hidden_state
    model.save_pretrained(out + "/again")
    again = AutoModelForCausalLM.from_pretrained(out + "/again", trust_remote_code=True).eval()(tokens).logits
torch.save({"logits": logits, "hidden": hidden, "again": again}, out + "/result.pt")
"""

STOCK = """
import sys
from transformers import LlamaForCausalLM
try:
    LlamaForCausalLM.from_pretrained(sys.argv[1])
except Exception as error:
    print("refused:", error)
else:
    print("loaded")
"""

UNTRUSTED = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("refused:", error)
else:
    print("loaded")
"""


def tiny_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_converted(entry, layout, directory):
    model = randomise_compensation(build_converted(make_base(entry), make_layout(layout)))
    save_checkpoint(model, tiny_tokenizer(), directory)
    return model


def python(code, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(autouse=True)
def no_grad():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@families
@pytest.mark.parametrize("layout", ["mixed", "low_rank"])
def test_loads_in_a_fresh_process_without_this_package(entry, layout, tmp_path):
    model = save_converted(entry, layout, tmp_path / "model")
    done = python(FRESH, tmp_path / "model", tmp_path)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    expected = model(TOKENS)
    assert torch.equal(result["logits"], expected.logits)
    assert torch.equal(result["again"], expected.logits)
    assert torch.equal(result["hidden"], model.model(TOKENS).last_hidden_state)


@families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_here_and_removed_projections_are_not_on_disk(entry, layout, tmp_path):
    model = save_converted(entry, layout, tmp_path)
    loaded = load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)
    names = set(load_file(tmp_path / "model.safetensors"))
    for index, plan in enumerate(make_layout(layout)):
        for projection in REMOVED_PROJECTIONS[plan.kind]:
            assert not any(f"layers.{index}.self_attn.{projection}" in name for name in names)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    tied = model.config.tie_word_embeddings
    assert stored == sum(p.numel() for p in model.parameters())
    assert ("lm_head.weight" in names) != tied


def test_a_stock_class_refuses_instead_of_inventing_weights(tmp_path):
    save_converted(FAMILIES[0], "leader", tmp_path)
    assert "refused" in python(STOCK, tmp_path).stdout


def test_without_trust_the_load_is_refused(tmp_path):
    save_converted(FAMILIES[0], "leader", tmp_path)
    assert "refused" in python(UNTRUSTED, tmp_path).stdout


@pytest.mark.parametrize("damage", ["missing", "unexpected", "mismatched", "truncated"])
def test_a_damaged_checkpoint_is_refused(damage, tmp_path):
    save_converted(FAMILIES[0], "leader", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.2.self_attn.compensation.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(48, 48)
    elif damage == "mismatched":
        weights[name] = torch.zeros(3, 3)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        save_file(weights, path, {"format": "pt"})
    with pytest.raises((CheckpointError, ModelError)) as caught:
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    assert "\n" not in str(caught.value)


def edit_config(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_newer_format_is_refused(tmp_path):
    save_converted(FAMILIES[0], "leader", tmp_path)
    edit_config(tmp_path, lambda content: content["uniattn"].update(format_version=99))
    with pytest.raises(CheckpointError, match="format 99"):
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)


def test_an_illegal_layout_is_refused(tmp_path):
    save_converted(FAMILIES[0], "leader", tmp_path)
    edit_config(tmp_path, lambda content: content["uniattn"]["layers"][2].update(leader=5))
    with pytest.raises(CheckpointError, match="layer 5, which is not an earlier layer"):
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)


def test_the_stored_configuration_keeps_the_stock_settings(tmp_path):
    model = save_converted(FAMILIES[1], "leader", tmp_path)
    config = load_config(locate(str(tmp_path)), converted=True)
    assert config.attention_bias and config.tie_word_embeddings
    assert config.layout == model.config.layout
    assert getattr(config, "layer_types", None) is None
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["layer_types"][2] == "uniattn_softmax" and stored["layer_types"][0] == "full_attention"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "t5"}, ModelError, "type 't5' are not supported; supported: .*llama"),
        ({"architectures": ["LlamaForSequenceClassification"]}, ModelError, "not a causal language model"),
        ({"quantization_config": {"quant_method": "awq"}}, ModelError, r"quantised weights \(awq\)"),
        ({"model_type": "uniattn_llama"}, ModelError, "already converted"),
        ({"num_hidden_layers": "six"}, CheckpointError, "not valid"),
    ],
)
def test_models_that_cannot_be_converted_are_refused_by_their_configuration(change, error, words, tmp_path):
    make_base(FAMILIES[0]).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda content: content.update(change))
    with pytest.raises(error, match=words):
        load_config(locate(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
        ("owner/missing-model", "the hub cannot be reached"),
        ("two words", "neither a directory nor a valid hub id"),
    ],
)
def test_models_that_cannot_be_found(name, words):
    with pytest.raises(ModelError, match=words):
        locate(name)


def test_generation_settings_that_stock_cannot_save_are_kept(tmp_path):
    model = build_converted(make_base(FAMILIES[0]), make_layout("leader"))
    model.generation_config.temperature = 0.6
    save_checkpoint(model, tiny_tokenizer(), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.6
