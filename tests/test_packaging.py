"""Models as people bring them: what their files say holds, or they are refused in one line that says what to do."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_base, make_layout
from tiny_run import make_model, make_tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
)

import uniattn_cli
from uniattn_cli.errors import CheckpointError, ModelError
from uniattn_cli.models import quantisation
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.costs import count_parameters
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_config, load_model, loading_notes
from uniattn_cli.models.text_part import text_part
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import ModelSpec

CPU = torch.device("cpu")
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456789\n"
LLAMA = FAMILIES[0]
TIED = [entry for entry in FAMILIES if entry[1]().tie_word_embeddings]


def load(folder, **spec):
    return load_model(locate(str(folder)), ModelSpec(**spec), CPU)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    """A Llama with its tokenizer, to be spoilt."""
    return make_model(tmp_path / "model")


@pytest.fixture
def sharded(tmp_path):
    """A Llama in several weight files."""
    make_base(LLAMA).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


# --- the head -------------------------------------------------------------------------------------------------------


def says_tied(base, folder):
    """Saves a model whose head is not its embedding under a configuration that says so."""
    head = torch.nn.Parameter(torch.randn_like(base.lm_head.weight))
    base.lm_head.weight, base.config.tie_word_embeddings, base.all_tied_weights_keys = head, False, {}
    base.save_pretrained(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    return head


@pytest.mark.parametrize("entry", TIED, ids=[entry[0] for entry in TIED])
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(entry, tmp_path):
    head = says_tied(make_base(entry), tmp_path / "base")
    source = locate(str(tmp_path / "base"))
    config = load_config(source)
    assert config.tie_word_embeddings is False
    base = load_model(source, ModelSpec(), CPU)
    layout = make_layout("mixed", config)
    assert count_parameters(config, layout) == sum(p.numel() for p in build_converted(base, layout).parameters())
    assert "head of its own" in loading_notes(source, base.config)[0]
    # As after `convert`, and once more as after `train`.
    save_checkpoint(build_converted(base, layout), make_tokenizer(), tmp_path / "converted")
    save_checkpoint(load(tmp_path / "converted"), make_tokenizer(), tmp_path / "trained")
    for name in ("converted", "trained"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"], head)
        loaded = load(tmp_path / name)
        assert torch.equal(loaded.lm_head.weight, head)
        assert loading_notes(locate(str(tmp_path / name)), loaded.config) == []


def test_a_head_of_its_own_is_seen_in_other_files_than_safetensors(tmp_path):
    says_tied(make_base(LLAMA), tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert load(tmp_path).config.tie_word_embeddings is False


@pytest.mark.parametrize("twice", [False, True])
def test_a_head_that_is_the_embedding_stays_so(twice, tmp_path):
    base = make_base(TIED[0])
    base.save_pretrained(tmp_path / "base")
    if twice:
        embeddings = "model.embed_tokens.weight"
        edit_weights(tmp_path / "base", lambda weights: weights.update({"lm_head.weight": weights[embeddings].clone()}))
    loaded = load(tmp_path / "base")
    assert loaded.config.tie_word_embeddings and loading_notes(locate(str(tmp_path / "base")), loaded.config) == []
    save_checkpoint(build_converted(loaded, make_layout("leader")), make_tokenizer(), tmp_path / "converted")
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "converted" / "model.safetensors")


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(value, dtype, tmp_path):
    make_base(LLAMA).to(dtype).save_pretrained(tmp_path)
    names = ["model.layers.2.self_attn.q_proj.weight", "model.layers.5.post_attention_layernorm.weight"]

    def spoil(weights):
        for name in names:
            weights[name].view(-1)[3] = value

    edit_weights(tmp_path, spoil)
    with pytest.raises(CheckpointError, match=rf"weight {names[0]} and 1 more .* or not a number: .* diverged; copy"):
        load(tmp_path)


def test_a_weight_that_a_smaller_dtype_cannot_hold_is_named(tmp_path):
    make_base(LLAMA).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda weights: weights["lm_head.weight"].fill_(1e6))
    assert load(tmp_path).lm_head.weight.max() == 1e6
    with pytest.raises(CheckpointError, match=r"weight lm_head\.weight .* too large for float16, set model\.dtype"):
        load(tmp_path, dtype="float16")


def test_files_that_are_pointers_of_git_lfs_are_recognised(folder, sharded):
    shard = max(sharded.glob("model-*.safetensors"))
    places = [shard, folder / "model.safetensors", folder / "tokenizer.json", folder / "config.json"]
    for path in places:
        path.write_text(LFS_POINTER)
        with pytest.raises(
            (CheckpointError, ModelError), match=rf"{re.escape(str(path))} is a pointer of Git LFS.*`git lfs pull`"
        ):
            load_tokenizer(locate(str(folder))) if path.name == "tokenizer.json" else load(path.parent)


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "additional_chat_templates/tool.jinja", "merges.txt"]
)
def test_all_files_of_a_tokenizer_may_be_pointers_or_links_to_nothing(name, folder):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(LFS_POINTER)
    with pytest.raises(ModelError, match=rf"{re.escape(str(path))} is a pointer of Git LFS"):
        load_tokenizer(locate(str(folder)))
    path.unlink()
    path.symlink_to("../../blobs/1234")
    with pytest.raises(ModelError, match=rf"{re.escape(str(path))} is a link to a file that is missing \(.*blobs/1234"):
        load_tokenizer(locate(str(folder)))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder, shard: shard.unlink(), "{shard} is missing"),
        (lambda folder, shard: shard.write_bytes(shard.read_bytes()[:-50]), "{shard} is damaged or cut off"),
        (lambda folder, shard: shard.write_bytes(b""), "{shard} is damaged or cut off"),
        (lambda folder, shard: (folder / "model.safetensors.index.json").unlink(), "index.json is missing"),
        (lambda folder, shard: (folder / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
        (lambda folder, shard: [path.unlink() for path in folder.glob("model*")], "has no weights"),
    ],
    ids=["missing", "cut-off", "empty", "no-index", "other-index", "nothing"],
)
def test_weight_files_that_are_not_whole_are_named(spoil, says, sharded):
    shard = max(sharded.glob("model-*.safetensors"))
    spoil(sharded, shard)
    with pytest.raises(CheckpointError, match=re.escape(says.format(shard=shard))):
        load(sharded)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_whose_numbers_stand_for_others_are_refused(dtype, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: (100 * weights[name]).to(dtype)}))
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {name} is quantised \(.*8.*\); give the unquantised"
    ):
        load(folder)


class Program:
    """Would run when it is unpickled."""

    def __reduce__(self):
        return exit, ()


def test_a_file_of_weights_that_is_a_program_is_not_run(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Program()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="may be a program; give the model as safetensors"):
        load(folder)


@pytest.mark.parametrize("text", [LFS_POINTER, "{", "[]", "[" * 100_000], ids=["pointer", "cut-off", "list", "deep"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_settings_that_cannot_be_read_are_named(name, text, folder):
    (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder / name))} is (damaged|a pointer of Git LFS)"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_act": "mystery"}, "KeyError 'mystery'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "unsupported operand"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "much"}}, "unsupported operand"),
        ({"num_attention_heads": 0}, "modulo by zero|division"),
        ({"dtype": "float7"}, "float7"),
        ({"pad_token_id": 500}, "Padding_idx"),
    ],
)
def test_settings_of_which_no_model_can_be_built_are_told_in_one_line(changes, says, folder):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [[7], "LlamaModel", {"a": "LlamaModel"}])
def test_architectures_that_are_no_causal_model_are_told_however_they_are_written(given, folder):
    edit_json(folder / "config.json", architectures=given)
    with pytest.raises(ModelError, match="is not a causal language model but a "):
        load(folder)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", None),
        ("tokenizer_config.json", None),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}),
        ("tokenizer.json", {"model": {"type": "of next year"}}),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_one_line(name, changes, folder):
    if changes is None:
        (folder / name).write_text("[]")
    else:
        edit_json(folder / name, **changes)
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded: ") as caught:
        load_tokenizer(locate(str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", ["bos_token", "eos_token", "pad_token", "chat_template", None])
def test_a_token_that_the_model_has_no_embedding_for_is_refused_where_it_is_used(use, folder):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    if use:
        setattr(tokenizer, use, "<|new|>")
    tokenizer.save_pretrained(folder)
    if use is None:
        assert len(load_tokenizer(locate(str(folder)))) == 301
        return
    role = "is in its chat template" if use == "chat_template" else f"is its {use}"
    with pytest.raises(
        ModelError, match=rf"token '<\|new\|>' \(number 300\) {role}, but .* only 300 embeddings; resize"
    ):
        load_tokenizer(locate(str(folder)))


# --- adapters ---------------------------------------------------------------------------------------------------------


def add_adapter(folder):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "owner/base"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("beside", ["nothing", "config", "tokenizer"])
def test_an_adapter_is_told_from_a_model(beside, folder, tmp_path):
    add_adapter(tmp_path / "adapter")
    for path in folder.glob({"nothing": "-", "config": "config.json", "tokenizer": "tokenizer*"}[beside]):
        path.rename(tmp_path / "adapter" / path.name)
    # `load` looks for a model or a run.
    for find in (locate, uniattn_cli.load):
        with pytest.raises(ModelError, match=r"is an adapter for owner/base, not a whole model; merge it with peft"):
            find(str(tmp_path / "adapter"))


def test_an_adapter_beside_a_whole_model_is_refused(folder, sharded):
    for whole in (folder, sharded):
        add_adapter(whole)
        with pytest.raises(ModelError, match=r"whole model with an adapter beside it \(adapter_config\.json, for"):
            locate(str(whole))


@pytest.mark.parametrize(
    ("others", "says"), [((), "an adapter for owner/base"), (("model.safetensors",), "a whole model with an adapter")]
)
def test_an_adapter_on_the_hub(others, says, monkeypatch, tmp_path):
    add_adapter(tmp_path / "hub")
    files = ["adapter_config.json", "adapter_model.safetensors", *others]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **kwargs: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **kwargs: str(tmp_path / "hub" / file))
    with pytest.raises(ModelError, match=f"owner/adapter is {says}"):
        locate("owner/adapter")


def test_an_adapter_in_the_cache_beside_a_whole_model_is_refused_without_a_network(folder, monkeypatch):
    add_adapter(folder)

    def offline(*args, **kwargs):
        raise OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", offline)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, **kwargs: str(folder / file))
    with pytest.raises(ModelError, match="owner/model is a whole model with an adapter"):
        locate("owner/model")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_files_of_a_tokenizer_are_those_of_the_base(folder, tmp_path):
    # Fields that transformers would leave out or rewrite when it saves, and a file that it would not write.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "of_the_base": 1}
    edit_json(folder / "tokenizer_config.json", **settings)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    own = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    # What is converted is trained, and saved once more.
    for before, after in ((folder, tmp_path / "converted"), (tmp_path / "converted", tmp_path / "trained")):
        source = locate(str(before))
        save_checkpoint(load_model(source, ModelSpec(), CPU), load_tokenizer(source), after)
        for name in own:
            assert (after / name).read_bytes() == (folder / name).read_bytes()
        assert load_tokenizer(locate(str(after))).get_vocab() == make_tokenizer().get_vocab()


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("template", [None, "{{ messages }}"])
def test_the_template_of_a_copied_tokenizer_is_the_one_in_use(place, template, folder, tmp_path):
    stored = (folder / "chat_template.jinja").read_text()
    if place != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / place, chat_template=stored)
    source = locate(str(folder))
    tokenizer = load_tokenizer(source)
    assert tokenizer.chat_template == stored
    tokenizer.chat_template = template or stored
    save_checkpoint(load_model(source, ModelSpec(), CPU), tokenizer, tmp_path / "saved")
    assert load_tokenizer(locate(str(tmp_path / "saved"))).chat_template == (template or stored)
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == (template or stored)
    assert "chat_template" not in json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())


def test_the_byte_order_mark_of_a_template_is_no_part_of_it(folder):
    path = folder / "chat_template.jinja"
    stored = path.read_text(encoding="utf-8")
    path.write_text(stored, encoding="utf-8-sig")
    assert load_tokenizer(locate(str(folder))).chat_template == stored


# --- multi-modal models -----------------------------------------------------------------------------------------------

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def text_settings(family):
    config = next(entry for entry in FAMILIES if entry[0] == family)[1]()
    # The whole says what is tied; the part's own word is not heard.
    return config.to_dict() | {"tie_word_embeddings": family == "mistral"}


def gemma3():
    config = Gemma3Config(text_config=text_settings("gemma3_text"), vision_config=VISION, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def mistral3():
    vision = {"model_type": "pixtral", "head_dim": 8, **VISION}
    config = Mistral3Config(text_config=text_settings("mistral"), vision_config=vision, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def ministral3():
    vision = {"model_type": "pixtral", "head_dim": 8, **VISION}
    config = Mistral3Config(text_config=text_settings("ministral3"), vision_config=vision, tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


def llava():
    vision = {"model_type": "clip_vision_model", "projection_dim": 16, **VISION}
    config = LlavaConfig(text_config=text_settings("llama"), vision_config=vision, tie_word_embeddings=False)
    return LlavaForConditionalGeneration(config)


def save_whole(make, folder, dtype=torch.float32):
    torch.manual_seed(3)
    whole = make().to(dtype).eval()
    whole.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [gemma3, mistral3, ministral3, llava])
def test_a_multi_modal_model_is_converted_as_its_language_model(make, dtype, tmp_path):
    whole = save_whole(make, tmp_path / "whole", dtype)
    source = locate(str(tmp_path / "whole"))
    config = load_config(source)
    assert config.model_type == whole.config.text_config.model_type and config.dtype == dtype
    assert config.tie_word_embeddings is whole.config.tie_word_embeddings is (make is gemma3)
    base = load(tmp_path / "whole", attention="eager")
    assert base.config._attn_implementation == "eager" and base.dtype == dtype
    assert any("multi-modal" in note and config.model_type in note for note in loading_notes(source, base.config))
    tokens = torch.arange(8, 40)[None]
    with torch.no_grad():
        expected = whole(tokens).logits
        found = load(tmp_path / "whole")(tokens).logits
        assert (found - expected).norm() <= 0.02 * expected.norm()
        for model in (base, build_converted(base, make_layout("mixed", base.config))):
            name = model.config.model_type
            save_checkpoint(model, make_tokenizer(), tmp_path / name)
            again = load(tmp_path / name, attention="eager")
            assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert count_parameters(config, make_layout("mixed", config)) == sum(p.numel() for p in model.parameters())


def test_a_head_of_its_own_is_kept_in_a_multi_modal_model(tmp_path):
    head = save_whole(mistral3, tmp_path / "whole").lm_head.weight
    edit_json(tmp_path / "whole" / "config.json", tie_word_embeddings=True)
    source = locate(str(tmp_path / "whole"))
    base = load_model(source, ModelSpec(), CPU)
    assert load_config(source).tie_word_embeddings is base.config.tie_word_embeddings is False
    assert len(loading_notes(source, base.config)) == 2
    save_checkpoint(base, make_tokenizer(), tmp_path / "text")
    assert torch.equal(load(tmp_path / "text").lm_head.weight, head)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("make", [llava, lambda: make_base(LLAMA)])
def test_quantised_weights_that_the_configuration_tells_of_are_left_to_their_library(make, key, tmp_path, monkeypatch):
    save_whole(make, tmp_path)
    edit_weights(tmp_path, lambda weights: weights.update({name: weights[name].to(torch.int8) for name in weights}))
    with pytest.raises(CheckpointError, match="stored as I8"):
        load(tmp_path)
    edit_json(tmp_path / "config.json", **{key: {"quant_method": "compressed-tensors"}})
    # Any module that is there.
    monkeypatch.setitem(quantisation.TRIED, "compressed-tensors", "json")

    def read(*args, **kwargs):
        raise OSError("now the library would read them")

    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", read)
    with pytest.raises(ModelError, match="now the library would read them"):
        load(tmp_path)


def test_a_language_model_is_compared_with_its_whole_where_the_whole_is(monkeypatch):
    whole = llava()

    def look(module, args):
        raise LookupError(f"tokens on {args[0].device}")

    whole.get_input_embeddings().register_forward_pre_hook(look)
    # Quantised models are loaded onto their device, which has no other name here.
    monkeypatch.setattr(LlavaForConditionalGeneration, "device", torch.device("meta"))
    with pytest.raises(LookupError, match="tokens on meta"):
        text_part("given", whole)


@pytest.mark.parametrize("lost", ["language_model.model.layers.1.mlp.up_proj.weight", "vision_tower"])
def test_a_multi_modal_model_with_a_weight_too_few_is_refused(lost, tmp_path):
    save_whole(gemma3, tmp_path)
    name = next(name for name in load_file(tmp_path / "model.safetensors") if name.startswith(lost))
    edit_weights(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=rf"missing weight .*{name.removeprefix('language_model.model.')}"):
        load(tmp_path)


def test_a_multi_modal_model_that_does_more_than_its_language_model_is_refused(monkeypatch, tmp_path):
    save_whole(gemma3, tmp_path)
    forward = Gemma3ForConditionalGeneration.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    monkeypatch.setattr(Gemma3ForConditionalGeneration, "forward", scaled)
    with pytest.raises(ModelError, match=r"language model alone \('gemma3_text'\) does not give the logits"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (
            {"model_type": "voxtral", "text_config": {"model_type": "llama"}},
            "'voxtral'.*of type 'llama'",
        ),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "qwen2"}}, "'internvl_chat'.*of type 'qwen2'"),
        ({"model_type": "qwen3_5", "text_config": {}}, r"'qwen3_5_text', which is not supported \(.*linear attention"),
        ({"model_type": "llama4", "text_config": {}}, r"'llama4_text', which is not supported \(.* within chunks"),
        (
            {"model_type": "qwen2_vl", "vision_config": {}},
            "'qwen2_vl'.*of type 'qwen2_vl_text', which is not supported",
        ),
        ({"model_type": "gemma3", "text_config": {}, "quantization_config": {"quant_method": "awq"}}, "quantised.*awq"),
        ({"model_type": "gemma3", "text_config": {"per_layer_config": {"1": {"head_dim": 4}}}}, "different shapes"),
    ],
)
def test_multi_modal_models_that_cannot_be_taken_apart_are_refused_by_name(raw, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ModelError, match=says):
        load_config(locate(str(tmp_path)))
