"""`uniattn eval` on tiny models: paired differences, measured costs, and a report that agrees with them."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_process
from safetensors.torch import save_file
from tiny import LAYOUTS, SIZES, make_base, make_layout, randomise_compensation
from tiny_run import byte_tokenizer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uniattn_cli.commands import evaluate
from uniattn_cli.data import heldout
from uniattn_cli.errors import CheckpointError, DataError, ModelError, RecipeError, StageError
from uniattn_cli.evaluation import aggregate, capacity, cost, figures, results, speed, tasks, verdict, wording
from uniattn_cli.evaluation.figures import Figure
from uniattn_cli.inference import engine, timing
from uniattn_cli.inference.engine import engine_for
from uniattn_cli.inference.program import UnsupportedError
from uniattn_cli.models import building, hub, loading, losses, pool
from uniattn_cli.models.fingerprint import fingerprint
from uniattn_cli.models.losses import window_loss
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import MarginSpec, Recipe
from uniattn_cli.reporting import tables
from uniattn_cli.run.directory import RunDir

WORDS = "the map of one layer is shared with those that follow it and a value stays what it was before".split()
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUICK = ("evaluation.tasks=[]", "evaluation.speed.enabled=false", "evaluation.tokens=192")
LAYOUT = "mixed"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few special tokens."""
    specials = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    return byte_tokenizer(specials, TEMPLATE, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(seed: int = 0):
    sizes = {**SIZES, "vocab_size": 272, "max_position_embeddings": 512}
    model = make_base(("llama", lambda: LlamaConfig(**sizes), LlamaForCausalLM), seed)
    model.generation_config.eos_token_id = list(range(272))  # generation would stop at once, speed must not
    return model


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)).capitalize() + "."


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(root: Path) -> Path:
    """A run directory with base, converted checkpoint and local data of every sort."""
    rng = random.Random(0)
    tokenizer, base = make_tokenizer(), make_model()
    building.save_checkpoint(base, tokenizer, root / "base")
    converted = randomise_compensation(building.build_converted(base, make_layout(LAYOUT)), 0.2)
    write_stage(root, "convert", converted, tokenizer, {"model": fingerprint(root / "base")})
    (root / "text.txt").write_text("\n\n".join(sentence(rng, 30) for _ in range(20)), encoding="utf-8")
    chats = [
        {
            "messages": [
                {"role": "user", "content": sentence(rng, 3)},
                {"role": "assistant", "content": sentence(rng, rng.randint(2, 20))},
            ]
        }
        for _ in range(40)
    ]
    write_rows(root / "chats.jsonl", chats)
    items = [
        {
            "query": f"Question: {sentence(rng, 4)}\nAnswer:",
            "choices": [sentence(rng, n) for n in (1, 2, 4)],
            "gold": n % 3,
        }
        for n in range(12)
    ]
    write_rows(root / "choose.jsonl", items)
    (root / "recipe.yaml").write_text(
        f"""
model: {{name: {root / "base"}}}
data: {{train: [{root / "chats.jsonl"}], text: [{root / "text.txt"}], holdout: 0.4}}
evaluation:
  tokens: 1024
  length: 64
  tasks: [{root / "choose.jsonl"}]
  limit: 10
  samples: 2
  sample_tokens: 4
  speed: {{prompt: 16, new: 6, repeats: 2, batch: 2}}
""",
        encoding="utf-8",
    )
    return root


