"""Tokens per second and peak memory of training a converted model and its base, interleaved, and where the time goes.

    python -m benchmarks.training_speed --out docs/benchmarks/training_speed.json
    python -m benchmarks.training_speed --shape smollm2-135m --layers 30 --cases all "all, no masks" ... --out FILE

By default a Llama-3.1-8B width with random weights and 8 of 32 layers, so that weights, gradients and optimiser fit
into one GPU of 80 GB; half of the converted model's layers borrow from the layer below. Everything but embeddings is
trained, with gradient checkpointing or without, where layers borrow maps and where they ask early; the compensation
stage is compared with the base's full training, and so is learning from the base as a teacher. What a case compiles or
leaves out, it does for both models. Rounds of base and converted model alternate, so that what slows the machine down
slows both. Tokens per second do not depend on the weights. After the timed steps one more is profiled: how long the
device is busy in it, how many kernels it is given and how often it is waited for, and which operators are called most;
a step that takes much longer than its kernels is bound by its launches. Of a CPU only operators are known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks import runner
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.device import clock, describe_device, release_memory, take_turns
from uniattn_cli.models.of_run import BASE
from uniattn_cli.models.random import SHAPES, known_config, random_models
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import DistillationSpec, TrainSpec, TrainStage
from uniattn_cli.run.process import join_processes
from uniattn_cli.tables import Table
from uniattn_cli.training.distill import Distillation
from uniattn_cli.training.objective import CrossEntropy, Objective
from uniattn_cli.training.stage import quiet_training
from uniattn_cli.training.trained import prepare
from uniattn_cli.training.trainer import StageTrainer
from uniattn_cli.training.trl_config import compute_dtype, make_config


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        trains: what the converted model trains.
        kind: of the layers that borrow.
        checkpointing: gradient checkpointing.
        masks: rows come with a mask of padding, of which they have none.
        compiled: `parts` of layers, their norms and MLPs; whole `layers`; or nothing.
        taught: the converted model learns from the base, its distribution and attention outputs.
    """

    trains: str = "all"
    kind: str = "early"
    checkpointing: bool = False
    masks: bool = True
    compiled: str = ""
    taught: bool = False


CASES = {
    "all": Case(kind="softmax"),
    "all, gradient checkpointing": Case(kind="softmax", checkpointing=True),
    "all, early layers": Case(),
    "all, early layers, gradient checkpointing": Case(checkpointing=True),
    "all, early layers, no masks": Case(masks=False),
    "all, early layers, parts compiled": Case(compiled="parts"),
    "all, early layers, taught by the base": Case(taught=True),
    "compensation": Case(trains="compensation", kind="softmax"),
    # Last, because compiling takes minutes.
    "all, early layers, compiled": Case(compiled="layers"),
}
# Operators and kernels of a step that are kept.
MOST = 12
# Operators that launch nothing.
VIEWS = set("alias as_strided contiguous detach empty empty_like empty_strided expand flatten linear matmul".split())
VIEWS |= set("narrow permute reshape resolve_conj resolve_neg result_type select slice split squeeze t to".split())
VIEWS |= set("transpose unbind unsqueeze view".split())


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


class Profile(transformers.TrainerCallback):
    """Watches the last step."""

    def __init__(self, device: torch.device, step: int):
        self.device, self.step = device, step
        self.trace: list[dict] = []
        self._profile: profile | None = None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            cuda = [ProfilerActivity.CUDA] if self.device.type == "cuda" else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *cuda])
            self._profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._profile is not None:
            clock(self.device)
            self._profile.__exit__(None, None, None)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                self._profile.export_chrome_trace(str(path))
                self.trace = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def summary(trace: list[dict]) -> dict[str, Any]:
    """What a trace of one step says.

    Args:
        trace: events as Chrome's format has them, times in microseconds.

    Returns:
        `operators`, how often those called most are; where kernels are among the events also `busy_ms`, the time in
        which at least one runs, their number `launches`, `waits`, how often the device was waited for, and the
        `kernels` that take longest, each with its number and milliseconds.
    """
    of = lambda *kinds: [event for event in trace if event.get("cat") in kinds]  # noqa: E731
    operators = Counter(event["name"].removeprefix("aten::") for event in of("cpu_op"))
    called = [(name, count) for name, count in operators.most_common() if name not in VIEWS]
    found: dict[str, Any] = {"operators": dict(called[:MOST])}
    launched = sorted(of("kernel", "gpu_memcpy", "gpu_memset"), key=lambda event: event["ts"])
    if launched:
        busy, until, counts, times = 0.0, 0.0, Counter[str](), Counter[str]()
        for event in launched:
            start, end, name = event["ts"], event["ts"] + event["dur"], event["name"][:80]
            busy += max(0.0, end - max(start, until))
            until = max(until, end)
            counts[name] += 1
            times[name] += event["dur"]
        waits = sum("Synchronize" in event["name"] for event in of("cuda_runtime", "cuda_driver"))
        found |= {"busy_ms": round(busy / 1000, 2), "launches": len(launched), "waits": waits}
        longest = [(name, [counts[name], round(time / 1000, 2)]) for name, time in times.most_common(MOST)]
        found["kernels"] = dict(longest)
    return found


def compile_layers(model: PreTrainedModel, what: str) -> None:
    """Compiles every layer of a model, or its parts that see one tensor and no other layer."""
    # Each borrower has other sources.
    torch._dynamo.config.recompile_limit = 8 * len(model.model.layers)
    for layer in model.model.layers:
        for name, part in layer.named_children():
            if what == "layers":
                # Casts are then the compiler's.
                part.__dict__.pop("forward", None)
            elif name != "self_attn":
                part.forward = torch.compile(part.forward)
        if what == "layers":
            layer.compile()


