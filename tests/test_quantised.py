"""Converted models with quantised weights and quantised KV caches, compared with the base under the same."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tiny import CASE_IDS, CASES, FAMILIES, SIZES, make_base, make_converted, randomise_compensation
from tiny_run import CPU, make_tokenizer, settings
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantizedCache,
    TorchAoConfig,
)
from transformers.cache_utils import QuantizedLayer

from uniattn_cli import evaluate, load
from uniattn_cli.errors import ModelError
from uniattn_cli.inference.engine import Engine
from uniattn_cli.inference.program import UnsupportedError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models import quantisation
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.costs import kv_bytes_per_token

TOKENS = torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))
ONE_HEAD = ("one_head", lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 1}), LlamaForCausalLM)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("layout", ["leader", "low_rank"])
def test_every_projection_is_of_the_class_that_quantisers_look_for(layout):
    model = make_converted(FAMILIES[0], layout)
    assert {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)} == {torch.nn.Linear}


class ExactLayer(QuantizedLayer):
    """Stores what it is given as the backends do, in a form that loses nothing, and like them refuses empty tensors."""

    def _quantize(self, tensor, axis):
        assert tensor.numel(), "nothing to quantise"
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


class GroupedLayer(ExactLayer):
    """Refuses, as quanto and hqq do, what does not fill whole groups, or along hqq's axis whole bytes."""

    def _quantize(self, tensor, axis):
        groups, rest = divmod(tensor.numel(), self.q_group_size)
        assert rest == 0, "a group is not full"
        assert axis != 1 or groups % (8 // self.nbits) == 0, "a byte is not full"
        return super()._quantize(tensor, axis)


def exact_cache(config, residual, layer_class=ExactLayer, **options):
    """The quantised cache of transformers around exact layers."""
    cache = QuantizedCache.__new__(QuantizedCache)
    super(QuantizedCache, cache).__init__(
        layers=[layer_class(residual_length=residual, **options) for _ in range(config.num_hidden_layers)]
    )
    return cache


@pytest.mark.parametrize("residual", [1, 4])
@pytest.mark.parametrize(
    ("entry", "layout"),
    [*[case for case in CASES if case[0][0] in ("llama", "phi3", "qwen3_moe")], (ONE_HEAD, "leader")],
    ids=[*[name for name in CASE_IDS if name.split("-")[0] in ("llama", "phi3", "qwen3_moe")], "one_head"],
)
def test_a_quantised_cache_holds_what_a_layer_caches(entry, layout, residual):
    model = make_converted(entry, layout)
    cache = exact_cache(model.config, residual)
    chunks = [model(part, past_key_values=cache).logits for part in TOKENS.split([7, 1, 2, 1, 5], dim=1)]
    assert (torch.cat(chunks, 1) - model(TOKENS, use_cache=False).logits).abs().max() < 2e-5
    stored = [
        tensor
        for layer in cache.layers
        if layer.is_initialized
        for tensor in (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)
    ]
    per_token = kv_bytes_per_token(model.config.layout, attention_shape(model.config), 4)
    assert sum(tensor.nbytes for tensor in stored) == per_token * TOKENS.numel()


@pytest.mark.parametrize(
    ("heads", "head_dim", "nbits", "axis"), [(1, 64, 4, 0), (2, 32, 4, 0), (2, 64, 4, 1), (1, 128, 4, 1), (4, 64, 2, 1)]
)
def test_a_quantised_cache_takes_values_of_any_length_where_it_takes_keys_and_values(heads, head_dim, nbits, axis):
    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": heads, "head_dim": head_dim}
    base = make_base(("grouped", lambda: LlamaConfig(**sizes), LlamaForCausalLM))
    for model in (base, build_converted(base, Layout.from_list([{}, {}, {"leader": 1}, {}, {}, {}]))):
        cache = exact_cache(model.config, 1, GroupedLayer, nbits=nbits, axis_key=axis, axis_value=axis)
        chunks = [model(part, past_key_values=cache).logits for part in TOKENS[:1].split([7, 1, 3, 5], dim=1)]
        assert (torch.cat(chunks, 1) - model(TOKENS[:1], use_cache=False).logits).abs().max() < 2e-5


# Wide enough for the kernels and groups of all libraries.
WIDE = SIZES | {"vocab_size": 300, "hidden_size": 192, "intermediate_size": 256, "head_dim": 32}
WIDE_LLAMA = ("wide", lambda: LlamaConfig(**WIDE, tie_word_embeddings=True), LlamaForCausalLM)
WIDE_LAYOUT = [
    {},
    {},
    {"kind": "early", "leader": 1, "compensation": "none"},
    {"kind": "early", "heads": "0:2 1:1 0:0", "compensation": "none"},
    {"leader": 1},
    {"leader": 1, "compensation": 64},
]


def wide_checkpoint(folder):
    base = make_base(WIDE_LLAMA)
    model = randomise_compensation(build_converted(base, Layout.from_list(WIDE_LAYOUT)))
    folder.mkdir()
    save_checkpoint(model, make_tokenizer(), folder)
    return folder


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantise(folder, scheme):
    """Loads a checkpoint with quantised weights."""
    library, config = {
        "torchao": ("torchao", torchao_config),
        "int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True)),
        "nf4": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        "fp8": ("llmcompressor", None),
    }[scheme]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    if config is not None:
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config())
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = AutoModelForCausalLM.from_pretrained(folder)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
    return model