def write_stage(root: Path, stage: str, model, tokenizer, inputs: dict) -> None:
    folder = RunDir(root).output(stage)
    building.save_checkpoint(model, tokenizer, folder)
    (folder / "stage.json").write_text(json.dumps({"stage": stage, "inputs": inputs}), encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def compared(run) -> evaluate.Evaluation:
    """Base, converted, an identical copy of the base, and one that is damaged."""
    shutil.copytree(run / "base", run / "copy")
    damaged, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        for parameter in damaged.lm_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    building.save_checkpoint(damaged, tokenizer, run / "damaged")
    return evaluate.evaluate(run_dir=run, checkpoints=[str(run / "copy"), str(run / "damaged")])


def load(run: Path, name: str):
    recipe = Recipe.load(run / "recipe.yaml")
    return loading.load_model(hub.locate(str(run / name)), recipe.model, torch.device("cpu"))


def all_figures(model: dict) -> dict[str, Any]:
    found = {**model["quality"], **model["cost"]}
    found.update({f"{task}.{metric}": one for task, each in model["tasks"].items() for metric, one in each.items()})
    return found


# Quality


def test_identical_copy_differs_by_nothing(run, compared):
    copy = compared.results["models"][str(run / "copy")]
    base = compared.results["models"]["base"]
    for name in ("perplexity", "text_loss", "response_loss", "accuracy"):
        assert copy["quality"][name].value == base["quality"][name].value
        difference = copy["quality"][name].difference_to_base
        assert (difference.value, difference.stderr) == (0.0, 0.0)
    assert copy["verdict"]["quality"] == "same" and "equal to the base in every score" in copy["verdict"]["sentence"]
    assert copy["agreement"]["kl"].value == 0 and copy["agreement"]["top1"].value == 1
    assert all(entry["difference"].value == 0 for entry in (*copy["lengths"], *copy["retrieval"]))


def test_damaged_model_is_worse(run, compared):
    damaged = compared.results["models"][str(run / "damaged")]
    for name in ("perplexity", "response_loss"):
        difference = damaged["quality"][name].difference_to_base
        assert difference.value > 2 * difference.stderr > 0
    assert damaged["verdict"]["quality"] == "worse"
    assert "worse than the base" in damaged["verdict"]["sentence"]


def test_perplexity_is_that_of_the_windows(run, compared):
    recipe = Recipe.load(run / "recipe.yaml")
    rows = heldout.text_rows(recipe, make_tokenizer())
    loss = window_loss(load(run, "converted"), torch.stack(rows.tokens))
    entry = compared.results["models"]["converted"]["quality"]["perplexity"]
    assert entry.value == pytest.approx(loss.perplexity, rel=1e-9)
    assert entry.stderr == pytest.approx(loss.perplexity * loss.stderr, rel=1e-9)
    assert entry.n == loss.windows == 16


def test_response_loss_counts_responses_only_and_ignores_padding(run):
    model, recipe = load(run, "base"), Recipe.load(run / "recipe.yaml")
    tokenizer = make_tokenizer()
    rows = heldout.response_rows(recipe, tokenizer)
    assert len({len(row) for row in rows.tokens}) > 3
    alone = losses.row_losses(model, rows, batch_size=1)
    for batch_size in (3, len(rows)):
        together = losses.row_losses(model, rows, batch_size=batch_size)
        assert together.counts == alone.counts
        assert together.sums == pytest.approx(alone.sums, rel=1e-5)
    text = tokenizer.decode(rows.tokens[0][rows.labels[0] != losses.IGNORED])
    assert text.endswith("<|end|>") and "<|user|>" not in text and alone.counts[0] == len(tokenizer(text).input_ids)
    ids = rows.tokens[0][None]
    start = len(ids[0]) - alone.counts[0]
    logits = model(ids).logits[0].double().log_softmax(-1)
    by_hand = -sum(logits[place - 1, ids[0, place]].item() for place in range(start, len(ids[0])))
    assert alone.sums[0] == pytest.approx(by_hand, rel=1e-5)


def test_accuracy_is_that_of_the_likeliest_choice(run, compared):
    tokenizer = make_tokenizer()
    items = [json.loads(line) for line in (run / "choose.jsonl").read_text().splitlines()][:10]
    for name in ("base", "converted"):
        model = load(run, name)
        right = {"acc": 0, "acc_norm": 0}
        for item in items:
            scores = [continuation_score(model, tokenizer, item["query"], choice) for choice in item["choices"]]
            lengths = [len(choice) for choice in item["choices"]]
            right["acc"] += scores.index(max(scores)) == item["gold"]
            normed = [score / length for score, length in zip(scores, lengths, strict=True)]
            right["acc_norm"] += normed.index(max(normed)) == item["gold"]
        for metric, count in right.items():
            entry = compared.results["models"][name]["tasks"]["choose"][metric]
            assert entry.value == pytest.approx(count / 10) and entry.n == 10
            assert entry.stderr == pytest.approx(math.sqrt(count / 10 * (1 - count / 10) / 9))


def continuation_score(model, tokenizer, query: str, choice: str) -> float:
    context, whole = tokenizer(query).input_ids, tokenizer(f"{query} {choice}").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[place - 1, whole[place]].item() for place in range(len(context), len(whole)))


