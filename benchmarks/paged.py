"""Passes of lenders over keys and values in pages, beside vLLM's FlashAttention 3 and the same passes on whole rows.

    python -m benchmarks.paged

Needs one GPU and vLLM in the environment. A pass does the attention of a lender and of the layers that borrow from it;
FlashAttention is called once for each of these layers. Pages of 16 tokens stand in random order. Each candidate is
captured in a graph, all take turns in each round; medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable

import torch

from benchmarks import runner
from uniattn_cli.inference.caches import Caches, whole_grains
from uniattn_cli.inference.paged import PagedOps
from uniattn_cli.inference.trial import attention_program, decoding_step
from uniattn_cli.inference.triton_ops import TritonOps
from uniattn_cli.modeling.layout_uniattn import Layout
from uniattn_cli.models.device import captured, describe_device, take_turns
from uniattn_cli.tables import NOTHING, Table, to_markdown

PAGE = 16
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Rows, tokens of each (None: one of `LENGTHS`), query heads, key/value heads, head size, borrowers, their kind.
CASES = {
    "64 x 8,192": (64, 8192, 32, 8, 128, 3, "softmax"),
    "64 x 8,192, early": (64, 8192, 32, 8, 128, 3, "early"),
    "64 x 8,192, one borrower": (64, 8192, 32, 8, 128, 1, "softmax"),
    "64 rows of 512 to 16,384": (64, None, 32, 8, 128, 3, "softmax"),
    "16 x 8,192": (16, 8192, 32, 8, 128, 3, "softmax"),
    "4 x 8,192": (4, 8192, 32, 8, 128, 3, "softmax"),
    "1 x 65,536": (1, 65536, 32, 8, 128, 3, "softmax"),
    "64 x 2,048": (64, 2048, 32, 8, 128, 3, "softmax"),
    "64 x 8,192, heads of 64": (64, 8192, 32, 8, 64, 3, "softmax"),
    "64 x 4,096, eight query heads to one": (64, 4096, 64, 8, 128, 3, "softmax"),
    "64 x 4,096, one query head to one": (64, 4096, 8, 8, 128, 3, "softmax"),
}


class Case:
    """Random keys and values of a lender and its borrowers, and the ways to compute their attention."""

    def __init__(self, rows, length, heads, kv_heads, head_dim, borrowers, kind, device):
        draw = random.Random(0)
        self.ends = [length or draw.choice(LENGTHS) for _ in range(rows)]
        self.heads, self.head_dim, self.device = heads, head_dim, device
        layout = Layout.from_list([{}, *[{"kind": kind, "leader": 0}] * borrowers], compensation="none")
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        self.program, self.plain = (
            attention_program(layout, **sizes, dtype=torch.bfloat16, device=device) for _ in range(2)
        )
        per_row = -(-max(self.ends) // PAGE)
        # Page 0 belongs to nobody, as in vLLM.
        self.table = (1 + torch.randperm(rows * per_row)).view(rows, per_row).to(device, torch.int32)
        shape = (rows * per_row + 1, PAGE, kv_heads, head_dim)
        self.pages = {
            (name, layer.index): torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2)
            for layer in self.program.layers
            for name in layer.kind.caches
        }
        asked = 1 + (borrowers if kind == "early" else 0)
        self.queries = torch.randn(rows, heads * asked, head_dim, device=device, dtype=torch.bfloat16)
        self.first = [heads * (index if kind == "early" else 0) for index in range(1 + borrowers)]
        self.moved = (2 + borrowers) * sum(self.ends) * kv_heads * head_dim * 2

    def outputs(self) -> list[torch.Tensor]:
        """A place for what each layer gives."""
        shape = (len(self.ends), self.heads * self.head_dim)
        return [torch.empty(shape, device=self.device, dtype=torch.bfloat16) for _ in self.program.layers]

    def paged(self, out: list[torch.Tensor]) -> Callable[[], None]:
        """One pass, and what each borrower adds."""
        operations = PagedOps(self.program, len(self.ends), max(self.ends), lambda *unit: self.pages[unit])
        operations.bind()
        ends = torch.tensor(self.ends, dtype=torch.int32, device=self.device)

        def call() -> None:
            for index, found in enumerate(out):
                operations.attend(index, self.queries, self.table, ends, found)

        return call

    def whole(self, out: list[torch.Tensor]) -> Callable[[], None]:
        """The same over caches in which a row lies together."""
        caches = Caches(self.plain, len(self.ends), whole_grains(max(self.ends)))
        caches.flat.normal_()
        operations, step = TritonOps(self.plain, caches), decoding_step(caches, [0] * len(self.ends), self.ends)

        def call() -> None:
            for layer, found in zip(self.plain.layers, out, strict=True):
                operations.decode(layer, self.queries, step, found)

        return call

    def flash(self, out: list[torch.Tensor]) -> Callable[[], None]:
        """vLLM's FlashAttention 3, which reads the keys once for each layer."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        starts = torch.arange(len(self.ends) + 1, dtype=torch.int32, device=self.device)
        ends = torch.tensor(self.ends, dtype=torch.int32, device=self.device)
        shared = {"cu_seqlens_q": starts, "max_seqlen_q": 1, "seqused_k": ends, "max_seqlen_k": max(self.ends)}
        shared |= {"softmax_scale": self.head_dim**-0.5, "causal": True, "window_size": [-1, -1], "softcap": 0.0}
        shared |= {"block_table": self.table, "fa_version": 3, "num_splits": 0}

        def call() -> None:
            for index, found in enumerate(out):
                flash_attn_varlen_func(
                    q=self.queries[:, self.first[index] : self.first[index] + self.heads],
                    k=self.pages["k", 0].transpose(1, 2),
                    v=self.pages["v", index].transpose(1, 2),
                    out=found.view(-1, self.heads, self.head_dim),
                    **shared,
                )

        return call


