"""Converted checkpoints in the real vLLM: the same text as transformers, and a cache without the keys of followers.

Needs vLLM in the environment (`make test-vllm`). Most tests run the engine without its server, which takes seconds for
a tiny model; the others start `uniattn serve` and speak HTTP with it. `transformers serve` is started here too, because
vLLM brings what it needs.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch_flash
from tiny import FAMILIES, LAYOUTS, REDUCED, make_base, make_layout, randomise_compensation
from tiny_run import make_tokenizer
from vllm_engine import CACHE_BYTES, QUICK, ROOT, Engine, Server, obstacles_of, obstacles_of_an_untried_pair, reference

from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import FORMAT_VERSION, Layout
from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.families import family_of
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.tokenizer import load_tokenizer
from uniattn_cli.recipe.schema import ModelSpec
from uniattn_cli.serving import cache_plan

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
SLOW = pytest.mark.slow

# vLLM's CPU kernels know heads of 32 and more, and have none for experts in float32.
HEAD = {"head_dim": 32}
SPECIAL = {
    "olmo2": {"hidden_size": 192},
    "cohere2": {"hidden_size": 192},
    "phi3": {
        "hidden_size": 192,
        "rope_parameters": None,
        "rope_scaling": {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
        },
    },
}
DENSE = [
    entry for entry in FAMILIES if entry[0] not in ("mixtral", "qwen3_moe") and family_of(entry[1]().model_type).in_vllm
]
# Windows beside full attention: the plugin refuses pooled layers there, which `others` has.
WINDOWED = ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2", "ministral")
# Every layout in one family, every kind in those that set families apart, every family. That each family computes every
# kind alike, whatever engine holds the cache, is what the tests of its model code show.
TYPICAL = ("gemma3_text", "phi3", "qwen3")
CASES = [
    (entry, name)
    for entry in DENSE
    for name in (LAYOUTS if entry[0] == "llama" else REDUCED if entry[0] in TYPICAL else ["mixed"])
    if name != "others" or entry[0] not in WINDOWED
]


def is_quick(entry, name: str) -> bool:
    """Each kind, and windows: what is served where only the quick part is run."""
    return entry[0] == "llama" or (entry[0], name) == ("gemma3_text", "mixed")


# Layouts whose borrowers their lenders serve; in windows, with norms of queries and capped logits, too.
FUSED = [("llama", "leader"), ("llama", "grouped_several"), ("llama", "early"), ("llama", "mixed")]
FUSED += [("qwen3", "early"), ("gemma2", "mixed")]
# Kernels of the passes that serve borrowers run in Triton's interpreter.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Families, without and with windows, and blocks that are too few for six requests of 160 tokens.
CROWDED = [("llama", 8), ("gemma3_text", 16)]
LENGTHS = (3, 17, 40, 130)
TOKENS = 12
BLOCK = 128
# Of float32 log-probabilities: the kernels add in another order.
TOLERANCE = 2e-4


def widened(entry, **changes):
    """A tiny family with heads that vLLM's kernels know; `changes` are further fields of its configuration."""
    name, make_config, model_class = entry

    def config():
        fields = make_config().to_dict() | HEAD | SPECIAL.get(name, {})
        fields |= {"vocab_size": 300, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 1}
        if fields.get("sliding_window"):
            fields["sliding_window"] = 24
        return type(make_config())(**fields | changes)

    return name, config, model_class


def write(directory: Path, entry, layout: str | Layout, **changes) -> Path:
    """Saves a tiny base (layout `base`), or that base converted."""
    base = make_base(widened(entry, **changes))
    tokenizer = make_tokenizer()
    if layout == "base":
        base.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    else:
        plans = make_layout(layout, base.config) if isinstance(layout, str) else layout
        save_checkpoint(randomise_compensation(build_converted(base, plans)), tokenizer, directory)
    return directory


@functools.cache
def prompts(vocabulary: int = 300) -> list[list[int]]:
    torch.manual_seed(0)
    return [torch.randint(4, vocabulary, (length,)).tolist() for length in LENGTHS]