def test_paired_standard_errors_match_a_bootstrap():
    rng = torch.Generator().manual_seed(0)
    counts = torch.randint(20, 200, (60,), generator=rng)
    base = counts * (2 + torch.randn(60, generator=rng) * 0.5)
    model = base + counts * (0.1 + torch.randn(60, generator=rng) * 0.05)
    picks = torch.randint(0, 60, (4000, 60), generator=rng)
    total = counts[picks].sum(1)
    drawn = [(each[picks].sum(1) / total).double() for each in (model, base)]
    rows = [losses.RowLosses(each.tolist(), counts.tolist()) for each in (model, base)]
    loss = aggregate._loss_figure(rows[0], rows[1], "rows").difference_to_base
    perplexity = aggregate._perplexity_figure(rows[0], rows[1]).difference_to_base
    assert loss.stderr == pytest.approx((drawn[0] - drawn[1]).std().item(), rel=0.08)
    assert perplexity.stderr == pytest.approx((drawn[0].exp() - drawn[1].exp()).std().item(), rel=0.08)
    scores = [tasks.MetricScores(0.5, [0.0, 1.0, 0.0, 1.0], True, 4), tasks.MetricScores(0.25, [0, 1, 0, 0], True, 4)]
    paired = aggregate.task_figure("acc", *scores).difference_to_base
    assert (paired.value, paired.stderr) == (0.25, pytest.approx(0.25))
    low, high = paired.interval
    assert low < 0 < 0.25 < high


def test_tasks_of_a_group_are_pooled_over_items():
    members = [
        {"acc": tasks.MetricScores(1.0, [1.0], True, 1), "f1": tasks.MetricScores(0.3, None, True, 1)},
        {"acc": tasks.MetricScores(1 / 3, [0.0, 1.0, 0.0], True, 3), "f1": tasks.MetricScores(0.3, None, True, 3)},
    ]
    assert tasks._pooled(members) == {"acc": tasks.MetricScores(0.5, [1.0, 0.0, 1.0, 0.0], True, 4)}


# Cost


@pytest.mark.parametrize("name", ["own", *LAYOUTS])
def test_measured_cache_is_what_the_layout_predicts(name, tmp_path):
    base = make_model()
    layout = make_layout(name) if name in LAYOUTS else make_layout("leader").own(6)
    model = building.build_converted(base, layout)
    building.save_checkpoint(model, make_tokenizer(), tmp_path)
    size = cost.measure_size(name, model, tmp_path)
    heads = {"own": 6, "softmax": 3, "key": 3, "kv": 0, "early": 3, "early-kv": 0, "pooled": 2, "linear": 0, "none": 0}
    assert size.kv_bytes == size.kv_bytes_predicted == 4 * 8 * sum(heads[plan.kind] for plan in layout)
    assert size.parameters == sum(one.numel() for one in dict(model.named_parameters()).values())
    assert size.checkpoint_bytes == (tmp_path / "model.safetensors").stat().st_size >= 4 * size.parameters


def test_a_wrong_saving_is_never_published(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    monkeypatch.setattr(cost, "kv_bytes_per_token", lambda *_: 1)
    with pytest.raises(ModelError, match="measured != predicted"):
        evaluate.evaluate(run_dir=tmp_path / "run", overrides=QUICK)
    assert not (tmp_path / "run/evaluation").exists()


def test_cache_bytes_see_what_a_view_keeps_alive():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    cache.layers[0].keys = torch.zeros(1, 2, 100, 8)[:, :, :4]
    assert cost.cache_bytes(cache) == 4 * 8 * (2 * 100 + 2 * 4)


def test_weights_of_several_formats_count_once(tmp_path):
    for name, size in (("model-1.safetensors", 5), ("model-2.safetensors", 7), ("pytorch_model.bin", 11)):
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "consolidated.safetensors").write_bytes(b"x" * 12)
    assert cost.weight_file_bytes(tmp_path) == 12