def measure(case: Case, rounds: int) -> dict:
    """Milliseconds of each way, the bytes that a pass has to read, and how far it is from FlashAttention."""
    outputs = {name: case.outputs() for name in ("paged", "flash", "whole")}
    calls = {name: getattr(case, name)(out) for name, out in outputs.items()}
    times = take_turns({name: captured([call]) for name, call in calls.items()}, rounds)
    difference = max(
        (ours.float() - theirs.float()).abs().max().item()
        for ours, theirs in zip(outputs["paged"], outputs["flash"], strict=True)
    )
    best = {f"{name}_ms": round(statistics.median(values), 4) for name, values in times.items()}
    return best | {"read_gb": round(case.moved / 1e9, 3), "difference": difference}


def markdown(content: runner.Content) -> str:
    """One line for each case."""
    lines = []
    for name, row in content["cases"].items():
        whole = row.get("whole_ms")
        lines.append(
            [
                *(name, f"{row['flash_ms']:.3f}", f"{row['paged_ms']:.3f}"),
                *(f"{row['flash_ms'] / row['paged_ms']:.2f}", f"{row['read_gb'] / row['paged_ms']:.2f}"),
                *(NOTHING if whole is None else f"{whole:.3f}", f"{row['difference']:.1e}"),
            ]
        )
    columns = ["", "FlashAttention 3, ms", "pass, ms", "times as fast", "TB/s read", "on whole rows, ms", "difference"]
    return to_markdown(Table("", columns, lines)) + "\n"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=12)


def measure_cases(arguments: argparse.Namespace, results: runner.Results) -> None:
    """All cases that are still to be measured."""
    results.begin({"device": describe_device(arguments.device), "dtype": "bfloat16", "page": PAGE})
    for name in results.missing("cases", CASES):
        results.add("cases", name, measure(Case(*CASES[name], arguments.device), arguments.rounds))


if __name__ == "__main__":
    runner.run("paged", __doc__, ("cases",), add_options, measure_cases, markdown=markdown)
