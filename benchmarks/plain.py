"""Plain transformers, without the engine: time to the first token and per token, base and converted.

    python -m benchmarks.plain --shapes 1x256 1x4096 16x1024 --ways dynamic static --out docs/benchmarks/plain_gpu.json

Random weights of a known shape, so no downloads; `generate` with scaled dot product attention. The models take turns in
every round, and are compared round by round. Launches are the kernels that a GPU is given for one token, or what would
be kernels of a CPU's operations: what a token of a small model takes on a GPU depends on them more than on bytes.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from benchmarks import runner
from uniattn_cli.inference.measurement import Measurement, measure_stock
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.device import Series, clock, describe_device
from uniattn_cli.models.random import SHAPES, known_config, random_models
from uniattn_cli.tables import Table

WAYS = ("dynamic", "static")


def chosen_layouts(arguments: argparse.Namespace, shape: AttentionShape) -> dict[str, Layout]:
    """The layouts to compare with the base, each kind with its default W_c."""
    stored = runner.read(arguments.layouts_from)["layouts"]
    layouts = {}
    for name in arguments.layouts:
        if len(stored.get(name, ())) == shape.layers:
            entries = [{key: value for key, value in one.items() if key != "compensation"} for one in stored[name]]
            layouts[name] = Layout.from_list(entries)
        else:
            layouts[name] = parse_groups(name, shape)
    return layouts


class Operations(TorchDispatchMode):
    """Counts operations that compute, which on a GPU launch a kernel each; views and empty memory cost none.

    Attributes:
        count: operations so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or name in ("detach", "_unsafe_view") or "empty" in name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def launches(model: PreTrainedModel) -> int:
    """Kernels that one step of decoding gives the GPU; on a CPU, operations that compute."""
    tokens = torch.zeros(1, 64, dtype=torch.long, device=model.device)
    cache = model(tokens, use_cache=True).past_key_values
    step = partial(model, tokens[:, :1], past_key_values=cache)
    step()
    if model.device.type != "cuda":
        with Operations() as operations:
            step()
        return operations.count
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        step()
        clock(model.device)
    return sum(event.device_type == DeviceType.CUDA for event in record.events())


def rows(measured: list[Measurement], counts: dict[str, int]) -> dict[str, dict]:
    """For each measurement: seconds, and medians of the ratios to the base's of the same round."""
    base, found = measured[0], {}
    for one in measured:
        key = f"{one.batch}x{one.context} | {one.path.split()[-1]} | {one.model}"
        if one.first is None or one.step is None:
            found[key] = {"note": one.note}
            continue
        row = {"first": one.first.values, "token": one.step.values, "launches": counts[one.model]}
        if base.first is not None and base.step is not None:
            row["first_ratio"] = ratio(one.first, base.first)
            row["token_ratio"] = ratio(one.step, base.step)
        found[key] = row
    return found


def ratio(one: Series, base: Series) -> float:
    """What one takes of the other's time, the median of rounds; a slow moment of the machine is in both."""
    return statistics.median(mine / its for mine, its in zip(one.values, base.values, strict=True))


def markdown(content: dict) -> str:
    """One line per shape and model."""
    setting, table = content["setting"], []
    for key, row in content["rows"].items():
        shape, way, model = key.split(" | ")
        if "token_ratio" in row:
            first, token = (statistics.median(row[name]) * 1e3 for name in ("first", "token"))
            cells = [f"{row['first_ratio']:.3f}", f"{row['token_ratio']:.3f}", f"{first:,.1f}", f"{token:.2f}"]
            table.append([shape, way, model, *cells, f"{row['launches']:,}"])
        else:
            table.append([shape, way, model, row.get("note", ""), "", "", "", ""])
    names = ["batch x prompt", "cache", "model", "first token / base's", "per token / base's", "ms", "ms", "launches"]
    return runner.page(
        f"Plain transformers: {setting['shape']}",
        f"Medians of {setting['repeats']} rounds in which all models took turns; {setting['new']} tokens after the "
        f"first one. {setting['device']}, {setting['threads']} threads on the host, {setting['dtype']}; PyTorch "
        f"{setting['versions']['torch']}, transformers {setting['versions']['transformers']}. Made by "
        "`benchmarks/plain.py`, which explains what is measured.",
        Table("", names, table),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--shape", default="smollm2-135m", choices=SHAPES)
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["early", "early-kv", "softmax", "key", "kv", "linear", "none@every:5", "paper", "pooled@every:3"],
        help="names in the file of --layouts-from, or fixed layouts as `uniattn convert --groups` takes them",
    )
    parser.add_argument("--layouts-from", type=Path, default=Path("docs/benchmarks/training/refined.json"))
    parser.add_argument("--shapes", nargs="+", default=["1x1024", "4x512"], metavar="BxT", help="batch x prompt")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=["dynamic"], help="caches; on a GPU, static is compiled"
    )
    parser.add_argument("--new", type=int, default=32, help="tokens after the first one")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")


def measure(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All shapes that were asked for."""
    device = arguments.device
    config = known_config(arguments.shape)
    layouts = chosen_layouts(arguments, attention_shape(config))
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    models = random_models(config, layouts, dtype, device)
    setting = {name: getattr(arguments, name) for name in ("shape", "new", "repeats")}
    setting |= {"device": describe_device(device), "threads": torch.get_num_threads(), "dtype": dtype}
    results.begin(setting | {"layouts": {name: layout.to_list() for name, layout in layouts.items()}})
    counts = {name: launches(model) for name, model in models.items()}
    for shape in arguments.shapes:
        batch, context = (int(part) for part in shape.split("x"))
        prompt = torch.randint(config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
        for way in arguments.ways:
            if not results.missing("rows", [f"{shape} | {way} | {name}" for name in models]):
                continue
            measured = measure_stock(
                models,
                prompt.to(device),
                new=arguments.new,
                repeats=arguments.repeats,
                static=way == "static",
            )
            for key, row in rows(measured, counts).items():
                results.add("rows", key, row, {name: row[name] for name in row if name not in ("first", "token")})


if __name__ == "__main__":
    runner.run("plain", __doc__, ("rows",), add_options, measure, markdown=markdown)