def test_bytes_of_different_dtypes_are_not_compared(compared):
    sizes = [
        cost.Size(10, 40, 8.0, 8, "float32", "float32", "sdpa", {}),
        cost.Size(9, 18, 4.0, 4, "bfloat16", "bfloat16", "sdpa", {}),
    ]
    base, model = (SimpleNamespace(size=size) for size in sizes)
    found = aggregate.size_figures(model, base)
    assert found["parameters"].ratio_to_base == 0.9
    for name in ("checkpoint_bytes", "kv_bytes_per_token"):
        assert found[name].ratio_to_base is None and wording.as_ratio(found[name]) == "other dtype"
    entry = compared.results["models"]["converted"]
    text = verdict.verdict("it", compared.results["models"]["base"], {**entry, "cost": found}, MarginSpec())["sentence"]
    assert "a different dtype of the KV cache" in text
    notes = results._limits({"base": base, "it": model}, SimpleNamespace(together=True))
    assert len(notes) == 2 and all("base float32, it bfloat16" in note for note in notes)


def test_generation_never_stops_early(run):
    model, calls = load(run, "base"), []
    model.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    taken = timing.time_generation(model, torch.ones(2, 9, dtype=torch.long), 7)
    assert calls == [9, 1, 1, 1, 1, 1, 1]
    assert taken.first > 0 and taken.rest > 0


def test_speed_is_interleaved(run):
    order = []
    found = {name: load(run, "base") for name in ("a", "b")}
    for name, model in found.items():
        model.register_forward_hook(
            lambda module, args, output, name=name: order.append(name) if args[0].shape[1] > 1 else None
        )
    timings = timing.measure_speed(found, torch.ones(1, 5, dtype=torch.long), new=2, repeats=3)
    assert order == ["a", "b"] * 4 + ["a"], "a warm-up, three rounds, and the first model to close them"
    assert [len(rounds) for rounds in timings.values()] == [4, 3]


def test_the_engine_is_timed_alike(run):
    found = {name: load(run, name) for name in ("base", "converted")}
    engines = {name: engine_for(model) for name, model in found.items()}
    calls = []
    for name, each in engines.items():
        each.borrow = lambda *sizes, name=name, own=each.borrow, **rest: (
            calls.append((name, sizes)) or own(*sizes, **rest)
        )
    timings = timing.measure_speed(found, torch.ones(2, 5, dtype=torch.long), new=6, repeats=2, engines=engines)
    assert [name for name, _ in calls] == ["base", "converted"] * 3 + ["base"]
    assert {sizes for _, sizes in calls} == {(2, 11, 6)}, "warm-up and rounds share a session"
    assert all(each._kept is None for each in engines.values())
    assert [len(rounds) for rounds in timings.values()] == [3, 2]
    assert all(timing.first > 0 and timing.rest > 0 for rounds in timings.values() for timing in rounds)


def test_one_engine_runs_all_models_or_none(tmp_path, monkeypatch):
    root = make_run(tmp_path)
    quick = ["evaluation.tokens=128", "evaluation.tasks=[]", "evaluation.samples=0", "evaluation.speed.engine=engine"]
    results = evaluate.evaluate(run_dir=root, overrides=quick).results
    timed = results["settings"]["speed"]
    assert (
        (timed["run_by"], timed["cache"]) == ("engine", "static") == (results["identity"]["speed"]["run by"], "static")
    )
    assert any("this package's decoding engine" in note for note in results["notes"])
    assert results["models"]["converted"]["cost"]["tokens_per_second"].ratio_to_base > 0

    def refuse(model):
        if hasattr(model.config, "uniattn"):
            raise UnsupportedError("its norms are unknown")

    monkeypatch.setattr(engine, "engine_for", refuse)
    with pytest.raises(ModelError, match="cannot run converted: its norms are unknown; set it to auto or transformers"):
        evaluate.evaluate(run_dir=root, overrides=quick, options=RunOptions(force=True))
    monkeypatch.setattr(engine, "engine_wanted", lambda choice, device: True)
    quick[-1] = "evaluation.speed.engine=auto"
    results = evaluate.evaluate(run_dir=root, overrides=quick, options=RunOptions(force=True)).results
    assert results["settings"]["speed"]["run_by"] == "transformers"
    assert any("the engine cannot run converted: its norms are unknown" in note for note in results["notes"])


