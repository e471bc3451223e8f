"""Memory and disk that conversions of well-known shapes take, computed from shapes as `uniattn convert --dry-run` does.

    python -m benchmarks.needs --out docs/benchmarks/needs.json

Nothing is measured, and no device is needed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch

from benchmarks import runner
from uniattn_cli.fitting.needs import conversion_needs
from uniattn_cli.layouts.shorthand import parse_groups
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.costs import count_parameters
from uniattn_cli.models.placement import placement
from uniattn_cli.models.random import known_config
from uniattn_cli.recipe.schema import ConversionSpec, EvaluationSpec
from uniattn_cli.tables import NOTHING, Table

SHAPES = ("qwen2.5-0.5b", "llama-3.1-8b", "llama-3.1-70b")
# Gigabytes of a GPU and of the computer.
MACHINES = ((24, 32), (80, 64))
GROUPS, ELEMENT, HELDOUT = "every:3", 2, 8192


def add_options(parser: argparse.ArgumentParser) -> None:
    """There are none but those of all benchmarks."""


def compute(arguments: argparse.Namespace, results: runner.Results) -> None:
    """One row for each shape and machine."""
    spec, scored = ConversionSpec(), EvaluationSpec()
    setting = {"groups": GROUPS, "dtype": "bfloat16", "tokens": spec.tokens, "length": spec.length}
    results.begin({**setting, "batch_size": scored.batch_size, "heldout_tokens": HELDOUT})
    for name in SHAPES:
        config = known_config(name)
        shape = attention_shape(config)
        weights = count_parameters(config, Layout.own(shape.layers)) * ELEMENT
        for machine in MACHINES:
            free = {"cuda": machine[0] * 10**9, "cpu": machine[1] * 10**9}
            placed = placement("auto", weights, torch.device("cuda"), free=lambda device, free=free: free[device.type])
            layout = parse_groups(GROUPS, shape, "full")
            needs = conversion_needs(config, layout, placed, ELEMENT, spec, scored, HELDOUT)
            total = {
                place: sum(need.size for need in needs if need.place == place) for place in ("device", "cpu", "disk")
            }
            row = {"weights": weights, "placed": placed.words, **total, "needs": [asdict(need) for need in needs]}
            results.add("rows", f"{name} | {machine[0]} | {machine[1]}", row, total)


def markdown(content: runner.Content) -> str:
    """The table, in GB."""
    rows = []
    for key, row in content["rows"].items():
        sizes = [
            f"{row[place] / 1e9:,.1f}" if row[place] else NOTHING for place in ("weights", "device", "cpu", "disk")
        ]
        name, device, cpu = key.split(" | ")
        rows.append([name, f"{device} + {cpu}", *sizes, row["placed"]])
    setting = content["setting"]
    text = (
        f"What `uniattn convert` takes, in GB, computed from shapes as `--dry-run` does, for {setting['dtype']},\n"
        f"layout `{setting['groups']}` and {setting['tokens']:,} calibration tokens. Nothing of it is measured.\n"
        "The libraries take a few hundred megabytes more."
    )
    columns = ["shape", "GPU + CPU memory", "weights", "on the GPU", "in CPU memory", "on disk", "the model is"]
    return runner.page("Memory of conversions", text, Table("", columns, rows))


if __name__ == "__main__":
    runner.run("needs", __doc__, ("rows",), add_options, compute, markdown=markdown, device=False)
