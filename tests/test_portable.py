"""Converted models under the tools of others: layers on several devices, PEFT, and the checkpoints that TRL writes."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tiny import FAMILIES, make_base, make_layout, randomise_compensation
from tiny_run import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted, save_checkpoint

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
MODEL_CODE = {"configuration_uniattn.py", "layout_uniattn.py", "sharing_uniattn.py"}


def by_name(name):
    return next(entry for entry in FAMILIES if entry[0] == name)


def converted_model(name, layout="mixed", vocabulary=None):
    base = make_base(by_name(name))
    if vocabulary:
        base.resize_token_embeddings(vocabulary)
    return randomise_compensation(build_converted(base, make_layout(layout, base.config)))


def saved_model(name, folder, **arguments):
    model = converted_model(name, **arguments)
    save_checkpoint(model, make_tokenizer(), folder)
    return model


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def assert_close(actual, expected):
    assert (actual - expected).abs().max() < 2e-6


def has_model_code(folder, name):
    return {path.name for path in folder.glob("*.py")} == MODEL_CODE | {f"modeling_uniattn_{name}.py"}


def test_libraries_are_told_of_layers_with_fewer_heads(tmp_path):
    saved_model("llama", tmp_path, layout="pooled")
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [3, 1, 3, 1, 3, 3]
    config.set_layout(Layout.own(6))
    assert "per_layer_config" not in config.to_dict()


# --- layers in several places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mixed", "others", "grouped_several"])
@pytest.mark.parametrize("name", ["llama", "llama_tied_bias", "mixtral", "gemma3_text", "phi3"])
def test_leaders_and_followers_in_different_places(name, layout, tmp_path):
    """Every other layer lies on disk and is moved by accelerate's hooks, which touch all arguments of a layer."""
    model = saved_model(name, tmp_path / "model", layout=layout)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(model.config.num_hidden_layers)}
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    assert_close(logits(split), logits(model))
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    assert torch.equal(split.generate(TOKENS, **arguments), model.generate(TOKENS, **arguments))


def test_places_chosen_by_accelerate_keep_each_layer_whole(tmp_path):
    from accelerate import infer_auto_device_map

    model = saved_model("llama", tmp_path)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")), logits(model))
    layer = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    places = infer_auto_device_map(
        model, {"cpu": 4 * layer, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(places.values()) == {"cpu", "disk"}
    assert not any("self_attn" in name or "mlp" in name for name in places)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["mixed", "others", "grouped_several"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_leaders_and_followers_on_two_cuda_devices(name, layout, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model = saved_model(name, tmp_path, layout=layout)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), 0)
    places |= {f"model.layers.{i}": i % 2 for i in range(model.config.num_hidden_layers)}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    tokens = TOKENS.to(0)
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        assert (split(tokens).logits.cpu() - logits(model)).abs().max() < 1e-4
        assert torch.equal(split.generate(tokens, **arguments), split.generate(tokens, **arguments, use_cache=False))


# --- PEFT -------------------------------------------------------------------------------------------------------------


def trained_adapter(model, targets, folder):
    """Trains LoRA for some steps and saves it; returns the logits of the adapted model and the matrices reached."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    optimiser = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], 0.5)
    for _ in range(3):
        optimiser.zero_grad()
        adapted(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        optimiser.step()
    adapted.save_pretrained(folder)
    names = {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    return logits(adapted), names


@pytest.mark.parametrize(
    ("name", "targets", "reached"),
    [
        ("llama", "all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "compensation"}),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("phi3", "all-linear", {"qkv_proj", "o_proj", "compensation"}),
        ("phi3", ["qkv_proj"], {"qkv_proj"}),
        ("gemma3_text", ["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    ],
)
def test_an_adapter_loads_onto_a_converted_model(name, targets, reached, tmp_path):
    peft = pytest.importorskip("peft")
    model = saved_model(name, tmp_path / "model")
    before = logits(model)
    expected, names = trained_adapter(model, targets, tmp_path / "adapter")
    assert (expected - before).abs().max() > 1e-3 and reached <= names
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_close(logits(loaded), before)
    adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert_close(logits(adapted), expected)

    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert has_model_code(tmp_path / "merged", name)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


# --- TRL --------------------------------------------------------------------------------------------------------------


def make_trainer(model, folder, **arguments):
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        save_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": TOKENS.tolist(), "labels": TOKENS.tolist()})
    return SFTTrainer(model, config, train_dataset=rows, processing_class=make_tokenizer(), **arguments)


def test_what_trl_saves_has_the_model_code_and_loads(tmp_path):
    tokenizer = make_tokenizer()
    model = converted_model("llama", vocabulary=len(tokenizer))
    before = logits(model)
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    expected = logits(trainer.model)
    assert (expected - before).abs().max() > 1e-3
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        assert has_model_code(folder, "llama")
        assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)


def test_what_trl_saves_of_an_adapter_loads_onto_the_checkpoint(tmp_path):
    peft = pytest.importorskip("peft")
    saved_model("llama", tmp_path / "model", vocabulary=len(make_tokenizer()))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = make_trainer(
        model, tmp_path / "out", peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    expected = logits(trainer.model)
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before = logits(fresh)
    adapted = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert (expected - before).abs().max() > 1e-4
    assert_close(logits(adapted), expected)
