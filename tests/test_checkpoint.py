"""Checkpoints load anywhere with the right numbers, and never load wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tiny import CASE_IDS, CASES, FAMILIES, REDUCED, make_base, make_converted, make_layout
from tiny_run import make_tokenizer
from transformers import AutoModelForCausalLM

from uniattn_cli.errors import CheckpointError, ModelError
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config, load_model
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import ModelSpec

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
tokens = torch.tensor([[5, 17, 80, 33, 4, 9, 61, 22]])
for directory in sys.argv[1:]:
    result = {}
    try:
        AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    except ValueError as error:
        result["untrusted"] = str(error)
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        with torch.no_grad():
            logits = model(tokens).logits
            hidden = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()(tokens).last_hidden_state
            model.save_pretrained(directory + "/again")
            again = AutoModelForCausalLM.from_pretrained(directory + "/again", trust_remote_code=True).eval()
            again = again(tokens).logits
        result |= {"logits": logits, "hidden": hidden, "again": again, "attention": model.config._attn_implementation}
    except Exception as error:
        result["error"] = repr(error)
    torch.save(result, directory + "/result.pt")
"""


def save_converted(entry, layout, directory, sharded=False):
    model = make_converted(entry, layout)
    if sharded:
        model.save_pretrained(directory, max_shard_size="40KB")
        assert len(list(directory.glob("model-*.safetensors"))) > 5 and not (directory / "model.safetensors").exists()
    else:
        save_checkpoint(model, make_tokenizer(), directory)
    return model


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def assert_same(actual, expected):
    """Equal, but that kernels sum in another order where weights lie at another address."""
    assert (actual - expected).abs().max() < 1e-6