def test_ratios_are_those_of_rounds_side_by_side():
    base = [timing.Timing(1.0, 1.0), timing.Timing(4.0, 4.0), timing.Timing(2.0, 2.0)]
    own = [timing.Timing(0.5, 0.5), timing.Timing(2.0, 2.0), timing.Timing(1.0, 1.0)]
    found = aggregate.speed_figures(own, base, batch=2, new=11)
    assert found["time_to_first_token"].value == 1.0 and found["time_to_first_token"].range == (0.5, 2.0)
    assert found["time_to_first_token"].ratio_to_base == 0.5
    assert found["tokens_per_second"].value == 20.0 and found["tokens_per_second"].ratio_to_base == 2.0
    assert found["time_per_output_token"].value == pytest.approx(0.1)
    # A base that grows slower from round to round: each round is divided by the mean of its neighbours.
    slowing = [timing.Timing(value, value) for value in (1.0, 3.0, 5.0)]
    assert timing.ratios([timing.Timing(1.0, 2.0), timing.Timing(1.0, 4.0)], slowing, lambda each: each.rest) == [1, 1]


# What is written


def test_every_figure_has_the_whole_schema(compared):
    results = json.loads((compared.directory / "results.json").read_text())
    assert results["schema"] == figures.SCHEMA
    assert figures.read_results(compared.directory / "results.json") == compared.results
    keys = {"value", "unit", "better", "n", "of", "stderr", "range", "difference_to_base", "ratio_to_base"}
    keys.add("difference_to_control")
    for name, model in results["models"].items():
        for figure in all_figures(model).values():
            assert set(figure) == keys
            assert (figure["difference_to_base"] is None) == (name == "base")
    speeds = results["settings"]["speed"]
    assert {"device", "threads", "run_by", "cache", "prompt", "new", "batch", "repeats", "interleaved"} <= set(speeds)
    assert results["models"]["converted"]["layers"] == {"own": 2, "softmax": 2, "kv": 1, "linear": 1}


def test_tables_and_report_say_what_the_results_say(compared):
    results = compared.results
    text = (compared.directory / "report.md").read_text()
    rows = {"perplexity of text": "perplexity", "loss on responses": "response_loss", "choose, acc": "choose.acc"}
    rows |= {"choose, acc_norm": "choose.acc_norm", "parameters": "parameters", "weights on disk": "checkpoint_bytes"}
    rows |= {"KV cache per token, measured": "kv_bytes_per_token", "time to first token": "time_to_first_token"}
    rows |= {"time per output token": "time_per_output_token", "tokens per second": "tokens_per_second"}
    rows |= {"mean accuracy of the tasks": "accuracy", "right answers generated": "generated"}
    scale = {"share": 100, "seconds": 1e3}
    names = list(results["models"])
    key, seen = None, set()
    for table in tables.tables(results):
        for row in table.rows:
            key = rows.get(row[0], key if row[0].startswith("  ") else None)
            seen.add(key)
            for name, cell in zip(names, row[1:], strict=True):
                entry = all_figures(results["models"][name])[key]
                factor = scale.get(entry.unit, 1)
                if row[0] == tables.RANGE:
                    known = entry.range
                elif row[0] == tables.DIFFERENCE:
                    difference = entry.difference_to_base
                    known = [difference.value, difference.stderr] if cell else []
                    assert cell == "" or "−+0"[(known[0] >= 0) + (known[0] == 0)] == cell[0]
                    assert cell == "" or cell[-1] == tables.SYMBOLS[difference.verdict]
                elif row[0] == tables.INTERVAL:
                    known = entry.difference_to_base.interval if cell else []
                elif row[0] == tables.RATIO:
                    known, factor = [entry.ratio_to_base] if cell else [], 1 if "×" in cell else 100
                else:
                    known = [value for value in (entry.value, entry.stderr) if value is not None]
                said = [float(found.replace(",", "")) for found in re.findall(r"[\d,]+\.?\d*", cell)]
                assert said == pytest.approx([abs(factor * value) for value in known], abs=0.051), (row, name)
                assert cell in text and (cell or name == "base")
    assert seen == {key for key in rows.values() if key in all_figures(results["models"]["base"])}
    assert wording.as_value(Figure(134_515_008, "parameters", "lower")) == "134.5 M"
    assert wording.as_value(Figure(4.185e8, "perplexity", "lower")) == "4.18e+08"
    for model in list(results["models"].values())[1:]:
        assert model["verdict"]["sentence"] in text and model["verdict"]["sentence"] in compared.notes


