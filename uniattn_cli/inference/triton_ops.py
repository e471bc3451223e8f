"""The operations of a decoder layer with Triton kernels where they do better than PyTorch."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import nn

from uniattn_cli.inference import kernels, matvec, pointwise, tuning
from uniattn_cli.inference.caches import BLOCKS, Caches
from uniattn_cli.inference.head_tables import HeadTable, head_tables
from uniattn_cli.inference.lending import Lending, plan_lending
from uniattn_cli.inference.ops import TorchOps
from uniattn_cli.inference.program import Gated, LayerProgram, Program
from uniattn_cli.inference.roofline import cache_bytes
from uniattn_cli.inference.step import Step

# Streaming multiprocessors of a device that has none (the interpreter), so that keys are split there too.
FALLBACK_PROCESSORS = 4
MOST_SPLITS = 128
# Share of the device that has to be busy in the last wave of programs.
GOOD_USE = 0.92
# A program with fewer keys than this hardly pays for the merge.
FEWEST_KEYS = 256
# Shared memory that a program may have on a device that does not say, and what is needed beside the blocks of keys.
FALLBACK_SHARED = 227 << 10
OTHER_SHARED = 24 << 10
# Keys that a kernel handles at once where it weighs borrowers' values too: as many as fit into shared memory twice.
LENDING_BLOCKS = (64, 32, 16)
# Bytes in flight beyond which such a kernel becomes slower (seen on an H200).
LENDING_SHARED = 160 << 10


@dataclass(frozen=True)
class Tuning:
    """How the attention kernels are launched.

    Attributes:
        programs: programs that one multiprocessor should hold.
        warps: warps per program.
        stages: blocks of keys in flight.
        resident: percent of the L2 cache that a leader's map may take. The cache is asked to keep that of as many rows
            as fit, because a map that goes to memory costs far more than its bytes.
    """

    programs: int
    warps: int
    stages: int
    resident: int = 0

    @classmethod
    def of(cls, role: str, block: int) -> Tuning:
        """What was fastest on an H200, or `UNIATTN_LEAD`, `UNIATTN_ALONE` and so on, such as `2,4,3`."""
        text = os.environ.get(f"UNIATTN_{role.upper()}", TUNINGS[role][BLOCKS.index(block)])
        return cls(*(int(value) for value in text.split(",")))


# By role (a layer that keeps its map, one that answers borrowers too, one that lends nothing, one that borrows a
# map) and size of a block of keys; found with benchmarks/kernels.py.
TUNINGS = {
    "lead": ("2,4,3,33", "1,4,4,33"),
    "lend": ("1,4,3", "1,4,3"),
    "alone": ("1,4,4", "1,4,4"),
    "follow": ("2,4,3", "1,4,4"),
}


@functools.cache
def choose_splits(rows: int, keys: int, slots: int) -> int:
    """Into how many parts the keys of each row are cut.

    The fewest parts with which the last wave of programs leaves little of the device idle.

    Args:
        rows: pairs of a sequence and a key/value head.
        keys: keys of the longest row.
        slots: programs that the device runs at the same time.
    """
    best, best_use = 1, 0.0
    for splits in range(1, max(1, min(MOST_SPLITS, keys // FEWEST_KEYS)) + 1):
        programs = rows * splits
        use = programs / (-(-programs // slots) * slots)
        if use >= GOOD_USE:
            return splits
        if use > best_use:
            best, best_use = splits, use
    return best


class TritonOps(TorchOps):
    """Needs 16-bit or float32 weights, heads of at most 256, and a CUDA device or Triton's interpreter.

    Args:
        lending: lenders serve the borrowers of `plan_lending`, or those of a plan that is given; without, followers
            read maps, and those that ask early keys.
    """

    name = "triton"

    def __init__(
        self,
        program: Program,
        caches: Caches,
        *,
        reuse: bool = True,
        lending: bool | Lending = True,
        tuning: Tuning | None = None,
    ):
        super().__init__(program, caches, reuse=reuse)
        if isinstance(lending, bool):
            lending = plan_lending(program) if reuse and lending else Lending({}, {}, {})
        self.lending = lending
        self.served = frozenset(self.lending.slots)
        self.tunings = {role: tuning or Tuning.of(role, caches.block) for role in TUNINGS}
        self.slots_of, self.shared = _processors(program.device), _shared_memory(program.device)
        self.tables = head_tables(program, caches, self.lending, None if reuse else self.map_rows)
        shape, device = program.shape, program.device
        parts = max(
            (
                rows * self._splits(layer, tuning, rows)
                for layer in program.layers
                if layer.kind.attends
                for tuning in self.tunings.values()
                for rows in caches.row_counts
            ),
            default=1,
        )
        heads = caches.batch * shape.query_heads
        floats: dict[str, Any] = {"dtype": torch.float32, "device": device}
        units = max(map(self.lending.units, self.lending.lenders), default=1)
        parts *= units * shape.query_heads
        self.part_out = torch.empty(parts, shape.head_dim, **floats)
        self.part_max = torch.empty(parts, **floats)
        self.part_sum = torch.empty(parts, **floats)
        slots = max(self.lending.slots.values(), default=-1) + 1
        self.lent = torch.empty(slots, heads, shape.head_dim, **floats)
        self.newest = torch.empty(slots, heads, **floats)
        # Rows of the batch whose maps the L2 cache is asked to keep: as many as their share of it holds.
        self.resident_rows = 0
        if any(self._keeps_map(layer) for layer in program.layers):
            share = cache_bytes(device) * self.tunings["lead"].resident // 100
            self.resident_rows = min(caches.batch, share // max(1, caches.maps[:, :1].nbytes))
        self.norm_offsets: dict[type[nn.Module], float | None] = {}
        self.nothing = torch.empty(0, dtype=program.dtype, device=device)

    # --- attention of a decoding step

    def _keeps_map(self, layer: LayerProgram) -> bool:
        return layer.map_slot is not None and self.reuse and layer.index not in self.lending.lenders

    def _splits(self, layer: LayerProgram, tuning: Tuning, rows: int, block: int | None = None) -> int:
        keys, block = self.caches.capacity, block or self.caches.block
        if layer.window is not None:
            keys = min(keys, (layer.window // block + 1) * block)
        return choose_splits(rows * layer.kv_heads, keys, self.slots_of * tuning.programs)

    def _stages(self, layer: LayerProgram, tuning: Tuning, read: int) -> int:
        """Blocks in flight: as many as asked for, or as fit into shared memory where heads or elements are large.

        Args:
            read: tensors that are read block by block, 2 for keys and values.
        """
        block = read * self.caches.block * _pad(layer.head_dim) * self.program.dtype.itemsize
        return max(1, min(tuning.stages, (self.shared - OTHER_SHARED) // block))

    def lending_block(self, layer: LayerProgram, tuning: Tuning) -> tuple[int, int]:
        """Keys that a kernel handles at once while it answers borrowers too, and its stages."""
        key = (2 + self.lending.lent(layer.index)) * _pad(layer.head_dim) * self.program.dtype.itemsize
        room = min(LENDING_SHARED, self.shared - OTHER_SHARED)
        block = next((size for size in LENDING_BLOCKS if 2 * size * key <= room), LENDING_BLOCKS[-1])
        # One block less than stages is in flight.
        return block, 1 + max(1, min(tuning.stages - 1, room // (block * key)))

    def decode(self, layer: LayerProgram, queries: torch.Tensor | None, step: Step, out: torch.Tensor) -> None:
        caches = self.caches
        if layer.map_slot is not None and queries is not None and not self.reuse:
            caches.queries[layer.map_slot] = queries[:, : layer.heads]
        if layer.index in self.served:
            self._receive(layer, step, out)
        elif layer.kind.borrows_maps and self.reuse:
            self._follow(layer, step, out)
        else:
            self._lead(layer, queries, step, out)

    def _lead(self, layer: LayerProgram, queries: torch.Tensor | None, step: Step, out: torch.Tensor) -> None:
        table, caches = self.tables[layer.index], self.caches
        assert table.keys is not None, "what makes a map reads keys"
        row = layer.heads * layer.head_dim if queries is None else queries.stride(0)
        slot = layer.map_slot if self._keeps_map(layer) else None
        units, lent = self.lending.units(layer.index), self.lending.lent(layer.index)
        tuning = self.tunings["lend" if units > 1 else "alone" if slot is None else "lead"]
        block, stages = caches.block, self._stages(layer, tuning, 2)
        if lent:
            block, stages = self.lending_block(layer, tuning)
        heads, splits = len(table.keys), self._splits(layer, tuning, step.batch, block)
        group = layer.heads // heads
        kernels.lead_kernel[(step.batch * heads, splits)](
            caches.queries if queries is None else queries,
            caches.flat,
            table.queries,
            table.keys,
            table.values,
            self._borrowers(table),
            step.starts,
            step.ends,
            out,
            self.part_out,
            self.part_max,
            self.part_sum,
            *self._kept(slot),
            self.lent,
            self.newest,
            row,
            table.key_row,
            table.value_row,
            out.stride(0),
            caches.capacity,
            layer.scale,
            layer.softcap or 0.0,
            layer.window or 0,
            splits,
            self.resident_rows,
            *caches.paging,
            HEADS=heads,
            GROUP=group,
            UNITS=units,
            ROWS_PAD=_pad(units * group),
            D=layer.head_dim,
            D_PAD=_pad(layer.head_dim),
            BLOCK=block,
            SPLIT=splits > 1,
            KEEP=slot is not None,
            LENT=lent,
            SOFTCAP=layer.softcap is not None,
            WINDOW=layer.window is not None,
            PAGE=caches.page,
            num_warps=tuning.warps,
            num_stages=stages,
        )
        if splits > 1:
            self._merge(layer, splits, out, slot, heads, normalised=False)

    def _receive(self, layer: LayerProgram, step: Step, out: torch.Tensor) -> None:
        table, slot = self.tables[layer.index], self.lending.slots[layer.index]
        kernels.receive_kernel[(step.batch * layer.heads,)](
            self.caches.flat,
            table.values,
            step.ends,
            out,
            self.lent[slot],
            self.newest[slot],
            table.value_row,
            out.stride(0),
            *self.caches.paging,
            HEADS=layer.heads,
            GROUP=layer.heads // layer.kv_heads,
            D=layer.head_dim,
            D_PAD=_pad(layer.head_dim),
            NEWEST=not layer.kind.borrows_values,
            PAGE=self.caches.page,
            num_warps=1,
        )

    def _follow(self, layer: LayerProgram, step: Step, out: torch.Tensor) -> None:
        table, caches, tuning = self.tables[layer.index], self.caches, self.tunings["follow"]
        splits, group = self._splits(layer, tuning, step.batch), layer.heads // layer.kv_heads
        kernels.follow_kernel[(step.batch * layer.kv_heads, splits)](
            caches.flat,
            self.map_rows[layer.index],
            table.values,
            step.starts,
            step.ends,
            out,
            self.part_out,
            caches.maps,
            caches.block_max,
            caches.lse,
            table.value_row,
            out.stride(0),
            caches.capacity,
            caches.batch * layer.heads,
            layer.window or 0,
            splits,
            HEADS=layer.kv_heads,
            GROUP=group,
            GROUP_PAD=_pad(group),
            D=layer.head_dim,
            D_PAD=_pad(layer.head_dim),
            BLOCK=caches.block,
            SPLIT=splits > 1,
            WINDOW=layer.window is not None,
            num_warps=tuning.warps,
            num_stages=self._stages(layer, tuning, 1),
        )
        if splits > 1:
            self._merge(layer, splits, out, None, layer.kv_heads, normalised=True)

    def _kept(self, slot: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where a leader keeps its map and its sum; what is passed where it keeps none is never touched."""
        caches = self.caches
        if slot is None:
            return self.nothing, self.part_max, self.part_max
        return caches.maps[slot], caches.block_max[slot], caches.lse[slot]

    def _borrowers(self, table: HeadTable) -> torch.Tensor:
        """Likewise."""
        return table.queries if table.borrowers is None else table.borrowers

    def _merge(
        self, layer: LayerProgram, splits: int, out: torch.Tensor, slot: int | None, heads: int, *, normalised: bool
    ) -> None:
        units = 1 if normalised else self.lending.units(layer.index)
        kernels.merge_kernel[(out.shape[0] * layer.heads * units,)](
            out,
            self.part_out,
            self.part_max,
            self.part_sum,
            self._kept(slot)[2],
            self._borrowers(self.tables[layer.index]),
            self.lent,
            self.newest,
            out.stride(0),
            splits,
            HEADS=heads,
            GROUP=layer.heads // heads,
            UNITS=units,
            D=layer.head_dim,
            D_PAD=_pad(layer.head_dim),
            SPLITS_PAD=triton.next_power_of_2(splits),
            NORMALISED=normalised,
            KEEP=slot is not None,
            LENT=0 if normalised else self.lending.lent(layer.index),
            num_warps=4,
        )

    # --- products, and what stands between them

    def tune(self) -> None:
        if self.caches.batch == 1:
            tuning.tune(self.program)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return tuning.product(x, weight, bias) if len(x) == 1 else super().linear(x, weight, bias)

    def gated(self, feed: Gated, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) == 1 and feed.activation:
            setting = tuning.chosen(feed.gate_up, activation=feed.activation)
            if setting is not None:
                return matvec.gated_matvec(hidden, feed.gate_up, feed.activation, setting)
        return super().gated(feed, hidden)

    def residual_norm(
        self,
        residual: torch.Tensor,
        update: torch.Tensor | None,
        post: nn.Module | None,
        pre: nn.Module | None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        offsets = {self._offset(norm) for norm in (post, pre) if norm is not None}
        if len(offsets) != 1 or None in offsets:
            return super().residual_norm(residual, update, post, pre, out)
        tokens, width = residual.shape
        summed = residual if update is None else torch.empty_like(residual)
        normed = (torch.empty_like(residual) if out is None else out) if pre is not None else summed
        weights = [self.nothing if norm is None else norm.weight for norm in (post, pre)]
        pointwise.residual_norm_kernel[(tokens,)](
            residual,
            residual if update is None else update,
            *weights,
            summed,
            normed,
            normed.stride(0),
            width,
            *(0.0 if norm is None else _epsilon(norm) for norm in (post, pre)),
            BLOCK=triton.next_power_of_2(width),
            UPDATE=update is not None,
            POST=post is not None and update is not None,
            PRE=pre is not None,
            OFFSET=offsets.pop(),
            num_warps=8 if width > 2048 else 4,
        )
        if pre is None and out is not None:
            normed = out.copy_(summed)
        return summed, normed

    def _offset(self, norm: nn.Module) -> float | None:
        """What a norm adds to its weights before it multiplies with them; None where it is no plain RMS norm.

        Found by trying, once per norm's class: families name and write their norms in their own ways.
        """
        kind = type(norm)
        if kind not in self.norm_offsets:
            self.norm_offsets[kind] = _find_offset(norm)
        return self.norm_offsets[kind]

    def place(
        self, layer: LayerProgram, projected: torch.Tensor, step: Step, extra: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        norms = [layer.q_norm if "q" in layer.parts else None, layer.k_norm if "k" in layer.parts else None]
        rotated = [part for part in "qk" if part in layer.parts]
        normed = [norm for norm in norms if norm is not None]
        offset = self._offset(normed[0]) if normed else 0.0
        if layer.wide_norm or offset is None or (normed and len(normed) != len(rotated)):
            return super().place(layer, projected, step, extra)
        caches, tokens = self.caches, len(projected)
        placed = layer.placed_heads
        queries = projected.new_empty(tokens, placed, layer.head_dim) if placed else None
        heads = {part: (placed if part == "q" else layer.kv_heads) for part in layer.parts}
        weights = [self.nothing if norm is None else norm.weight for norm in norms]
        if layer.query_norms is not None:
            weights[0] = layer.query_norms
        cos, sin = step.tables[layer.rope] if layer.rope is not None else (self.nothing, self.nothing)
        rank = 0 if extra is None else extra.shape[1]
        programs = sum(heads.values()) + -(-rank // layer.head_dim)
        pointwise.place_kernel[(tokens, programs)](
            projected,
            cos,
            sin,
            step.positions,
            step.places,
            *weights,
            self.nothing if queries is None else queries,
            caches.keys.get(layer.index, self.nothing),
            caches.values.get(layer.index, self.nothing),
            self.nothing if extra is None else extra,
            projected.stride(0),
            placed * layer.head_dim,
            layer.kv_heads * caches.capacity * layer.head_dim,
            0 if extra is None else extra.stride(0),
            step.tokens,
            caches.capacity,
            _epsilon(normed[0]) if normed else 0.0,
            NQ=heads.get("q", 0),
            NK=heads.get("k", 0),
            NV=heads.get("v", 0),
            RANK=rank,
            D=layer.head_dim,
            D_PAD=_pad(layer.head_dim),
            ROTARY=cos.shape[-1] if layer.rope is not None and rotated else 0,
            QUERY_NORM=norms[0] is not None,
            KEY_NORM=norms[1] is not None,
            LAYER_HEADS=layer.heads,
            NORMED=layer.joined_heads,
            NORM=bool(normed),
            OFFSET=offset,
            num_warps=1,
        )
        return queries

    def gate(self, feed: Gated, gate_up: torch.Tensor) -> torch.Tensor:
        return pointwise.gate(feed.activation, gate_up) if feed.activation else super().gate(feed, gate_up)


def _pad(size: int) -> int:
    """What the matrix units take: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


def _epsilon(norm: Any) -> float:
    return getattr(norm, "variance_epsilon", None) or norm.eps


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return FALLBACK_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return FALLBACK_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", FALLBACK_SHARED)


@torch.no_grad()
def _find_offset(norm: Any) -> float | None:
    weight = norm.weight
    if not hasattr(norm, "variance_epsilon") and not hasattr(norm, "eps"):
        return None
    x = torch.linspace(-1, 2, weight.shape[0], device=weight.device, dtype=weight.dtype)[None]
    found = norm(x).float()
    unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + _epsilon(norm))
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        if torch.allclose(found, unit * (weight.float() + offset), rtol=tolerance, atol=tolerance):
            return offset
    return None