def assert_same(found, expected, tolerance: float = TOLERANCE) -> None:
    """The same tokens, and log-probabilities within the rounding of float32."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < tolerance


def preempts(engine: Engine, family: str, blocks: int, folder: Path) -> None:
    """Serves more requests than fit into so many blocks."""
    directory = write(folder, next(entry for entry in FAMILIES if entry[0] == family), "mixed")
    torch.manual_seed(1)
    load = [torch.randint(4, 300, (100,)).tolist() for _ in range(6)]
    done = engine.run(directory, (load, 60), num_gpu_blocks_override=blocks, max_num_batched_tokens=256)
    assert done.counters["num_preemptions"] > 0
    assert_same(done.outputs[0], reference(directory, load, 60))


def page_bytes(directory: Path) -> int:
    """Bytes of one block of all layers of a model without windows, by the layout."""
    raw = json.loads((directory / "config.json").read_text())
    config = load_model(locate(str(directory)), ModelSpec(name="", dtype="float32"), torch.device("cpu")).config
    layout = config.layout if raw.get("uniattn") else Layout.own(raw["num_hidden_layers"])
    shape = attention_shape(config)
    heads = sum(
        cache_plan.units(layout, index) * cache_plan.kv_heads_of(layout, shape, index) for index in range(len(layout))
    )
    return heads * shape.head_dim * 4 * BLOCK


# --- the engine -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def base_blocks(engine, tmp_path_factory) -> int:
    """Blocks that the cache of the unconverted model has."""
    directory = write(tmp_path_factory.mktemp("base"), FAMILIES[0], "base")
    done = engine.run(directory)
    assert done.blocks == CACHE_BYTES // page_bytes(directory)
    return done.blocks


@pytest.mark.parametrize(
    ("entry", "name"),
    [pytest.param(*case, id=f"{case[0][0]}-{case[1]}", marks=[] if is_quick(*case) else SLOW) for case in CASES],
)
def test_every_family_and_kind_gives_the_text_of_transformers(entry, name, engine, base_blocks, tmp_path):
    directory = write(tmp_path, entry, name)
    done = engine.run(directory, (prompts(), TOKENS), (prompts(), TOKENS))
    first, again = done.outputs
    assert_same(first, reference(directory, prompts(), TOKENS))
    assert_same(again, first)
    assert done.counters["prefix_cache_hits"] >= BLOCK, "the second time, the longest prompt comes from the cache"
    if entry[0] == "llama":
        assert done.tokens == done.blocks * BLOCK
        assert done.concurrency == pytest.approx(done.tokens / 256)
        assert abs(done.blocks - CACHE_BYTES // page_bytes(directory)) <= 1
        assert done.blocks > base_blocks


def test_pooled_layers_beside_windows_are_refused(engine, tmp_path):
    entry = next(entry for entry in FAMILIES if entry[0] == "gemma2")
    directory = write(tmp_path, entry, "others")
    with pytest.raises(ValueError, match="cannot be cached together yet"):
        engine.run(directory, (prompts(), TOKENS))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_layers_with_windows_save_too(family, engine, tmp_path):
    entry = next(entry for entry in FAMILIES if entry[0] == family)
    base, converted = (engine.run(write(tmp_path / name, entry, name)).concurrency for name in ("base", "leader"))
    # Three of six layers of each sort follow: nine units are left of twelve.
    assert converted / base == pytest.approx(12 / 9, rel=0.02)


@SLOW
@pytest.mark.parametrize(("family", "blocks"), CROWDED)
def test_preemption_in_a_cache_too_small_for_the_load(family, blocks, engine, tmp_path):
    preempts(engine, family, blocks, tmp_path)


@SLOW
def test_compiled_code_gives_the_same_text(engine, tmp_path):
    directory = write(tmp_path, FAMILIES[0], "others")
    done = engine.run(directory, (prompts(), TOKENS), enforce_eager=False)
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))


@pytest.mark.parametrize("name", ["leader", "grouped_several", "key", "kv", "early", "linear_none"])
def test_the_plain_path_serves_without_saving(name, engine, base_blocks, tmp_path):
    directory = write(tmp_path, FAMILIES[0], name)
    done = engine.run(directory, (prompts(), TOKENS), plugin=False)
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
    assert done.blocks == base_blocks


@pytest.mark.parametrize("told", [True, False])
def test_the_plain_path_caches_pooled_heads_only_where_the_checkpoint_tells_it(told, engine, base_blocks, tmp_path):
    """In transformers' words, which older checkpoints lack."""
    directory = write(tmp_path, FAMILIES[0], "pooled")
    if not told:
        raw = json.loads((directory / "config.json").read_text())
        del raw["per_layer_config"]
        (directory / "config.json").write_text(json.dumps(raw))
    done = engine.run(directory, (prompts(), TOKENS), plugin=False)
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
    assert abs(done.blocks - (CACHE_BYTES // page_bytes(directory) if told else base_blocks)) <= 1


@pytest.mark.parametrize(("name", "saved"), [("kv", 1), ("mixed", 2), ("linear_none", 3), ("leader", 0)])
def test_where_the_plugin_cannot_share_keys_the_engine_shares_what_it_can(name, saved, engine, base_blocks, tmp_path):
    """A `kv` layer with one source reads that one's cache; layers without attention have none."""
    directory = write(tmp_path, FAMILIES[0], name)
    done = engine.run(directory, (prompts(), TOKENS), obstacles=["a test asks for it"])
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
    assert abs(done.blocks - base_blocks * 6 // (6 - saved)) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "the cache is stored as fp8"),
        ({"cache_config__kv_cache_dtype_skip_layers": ["3"]}, "some layers are left out of the cache's dtype"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "fast prefill of layers that share keys and values is used"),
        ({"kv_transfer_config": "any"}, "a KV connector is used"),
        ({"speculative_config": "any"}, "speculative decoding is used"),
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism is used"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism is used"),
        ({"parallel_config__use_ubatching": True}, "batches are computed in two overlapping parts"),
        ({"additional_config": "any"}, "additional_config is no mapping"),
        ({"use_v2_model_runner": True}, "model runner V2 is used"),
    ],
)
def test_settings_that_the_shared_cache_has_not_been_made_for(changes, message, engine):
    assert engine.call(obstacles_of) == []
    assert engine.call(functools.partial(obstacles_of, **changes)) == [message]


