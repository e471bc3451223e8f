"""Scores that a sceptic can check: equal to the harness's own, by position and length; and never found twice."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from test_evaluation import QUICK, make_model, make_run, make_tokenizer, write_rows

from uniattn_cli.commands import evaluate
from uniattn_cli.data.items import load_items
from uniattn_cli.errors import DataError, RecipeError
from uniattn_cli.evaluation import agreement, batches, cache, local_tasks, retrieval, scores, task_names, tasks
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import Recipe, TaskSpec

NO_SPEED = "evaluation.speed.enabled=false"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A file of each shape."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    write_rows(folder / "choose.jsonl", [
        {"query": f"Take {n}:", "choices": ["one", "two or three", "none"], "gold": n % 3} for n in range(9)
    ])  # fmt: skip
    write_rows(folder / "sums.jsonl", [
        {"question": f"What is {n} + 1?", "answer": f"It is {n} + 1 = {n + 1}.\n#### {n + 1}", "target": str(n + 1)}
        for n in range(8)
    ])  # fmt: skip
    write_rows(folder / "words.jsonl", [
        {"query": " ".join(rng.choices(["map", "layer", "head"], k=6)), "target": rng.choice(["map", "layer"])}
        for _ in range(12)
    ])  # fmt: skip
    (folder / "text.txt").write_text("\n\n".join(f"Line {n} of a text. " * 30 for n in range(12)), encoding="utf-8")
    return folder


def specs(data: Path, **settings) -> list[TaskSpec]:
    names = ("choose.jsonl", "sums.jsonl", "words.jsonl", "text.txt")
    return [TaskSpec(str(data / name), new=12, **settings) for name in names]


def scores_of(found: tasks.TaskSet, model, batch_size: int = 4) -> tasks.TaskScores:
    tokenizer = make_tokenizer()
    return {name: tasks.run_task(found, name, model, tokenizer, batch_size=batch_size) for name in found.loaded}


# Tasks


@pytest.mark.parametrize(
    "settings", [{}, {"fewshot": 2}, {"chat_template": True}, {"fewshot": 1, "chat_template": True}]
)
def test_scores_are_those_of_the_harness(data, settings, monkeypatch):
    """Each number equals, to the last bit, what `lm_eval --model hf` finds for the same task, items and settings."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # It asks every installed package for its version, which takes seconds and decides no score.
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    model, tokenizer = make_model(), make_tokenizer()
    ours = scores_of(tasks.load_tasks(specs(data), limit=6, **settings), model)
    for spec in specs(data):
        name = Path(spec.source).stem
        with tasks.quiet_harness():
            theirs = evaluator.simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
                tasks=[local_tasks.local_task(name, *load_items(spec), spec)],
                num_fewshot=settings.get("fewshot"),
                apply_chat_template=settings.get("chat_template", False),
                limit=6,
                bootstrap_iters=0,
                task_manager=TaskManager(include_defaults=False),
            )["results"][name]
        assert ours[name], name
        for metric, score in ours[name].items():
            assert score.value == theirs[f"{metric},none"], (name, metric)


def test_every_model_gets_the_same_examples(data):
    """The harness draws examples from a generator that goes on from one run to the next."""
    found = tasks.load_tasks(specs(data)[:1], limit=6, fewshot=2)
    model = make_model()
    assert scores_of(found, model) == scores_of(found, model)


def test_values_of_items_give_the_metric_back(data):
    found = scores_of(tasks.load_tasks(specs(data), limit=6), make_model())
    assert {name: set(metrics) for name, metrics in found.items()} == {
        "choose": {"acc", "acc_norm"},
        "sums": {"exact_match"},
        "words": {"acc", "perplexity"},
        "text": {"word_perplexity", "bits_per_byte"},
    }
    assert len(load_items(specs(data)[3])[1]) > 1, "paragraphs are joined to documents"
    for metrics in found.values():
        for score in metrics.values():
            assert score.values is not None and len(score.values) == score.n
            mean = sum(score.values) / (sum(score.weights) if score.weights else score.n)
            value = math.exp(mean) if score.transform == "exponential" else mean
            assert value == pytest.approx(score.value, rel=1e-9)