# One process for all, since starting one takes seconds.
FRESH_CASES = {f"{entry[0]}-mixed": (entry, "mixed") for entry in FAMILIES}
FRESH_CASES["llama-others"] = (FAMILIES[0], "others")
SHARDED = {f"{entry[0]}-sharded": (entry, "mixed") for entry in FAMILIES[:2]}
FRESH_CASES |= SHARDED


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a process without this package made of a checkpoint, by case: (our model, its results)."""
    folder = tmp_path_factory.mktemp("fresh")
    made = {
        name: save_converted(entry, layout, folder / name, sharded=name in SHARDED)
        for name, (entry, layout) in FRESH_CASES.items()
    }
    command = [sys.executable, "-c", FRESH, *(str(folder / name) for name in made)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (model, torch.load(folder / name / "result.pt")) for name, model in made.items()}


@pytest.mark.parametrize("name", FRESH_CASES)
def test_loads_in_a_fresh_process_without_this_package(name, fresh):
    model, result = fresh[name]
    assert "error" not in result, result
    expected = model(TOKENS)
    assert_same(result["logits"], expected.logits)
    assert_same(result["again"], expected.logits)
    assert_same(result["hidden"], model.model(TOKENS).last_hidden_state)
    assert result["attention"] == model.config._attn_implementation
    assert "trust_remote_code=True" in result["untrusted"], "without trust the load is refused"


@pytest.mark.parametrize(("entry", "layout"), CASES, ids=CASE_IDS)
def test_loads_here_and_removed_projections_are_not_on_disk(entry, layout, tmp_path):
    model = save_converted(entry, layout, tmp_path)
    loaded = load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    assert_same(loaded(TOKENS).logits, model(TOKENS).logits)
    names = set(load_file(tmp_path / "model.safetensors"))
    for index, plan in enumerate(model.config.layout):
        for projection in plan.traits.removed:
            assert not any(f"layers.{index}.self_attn.{projection}" in name for name in names)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values())
    tied = model.config.tie_word_embeddings
    assert stored == sum(p.numel() for p in model.parameters())
    assert ("lm_head.weight" in names) != tied


@families
@pytest.mark.parametrize("layout", REDUCED)
def test_a_stock_class_refuses_instead_of_inventing_weights(entry, layout, tmp_path):
    save_converted(entry, layout, tmp_path)
    # Families with rotary parameters per layer type may look those up first.
    with pytest.raises((StrictDataclassError, KeyError), match=r"layer_types|uniattn_"):
        entry[2].from_pretrained(tmp_path)


@families
def test_a_lost_weight_is_noticed(entry, tmp_path):
    save_converted(entry, "mixed", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = max(name for name in weights if "self_attn" in name)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing weight {lost}"):
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    # So it is for whoever loads without this tool, with the copied code.
    with pytest.raises(ValueError, match=f"missing weight {lost}: loading would leave random values"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@families
def test_a_base_on_disk_is_converted_like_one_in_memory(entry, tmp_path):
    base = make_base(entry)
    base.save_pretrained(tmp_path)
    loaded = load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    layout = make_layout("mixed", loaded.config)
    expected = build_converted(base, layout)(TOKENS).logits
    assert_same(build_converted(loaded, layout)(TOKENS).logits, expected)


def test_a_backend_that_changes_the_numbers_is_refused(tmp_path):
    entry = next(entry for entry in FAMILIES if entry[0] == "gemma2")
    make_base(entry).save_pretrained(tmp_path / "base")
    save_converted(entry, "mixed", tmp_path / "converted")
    for name in ("base", "converted"):
        with pytest.raises(
            ModelError,
            match=r"'gemma2' give wrong results with attention backend 'sdpa'; set model.attention to eager or",
        ):
            load_model(locate(str(tmp_path / name)), ModelSpec(attention="sdpa"), CPU)
        assert load_model(locate(str(tmp_path / name)), ModelSpec(), CPU).config._attn_implementation == "eager"


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


def test_a_missing_shard_is_refused(tmp_path):
    model = save_converted(FAMILIES[0], "leader", tmp_path, sharded=True)
    assert_same(load_model(locate(str(tmp_path)), ModelSpec(), CPU)(TOKENS).logits, model(TOKENS).logits)
    max(tmp_path.glob("model-*.safetensors")).unlink()
    with pytest.raises((CheckpointError, ModelError)) as caught:
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


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
    make_tokenizer().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda content: content["uniattn"]["layers"][2].update(leader=5))
    with pytest.raises(CheckpointError, match="layer 5, which is not an earlier layer"):
        load_model(locate(str(tmp_path)), ModelSpec(), CPU)
    # It is read there, too.
    with pytest.raises(ModelError, match="layer 5, which is not an earlier layer"):
        load_tokenizer(locate(str(tmp_path)))


def test_an_attention_backend_in_the_configuration_is_that_of_another_machine(tmp_path):
    save_checkpoint(make_base(FAMILIES[0]), make_tokenizer(), tmp_path)
    edit_config(tmp_path, lambda content: content.update(_attn_implementation="flash_attention_9"))
    source = locate(str(tmp_path))
    assert AutoModelForCausalLM.from_config(load_config(source))
    assert load_model(source, ModelSpec(), CPU).config._attn_implementation == "sdpa"


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
        ({"model_type": "qwen3_next"}, ModelError, r"'qwen3_next' are not supported \(some of .*linear attention"),
        ({"model_type": "deepseek_v3"}, ModelError, r"'deepseek_v3' are not supported \(.* latent vector"),
        ({"model_type": "nemotron-nas", "block_configs": [{}]}, ModelError, "different numbers of heads"),
        ({"architectures": ["LlamaForSequenceClassification"]}, ModelError, "not a causal language model"),
        ({"quantization_config": {"quant_method": "awq"}}, ModelError, r"quantised weights \(awq\)"),
        ({"compression_config": {"quant_method": "nvfp4"}}, ModelError, r"quantised weights \(nvfp4\)"),
        ({"quantization_config": "int8"}, ModelError, r"quantised weights \(int8\)"),
        ({"per_layer_config": {"2": {"num_key_value_heads": 1}}}, ModelError, r"different shapes \(per_layer_config"),
        ({"per_layer_config": {"1": {"skip": ["attention"]}}}, ModelError, r"different shapes \(per_layer_config"),
        ({"block_configs": [{"attention": {"no_op": True}}]}, ModelError, r"different shapes \(block_configs"),
        ({"num_key_value_heads": [3, 3, 1, 3, 3, 3]}, ModelError, r"different shapes \(num_key_value_heads"),
        ({"num_key_value_heads": "three"}, CheckpointError, "not valid"),
        (
            {"layer_types": ["full_attention", "linear_attention"] * 3},
            ModelError,
            "has 'linear_attention', and .*full_at",
        ),
        ({"layer_types": ["full_attention", "chunked_attention"] * 3}, ModelError, "has 'chunked_attention'"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0}},
            ModelError,
            "factor of its rotary .* is 0 and must",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ModelError, "rope_theta of its rotary"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, ModelError, "rope_theta of its .* is null"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}, "rope_parameters": None}, ModelError, "is nan"),
        ({"rope_parameters": {"rope_type": "mystery", "factor": 2.0}}, ModelError, "of type 'mystery' .*longrope"),
        ({"rope_parameters": None, "rope_scaling": {"type": "mystery"}}, ModelError, "of type 'mystery'"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, (ModelError, CheckpointError), "yarn"),
        ({"model_type": "uniattn_llama"}, ModelError, "already converted"),
        ({"num_hidden_layers": "six"}, CheckpointError, "not valid"),
        ({"model_type": 5}, CheckpointError, "its model_type is not a string"),
    ],
)
def test_models_that_cannot_be_converted_are_refused_by_their_configuration(change, error, words, tmp_path):
    make_base(FAMILIES[0]).save_pretrained(tmp_path)
    edit_config(tmp_path, lambda content: content.update(change))
    with pytest.raises(error, match=words):
        load_config(locate(str(tmp_path)))


@families
def test_an_unknown_rotary_embedding_is_refused_in_every_family(entry, tmp_path):
    config = entry[1]()
    config.architectures = [entry[2].__name__]
    config.save_pretrained(tmp_path)
    assert load_config(locate(str(tmp_path))).model_type == config.model_type

    def change(content):
        sets = [value for value in content["rope_parameters"].values() if isinstance(value, dict)]
        (sets or [content["rope_parameters"]])[-1]["rope_type"] = "mystery"

    edit_config(tmp_path, change)
    with pytest.raises((ModelError, CheckpointError), match="mystery"):
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
    save_checkpoint(model, make_tokenizer(), tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.6