def test_where_nobody_has_tried_it_the_cache_is_the_engines_own(engine):
    [found] = engine.call(obstacles_of_an_untried_pair)
    assert found.startswith("it has not been tried with vLLM 0.") and found.endswith(" on cpu")


def test_decoding_is_fused_on_gpus_only_and_by_a_setting_that_is_true_or_false(engine, tmp_path):
    directory = write(tmp_path, FAMILIES[0], "early")
    done = engine.run(directory, (prompts(), TOKENS), additional_config={"uniattn_fused_decoding": True})
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
    with pytest.raises(ValueError, match="must be true or false, not 'yes'"):
        engine.run(directory, additional_config={"uniattn_fused_decoding": "yes"})


def test_the_plain_path_refuses_free_head_maps(engine, tmp_path):
    directory = write(tmp_path, FAMILIES[0], "free_several")
    with pytest.raises(ValueError, match="install uniattn for vLLM"):
        engine.run(directory, (prompts(), 1), plugin=False)


def test_a_checkpoint_of_an_unknown_format_is_refused(engine, tmp_path):
    directory = write(tmp_path, FAMILIES[0], "leader")
    raw = json.loads((directory / "config.json").read_text())
    raw["uniattn"]["format_version"] = 99
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"has uniattn format 99, this code reads up to {FORMAT_VERSION}"):
        engine.run(directory)