def logits(model):
    return model(TOKENS).logits


@pytest.mark.parametrize("scheme", ["torchao", "int8", "nf4", "fp8"])
def test_quantised_checkpoints_load_and_take_fewer_bytes(scheme, tmp_path):
    folder = wide_checkpoint(tmp_path / "whole")
    model = quantise(folder, scheme)
    model.save_pretrained(tmp_path / "less")
    make_tokenizer().save_pretrained(tmp_path / "less")
    loaded, _ = load(tmp_path / "less", device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("less", "whole")]
    assert sizes[0] < 0.4 * sizes[1]
    with pytest.raises(UnsupportedError, match="its weights are quantised"):
        Engine(loaded)


def test_each_projection_of_a_quantised_model_is_what_its_weights_say(tmp_path):
    folder = wide_checkpoint(tmp_path / "whole")
    model, plain = quantise(folder, "torchao"), AutoModelForCausalLM.from_pretrained(folder)
    before = logits(plain)
    rounded = 0
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "dequantize") and type(parameter) is not torch.nn.Parameter:
            plain.get_parameter(name).copy_(parameter.dequantize())
            rounded += 1
    assert rounded == sum(isinstance(module, torch.nn.Linear) for module in model.modules()) - 1
    assert (logits(model) - logits(plain)).abs().max() < 2e-5 < (logits(model) - before).abs().max()


def test_evaluation_takes_a_quantised_checkpoint(tiny_runs, tmp_path):
    converted = tiny_runs / "finished" / "converted"
    quantise(converted, "torchao").save_pretrained(tmp_path / "less")
    load(converted, device="cpu")[1].save_pretrained(tmp_path / "less")
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text((tiny_runs / "analysed" / "recipe.yaml").read_text())
    for name in ("rows.jsonl", "text.txt"):
        (run / name).write_text((tiny_runs / "analysed" / name).read_text())
    given = [str(tmp_path / "less"), str(converted)]
    models = evaluate(run_dir=run, checkpoints=given, overrides=settings(), options=CPU).results["models"]
    less, whole = (models[name] for name in given)
    parameters, stored = (
        [model["cost"][name] for model in (less, whole)] for name in ("parameters", "checkpoint_bytes")
    )
    assert parameters[0].value == parameters[1].value and stored[0].value < stored[1].value
    # Bytes of other formats are not compared.
    assert stored[0].ratio_to_base is None and stored[1].ratio_to_base


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", r"quantised weights \(gptq\), of which only those by torchao"),
        ("torchao", "which need torchao: run pip install torchao"),
    ],
)
def test_quantised_weights_that_cannot_be_read_are_told_in_one_line(method, words, tmp_path, monkeypatch):
    monkeypatch.setitem(quantisation.TRIED, "torchao", "not_installed")
    folder = wide_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ModelError, match=words):
        load(folder, device="cpu")


def test_the_engine_leaves_models_with_integer_weights_alone():
    model = make_converted(FAMILIES[0], "leader")
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="its weights are quantised"):
        Engine(model)