def test_tables_by_length_say_what_the_results_say(compared):
    results = compared.results
    (table,) = [table for table in compared.tables if table.title.startswith("By length")]
    cells = {row[0]: row[1:] for row in table.rows}
    models = list(results["models"].values())
    assert cells["perplexity at 256 tokens"] == [f"{one['lengths'][0]['perplexity']:,.2f}" for one in models]
    found = [f"{one['retrieval'][0]['correct']} of {one['retrieval'][0]['items']}" for one in models]
    assert cells["codes retrieved from 256 tokens"] == found
    by_position = [one["agreement"]["by_position"] for one in models[1:]]
    assert by_position[0]["edges"] == [0, 16, 64, 256] and "agreement" not in models[0]
    assert cells["  KL at positions 16–63"] == ["", *(f"{one['kl'][1]:.3f}" for one in by_position)]
    text = (compared.directory / "report.md").read_text()
    assert all(cell in text for row in cells.values() for cell in row)


def test_capacity_follows_from_the_formula(run, compared):
    for entry in compared.results["capacity"]:
        models = entry["models"]
        assert models["converted"]["context"] > models["base"]["context"]
    model = load(run, "converted")
    weights = sum(parameter.numel() * 4 for parameter in model.parameters())
    footprint = capacity.Footprint(model.config, weights, 4)
    memory = 1e9
    tokens, batch = footprint.longest_context(memory), footprint.largest_batch(memory, 300)
    kv = compared.results["models"]["converted"]["cost"]["kv_bytes_per_token"].value
    by_hand = memory - weights - 2**29 - 4 * 272 - 2048 * (2 * 64 + 6 * 48) * 4
    assert tokens == by_hand // kv
    assert footprint.bytes(batch, 300) <= memory < footprint.bytes(batch + 1, 300)
    assert footprint.longest_context(1e6) == 0, "not even the runtime fits"