def test_an_unknown_vllm_is_left_alone_with_one_warning():
    code = (
        "import importlib\nimport vllm\nfrom vllm import ModelRegistry\n"
        "from uniattn_cli.serving.vllm_plugin import GROUPING, register, release\n"
        "grouping = importlib.import_module(GROUPING[release()])\nbefore = grouping.get_kv_cache_groups\n"
        "vllm.__version__ = '99.1.0'\nregister()\n"
        "assert grouping.get_kv_cache_groups is before\n"
        "assert not [name for name in ModelRegistry.models if name.startswith('UniAttn')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "uniattn's plugin supports" in line]
    assert len(warnings) == 1
    assert "not 99.1.0 on cpu, and is disabled" in warnings[0]


# --- the GPU's attention, with PyTorch in the place of its kernels: kinds, windows, caps ------------------------------


@pytest.fixture(scope="module")
def flash():
    engine = Engine()
    engine.call(torch_flash.install)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        pytest.param(*case, id=f"{case[0][0]}-{case[1]}")
        for case in CASES
        if is_quick(*case) or (case[0][0], case[1]) == ("gemma2", "mixed")
    ],
)
def test_attention_of_gpus_gives_the_text_of_transformers(entry, name, flash, tmp_path):
    directory, before = write(tmp_path, entry, name), flash.call(torch_flash.calls)
    done = flash.run(directory, (prompts(), TOKENS), (prompts(), TOKENS))
    assert flash.call(torch_flash.calls) > before
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
    assert_same(done.outputs[1], done.outputs[0])
    assert done.counters["prefix_cache_hits"] >= BLOCK
    if entry[0] == "llama":
        assert abs(done.blocks - CACHE_BYTES // page_bytes(directory)) <= 1


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("family", "name"), FUSED)
def test_fused_decoding_gives_the_text_of_transformers(family, name, flash, tmp_path):
    entry = next(entry for entry in FAMILIES if entry[0] == family)
    directory = write(tmp_path, entry, name)
    found = []
    for fused in (False, True):
        before = flash.call(torch_flash.calls)
        done = flash.run(
            directory, (prompts(), TOKENS), (prompts(), TOKENS), additional_config={"uniattn_fused_decoding": fused}
        )
        found.append(flash.call(torch_flash.calls) - before)
        assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))
        assert_same(done.outputs[1], done.outputs[0])
    assert found[1] < found[0]


