"""Learning from a teacher: the loss and its gradient against sums written out by hand, on disk against live."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import make_tokenizer
from training_run import (
    CPU,
    Interrupting,
    Recorder,
    fresh_run,
    log_of,
    losses_of,
    stages,
    torn_run,
    weights,
    without_times,
)

from uniattn_cli.commands.train import train
from uniattn_cli.data.counts import Counts
from uniattn_cli.data.sequences import Tokenised
from uniattn_cli.errors import RecipeError, StageError
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.models.losses import IGNORED
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DistillationSpec, ModelSpec, Recipe, TrainSpec, TrainStage
from uniattn_cli.training import distill
from uniattn_cli.training.distill import Distillation
from uniattn_cli.training.divergence import TopK, dense_divergence, sparse_divergence, top_k

CHANGED_LAYERS = (1, 3)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fresh_run(tmp_path / "run")


def logits(*, scale: float = 3.0, seed: int = 0, rows: int = 7, vocabulary: int = 23) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kept", [1, 4, 22, 23, 99])
def test_top_k_is_the_divergence_of_coarsened_distributions(kept, temperature):
    teacher, student = logits(), logits(seed=1).requires_grad_()
    found = sparse_divergence(student, top_k(teacher, kept, temperature), temperature)
    p, q = ((x.double() / temperature).softmax(-1) for x in (teacher, student))
    places = p.argsort(-1, descending=True)
    pairs = [x.gather(-1, places) for x in (p, q)]
    if kept < 23:
        pairs = [torch.cat([x[:, :kept], x[:, kept:].sum(-1, keepdim=True)], -1) for x in pairs]
    expected = temperature**2 * (pairs[0] * (pairs[0] / pairs[1]).log()).sum(-1)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6)
    whole = dense_divergence(student, teacher, temperature)
    assert (found <= whole + 1e-5).all()
    # 22 tokens and "any other" are 23 events too.
    assert torch.allclose(found, whole, rtol=1e-4, atol=1e-5) == (kept >= 22)
    gradients = [torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)


def test_divergences_stay_finite_where_the_teacher_is_certain():
    teacher, student = logits(scale=400.0), logits(scale=400.0, seed=1).requires_grad_()
    for found in (sparse_divergence(student, top_k(teacher, 4, 1.0), 1.0), dense_divergence(student, teacher, 1.0)):
        (gradient,) = torch.autograd.grad(found.sum(), student)
        assert torch.isfinite(found).all() and torch.isfinite(gradient).all()


def make_batches(packing: bool) -> list[dict[str, torch.Tensor]]:
    """Two micro-batches as TRL's collator makes them; the same rows, padded or one after the other."""
    torch.manual_seed(3)
    rows = [torch.randint(4, 200, (length,)).tolist() for length in (12, 5, 9, 7)]
    batches = []
    for part in (rows[:2], rows[2:]):
        labels = [[IGNORED] * (len(row) // 3) + row[len(row) // 3 :] for row in part]
        if packing:
            batches.append(
                {
                    "input_ids": torch.tensor([list(itertools.chain(*part))]),
                    "labels": torch.tensor([list(itertools.chain(*([IGNORED, *each[1:]] for each in labels)))]),
                    "position_ids": torch.tensor([[place for row in part for place in range(len(row))]]),
                }
            )
        else:
            width = max(map(len, part))
            batches.append(
                {
                    "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in part]),
                    "labels": torch.tensor([each + [IGNORED] * (width - len(each)) for each in labels]),
                    "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part]),
                }
            )
    return batches


def make_trainer(run: Path, spec: DistillationSpec, **changes):
    """A stage's trainer over the converted model with sharp attention, and the teacher."""
    import datasets

    from uniattn_cli.training.trainer import StageTrainer
    from uniattn_cli.training.trl_config import make_config

    student = load_model(locate(str(run / "converted")), ModelSpec(attention="eager"), torch.device("cpu"))
    teacher = load_model(locate(str(run / "base")), ModelSpec(attention="eager"), torch.device("cpu"))
    torch.manual_seed(5)
    for model in (student, teacher):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "compensation" in name or "self_attn" in name or "lm_head" in name:
                    parameter.normal_(std=0.5)
    teacher.requires_grad_(False)
    config = make_config(
        replace(TrainSpec(micro_batch_size=2, max_length=32), **changes),
        TrainStage(),
        folder=run / "w",
        steps=1,
        accumulation=2,
        device=torch.device("cpu"),
        seed=0,
    )
    rows = datasets.Dataset.from_list([{"input_ids": [4, 5], "labels": [4, 5]}] * 4)
    objective = Distillation(spec, teacher, layers=CHANGED_LAYERS)
    return StageTrainer(student, config, objective, train_dataset=rows, processing_class=make_tokenizer()), teacher


def nearly(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to the rounding of sums in another order."""
    return (one - other).abs().max() <= 1e-4 * other.abs().max()


def labels_by_hand(batch: dict) -> torch.Tensor:
    """What each position of `outputs_by_hand` is to predict, -100 where nothing is learned."""
    from uniattn_cli.training.stored_teacher import documents

    return torch.tensor([label for _, labels in documents(batch, batch["labels"]) for label in labels[1:]])


def outputs_by_hand(model, batch: dict) -> tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor]:
    """Logits, attention outputs and the last layer's inputs, each row alone, where a next token follows."""
    from uniattn_cli.training.stored_teacher import documents

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found, outputs, entering = [], {layer: [] for layer in CHANGED_LAYERS}, []
    for tokens, _ in documents(inputs, batch["labels"]):
        kept = {}
        hooks = [
            model.model.layers[layer].self_attn.register_forward_hook(
                lambda module, inputs, output, layer=layer, kept=kept: kept.update({layer: output[0]})
            )
            for layer in CHANGED_LAYERS
        ]
        last = lambda module, inputs: entering.append(inputs[0][0, :-1])  # noqa: E731
        hooks.append(model.model.layers[-1].register_forward_pre_hook(last))
        found.append(model(torch.tensor([tokens]), use_cache=False).logits[0, :-1])
        for layer, output in kept.items():
            outputs[layer].append(output[0, :-1])
        for hook in hooks:
            hook.remove()
    return torch.cat(found), {layer: torch.cat(each) for layer, each in outputs.items()}, torch.cat(entering)


PLAIN = DistillationSpec(teacher="base", weight=0.5, top_k=None, tokens="learned", attention=0.0)
SPECS = {
    "dense": replace(PLAIN, weight=0.7, temperature=2.0),
    "top_k": replace(PLAIN, weight=1.0, top_k=5),
    "attention": replace(PLAIN, weight=0.25, attention=3.0),
    "all tokens": replace(PLAIN, weight=0.5, attention=1.0, tokens="all"),
    "top_k of all tokens": replace(PLAIN, weight=0.5, top_k=5, tokens="all"),
    "attention alone": replace(PLAIN, weight=0.0, attention=1.0),
    "hidden states": replace(PLAIN, weight=0.5, attention=1.0, hidden=2.0, tokens="all"),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_loss_and_gradient_equal_a_computation_by_hand(run, name, packing):
    spec = SPECS[name]
    trainer, teacher = make_trainer(run, spec)
    student, batches = trainer.model.train(), make_batches(packing)
    trainer.objective.prepare(batches)
    batches, count = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    for batch in batches:
        trainer.compute_loss(student, dict(batch)).backward()
    parts = {name: loss for name, loss in trainer.take_step_losses().items() if name != "loss"}
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()

    ours, theirs = ([outputs_by_hand(model, batch) for batch in batches] for model in (student, teacher))
    s, t = (torch.cat([logits for logits, *_ in each]).double() for each in (ours, theirs))
    targets = torch.cat([labels_by_hand(batch) for batch in batches])
    learned = targets != IGNORED
    assert int(learned.sum()) == count < len(targets)
    compared = torch.ones_like(learned) if spec.tokens == "all" else learned
    expected = {"cross_entropy": -s[learned].log_softmax(-1)[range(int(count)), targets[learned]].mean()}
    s, t = s[compared], t[compared]
    if spec.weight:
        p, q = (t / spec.temperature).softmax(-1), (s / spec.temperature).softmax(-1)
        if spec.top_k:
            order = p.argsort(-1, descending=True)
            p, q = (x.gather(-1, order) for x in (p, q))
            p, q = (torch.cat([x[:, :5], 1 - x[:, :5].sum(-1, keepdim=True)], -1) for x in (p, q))
        expected["divergence"] = spec.temperature**2 * (p * (p / q).log()).sum() / len(s)
    if spec.attention:
        errors = []
        for layer in CHANGED_LAYERS:
            a, b = (torch.cat([outputs[layer] for _, outputs, _ in each])[compared].double() for each in (ours, theirs))
            energy = b.square().sum() / len(b)
            errors.append((a - b).square().sum() / energy / len(s))
        expected["attention"] = sum(errors) / len(errors)
    if spec.hidden:
        a, b = (torch.cat([entering for *_, entering in each])[compared].double() for each in (ours, theirs))
        expected["hidden"] = ((a - b).square().sum(-1) / b.square().sum(-1)).mean()
    assert parts.keys() == expected.keys()
    for key, value in expected.items():
        assert parts[key] == pytest.approx(value.item(), rel=1e-4), key
    loss = (1 - spec.weight) * expected["cross_entropy"] + spec.weight * expected.get("divergence", 0)
    loss = loss + spec.attention * expected.get("attention", 0) + spec.hidden * expected.get("hidden", 0)
    loss.backward()
    for key, parameter in student.named_parameters():
        if parameter.grad is None:
            assert gradients[key] is None or not gradients[key].any(), key
        else:
            assert nearly(gradients[key], parameter.grad), key
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module is teacher for module in trainer.model.modules())
    # Nothing is left behind on the models.
    assert not any(layer.self_attn._forward_hooks for model in (student, teacher) for layer in model.model.layers)


@pytest.mark.parametrize("name", ["dense", "top_k"])
def test_logits_in_pieces_change_nothing(run, name, monkeypatch):
    found = []
    for size in (1 << 26, 3 * 260):
        monkeypatch.setattr(distill, "LOGITS_AT_ONCE", size)
        trainer, _ = make_trainer(run, SPECS[name])
        ((batch,), _) = trainer.get_batch_samples(iter(make_batches(packing=False)), 1, torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
        gradients = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        found.append((loss.detach(), gradients))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-6)
    assert all(nearly(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


DISTIL = [
    *stages("trains: all, loss: distillation, steps: 6, learning_rate: 0.0005"),
    "train.distillation={teacher: base, weight: 0.5, temperature: 2.0, attention: 0.5, hidden: 0.5, tokens: learned}",
    "train.save_steps=2",
    "train.log_steps=1",
]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    """A run that distilled. Tests only read it."""
    run = torn_run(tmp_path_factory.mktemp("distilled") / "run")
    train(run_dir=run, overrides=DISTIL, options=CPU)
    return run


@pytest.fixture
def again(distilled: Path, tmp_path: Path) -> Path:
    """The same run before it was trained."""
    return Path(shutil.copytree(distilled, tmp_path / "run", ignore=shutil.ignore_patterns("trained")))


def test_distillation_learns_and_is_logged_by_its_parts(distilled):
    lines = [line for line in log_of(distilled / "trained") if "loss" in line]
    for line in lines:
        parts = ("cross_entropy", "divergence", "attention", "hidden")
        assert line["loss"] == pytest.approx(0.5 * sum(line[part] for part in parts), rel=1e-5)
    for part in ("loss", "cross_entropy", "attention", "hidden"):
        assert lines[-1][part] < lines[0][part]
    record = json.loads((distilled / "trained" / "stage.json").read_text())
    # The teacher is as it was.
    assert record["inputs"]["teacher"] == locate(str(distilled / "base")).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        ["train.micro_batch_size=1", "train.gradient_checkpointing=true"],
        pytest.param(["train.micro_batch_size=8"], marks=pytest.mark.slow),
        pytest.param(["train.gradient_checkpointing=true"], marks=pytest.mark.slow),
    ],
)
def test_how_a_step_is_computed_changes_no_loss(distilled, again, changes):
    train(run_dir=again, overrides=[*DISTIL, *changes], options=CPU)
    # Forward passes of other sizes round differently in bfloat16.
    assert losses_of(again / "trained") == pytest.approx(losses_of(distilled / "trained"), rel=1e-3)


def test_interrupted_distillation_ends_like_any_other(distilled, again):
    with pytest.raises(KeyboardInterrupt):
        train(run_dir=again, overrides=DISTIL, options=RunOptions(device="cpu", progress=Interrupting(5)))
    said = Recorder()
    train(run_dir=again, overrides=DISTIL, options=RunOptions(device="cpu", progress=said))
    assert any("resumes after step 4 of 6" in text for text in said.notes)
    assert without_times(log_of(again / "trained")) == without_times(log_of(distilled / "trained"))
    after, reference = weights(again / "trained"), weights(distilled / "trained")
    assert all(torch.equal(after[name], reference[name]) for name in reference)


@pytest.mark.parametrize(
    ("packing", "tokens"),
    [
        ("true", "all"),
        *(
            pytest.param(packing, tokens, marks=pytest.mark.slow)
            for packing, tokens in (("true", "learned"), ("false", "all"), ("false", "learned"))
        ),
    ],
)
def test_a_teacher_on_disk_is_as_good_as_a_live_one(run, packing, tokens):
    setting = [
        *stages("trains: all, loss: distillation, steps: 4, learning_rate: 0.003"),
        "train.log_steps=1",
        f"train.packing={packing}",
        "train.batch_size=4",
        "train.micro_batch_size=2",
    ]
    spec = f"teacher: base, weight: 0.5, top_k: 6, attention: 0, tokens: {tokens}"
    live = [*setting, f"train.distillation={{{spec}}}"]
    result = train(run_dir=run, overrides=live, options=CPU)
    expected = losses_of(run / "trained")
    assert expected[-1] < expected[0] and result.stages[0].rows == 16
    said = Recorder()
    stored = [*setting, f"train.distillation={{{spec}, precompute: true}}"]
    train(run_dir=run, overrides=stored, options=RunOptions(device="cpu", force=True, progress=said))
    assert losses_of(run / "trained") == pytest.approx(expected, rel=1e-5)
    assert len(said.bars["teacher"]) > 1
    (folder,) = (run / "teacher").iterdir()
    assert json.loads((folder / "teacher.json").read_text())["top_k"] == 6


def test_a_teacher_on_disk_is_written_once_for_the_same_settings(run):
    import datasets
    from accelerate import PartialState

    from uniattn_cli.training.teaching import Teaching

    rows = datasets.Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}])
    rows = Tokenised(rows, [3], "data", Counts(), {})
    said = Recorder()
    for spec in ("top_k: 6", "top_k: 6", "top_k: 6, temperature: 2.0"):
        setting = f"train.distillation={{teacher: base, {spec}, attention: 0, precompute: true}}"
        recipe = Recipe.load(run / "recipe.yaml", [*stages("trains: all, loss: distillation"), setting])
        process = PartialState(cpu=True)
        process.device = torch.device("cpu")
        teaching = Teaching(recipe, {"base": locate(str(run / "base"))}, run, process, said)
        stored = teaching.distillation(recipe.train.distillation, rows, None).stored
        assert stored.ids.shape == (2, 6)
    assert [("read from" in note) for note in said.notes] == [False, True, False]
    # Another temperature is another teacher.
    assert len(list((run / "teacher").iterdir())) == 2