@pytest.mark.parametrize(
    ("text", "extract", "target", "right"),
    [
        ("so 3 + 4 = 7.\n#### 1,007", "number", "1007", 1.0),
        ("it costs $18.00", "number", "18", 1.0),
        ("either 7 or 8", "number", "7", 0.0),
        ("nothing", "number", "7", 0.0),
        (" Yes \nNo", "line", "yes", 1.0),
        ("the answer is (B)", r"\((\w)\)", "B", 1.0),
        ("the answer is B", r"\((\w)\)", "B", 0.0),
    ],
)
def test_answers_are_extracted(text, extract, target, right):
    assert local_tasks.matcher(extract)({"target": target}, [text]) == {"exact_match": right}


def test_files_of_other_shapes_are_refused(data, tmp_path):
    write_rows(tmp_path / "odd.jsonl", [{"prompt": "a", "result": "b"}])
    write_rows(tmp_path / "gap.jsonl", [{"query": "a", "target": "b"}, {"query": "a"}])
    for spec, words in (
        (TaskSpec(str(tmp_path / "odd.jsonl")), "fits no known shape"),
        (TaskSpec(str(tmp_path / "gap.jsonl")), "line 2 lacks target"),
        (TaskSpec(str(tmp_path / "gap.jsonl"), shape="choices"), "lacks choices, gold"),
        (TaskSpec("builtin:name_the_function", shape="last_word"), "has the shape choices"),
        (TaskSpec(str(data / "text.txt"), shape="choices"), "plain text"),
    ):
        with pytest.raises(DataError, match=words):
            load_items(spec)
    with pytest.raises(DataError, match="too few for 9 few-shot"):
        tasks.load_tasks(specs(data)[:1], fewshot=9)
    with pytest.raises(DataError, match="appears twice"):
        tasks.load_tasks([specs(data)[0], TaskSpec(str(data / "choose.jsonl"), fewshot=1)])
    with pytest.raises(RecipeError, match="not a regular expression"):
        Recipe.from_tree({"model": {"name": "x"}, "evaluation": {"tasks": [{"source": "a.jsonl", "extract": "("}]}})


def test_a_task_is_known_by_its_settings_and_items(data, tmp_path):
    digests = {tasks.load_tasks(specs(data)[:1], **settings).digest for settings in (
        {}, {"limit": 5}, {"fewshot": 1}, {"chat_template": True}
    )}  # fmt: skip
    assert len(digests) == 4 and tasks.load_tasks(specs(data)[:1]).digest in digests
    # Another extraction is another function, of which the harness's configuration tells nothing.
    assert (
        len({tasks.load_tasks([TaskSpec(str(data / "sums.jsonl"), extract=how)]).digest for how in ("number", "line")})
        == 2
    )


def test_a_mistyped_task_is_told_without_the_index_of_the_harness(monkeypatch):
    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", None)
    for name, near in (
        ("hellaswg", "hellaswag"),
        ("mmlu_stemm", "mmlu_stem"),
        ("AraDiCE_boolq_lav", "AraDiCE_boolq_lev"),
    ):
        with pytest.raises(DataError, match=rf"'{name}' is not a task .* \(did you mean '{near}'\?\)"):
            tasks.load_tasks([TaskSpec(name)])


@pytest.mark.slow
def test_every_task_of_the_harness_is_known_by_the_text_of_its_files():
    import lm_eval.tasks

    with tasks.quiet_harness():
        names = lm_eval.tasks.TaskManager().all_tasks
    task_names.check_mentioned(names)
    assert set(names) <= task_names.names_in(task_names.read_text())


# Agreement, lengths, retrieval