@pytest.mark.parametrize("name", ["early", "mixed"])
def test_attention_of_gpus_reads_each_tensor_with_the_scale_that_wrote_it(name, flash, tmp_path):
    """Of a cache in FP8. Whether FP8 is good enough for a model is not what is asked here."""
    directory, found = write(tmp_path, FAMILIES[0], name), []
    for scaled in (False, True):
        flash.call(torch_flash.scale, scaled)
        done = flash.run(directory, (prompts(), TOKENS), obstacles=[], kv_cache_dtype="fp8")
        assert abs(done.blocks - CACHE_BYTES // (page_bytes(directory) // 4)) <= 1
        found.append(done.outputs[0])
    flash.call(torch_flash.scale, False)
    # Small numbers are rounded by their size, so not quite alike; a wrong scale gives other tokens.
    assert_same(*found, 0.02)


@SLOW
@pytest.mark.parametrize(("family", "blocks"), CROWDED)
def test_preemption_with_attention_of_gpus(family, blocks, flash, tmp_path):
    preempts(flash, family, blocks, tmp_path)


@SLOW
def test_compiled_code_with_attention_of_gpus(flash, tmp_path):
    directory = write(tmp_path, FAMILIES[0], "early")
    fused = {"uniattn_fused_decoding": INTERPRETED}
    done = flash.run(directory, (prompts(), TOKENS), enforce_eager=False, additional_config=fused)
    assert_same(done.outputs[0], reference(directory, prompts(), TOKENS))


# --- the server -------------------------------------------------------------------------------------------------------


def real(name: str, layout: str, directory: Path) -> Path:
    """A real model converted without a fit: what is compared is engines, not quality."""
    source = ROOT / "demo" / name
    if not source.is_dir():
        pytest.skip(f"{source} is missing; make test-vllm fetches it")
    model = load_model(locate(str(source)), ModelSpec(name="", dtype="float32"), torch.device("cpu"))
    shape = attention_shape(model.config)
    plans = [{}] * shape.layers
    for index in range(shape.layers // 2, shape.layers):
        earlier = [i for i in range(index) if shape.mask_types[i] == shape.mask_types[index] and not plans[i]]
        if index % 2 and earlier:
            plans[index] = {"leader": earlier[-1], "compensation": "none"}
    if layout == "grouped":
        plans = [rotate(plan, shape) for plan in plans]
    save_checkpoint(build_converted(model, Layout.from_list(plans)), load_tokenizer(locate(str(source))), directory)
    return directory


def rotate(plan: dict, shape) -> dict:
    """A leader's heads, each key/value group moved by one."""
    if "leader" not in plan:
        return plan
    heads = [(head + shape.group_size) % shape.query_heads for head in range(shape.query_heads)]
    return {"heads": " ".join(f"{plan['leader']}:{head}" for head in heads), "compensation": "none"}


TEXTS = ["The capital of France is", "def fibonacci(n):\n", "Water boils at", "The three primary colours are"]
LONG = "One, two, three, four, five, six, seven, eight, nine, ten. " * 12


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    return real("SmolLM2-135M-Instruct", "grouped", tmp_path_factory.mktemp("smollm"))


@pytest.fixture(scope="module")
def server(smollm, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [*QUICK, "--max-model-len=512", "--max-num-batched-tokens=64", "--enable-prefix-caching"]
    with Server(smollm, *arguments, log=log) as running:
        yield running.wait()


@pytest.fixture(scope="module")
def expected(smollm):
    """Greedy tokens of transformers for `TEXTS` and `LONG`."""
    tokenizer = load_tokenizer(locate(str(smollm)))
    return reference(smollm, [tokenizer(text).input_ids for text in (*TEXTS, LONG)], 16)


def as_pair(choice: dict) -> tuple[list[int], list[float]]:
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def test_completions_of_the_server(server, expected):
    assert_same([as_pair(server.complete(text, 16)) for text in (*TEXTS, LONG)], expected)


def test_concurrent_requests_and_the_prefix_cache(server, expected):
    before = server.metric("prefix_cache_hits_total")
    texts = [*TEXTS, LONG, LONG] * 3
    with ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda text: as_pair(server.complete(text, 16)), texts))
    assert_same(found, [*expected, expected[-1]] * 3)
    assert server.metric("prefix_cache_hits_total") > before


def test_chat_and_streaming(server, smollm):
    message = [{"role": "user", "content": "Name three colours."}]
    tokenizer = load_tokenizer(locate(str(smollm)))
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    body = {"model": server.model, "messages": message, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, answer = server.request("/v1/chat/completions", body)
    assert status == 200
    text = answer["choices"][0]["message"]["content"]
    [(tokens, _)] = reference(smollm, [ids], 12)
    assert text.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    status, stream = server.request("/v1/chat/completions", body | {"stream": True})
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    assert len(events) > 6
    assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == text


def test_malformed_requests_leave_the_server_alive(server, expected):
    good = {"model": server.model, "prompt": "x", "max_tokens": 1}
    for body in (b"{not json", {"model": server.model}, good | {"temperature": -3}, good | {"prompt": "x " * 2000}):
        status, answer = server.request("/v1/completions", body)
        assert status in (400, 422), answer
        assert answer["error"]["message"]
    assert server.request("/v1/completions", good | {"model": "nobody"})[0] == 404
    assert server.request("/health")[0] == 200
    assert_same([as_pair(server.complete(TEXTS[0], 16))], expected[:1])


def test_the_servers_cache(server, smollm):
    tokens, concurrency = server.cache()
    blocks = CACHE_BYTES // page_bytes(smollm)
    assert abs(tokens // BLOCK - blocks) <= 1
    assert concurrency == pytest.approx(tokens / 512, abs=0.01)
    # What was said before it started, in whole tokens, not in blocks.
    said = re.search(r"cache: [\d,]+ tokens of the base, ([\d,]+) of this checkpoint", server.log.read_text())
    assert 0 <= int(said[1].replace(",", "")) - tokens < 2 * BLOCK


@SLOW
def test_a_killed_server_starts_again(tmp_path):
    directory = write(tmp_path / "model", FAMILIES[0], "leader")
    arguments = [*QUICK, "--max-model-len=256"]
    for attempt in range(3):
        with Server(directory, *arguments, log=tmp_path / f"log{attempt}") as server:
            first = as_pair(server.wait().complete(prompts()[1], 8))
            if b"[DONE]" not in server.killed_while_answering(prompts()[0], 200):
                break
    else:
        pytest.fail("a busy machine finished every answer before it came to kill the server")
    with Server(directory, *arguments, log=tmp_path / "again", port=server.port) as server:
        assert as_pair(server.wait().complete(prompts()[1], 8)) == first


@SLOW
def test_tensor_parallel_over_two_workers(tmp_path):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 10}
    # Heads that are not their leader's are borrowed inside a worker's half, one of which keeps them in another order.
    maps = {"heads": "1:1 1:0 0:3 0:3 0:4 0:5 1:6 1:7"}, {"kind": "key", "heads": "1:1 0:0 0:3 1:2"}
    others = [{"kind": kind, "leader": 1} for kind in ("kv", "early")]
    plans = [{}, {}, {"leader": 1}, *maps, {"leader": 0}, *others, {"kind": "linear"}, {}]
    found, tokens = parallel(write(tmp_path / "model", FAMILIES[0], Layout.from_list(plans), **sizes), tmp_path)
    assert_same(found, reference(tmp_path / "model", prompts(), TOKENS))
    # Each of the two has half of the heads, and as much memory.
    assert abs(tokens // BLOCK - CACHE_BYTES * 2 // page_bytes(tmp_path / "model")) <= 1


@SLOW
def test_tensor_parallel_with_windows(tmp_path):
    entry = next(entry for entry in FAMILIES if entry[0] == "gemma3_text")
    directory = write(tmp_path / "model", entry, "leader", num_attention_heads=8, num_key_value_heads=4)
    found, _ = parallel(directory, tmp_path)
    assert_same(found, reference(directory, prompts(), TOKENS))


def parallel(directory: Path, folder: Path) -> tuple[list[tuple[list[int], list[float]]], int]:
    """What a server of two workers answers, and the tokens that its cache holds."""
    arguments = [*QUICK, "--max-model-len=256", "--tensor-parallel-size=2"]
    with Server(directory, *arguments, log=folder / "log") as server:
        server.wait()
        return [as_pair(server.complete(prompt, TOKENS)) for prompt in prompts()], server.cache()[0]


@SLOW
def test_gemma_with_windows(tmp_path):
    directory = real("gemma-3-270m", "leader", tmp_path / "model")
    tokenizer = load_tokenizer(locate(str(directory)))
    arguments = [*QUICK, "--max-model-len=640", "--max-num-batched-tokens=64"]
    ids = [tokenizer(text).input_ids for text in (TEXTS[0], LONG * 3)]
    ids[1] = ids[1][:600]  # past its window of 512
    with Server(directory, *arguments, log=tmp_path / "log") as server:
        server.wait()
        found = [as_pair(server.complete(prompt, 12)) for prompt in ids]
    # Of one token here, transformers in float32 is 6e-4 from float64, ten times as far as vLLM; its norms and softmax
    # stay in float32 here. A window that is one token off would differ by 6e-3.
    assert_same(found, reference(directory, ids, 12, torch.float64), 5e-4)


# --- the other server -------------------------------------------------------------------------------------------------


@SLOW
def test_transformers_serves_what_it_generates(smollm, tmp_path):
    message = [{"role": "user", "content": "Name three colours."}]
    tokenizer = load_tokenizer(locate(str(smollm)))
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    texts = [tokenizer.decode(reference(smollm, [prompt], 16)[0][0]) for prompt in (ids, tokenizer(LONG).input_ids)]
    arguments = ["--engine=transformers", "--dtype=float32", "--device=cpu"]
    with Server(smollm, *arguments, log=tmp_path / "log") as server:
        server.wait()
        body = {"model": server.model, "max_tokens": 16, "temperature": 0}
        status, answer = server.request("/v1/chat/completions", body | {"messages": message})
        assert (status, answer["choices"][0]["message"]["content"]) == (200, texts[0])
        status, stream = server.request("/v1/chat/completions", body | {"messages": message, "stream": True})
        events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == texts[0]
        status, answer = server.request("/v1/completions", body | {"prompt": LONG})
        assert (status, answer["choices"][0]["text"]) == (200, texts[1])
        assert server.request("/v1/completions", body | {"model": "nobody", "prompt": LONG})[0] == 400
        assert server.request("/v1/completions", b"{not json")[0] == 422
        assert server.request("/health")[0] == 200