def measure(
    model: PreTrainedModel, case: Case, objective: Objective, arguments: argparse.Namespace
) -> tuple[float, float | None, dict[str, Any]]:
    """Tokens per second and peak memory in GiB of some steps of training, and the `summary` of one more."""
    device = arguments.device
    release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = model.float()
    stage = TrainStage(trains=case.trains, learning_rate=1e-6)
    low = compute_dtype(device)
    prepare(model, stage, low if low is torch.bfloat16 else None, 0)
    if case.compiled == "parts":
        compile_layers(model, case.compiled)
    steps = arguments.warm_up + arguments.steps + 1
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, model.config.vocab_size, (steps * arguments.batch, arguments.length), generator=generator)
    rows = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    spec = TrainSpec(
        batch_size=arguments.batch,
        micro_batch_size=arguments.batch,
        max_length=arguments.length,
        gradient_checkpointing=case.checkpointing,
        save_steps=10**9,
    )
    with tempfile.TemporaryDirectory() as folder, quiet_training():
        config = make_config(spec, stage, folder=Path(folder), steps=steps, accumulation=1, device=device, seed=0)
        stopwatch, watch = Clock(device, arguments.warm_up), Profile(device, steps - 1)
        trainer = StageTrainer(
            model,
            config,
            objective,
            train_dataset=rows,
            processing_class=make_tokenizer(),
            callbacks=[stopwatch, watch],
        )
        if case.compiled == "layers":
            compile_layers(model, case.compiled)
        if not case.masks:
            padded = trainer.data_collator
            trainer.data_collator = lambda some: {k: v for k, v in padded(some).items() if k != "attention_mask"}
        trainer.args.save_strategy = "no"
        objective.prepare(trainer.first_step())
        trainer.train()
        trainer.accelerator.free_memory()
    torch._dynamo.reset()
    seconds = statistics.median(stopwatch.seconds[: arguments.steps])
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return arguments.batch * arguments.length / seconds, peak, summary(watch.trace)


def measure_case(name: str, arguments: argparse.Namespace) -> dict:
    """Alternating rounds of base and converted model."""
    case = CASES[name]
    config = known_config(arguments.shape, arguments.layers)
    plans = [{"kind": case.kind, "leader": layer - 1} if layer % 2 else {} for layer in range(arguments.layers)]
    # The base has no compensation; its full training is what that stage saves time against.
    cases = {BASE: Case(checkpointing=case.checkpointing, masks=case.masks, compiled=case.compiled), "converted": case}

    def train(who: str) -> tuple[float, float | None, dict[str, Any]]:
        layouts = {} if who == BASE else {who: Layout.from_list(plans)}
        release_memory(arguments.device)
        model = random_models(config, layouts, "bfloat16", arguments.device)[who]
        objective: Objective = CrossEntropy()
        if cases[who].taught:
            teacher = random_models(config, {}, "bfloat16", arguments.device)[BASE].eval().requires_grad_(False)
            spec = DistillationSpec()
            objective = Distillation(spec, teacher, layers=range(1, arguments.layers, 2))
        return measure(model, cases[who], objective, arguments)

    rounds = take_turns({who: partial(train, who) for who in (BASE, "converted")}, arguments.rounds)
    ratios = [round(converted[0] / base[0], 4) for base, converted in zip(*rounds.values(), strict=True)]
    row: dict = {"ratio": statistics.median(ratios), "ratios": ratios}
    for who, measured in rounds.items():
        speeds, peaks, steps = zip(*measured, strict=True)
        speed = statistics.median(speeds)
        row[who] = {
            "tokens_per_second": round(speed, 1),
            "range": [round(min(speeds), 1), round(max(speeds), 1)],
            "peak_gib": None if peaks[0] is None else round(max(peaks), 2),
            "step_ms": round(1000 * arguments.batch * arguments.length / speed, 2),
            **steps[-1],
        }
    return row


COLUMNS = ["converted trains", "tokens/s, base trains all", "tokens/s, converted", "ratio", "peak, base"]
COLUMNS += ["peak, converted", "ms per step, of them busy", "launches", "waits"]


def markdown(content: runner.Content) -> str:
    """One line for each case."""
    setting, table = content["setting"], []
    for name, row in content["cases"].items():
        both = row[BASE], row["converted"]
        speeds = [f"{one['tokens_per_second']:,.0f}" for one in both]
        peaks = ["–" if one["peak_gib"] is None else f"{one['peak_gib']:.1f} GiB" for one in both]
        # Older rows were not profiled.
        profiled = ["–"] * 3
        if all("launches" in one for one in both):
            profiled = [" / ".join(f"{one['step_ms']:.0f}, {one['busy_ms']:.0f}" for one in both)]
            profiled += [" / ".join(f"{one[figure]:,}" for one in both) for figure in ("launches", "waits")]
        table.append([name, *speeds, f"{row['ratio']:.2f}×", *peaks, *profiled])
    return runner.page(
        "Speed and memory of training, converted and base",
        f"{setting['layers']} layers of the shape {setting['shape']}, half of which borrow; {setting['batch']} "
        f"sequences of {setting['length']} tokens; {setting['device']}. Medians of {setting['rounds']} alternating "
        "rounds; the last columns are of one more step, base / converted. Made by `benchmarks/training_speed.py`.",
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