def test_agreement_is_that_of_the_logits():
    base, other = make_model(), make_model(seed=1)
    windows = torch.randint(7, 263, (3, 100), generator=torch.Generator().manual_seed(0))
    reference = agreement.Reference(lambda: base, windows, 2)
    losses, found = agreement.compare_with_base(other, reference, batch_size=2)
    with torch.no_grad():
        p, q = (model(windows).logits.double().log_softmax(-1) for model in (base, other))
    kl = (p.exp() * (p - q)).sum(-1)
    equal = (p.argmax(-1) == q.argmax(-1)).double()
    assert found.edges == [0, 16, 64, 100]
    assert found.kl == pytest.approx(kl.mean(1).tolist(), rel=1e-4)
    assert found.top1 == pytest.approx(equal.mean(1).tolist())
    assert found.kl_by_position[1] == pytest.approx(kl[:, 16:64].mean().item(), rel=1e-4)
    assert found.top1_by_position[2] == pytest.approx(equal[:, 64:].mean().item())
    expected = -q[:, :-1].gather(-1, windows[:, 1:, None]).sum((1, 2))
    assert losses.sums == pytest.approx(expected.tolist(), rel=1e-5) and losses.counts == [99] * 3


def test_codes_are_told_at_all_depths():
    tokenizer = make_tokenizer()
    filler = tokenizer("the map of one layer is shared. " * 50).input_ids
    items = retrieval.retrieval_items(tokenizer, filler, length=400, count=12, seed=3)
    assert [len(item.prompt) + len(item.answers[0]) for item in items] == [400] * 12
    assert items == retrieval.retrieval_items(tokenizer, filler, length=400, count=12, seed=3)
    depths = []
    for item in items:
        text = tokenizer.decode(item.prompt)
        box = text.rsplit("The code of the ", 1)[1].split()[0]
        told = [text.index(f"The code of the {box} box is{tokenizer.decode(item.answers[item.gold])}.")]
        assert all(tokenizer.decode(answer) in text for answer in item.answers) and text.endswith(f"the {box} box is")
        depths.append(told[0] / len(text))
    # The other facts stand anywhere and move it a little.
    assert depths[0] < 0.3 and depths[-1] > 0.6 and sum(depths[:6]) < sum(depths[6:]) - 1.5
    guesses = retrieval.answer_items(make_model(), items)
    assert 0 <= sum(guesses) < 10, "a random model cannot know"
    assert not retrieval.retrieval_items(tokenizer, filler, length=64, count=1), "four facts do not fit"


def test_answers_are_scored_like_the_whole_sequence():
    tokenizer, model = make_tokenizer(), make_model()
    item = retrieval.retrieval_items(tokenizer, list(range(7, 200)), length=350, count=1)[0]
    whole = torch.tensor([item.prompt + answer for answer in item.answers])
    with torch.no_grad():
        logp = model(whole).logits.log_softmax(-1)
    start = len(item.prompt)
    expected = logp[:, start - 1 : -1].gather(-1, whole[:, start:, None])[..., 0].sum(1)
    assert retrieval._log_likelihoods(model, item) == pytest.approx(expected.tolist(), rel=1e-4)


# Batches


def test_batches_shrink_until_they_fit():
    found, tried = batches.Batches(64, 512, torch.device("cpu")), []

    def call(size: int) -> str:
        tried.append(size)
        if size > 10:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return "done"

    assert found.run("text", 2048, call) == "done" and tried == [16, 8]
    assert found.run("text", 2048, call) == "done" and tried == [16, 8, 8], "the next model begins where this one ended"
    assert found.reduced == {"text": 8}
    with pytest.raises(RuntimeError, match="shapes"):
        found.run("other", None, lambda size: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="out of memory"):
        found.run("third", None, lambda size: (_ for _ in ()).throw(RuntimeError("CUDA out of memory. It is")))


# The store


