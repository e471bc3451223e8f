"""Casts of mixed precision are made together: the same losses, gradients within rounding, and fewer launches."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from tiny import FAMILIES, families, make_converted, make_layout
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_run import fresh_run, stages

from uniattn_cli.commands.train import train
from uniattn_cli.models.building import build_converted
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DistillationSpec, LoraSpec, TrainStage
from uniattn_cli.training import trainer, trl_config
from uniattn_cli.training.casts import cast_together
from uniattn_cli.training.distill import Distillation
from uniattn_cli.training.objective import CrossEntropy, attach_objective
from uniattn_cli.training.trained import prepare

LLAMA = next(entry for entry in FAMILIES if entry[0] == "llama")
CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Counts what is called below autograd, which is about what is launched on a GPU."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def make_inputs(model) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


def step(model, inputs, objective=None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one forward pass, as the trainer computes it, and all gradients."""
    objective = objective or CrossEntropy()
    attach_objective(model)
    targets = objective.targets(inputs)
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.autocast("cpu", torch.bfloat16):
        sums = model(**given, use_cache=False, objective=lambda *both: objective.loss_sums(*both, targets))
        loss = sum(objective.weights[name] * value for name, value in sums.items() if name != "router")
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return loss.item(), gradients


def both(model, stage: TrainStage) -> list:
    """The model ready for a stage, as it is and with casts made together."""
    model.train()
    prepare(model, stage, None, 0)
    other = copy.deepcopy(model)
    cast_together(other, CPU)
    return [model, other]


@families("llama", "gemma3_text", "phi3", "qwen3_moe", "olmo2")
@pytest.mark.parametrize("layout", ["mixed", "early"])
def test_losses_are_equal_and_gradients_differ_by_rounding(entry, layout):
    models = both(make_converted(entry, layout), TrainStage(trains="all"))
    inputs = make_inputs(models[0])
    (loss, gradients), (other_loss, other_gradients) = (step(model, inputs) for model in models)
    assert other_loss == loss
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert other_gradients[name].dtype is gradient.dtype is torch.float32
        assert (other_gradients[name] - gradient).norm() <= 0.03 * gradient.norm() + 1e-6, name
    assert all(type(parameter) is nn.Parameter for parameter in models[1].parameters())
    assert len(list(models[1].parameters())) == len(list(models[0].parameters()))


@pytest.mark.parametrize("layout", ["mixed", "early"])
def test_gradients_under_checkpointing_are_the_same(layout):
    plain, other = (model for model in both(make_converted(LLAMA, layout), TrainStage(trains="all")))
    cast_together(plain, CPU)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = make_inputs(plain)
    (loss, gradients), (other_loss, other_gradients) = (step(model, inputs) for model in (plain, other))
    assert other_loss == loss and gradients.keys() == other_gradients.keys()
    assert all(torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items())
    assert all(type(parameter) is nn.Parameter for parameter in other.parameters())


@pytest.mark.parametrize(
    "stage",
    [TrainStage(trains="compensation"), TrainStage(trains="followers"), TrainStage(trains="lora", lora=LoraSpec(2))],
    ids=lambda stage: stage.trains,
)
def test_weights_that_a_stage_does_not_train_get_no_gradients(stage):
    pytest.importorskip("peft")
    models = both(make_converted(LLAMA, "early"), stage)
    inputs = make_inputs(models[0])
    (loss, gradients), (other_loss, other_gradients) = (step(model, inputs) for model in models)
    assert other_loss == pytest.approx(loss, rel=1e-3)
    trained = {name for name, parameter in models[0].named_parameters() if parameter.requires_grad}
    assert gradients.keys() == other_gradients.keys() == trained
    for name, gradient in gradients.items():
        assert (other_gradients[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, name


def test_nothing_changes_without_mixed_precision():
    models = both(make_converted(LLAMA, "early"), TrainStage(trains="all"))
    tokens = make_inputs(models[0])["input_ids"]
    logits = [model(tokens).logits for model in models]
    assert torch.equal(*logits) and logits[0].dtype is torch.float32


# Casts of one layer in a step: of queries and keys before attention and their gradients after it, of gradients that
# leave the rotary embedding and the residual stream, and of the inputs of two blocks. A teacher's norms
# cast, too.
@pytest.mark.parametrize(
    ("who", "checkpointing", "most"),
    [
        ("base", False, 14),
        ("base", True, 18),
        ("softmax", False, 10),
        ("softmax", True, 13),
        ("early", False, 12),
        ("early", True, 15.5),
        ("taught", False, 17),
    ],
)
def test_the_number_of_casts_does_not_grow(who, checkpointing, most):
    counts = []
    for pairs in (2, 4):
        _, config, model_class = LLAMA
        config = config()
        config.num_hidden_layers = 2 * pairs
        torch.manual_seed(0)
        model = base = model_class(config)
        kind = {"kind": "early" if who == "taught" else who, "leader": 0}
        if who != "base":
            layout = [kind | {"leader": layer - 1} if layer % 2 else {} for layer in range(2 * pairs)]
            model = build_converted(copy.deepcopy(base), type(make_layout("leader")).from_list(layout))
        objective = CrossEntropy()
        if who == "taught":
            teacher = copy.deepcopy(base).eval().requires_grad_(False).to(torch.bfloat16)
            spec = DistillationSpec(top_k=4)
            objective = Distillation(spec, teacher, layers=range(1, 2 * pairs, 2))
            objective.prepare([make_inputs(model)])
        model.train()
        prepare(model, TrainStage(trains="all"), None, 0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        cast_together(model, CPU)
        with Operators() as operators:
            step(model, make_inputs(model), objective)
        counts.append(operators.counts["_to_copy"])
    assert (counts[1] - counts[0]) / 4 <= most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stage_in_mixed_precision_makes_them_together(tmp_path, monkeypatch, dtype):
    seen = []
    monkeypatch.setattr(trl_config, "compute_dtype", lambda device: dtype)
    monkeypatch.setattr(trainer, "cast_together", lambda model, device: seen.append(cast_together(model, device)))
    train(run_dir=fresh_run(tmp_path / "run"), overrides=stages("trains: all, steps: 2"), options=RunOptions("cpu"))
    assert len(seen) == (dtype is torch.bfloat16)
