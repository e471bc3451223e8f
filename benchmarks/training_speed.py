"""Tokens per second and peak memory of training a converted model and its base, interleaved.

    python -m benchmarks.training_speed --out docs/benchmarks/training_speed.json

By default a Llama-3.1-8B width with random weights and 8 of 32 layers, so that weights, gradients and optimiser fit
into one GPU of 80 GB; half of the converted model's layers borrow from the layer below. Cases: everything but
embeddings trained with gradient checkpointing and without, where layers borrow maps and where they ask early; and the
compensation stage, which is compared with the base's full training.
Rounds of base and converted model alternate, so that what slows the machine down slows both. Tokens per second do not
depend on the weights. Peak memory is measured on CUDA only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import runner
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.device import clock, describe_device, release_memory, take_turns
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.random import SHAPES, known_config, random_models
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import TrainSpec, TrainStage
from uniattn_cli.run.process import join_processes
from uniattn_cli.tables import Table
from uniattn_cli.training.objective import CrossEntropy
from uniattn_cli.training.stage import quiet_training
from uniattn_cli.training.trained import prepare
from uniattn_cli.training.trainer import StageTrainer
from uniattn_cli.training.trl_config import compute_dtype, make_config

# Name of the case: what the converted model trains, gradient checkpointing, the kind of layer that borrows.
CASES = {
    "all": ("all", False, "softmax"),
    "all, gradient checkpointing": ("all", True, "softmax"),
    "all, early layers": ("all", False, "early"),
    "all, early layers, gradient checkpointing": ("all", True, "early"),
    "compensation": ("compensation", False, "softmax"),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """TRL wants one; nothing is tokenised."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<eos>": 0}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


class Clock(transformers.TrainerCallback):
    """Times steps, without the first ones."""

    def __init__(self, device: torch.device, warm_up: int):
        self.device = device
        self.warm_up = warm_up
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._begun = clock(self.device)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step > self.warm_up:
            self.seconds.append(clock(self.device) - self._begun)


def measure(
    model: PreTrainedModel, trains: str, checkpointing: bool, arguments: argparse.Namespace
) -> tuple[float, float | None]:
    """Tokens per second, and peak memory in GiB, of some steps of training."""
    device = arguments.device
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = model.float()
    stage = TrainStage(trains=trains, learning_rate=1e-6)
    low = compute_dtype(device)
    prepare(model, stage, low if low is torch.bfloat16 else None, 0)
    steps = arguments.warm_up + arguments.steps
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (steps * arguments.batch, arguments.length), generator=generator)
    rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    spec = TrainSpec(
        batch_size=arguments.batch,
        micro_batch_size=arguments.batch,
        max_length=arguments.length,
        gradient_checkpointing=checkpointing,
        save_steps=10**9,
    )
    with tempfile.TemporaryDirectory() as folder, quiet_training():
        config = make_config(spec, stage, folder=Path(folder), steps=steps, accumulation=1, device=device, seed=0)
        stopwatch = Clock(device, arguments.warm_up)
        tokenizer = make_tokenizer()
        trainer = StageTrainer(
            model, config, CrossEntropy(), train_dataset=rows, processing_class=tokenizer, callbacks=[stopwatch]
        )
        trainer.args.save_strategy = "no"
        trainer.train()
        trainer.accelerator.free_memory()
    speed = arguments.batch * arguments.length / statistics.median(stopwatch.seconds)
    return speed, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def measure_case(name: str, arguments: argparse.Namespace) -> dict:
    """Alternating rounds of base and converted model."""
    trains, checkpointing, kind = CASES[name]
    config = known_config(arguments.shape, arguments.layers)
    plans = [{"kind": kind, "leader": layer - 1} if layer % 2 else {} for layer in range(arguments.layers)]

    def train(who: str) -> tuple[float, float | None]:
        layouts = {} if who == BASE else {who: Layout.from_list(plans)}
        release_memory(arguments.device)
        model = random_models(config, layouts, "bfloat16", arguments.device)[who]
        # The base has no compensation; its full training is what that stage saves time against.
        return measure(model, "all" if who == BASE else trains, checkpointing, arguments)

    rounds = take_turns({who: partial(train, who) for who in (BASE, "converted")}, arguments.rounds)
    ratios = [round(converted[0] / base[0], 4) for base, converted in zip(*rounds.values(), strict=True)]
    row: dict = {"ratio": statistics.median(ratios), "ratios": ratios}
    for who, measured in rounds.items():
        speeds, peaks = zip(*measured, strict=True)
        row[who] = {
            "tokens_per_second": round(statistics.median(speeds), 1),
            "range": [round(min(speeds), 1), round(max(speeds), 1)],
            "peak_gib": None if peaks[0] is None else round(max(peaks), 2),
        }
    return row


COLUMNS = ["converted trains", "tokens/s, base trains all", "tokens/s, converted", "ratio", "peak, base"]
COLUMNS += ["peak, converted"]


def markdown(content: runner.Content) -> str:
    """One line for each case."""
    setting, table = content["setting"], []
    for name, row in content["cases"].items():
        both = row[BASE], row["converted"]
        speeds = [f"{one['tokens_per_second']:,.0f}" for one in both]
        peaks = ["–" if one["peak_gib"] is None else f"{one['peak_gib']:.1f} GiB" for one in both]
        table.append([name, *speeds, f"{row['ratio']:.2f}×", *peaks])
    return runner.page(
        "Speed and memory of training, converted and base",
        f"{setting['layers']} layers of the shape {setting['shape']}, half of which borrow; {setting['batch']} "
        f"sequences of {setting['length']} tokens; {setting['device']}. Medians of {setting['rounds']} alternating "
        "rounds. Made by `benchmarks/training_speed.py`.",
        Table("", COLUMNS, table),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    for name, default in (("layers", 8), ("batch", 4), ("length", 2048), ("steps", 10), ("warm-up", 3), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)


def measure_cases(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All cases that were asked for."""
    arguments.device = join_processes(RunOptions(device=str(arguments.device))).device
    shown = ("shape", "layers", "batch", "length", "steps", "rounds")
    setting = {name: getattr(arguments, name) for name in shown}
    results.begin(setting | {"device": describe_device(arguments.device)})
    for name in results.missing("cases", arguments.cases):
        results.add("cases", name, measure_case(name, arguments))


if __name__ == "__main__":
    runner.run("training_speed", __doc__, ("cases",), add_options, measure_cases, markdown=markdown)