@pytest.fixture
def fresh(tmp_path, monkeypatch) -> Path:
    """A run directory, and an empty store of scores."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    cache.environment_key.cache_clear()
    return make_run(tmp_path / "run") if (tmp_path / "run").mkdir() is None else tmp_path


def count_forward(monkeypatch) -> list[str]:
    """Notes each part of a model that is really scored."""
    scored = []
    for name in ("row_losses", "compare_with_base", "base_losses", "answer_items", "run_task"):
        real = getattr(scores, name)

        def counted(*arguments, name=name, real=real, **settings):
            scored.append(name)
            return real(*arguments, **settings)

        monkeypatch.setattr(scores, name, counted)
    return scored


def test_nothing_is_scored_twice_over_run_directories(fresh, tmp_path, monkeypatch):
    scored = count_forward(monkeypatch)
    first = evaluate.evaluate(run_dir=fresh, overrides=[NO_SPEED])
    once = len(scored)
    assert once == 2 * (2 + 1 + 1 + 1), "two models: text and responses, the longest windows, retrieval, one task"
    shutil.copytree(fresh, tmp_path / "other", ignore=shutil.ignore_patterns("evaluation"))
    second = evaluate.evaluate(run_dir=tmp_path / "other", overrides=[NO_SPEED])
    assert len(scored) == once
    assert first.results["models"]["base"] == second.results["models"]["base"]
    for change, more in (
        (["evaluation.limit=5", "evaluation.length=32"], 2 + 2),  # the task of both models, and their text
        (["evaluation.cache=false"], once),
        (["model.dtype=bfloat16"], once),
    ):
        before = len(scored)
        evaluate.evaluate(run_dir=tmp_path / "other", overrides=[NO_SPEED, *change], options=RunOptions(force=True))
        assert len(scored) - before == more, change


def test_a_changed_weight_or_version_is_never_stale(fresh, tmp_path, monkeypatch):
    source = evaluate.find_subjects(evaluate.RunDir(fresh), Recipe.load(fresh / "recipe.yaml"), ())[0][0].source
    before = cache.model_key(source)
    weights = source.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 + 13] ^= 1
    weights.write_bytes(bytes(content))
    assert cache.model_key(source) != before, "one bit in the middle of the file"
    kept = cache.ScoreStore([tmp_path / "a"])
    assert kept.get({"versions": 1}, lambda: 1) == kept.get({"versions": 1}, lambda: 2) == 1
    assert kept.get({"versions": 2}, lambda: 2) == 2 and (kept.found, kept.made) == (1, 2)
    for path in (tmp_path / "a").iterdir():
        path.write_text(path.read_text()[:-9])
    assert kept.get({"versions": 1}, lambda: 3) == 3, "a damaged entry is found anew"


def test_an_interrupted_model_goes_on_where_it_was(fresh, monkeypatch):
    """Without a store of the user's, too: the parts that were finished lie in the run directory."""
    monkeypatch.setenv(cache.VARIABLE, "off")
    real = scores.answer_items
    monkeypatch.setattr(scores, "answer_items", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(run_dir=fresh, overrides=[NO_SPEED])
    monkeypatch.setattr(scores, "answer_items", real)
    scored = count_forward(monkeypatch)
    found = evaluate.evaluate(run_dir=fresh, overrides=[NO_SPEED])
    assert scored[:2] == ["answer_items", "run_task"], "of the base, what was missing"
    assert not (found.directory / evaluate.PARTS).exists()


def test_the_place_of_the_store_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_directory() == tmp_path / "uniattn/scores"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.cache_directory() == Path.home() / ".cache/uniattn/scores"
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.cache_directory() is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cache.ScoreStore([blocked]).get({}, lambda: [1]) == [1], "a folder that cannot be written to is no obstacle"


def test_a_chat_template_that_is_not_there_is_told(fresh):
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = fresh / "base" / name
        if path.name.endswith("jinja"):
            path.unlink(missing_ok=True)
    content = json.loads((fresh / "base/tokenizer_config.json").read_text())
    content.pop("chat_template", None)
    (fresh / "base/tokenizer_config.json").write_text(json.dumps(content))
    shutil.rmtree(fresh / "converted")
    with pytest.raises(DataError, match="no chat template"):
        evaluate.evaluate(run_dir=fresh, overrides=[*QUICK[1:], "evaluation.chat_template=true"])