def test_the_grid_has_every_point_and_its_table(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    overrides = [*QUICK[:1], *QUICK[2:], "evaluation.speed.batches=[1]", "evaluation.speed.contexts=[8]"]
    found = evaluate.evaluate(run_dir=tmp_path / "run", overrides=[*overrides, "evaluation.lengths=[]"])
    grid = found.results["speed_grid"]
    assert [(point["batch"], point["context"]) for point in grid] == [(2, 16), (2, 8), (1, 16), (1, 8)]
    for point in grid:
        base, converted = point["models"]["base"]["ttft"], point["models"]["converted"]["ttft"]
        assert base["ratio_to_base"] is None and converted["ratio_to_base"] > 0
        assert base["low"] <= base["median"] <= base["high"] and point["models"]["base"]["peak_bytes"] is None
    cost = found.results["models"]["converted"]["cost"]
    assert cost["time_to_first_token"].value == grid[0]["models"]["converted"]["ttft"]["median"]
    assert "1 × 8: time per output token" in (found.directory / "report.md").read_text()
    with pytest.raises(RecipeError, match="contexts"):
        options = RunOptions(force=True)
        evaluate.evaluate(
            run_dir=tmp_path / "run", overrides=[*overrides, "evaluation.speed.contexts=[510]"], options=options
        )


def test_another_backend_is_never_divided_by_the_base(run):
    timings = {name: [timing.Timing(1.0, 1.0)] * 2 for name in ("base", "it")}
    entry = speed.grid_entry(speed.GridPoint(1, 8, timings), {"base": True, "it": False}, 5)
    assert entry["models"]["it"]["tpot"] == {"median": 0.25, "low": 0.25, "high": 0.25, "ratio_to_base": None}
    found = aggregate.speed_figures(timings["it"], None, batch=1, new=5)["tokens_per_second"]
    assert wording.as_ratio(found) == "other backend"


def test_figures_follow_from_the_kept_items(run, compared):
    files = sorted((compared.directory / "items").iterdir())
    assert [path.name.split("-")[0] for path in files] == ["0", "1", "2", "3"]
    scores = json.loads(files[1].read_text())["tasks"]["choose"]["acc"]
    assert len(scores["values"]) == 10 and sum(scores["values"]) / 10 == scores["value"]
    assert {path.name for path in compared.directory.iterdir()} == {
        "items", "quality_vs_kv.png", "report.html", "report.md", "results.json", "samples", "stage.json",
    }  # fmt: skip
    assert (compared.directory / "quality_vs_kv.png").read_bytes().startswith(b"\x89PNG")


def test_tables_fit_a_terminal(compared):
    names = {"base", "converted", "trained"}
    entry = compared.results["models"]["converted"]
    results = {**compared.results, "models": {"base": compared.results["models"]["base"], "converted": entry}}
    results["models"]["trained"] = entry
    for table in tables.tables(results):
        widths = [max(map(len, cells)) for cells in zip(table.columns, *table.rows, strict=True)]
        assert sum(widths) + 2 * len(widths) <= 100 and set(table.columns[1:]) == names


def test_many_models_make_several_tables(compared):
    base = compared.results["models"]["base"]
    entry = compared.results["models"]["converted"]
    results = {**compared.results, "models": {"base": base, **{f"model {n}": entry for n in range(5)}}}
    columns = [table.columns[1:] for table in tables.tables(results)]
    assert columns[0] == columns[1] == ["base", "model 0", "model 1", "model 2"]
    assert columns[2] == columns[3] == ["base", "model 3", "model 4"]


# What is read


def test_missing_stages_are_noted(run, tmp_path):
    shutil.copytree(run / "base", tmp_path / "base")
    shutil.copy(run / "recipe.yaml", tmp_path)
    (tmp_path / "trained").mkdir()
    found = evaluate.evaluate(run_dir=tmp_path, overrides=QUICK)
    assert list(found.results["models"]) == ["base"]
    assert any("converted/ is missing" in note for note in found.notes)
    assert any("trained/ was not written by uniattn" in note for note in found.notes)
    assert "nothing to compare" in (found.directory / "report.md").read_text()


def test_stale_and_finished_outputs_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    run = tmp_path / "run"
    converted, tokenizer = load(run, "converted"), make_tokenizer()
    inputs = {"model": fingerprint(run / "base"), "converted": fingerprint(run / "converted")}
    write_stage(run, "train", converted, tokenizer, inputs)
    overrides = [f"model.name={run / 'base'}", *QUICK]
    found = evaluate.evaluate(run_dir=run, overrides=overrides)
    assert list(found.results["models"]) == ["base", "converted", "trained"]
    with pytest.raises(StageError, match="--force"):
        evaluate.evaluate(run_dir=run, overrides=overrides)
    options = RunOptions(force=True)
    write_stage(run, "train", converted, tokenizer, {**inputs, "converted": "other"})
    with pytest.raises(StageError, match="trained was made from another version"):
        evaluate.evaluate(run_dir=run, overrides=overrides, options=options)
    shutil.rmtree(run / "trained")
    building.save_checkpoint(make_model(seed=1), tokenizer, run / "base")
    with pytest.raises(StageError, match="converted was made from another version"):
        evaluate.evaluate(run_dir=run, overrides=overrides, options=options)
    assert figures.read_results(run / "evaluation/results.json") == found.results


def test_an_interrupted_evaluation_goes_on(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    run, done, real = tmp_path / "run", [], evaluate.measure

    def interrupted(subject, *arguments, **settings):
        if subject.name == "converted" and len(done) == 1:
            done.append("interrupt")
            raise KeyboardInterrupt
        done.append(subject.name)
        return real(subject, *arguments, **settings)

    monkeypatch.setattr(evaluate, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run_dir=run, overrides=QUICK)
    assert not (run / "evaluation").exists()
    found = evaluate.evaluate(run_dir=run, overrides=QUICK)
    assert done == ["base", "interrupt", "converted"]
    again = evaluate.evaluate(run_dir=run, overrides=QUICK, options=RunOptions(force=True))
    assert done[3:] == ["base", "converted"] and again.results == found.results


def test_models_that_do_not_fit_together_are_timed_apart(run, compared, monkeypatch, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    monkeypatch.setattr(pool, "available_bytes", lambda device: 0)
    found = evaluate.evaluate(run_dir=tmp_path / "run", overrides=["evaluation.tasks=[]", "evaluation.tokens=192"])
    assert found.results["settings"]["speed"]["interleaved"] is False
    assert any("do not fit into memory together" in note for note in found.notes)
    assert found.results["models"]["converted"]["cost"]["tokens_per_second"].n == 2
    agreement = [each["models"]["converted"]["agreement"] for each in (found.results, compared.results)]
    assert agreement[0] == agreement[1]


def test_without_the_harness_tasks_are_left_out(run, monkeypatch, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    monkeypatch.setattr(evaluate, "harness_installed", lambda: False)
    found = evaluate.evaluate(run_dir=tmp_path / "run", overrides=QUICK[1:])
    assert any("pip install 'uniattn[eval]'" in note for note in found.notes)
    assert found.results["tasks"] == [] and "accuracy" not in found.results["models"]["base"]["quality"]


def test_fingerprints_see_a_compensation_in_the_middle_of_a_large_file(tmp_path):
    weights = {f"layer.{n}": torch.zeros(500_000) for n in range(4)}
    save_file(weights, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    weights["layer.1"] += torch.rand(500_000)
    save_file(weights, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != before
    for damaged in (b"", b"short", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        assert fingerprint(tmp_path) != before


def test_another_vocabulary_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["new"])
    building.save_checkpoint(make_model(), tokenizer, tmp_path / "other")
    with pytest.raises(CheckpointError, match="another vocabulary"):
        evaluate.evaluate(run_dir=tmp_path / "run", checkpoints=[str(tmp_path / "other")], overrides=QUICK)


def test_bad_settings_write_nothing(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    for overrides, error, words in (
        (["evaluation.length=1024"], RecipeError, "window is 512"),
        (["evaluation.tasks=[nowhere.jsonl]"], DataError, "nowhere.jsonl"),
        (["evaluation.tasks=[hellaswg]"], DataError, "did you mean 'hellaswag'"),
    ):
        with pytest.raises(error, match=words):
            evaluate.evaluate(run_dir=tmp_path / "run", overrides=overrides)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_models_without_numbers_are_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    broken = make_model()
    with torch.no_grad():
        broken.lm_head.weight.fill_(3e38)
    building.save_checkpoint(broken, make_tokenizer(), tmp_path / "broken")
    with pytest.raises(ModelError, match="not a number"):
        evaluate.evaluate(run_dir=tmp_path / "run", checkpoints=[str(tmp_path / "broken")], overrides=QUICK)


@pytest.mark.slow
def test_the_command_in_a_fresh_process(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation", "copy", "damaged"))
    settings = [word for override in QUICK for word in ("--set", override)]
    done = run_process("eval", "base", "-C", "run", "--device", "cpu", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = figures.read_results(tmp_path / "run/evaluation/results.json")
    assert list(results["models"]) == ["base", "converted", "./base"]
    perplexity = results["models"]["converted"]["quality"]["perplexity"]
    assert wording.as_value(perplexity, error=True) in done.stdout
    assert done.stdout.count("trained/ is missing") == 1, "with the results, to which it belongs, and once"
    assert "trained/ is missing" not in done.stderr and "Traceback" not in done.stderr
