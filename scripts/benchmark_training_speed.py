"""Tokens per second and peak memory of training a converted model beside its base, interleaved.

    python scripts/benchmark_training_speed.py --out docs/benchmarks/training_speed.json

By default a Llama-3.1-8B width with random weights and 8 of 32 layers, so that weights, gradients and optimiser fit
into one GPU of 80 GB; half of the converted model's layers borrow their maps. Cases: everything but embeddings trained
with gradient checkpointing and without, and the compensation stage, which is compared with the base's full training.
Rounds of base and converted model alternate, so that what slows the machine down slows both. Tokens per second do not
depend on the weights. Peak memory is measured on CUDA only.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.building import build_converted
from uniattn_cli.options import RunOptions
from uniattn_cli.recipe.schema import TrainSpec, TrainStage
from uniattn_cli.training.objective import CrossEntropy
from uniattn_cli.training.process import join_processes
from uniattn_cli.training.stage import quiet_training
from uniattn_cli.training.trained import prepare
from uniattn_cli.training.trainer import StageTrainer
from uniattn_cli.training.trl_config import compute_dtype, make_config

# Name of the case: what the converted model trains, gradient checkpointing.
CASES = {
    "all": ("all", False),
    "all, gradient checkpointing": ("all", True),
    "compensation": ("compensation", False),
}


def make_base(arguments: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """A Llama shape with random weights in bfloat16."""
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    # On the device, where drawing billions of weights takes a second and not a minute.
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16)


def make_layout(layers: int) -> Layout:
    """Every second layer follows the one below it."""
    return Layout.from_list([{"leader": layer - 1} if layer % 2 else {} for layer in range(layers)], "full")


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

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._begun = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step > self.warm_up:
            self.seconds.append(self._now() - self._begun)


def measure(model, trains: str, checkpointing: bool, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Tokens per second and peak memory of some steps of training."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = model.to(device).float()
    stage = TrainStage(trains=trains, learning_rate=1e-6)
    low = compute_dtype(device)
    prepare(model, stage, low if low is torch.bfloat16 else None, 0)
    steps = arguments.warm_up + arguments.steps
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, arguments.vocabulary, (steps * arguments.batch, arguments.length), generator=generator)
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
        clock = Clock(device, arguments.warm_up)
        trainer = StageTrainer(
            model,
            config,
            CrossEntropy(),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            callbacks=[clock],
        )
        trainer.args.save_strategy = "no"
        trainer.train()
        trainer.accelerator.free_memory()
    per_step = arguments.batch * arguments.length
    return {
        "tokens_per_second": per_step / statistics.median(clock.seconds),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def run_case(name: str, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Alternating rounds of base and converted model."""
    trains, checkpointing = CASES[name]
    found: dict[str, list[dict]] = {"base": [], "converted": []}
    for _ in range(arguments.rounds):
        for who in found:
            base = make_base(arguments, device)
            model = base if who == "base" else build_converted(base, make_layout(arguments.layers))
            del base
            # The base has no compensation; its full training is what that stage saves time against.
            found[who].append(measure(model, "all" if who == "base" else trains, checkpointing, arguments, device))
            del model
            gc.collect()
    ratios = [c["tokens_per_second"] / b["tokens_per_second"] for b, c in zip(*found.values(), strict=True)]
    result: dict = {"ratio": statistics.median(ratios), "ratios": [round(ratio, 4) for ratio in ratios]}
    for who, rounds in found.items():
        result[who] = {
            "tokens_per_second": round(statistics.median(each["tokens_per_second"] for each in rounds), 1),
            "range": [round(f(each["tokens_per_second"] for each in rounds), 1) for f in (min, max)],
            "peak_gib": None if device.type != "cuda" else round(max(each["peak_gib"] for each in rounds), 2),
        }
    return result


def markdown(content: dict) -> str:
    """One line for each case."""
    setting = content["setting"]
    lines = [
        "# Speed and memory of training, converted beside base",
        "",
        f"{setting['layers']} layers of width {setting['hidden']}, half of them followers; {setting['batch']} "
        f"sequences of {setting['length']} tokens; {setting['device']}. Medians of {setting['rounds']} alternating "
        "rounds. Made by `scripts/benchmark_training_speed.py`.",
        "",
        "| converted trains | tokens/s, base trains all | tokens/s, converted | ratio | peak, base | peak, converted |",
        "| :--- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in content["cases"].items():
        peaks = [
            "–" if row[who]["peak_gib"] is None else f"{row[who]['peak_gib']:.1f} GiB" for who in ("base", "converted")
        ]
        speeds = [f"{row[who]['tokens_per_second']:,.0f}" for who in ("base", "converted")]
        lines.append("| " + " | ".join([name, *speeds, f"{row['ratio']:.2f}×", *peaks]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/benchmarks/training_speed.json")
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device, out = join_processes(RunOptions(device=arguments.device)).device, Path(arguments.out)
    content = json.loads(out.read_text()) if out.exists() else {"cases": {}}
    shown = ("layers", "hidden", "batch", "length", "rounds")
    content["setting"] = {name: getattr(arguments, name) for name in shown} | {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    for name in arguments.cases:
        content["cases"][name] = run_case(name, arguments, device)
        print(name, content["cases"][name], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown(content), encoding="utf-8")


if __name__ == "__main__":
    main()
