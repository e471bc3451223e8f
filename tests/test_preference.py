"""TRL's preference and reinforcement trainers take a converted checkpoint as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny import make_layout
from tiny_run import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from uniattn_cli.models.building import build_converted, save_checkpoint
from uniattn_cli.models.hub import locate
from uniattn_cli.models.loading import load_model
from uniattn_cli.recipe.schema import ModelSpec

ROWS = [{"prompt": f"{n} and {n}?", "chosen": f" It is {n + n}.", "rejected": " Who knows?"} for n in range(8)]


@pytest.fixture(scope="module", params=["early", "others", "mixed"])
def checkpoint(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    base = AutoModelForCausalLM.from_pretrained(make_model(folder / "base"))
    save_checkpoint(build_converted(base, make_layout(request.param)), make_tokenizer(), folder)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    """Two steps on a CPU."""
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trained(make, checkpoint: Path, folder: Path) -> None:
    """Trains, and checks that all changed layers have learned and that the result is a checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = make(model, AutoTokenizer.from_pretrained(checkpoint))
    trainer.train()
    assert trainer.state.global_step == 2
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    changed = model.config.layout.changed
    assert all(any(name.startswith(f"model.layers.{layer}.") for name in moved) for layer in changed)
    trainer.save_model(folder / "saved")
    again = load_model(locate(str(folder / "saved")), ModelSpec(), torch.device("cpu"))
    tokens = torch.arange(5, 25)[None]
    assert torch.equal(again(tokens).logits, trainer.model.eval()(tokens).logits)


def test_dpo_trains_a_converted_model(checkpoint, tmp_path):
    from trl import DPOConfig, DPOTrainer

    def make(model, tokenizer):
        reference = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
        return DPOTrainer(
            model,
            reference,
            args=DPOConfig(**settings(tmp_path)),
            train_dataset=datasets.Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )

    trained(make, checkpoint, tmp_path)


def test_grpo_trains_a_converted_model(checkpoint, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    def make(model, tokenizer):
        return GRPOTrainer(
            model,
            reward_funcs=lambda completions, **others: [float(len(set(each))) for each in completions],
            args=GRPOConfig(**settings(tmp_path), num_generations=2, max_completion_length=8, beta=0.0),
            train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]),
            processing_class=tokenizer,
        )

    trained(make, checkpoint, tmp_path)
