"""What each layer computes itself and what it borrows from earlier layers: the one representation of a layout.

This file is copied into every checkpoint, so it needs the standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The newest format of checkpoints that this code reads; each is written in the oldest that has all its kinds.
FORMAT_VERSION = 2

PLAN_KEYS = ("kind", "leader", "heads", "kv_heads", "compensation")


@dataclass(frozen=True)
class Kind:
    """What the layers of one kind compute themselves and what they borrow; everything else follows from it.

    Attributes:
        name: in layouts, recipes and on the command line.
        projects: which of the letters q, k, v (queries, keys, values) a layer projects; without any, there is no
            attention.
        borrows: which of them it takes from earlier layers.
        symbol: one character, for drawings.
        phrase: what is done to such a layer, as in "layer 7 borrows keys".
        early: queries are projected from the input of the layer whose keys are borrowed, so that its pass over them can
            answer them too.
        fewer_heads: it has fewer key/value heads than the base, and its plan says how many.
        compensation: whether W_c is `optional`, `required` or `forbidden`.
        default_compensation: W_c where it is optional and nothing else is asked for. With queries of its own matched to
            what it borrows, an early layer without W_c is nearly as good, and as small as a `softmax` layer with it.
        since: first format of checkpoints that knows the kind.
    """

    name: str
    projects: str
    borrows: str
    symbol: str
    phrase: str
    early: bool = False
    fewer_heads: bool = False
    compensation: str = "optional"
    default_compensation: str = "full"
    since: int = 1

    @property
    def attends(self) -> bool:
        """Whether there is an attention call, and so W_o."""
        return bool(self.projects)

    @property
    def caches(self) -> str:
        """Which of the letters k, v are cached: what a layer projects of them."""
        return self.projects.replace("q", "")

    @property
    def removed(self) -> tuple[str, ...]:
        """Projections of the base that a layer does not have."""
        kept = self.projects + ("o" if self.attends else "")
        return tuple(f"{part}_proj" for part in "qkvo" if part not in kept)

    @property
    def borrows_maps(self) -> bool:
        """Whether queries are borrowed beside the keys, and so whole maps, query head by query head."""
        return "q" in self.borrows

    @property
    def borrows_values(self) -> bool:
        """Whether values are borrowed beside the keys."""
        return "v" in self.borrows

    @property
    def aligns_queries(self) -> bool:
        """Whether own queries meet borrowed keys, to which they can be fitted."""
        return "q" in self.projects and "k" in self.borrows

    def compensation_for(self, asked: str | int) -> str | int:
        """W_c of a layer: what is asked for, as far as the kind leaves a choice.

        Args:
            asked: `full`, `none`, a rank, or `auto` for the kind's default.
        """
        if self.compensation == "forbidden":
            return "none"
        if asked == "auto":
            return self.default_compensation
        return "full" if self.compensation == "required" and asked == "none" else asked

    def borrowed_heads(self, shape: AttentionShape) -> int:
        """Entries of a head map: query heads where maps are borrowed, else key/value heads; 0 where nothing is."""
        if not self.borrows:
            return 0
        return shape.query_heads if self.borrows_maps else shape.kv_heads


KINDS = {
    kind.name: kind
    for kind in (
        Kind("own", "qkv", "", "■", "is unchanged", compensation="forbidden"),
        Kind("softmax", "v", "qk", "s", "borrows its attention map"),
        Kind("key", "qv", "k", "k", "borrows keys"),
        Kind("kv", "q", "kv", "v", "borrows keys and values"),
        Kind(
            *("early", "qv", "k", "e", "borrows keys, with queries from the lender's input"),
            early=True,
            default_compensation="none",
            since=2,
        ),
        Kind(
            *("early-kv", "q", "kv", "w", "borrows keys and values, with queries from the lender's input"),
            early=True,
            default_compensation="none",
            since=2,
        ),
        Kind("pooled", "qkv", "", "p", "has fewer key/value heads", fewer_heads=True),
        Kind("linear", "", "", "l", "has a linear map in place of attention", compensation="required"),
        Kind("none", "", "", "×", "has no attention", compensation="forbidden"),
    )
}
CHANGED_KINDS = tuple(name for name in KINDS if name != "own")
BORROWING_KINDS = tuple(name for name, kind in KINDS.items() if kind.borrows)


@dataclass(frozen=True)
class AttentionShape:
    """The sizes of a model that decide which layouts it can have.

    Attributes:
        query_heads: query heads of a layer.
        kv_heads: key/value heads of a layer; divides `query_heads`.
        head_dim: size of one head.
        hidden_size: width of the residual stream.
        mask_types: one name per layer; layers can share only if these are equal (mask, window and rotary parameters).
    """

    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    mask_types: tuple[str, ...]

    @property
    def layers(self) -> int:
        return len(self.mask_types)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class LayerPlan:
    """What one layer does.

    Attributes:
        kind: one of `KINDS`.
        leader: the layer borrowed from with all heads mapped to the same heads; `heads` is None then.
        heads: (layer, head) borrowed by each query head (`softmax`) or by each key/value head (`key`, `kv`), where head
            counts query heads or key/value heads in the same way.
        kv_heads: key/value heads kept by a `pooled` layer.
        compensation: `full` (a square W_c), `none`, or the rank of a low-rank W_c.
    """

    kind: str = "own"
    leader: int | None = None
    heads: tuple[tuple[int, int], ...] | None = None
    kv_heads: int | None = None
    compensation: str | int = "none"

    @classmethod
    def from_dict(cls, entry: dict, compensation: str | int = "auto") -> LayerPlan:
        """Reads one entry of a layout file, of a recipe or of `config.json`.

        Args:
            entry: the mapping.
            compensation: asked for where the entry names none, see `Kind.compensation_for`.

        Raises:
            ValueError: unknown keys or a value of the wrong type.
        """
        if not isinstance(entry, dict):
            raise ValueError(f"must be a mapping such as {{kind: softmax, leader: 4}}, not {entry!r}")
        unknown = [key for key in entry if key not in PLAN_KEYS]
        if unknown:
            raise ValueError(f"unknown key '{unknown[0]}' (known: {', '.join(PLAN_KEYS)})")
        heads = entry.get("heads")
        if heads is not None:
            try:
                pairs = [pair.split(":") for pair in heads.split()] if isinstance(heads, str) else heads
                heads = tuple((int(layer), int(head)) for layer, head in pairs)
            except (TypeError, ValueError):
                raise ValueError(f"heads must read like '4:0 4:2 3:1' (layer:head), not {heads!r}") from None
        kind = entry.get("kind", "softmax" if "leader" in entry or heads else "own")
        if not isinstance(kind, str):
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        # A kind that nobody knows is reported by `Layout.problems`.
        default = KINDS[kind].compensation_for(compensation) if kind in KINDS else compensation
        return cls(kind, entry.get("leader"), heads, entry.get("kv_heads"), entry.get("compensation", default))

    def to_dict(self) -> dict:
        """The shortest mapping from which `from_dict` makes an equal plan."""
        if self.kind == "own":
            return {"kind": "own"}
        entry: dict = {"kind": self.kind}
        if self.heads is not None:
            entry["heads"] = " ".join(f"{layer}:{head}" for layer, head in self.heads)
        elif self.leader is not None:
            entry["leader"] = self.leader
        if self.kv_heads is not None:
            entry["kv_heads"] = self.kv_heads
        entry["compensation"] = self.compensation
        return entry

    def sources(self, shape: AttentionShape) -> tuple[tuple[int, int], ...]:
        """(layer, head) for each borrowed head, whether written as a leader or as a head map."""
        if self.heads is not None:
            return self.heads
        if self.leader is not None:
            return tuple((self.leader, head) for head in range(self.traits.borrowed_heads(shape)))
        return ()

    def key_sources(self, shape: AttentionShape) -> tuple[tuple[tuple[int, int], ...], int]:
        """(layer, key/value head) of each borrowed key head, and the query heads that one own value head serves there.

        Borrowed maps keep the grouped-query shape, and the count is 1, if each group takes query heads of one group;
        else there is one key head for each query head.
        """
        sources = self.sources(shape)
        if not self.traits.borrows_maps:
            return sources, 1
        group = shape.group_size
        keys = tuple((layer, head // group) for layer, head in sources)
        if all(len(set(keys[start : start + group])) == 1 for start in range(0, len(keys), group)):
            return keys[::group], 1
        return keys, group

    def asked(self, shape: AttentionShape) -> list[tuple[int, slice]]:
        """Of a layer that asks early, run by run: the layer whose input is asked, and the query heads that ask it."""
        found: list[tuple[int, slice]] = []
        if not self.traits.early:
            return found
        start = 0
        for layer, units in itertools.groupby(layer for layer, _ in self.sources(shape)):
            stop = start + len(list(units)) * shape.group_size
            found.append((layer, slice(start, stop)))
            start = stop
        return found

    @property
    def traits(self) -> Kind:
        """The record of its kind."""
        return KINDS[self.kind]

    def own_kv_heads(self, shape: AttentionShape) -> int:
        """Key/value heads of its attention, fewer than the base's in a `pooled` layer."""
        return shape.kv_heads if self.kv_heads is None else self.kv_heads

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The layers borrowed from, in ascending order."""
        if self.heads is not None:
            return tuple(sorted({layer for layer, _ in self.heads}))
        return () if self.leader is None else (self.leader,)


@dataclass(frozen=True)
class Layout:
    """One `LayerPlan` per layer."""

    plans: tuple[LayerPlan, ...]

    @classmethod
    def own(cls, layers: int) -> Layout:
        """The identity layout: every layer is the stock layer."""
        return cls((LayerPlan(),) * layers)

    @classmethod
    def from_list(cls, entries: Sequence[dict], compensation: str | int = "auto") -> Layout:
        """Reads the list written by `to_list`; `compensation` as in `LayerPlan.from_dict`.

        Raises:
            ValueError: names the first layer whose entry cannot be read.
        """
        plans = []
        for index, entry in enumerate(entries):
            try:
                plans.append(LayerPlan.from_dict(entry, compensation))
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None
        return cls(tuple(plans))

    def to_list(self) -> list[dict]:
        return [plan.to_dict() for plan in self.plans]

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.plans)

    def __getitem__(self, index: int) -> LayerPlan:
        return self.plans[index]

    def with_plan(self, index: int, plan: LayerPlan) -> Layout:
        """The same layout but for one layer."""
        return Layout((*self.plans[:index], plan, *self.plans[index + 1 :]))

    @property
    def changed(self) -> list[int]:
        """Layers that are not `own`."""
        return [index for index, plan in enumerate(self.plans) if plan.kind != "own"]

    @property
    def format_version(self) -> int:
        """The oldest format of checkpoints that has all its kinds."""
        return max((plan.traits.since for plan in self.plans), default=1)

    @property
    def followers(self) -> list[int]:
        """Layers that borrow their Softmax map."""
        return [index for index, plan in enumerate(self.plans) if plan.traits.borrows_maps]

    @property
    def last_use(self) -> dict[int, int]:
        """For each layer that is borrowed from, the last layer that borrows from it."""
        uses: dict[int, int] = {}
        for index, plan in enumerate(self.plans):
            for source in plan.source_layers:
                uses[source] = index
        return uses

    @property
    def input_lenders(self) -> set[int]:
        """Layers from whose input others project their queries."""
        return {source for plan in self.plans if plan.traits.early for source in plan.source_layers}

    def problems(self, shape: AttentionShape) -> list[str]:
        """Every invariant that the layout breaks for a model of this shape, one line each; empty when it is legal."""
        if len(self) != shape.layers:
            return [f"the layout has {len(self)} entries, the model has {shape.layers} layers"]
        found = []
        # Masks are made from the lengths of the first cache layer of each sort, whatever the positions in it.
        caches = [name.partition("/")[0] for name in shape.mask_types]
        first_of_type = {name: caches.index(name) for name in caches}
        for index, plan in enumerate(self.plans):
            for problem in self._plan_problems(index, plan, shape, first_of_type):
                found.append(f"layer {index}: {problem}")
        return found

    def _plan_problems(
        self, index: int, plan: LayerPlan, shape: AttentionShape, first_of_type: dict[str, int]
    ) -> Iterator[str]:
        if plan.kind not in KINDS:
            yield f"unknown kind '{plan.kind}' (known: {', '.join(KINDS)})"
            return
        rank = plan.compensation
        is_rank = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= shape.hidden_size
        if rank not in ("full", "none") and not is_rank:
            yield f"compensation must be full, none or a rank from 1 to {shape.hidden_size}, not {rank!r}"
        if plan.kind == "own":
            if plan.source_layers:
                yield "an 'own' layer borrows nothing, but a leader is given"
            return
        cache = shape.mask_types[index].partition("/")[0]
        if first_of_type[cache] == index:
            yield (
                f"the first layer with mask type '{cache}' must be 'own', not '{plan.kind}', "
                "because the cache takes its length from it"
            )
        if plan.traits.compensation == "forbidden" and rank != "none":
            yield f"a '{plan.kind}' layer has no compensation; use kind 'linear' for one"
        if plan.traits.compensation == "required" and rank == "none":
            yield f"a '{plan.kind}' layer is nothing but its compensation; use kind 'none' to drop it"
        if plan.traits.fewer_heads:
            kept = plan.kv_heads
            if not isinstance(kept, int) or not 1 <= kept < shape.kv_heads or shape.kv_heads % kept:
                yield f"kv_heads must divide {shape.kv_heads} and be smaller, not {kept!r}"
        elif plan.kv_heads is not None:
            yield f"kv_heads belongs to kind 'pooled', not '{plan.kind}'"
        if plan.traits.borrows:
            yield from self._source_problems(index, plan, shape)
        elif plan.source_layers:
            yield f"a '{plan.kind}' layer borrows nothing, but a leader is given"

    def _source_problems(self, index: int, plan: LayerPlan, shape: AttentionShape) -> Iterator[str]:
        count = plan.traits.borrowed_heads(shape)
        if plan.leader is not None and plan.heads is not None:
            yield "give a leader or a head map, not both"
            return
        if plan.heads is not None and len(plan.heads) != count:
            yield f"the head map has {len(plan.heads)} entries, kind '{plan.kind}' needs {count}"
        if not plan.source_layers:
            yield f"kind '{plan.kind}' needs a leader or a head map"
        for layer in plan.source_layers:
            if not isinstance(layer, int) or not 0 <= layer < index:
                yield f"borrows from layer {layer}, which is not an earlier layer"
            elif self.plans[layer].kind != "own":
                yield f"borrows from layer {layer}, which is itself '{self.plans[layer].kind}', not 'own'"
            elif shape.mask_types[layer] != shape.mask_types[index]:
                yield (
                    f"borrows from layer {layer}, whose mask type is '{shape.mask_types[layer]}', "
                    f"not '{shape.mask_types[index]}'"
                )
        for _, head in plan.heads or ():
            if not 0 <= head < count:
                yield f"borrows head {head}, but heads are numbered 0 to {count - 1}"