def test_a_process_that_waits_for_the_teacher_of_another_machine_says_so(tmp_path, monkeypatch):
    from uniattn_cli.training import teaching

    lock = tmp_path / ".teacher.lock"
    lock.write_text("1\nanother-machine\n", encoding="utf-8")
    said = Recorder()
    note = said.note
    monkeypatch.setattr(said, "note", lambda text: (note(text), lock.unlink()))
    monkeypatch.setattr(teaching, "PATIENCE", 0.1)
    waiting = teaching.Teaching(Recipe(), {}, tmp_path, None, said)
    with waiting._turn(lock):
        assert lock.exists()
    assert not lock.exists()
    assert said.notes == [f"waiting for {lock}; remove it if no process writes the teacher's distributions"]


def test_a_row_that_the_teacher_never_saw_is_refused(run):
    import datasets

    from uniattn_cli.training.stored_teacher import StoredTeacher
    from uniattn_cli.training.teaching import write_teacher

    trainer, _ = make_trainer(run, replace(PLAIN, top_k=3))
    rows = datasets.Dataset.from_list([{"input_ids": [4, 5, 6], "labels": [IGNORED, 5, 6]}])
    write_teacher(run / "teacher" / "x", trainer.objective, rows, settings={}, batch_size=2, device=torch.device("cpu"))
    stored = StoredTeacher(run / "teacher" / "x")
    batch = {"input_ids": torch.tensor([[4, 5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    found = stored.lookup(batch, torch.tensor([[IGNORED, 5, 6, IGNORED]]), "learned")
    assert isinstance(found, TopK) and found.ids.shape == (2, 3)
    total = found.logprobs.exp().sum(-1) + found.rest.exp()
    assert total.tolist() == pytest.approx([1.0, 1.0], rel=1e-5)
    with pytest.raises(StageError, match="lacks a row"):
        stored.lookup(batch, torch.tensor([[IGNORED, IGNORED, 6, IGNORED]]), "learned")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{precompute: true, top_k: null}", "set train.distillation.top_k"),
        ("{precompute: true}", "stores nothing that attention could be compared with"),
        ("{weight: 0, attention: 0}", "set one of them to distil anything"),
    ],
)
def test_settings_that_cannot_be_had_together(spec, says):
    tree = {"model": {"name": "m"}}
    setting = ["train.stages=[{trains: all, loss: distillation}]", f"train.distillation={spec}"]
    with pytest.raises(RecipeError) as caught:
        Recipe.from_tree(tree, overrides=setting)
    assert says in str(caught.value)
    # Without a stage that distils they mean nothing and are no fault.
    Recipe.from_tree({"model": {"name": "m"}}, overrides=setting[1:])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_keeps_its_balancing_loss(family):
    from tiny import FAMILIES, make_base, make_layout

    from uniattn_cli.models.building import build_converted

    base = make_base(next(entry for entry in FAMILIES if entry[0] == family))
    student = build_converted(base, make_layout("mixed", base.config))
    layers = [layer for layer, plan in enumerate(student.config.layout) if plan.kind not in ("own", "none")]
    distillation = Distillation(replace(PLAIN, attention=1.0), base, layers=layers)
    tokens = torch.arange(5, 45).view(2, 20)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    distillation.prepare([batch])
    targets = distillation.targets(batch)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        sums = distillation.loss_sums(student, {**inputs, "output_router_logits": True, "use_cache": False}, targets)
        plain = student(**inputs, labels=tokens, output_router_logits=True, use_cache=False)
    assert sums["router"].item() == pytest.approx(plain.aux_loss.item(), rel=1e-6)
    assert sums["cross_entropy"].item() > 0 and sums["attention"].item() > 0
