"""Attention layers that borrow from earlier layers, for any family that calls transformers' attention interface.

A follower computes `W_o concat_h(softmax(Q_l K_l^T s) V) + W_c x` with the queries and keys that its source layers
handed over (UniAttn, arXiv 2502.00439, with head maps); other kinds of layer borrow less, see `layout_uniattn`. Softmax
is computed by the ordinary attention backend from Q and K, borrowed ones too, so memory stays linear in the length.
Copied into every checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_uniattn import attention_shape
from .layout_uniattn import AttentionShape, LayerPlan, Layout

if TYPE_CHECKING:
    # Mixins stand before a family's own classes, which have what they ask for.
    from transformers import PreTrainedModel as _Model

    class _Attention(Any): ...
else:
    _Attention = _Model = object


class SharedStates:
    """Queries, keys, values and inputs that source layers hand to their borrowers during one forward call.

    An object and not a dict, because tree utilities copy dicts in keyword arguments and each layer would see its own.
    Tensors have shape [batch, heads, tokens, head_dim]; keys and values cover the whole cache, queries the new tokens.
    Inputs are what a source's attention was given, [batch, new tokens, hidden], where somebody asks early. Sinks, in
    families that have them, are a score of each query head for no key at all, [1, heads]: they belong to the map.
    """

    def __init__(self):
        self.queries: dict[int, torch.Tensor] = {}
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.inputs: dict[int, torch.Tensor] = {}
        self.sinks: dict[int, torch.Tensor] = {}

    def lend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Hands over what a layer computed, and was given.

        Gradient checkpointing computes a layer again in the backward pass, when all that borrow from it are done. What
        it lent is then let go, and what it computes now is not kept: each would hold memory to the end of the pass.
        """
        if layer in self.keys and torch.is_grad_enabled():
            self.forget(layer)
            return
        self.queries[layer], self.keys[layer], self.values[layer] = queries, keys, values
        if inputs is not None:
            self.inputs[layer] = inputs
        if sinks is not None:
            self.sinks[layer] = sinks

    def forget(self, layer: int) -> None:
        """Lets go what a layer lent."""
        for states in vars(self).values():
            states.pop(layer, None)

    def copy(self) -> SharedStates:
        """A holder of the same tensors, so that what is added to it is not seen elsewhere."""
        other = SharedStates()
        for name, states in vars(self).items():
            setattr(other, name, dict(states))
        return other

    def to(self, *args, **kwargs) -> SharedStates:
        """Stays where it is: accelerate moves arguments between devices, the tensors follow when they are read."""
        return self


class HeadRun(NamedTuple):
    """Neighbouring heads of one layer, in order."""

    layer: int
    first: int
    heads: int


def head_runs(sources: Sequence[tuple[int, int]]) -> tuple[HeadRun, ...]:
    """The fewest runs that are, one after the other, these (layer, head) pairs."""
    runs: list[HeadRun] = []
    for layer, head in sources:
        if runs and layer == runs[-1].layer and head == runs[-1].first + runs[-1].heads:
            runs[-1] = runs[-1]._replace(heads=runs[-1].heads + 1)
        else:
            runs.append(HeadRun(layer, head, 1))
    return tuple(runs)


# Bytes of gathered heads for which, on this type of device, one more attention call costs as much as their copy.
CALL_BYTES = {"cpu": 1 << 16, "other": 1 << 25}


class HeadPart(NamedTuple):
    """Query heads of a layer, and what one attention call on these alone reads: heads in order, all of one source."""

    queries: tuple[int, int]
    keys: HeadRun
    values: tuple[int, int]


def head_parts(runs: tuple[HeadRun, ...], value_groups: int, group: int) -> tuple[HeadPart, ...]:
    """The attention calls that read borrowed heads where they lie.

    Args:
        runs: of the borrowed key heads.
        value_groups: query heads that one value head serves, where each query head has a key head of its own; else 1.
        group: query heads that one key head serves.
    """
    parts, first = [], 0
    for layer, source, count in runs:
        # Grouped queries take neighbouring value heads; ungrouped ones share a value head with others.
        for start, heads in [(0, count)] if value_groups == 1 else [(each, 1) for each in range(count)]:
            place = first + start
            values = (place // value_groups, heads)
            parts.append(HeadPart((place * group, heads * group), HeadRun(layer, source + start, heads), values))
        first += count
    return tuple(parts)


def gather_heads(states: dict[int, torch.Tensor], runs: tuple[HeadRun, ...], device: torch.device) -> torch.Tensor:
    """Collects heads of several layers.

    Args:
        states: per layer, a tensor [batch, heads, tokens, head_dim].
        runs: the heads of the result.
        device: where the result is needed.

    Returns:
        [batch, heads, tokens, head_dim]; without a copy where all heads of one layer are taken in order. Where an
        engine holds a shard of the heads only, taking all of them gives those of the shard.

    Raises:
        RuntimeError: a layer's states have been let go (`SharedStates.lend`).
        ValueError: heads are borrowed that tensor parallelism put on another device.
    """
    if len(runs) == 1:
        return _lent(states, runs[0].layer).to(device)
    parts = []
    for layer, first, heads in runs:
        source = _lent(states, layer)
        if first + heads > source.shape[1]:
            raise ValueError(
                f"head {first + heads - 1} is borrowed, but only {source.shape[1]} heads are on this device; under "
                "tensor parallelism convert with layout.head_map=identity, or serve with vLLM with uniattn installed"
            )
        # Not an index: vLLM compiles a model in pieces and moves indexing into the piece that made the tensor.
        parts.append(source.narrow(1, first, heads).to(device))
    return torch.cat(parts, dim=1)


def _lent(states: dict[int, torch.Tensor], layer: int) -> torch.Tensor:
    if layer not in states:
        raise RuntimeError(
            f"the states of layer {layer} have been freed; with gradient checkpointing, each backward pass needs "
            "its own forward pass"
        )
    return states[layer]


def some_rows(linear: Any, inputs: torch.Tensor, rows: slice) -> torch.Tensor:
    """Some outputs of a projection; the others are not computed where the module is a plain matrix.

    Adapters, quantisation, offloading and parallelism wrap the module, its `forward` or its weight, and are asked for
    all outputs.
    """
    wrapped = type(linear) is not nn.Linear or "forward" in linear.__dict__
    wrapped = wrapped or linear._forward_hooks or linear._forward_pre_hooks
    if wrapped or type(linear.weight) not in (nn.Parameter, torch.Tensor) or linear.weight.device != inputs.device:
        return linear(inputs)[..., rows]
    first, count = rows.start, rows.stop - rows.start
    bias = None if linear.bias is None else linear.bias.narrow(0, first, count)
    return nn.functional.linear(inputs, linear.weight.narrow(0, first, count), bias)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """W_c, or the outer factor of a low-rank W_c: a projection without bias that starts at zero.

    Marked for `_init_weights`, which must never leave W_c at random values, and not of a class of its own, because
    bitsandbytes quantises what is exactly `nn.Linear`.
    """
    linear: Any = nn.Linear(in_features, out_features, bias=False)
    linear.starts_at_zero = True
    return linear


class LowRankCompensation(nn.Module):
    """W_c = up down with `down` [rank, hidden] and `up` [hidden, rank]."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.down = nn.Linear(hidden_size, rank, bias=False)
        self.up = zero_linear(rank, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))


def make_compensation(plan: LayerPlan, hidden_size: int) -> nn.Linear | LowRankCompensation | None:
    """The module of W_c that a plan asks for, or None."""
    if plan.compensation == "none":
        return None
    if plan.compensation == "full":
        return zero_linear(hidden_size, hidden_size)
    return LowRankCompensation(hidden_size, int(plan.compensation))


class SharedAttentionMixin(_Attention):
    """Turns a family's own attention class into one that follows a `LayerPlan`; put before it in the bases.

    A family gives `rotate`, `rotate_half` and `eager_attention` (its own functions), names in `attention_arguments`
    what its attention call is given, and overrides `project`, `projected` or `split_heads` where queries, keys and
    values come out of the hidden states in another way.
    """

    output_name = "o_proj"
    # None where `rotate` is not states * cos + rotate_half(states) * sin.
    rotate_half: Any = None
    removable: ClassVar[dict] = {
        "q_proj": ("q_proj", "q_norm", "sinks"),
        "k_proj": ("k_proj", "k_norm"),
        "v_proj": ("v_proj",),
    }
    # Modules with `head_dim` outputs per key/value head; a `pooled` layer starts from means of the base's.
    pooled_names: ClassVar[tuple] = ("k_proj", "v_proj")

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        shape = attention_shape(config)
        layout = config.layout
        plan = layout[layer_idx]
        self.plan = plan
        self.lend_to(layout)
        # Asking a module for what it has not is slow, and is done in each call otherwise.
        self.normed = [part for part in "qkv" if hasattr(self, f"{part}_norm")]
        self.has_sinks = hasattr(self, "sinks")
        self.drop_projections(plan.traits.removed)
        self.compensation = make_compensation(plan, shape.hidden_size)
        if plan.traits.fewer_heads:
            self.shrink_kv_heads(plan.kv_heads)
            self.num_key_value_groups = shape.query_heads // plan.kv_heads
        self.borrow_from(plan, shape)

    def lend_to(self, layout: Layout | None) -> None:
        """Lends to this layer's borrowers in a layout; None lends always, for borrowers that are not chosen yet."""
        always = layout is None and self.plan.kind == "own"
        self.is_source = always or (layout is not None and self.layer_idx in layout.last_use)
        self.lends_input = always or (layout is not None and self.layer_idx in layout.input_lenders)

    def borrow_from(self, plan: LayerPlan, shape: AttentionShape) -> None:
        """Sets the heads to borrow; of borrowed maps, decides whether keys keep their grouped-query shape.

        Args:
            shape: of the heads that are here; an engine may have a shard of them.
        """
        self.key_sources, self.value_groups = plan.key_sources(shape)
        if plan.traits.borrows_maps:
            self.query_runs = head_runs(plan.sources(shape))
        if self.value_groups > 1:
            self.num_key_value_groups = 1
        self.key_runs = head_runs(self.key_sources)
        self.parts = head_parts(self.key_runs, self.value_groups, self.num_key_value_groups)
        self.asked = plan.asked(shape)

    def drop_projections(self, removed: tuple[str, ...]) -> None:
        """Deletes the modules that a layer of this kind does not have."""
        for projection in removed:
            names = (self.output_name,) if projection == "o_proj" else self.removable[projection]
            for name in names:
                if hasattr(self, name):
                    delattr(self, name)

    def shrink_kv_heads(self, kept: int) -> None:
        """Makes the key and value projections of a `pooled` layer narrower."""
        for name in ("k_proj", "v_proj"):
            old = getattr(self, name)
            width = kept * self.head_dim
            setattr(self, name, nn.Linear(old.in_features, width, bias=old.bias is not None))

    @torch.no_grad()
    def take_weights(self, stock: nn.Module) -> None:
        """Takes this layer's starting weights from the base's attention module.

        What is kept is shared with the base, but the output projection of a changed layer is a copy, because it is
        refitted. Pooled key and value heads are means of their group (as in grouped-query uptraining, arXiv
        2305.13245). Compensations become zero (`up` of a low-rank one; `down` starts at random).
        """
        output = getattr(self, self.output_name, None)
        if output is not None and self.plan.kind != "own":
            stock_output = getattr(stock, self.output_name)
            for name, parameter in stock_output.named_parameters():
                setattr(output, name, nn.Parameter(parameter.detach().clone()))
        if self.plan.traits.fewer_heads:
            for name in self.pooled_names:
                for kind, parameter in getattr(stock, name).named_parameters():
                    setattr(getattr(self, name), kind, nn.Parameter(self.pool_heads(parameter)))
        if self.compensation is not None:
            like = next(stock.parameters())
            for parameter_name, parameter in list(self.compensation.named_parameters()):
                value = torch.zeros(parameter.shape, dtype=like.dtype, device=like.device)
                if parameter_name.startswith("down"):
                    value.normal_(std=parameter.shape[1] ** -0.5)
                module_name, _, last = parameter_name.rpartition(".")
                setattr(self.compensation.get_submodule(module_name), last, nn.Parameter(value))

    def pool_heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Means of neighbouring key/value heads: [kv_heads * head_dim, ...] becomes [kept * head_dim, ...]."""
        return rows.view(self.plan.kv_heads, -1, self.head_dim, *rows.shape[1:]).mean(1).flatten(0, 1)

    def project(self, hidden_states: torch.Tensor, parts: str) -> dict[str, torch.Tensor]:
        """Queries, keys and values before rotary embedding.

        Args:
            hidden_states: [batch, tokens, hidden].
            parts: which of the letters q, k, v are wanted.

        Returns:
            For each letter a tensor [batch, heads, tokens, head_dim].
        """
        return {part: self.split_heads(part, self.projected(part, hidden_states)) for part in parts}

    def projected(self, part: str, hidden_states: torch.Tensor, heads: slice | None = None) -> torch.Tensor:
        """Queries, keys or values as their projection gives them, [batch, tokens, heads * head_dim].

        Args:
            part: one of the letters q, k, v.
            hidden_states: [batch, tokens, hidden].
            heads: which heads; None for all.
        """
        module = getattr(self, f"{part}_proj")
        return module(hidden_states) if heads is None else some_rows(module, hidden_states, self._rows(heads))

    def split_heads(self, part: str, projected: torch.Tensor) -> torch.Tensor:
        """What `projected` gives for all heads as [batch, heads, tokens, head_dim], normed where the family does so."""
        states = projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)
        return getattr(self, f"{part}_norm")(states) if part in self.normed else states

    def _rows(self, heads: slice) -> slice:
        """Rows of a projection that give these heads."""
        return slice(heads.start * self.head_dim, heads.stop * self.head_dim)

    def early_queries(self, inputs: dict[int, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Queries of a layer that asks early, before rotary embedding.

        Args:
            inputs: what the source layers' attention was given, [batch, tokens, hidden] each.
            device: where they are needed.

        Returns:
            [batch, heads, tokens, head_dim]; the heads of a key/value group come from the input of its source.
        """
        if len(self.asked) == 1:
            return self.project(_lent(inputs, self.asked[0][0]).to(device), "q")["q"]
        parts = [self.projected("q", _lent(inputs, layer).to(device), heads) for layer, heads in self.asked]
        return self.split_heads("q", torch.cat(parts, dim=-1))

    def embed_positions(self, states: dict[str, torch.Tensor], position_embeddings, position_ids) -> None:
        """Rotates queries and keys in place of the mapping.

        Args:
            states: queries and keys, [batch, heads, tokens, head_dim] each, as far as they are wanted.
            position_embeddings: cosines and sines of the model's rotary embedding.
            position_ids: [batch or 1, tokens], for families in which queries depend on them in another way too.
        """
        cos, sin = position_embeddings
        parts = [part for part in "qk" if part in states]
        if len(parts) == 2:
            states["q"], states["k"] = self.rotate(states["q"], states["k"], cos, sin)
        elif parts:
            states[parts[0]] = self.rotate_alone(states[parts[0]], cos, sin)

    def rotate_alone(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Rotates one tensor as `rotate` does two."""
        if self.rotate_half is None:
            # No memory is read for a tensor without heads, but each operation on it is called.
            return self.rotate(states, states.narrow(1, 0, 0), cos, sin)[0]
        return states * cos.unsqueeze(1) + self.rotate_half(states) * sin.unsqueeze(1)

    def attention_arguments(self) -> dict:
        """What the family's attention call is given beside scaling, dropout and sinks."""
        return {}

    def map_sinks(self, shared: SharedStates | None, device: torch.device) -> torch.Tensor | None:
        """Sinks of this layer's map, own or borrowed, [1, heads]; None in families without."""
        if not self.has_sinks:
            return None
        if self.plan.traits.borrows_maps:
            assert shared is not None, "maps are borrowed"
            return gather_heads(shared.sinks, self.query_runs, device)
        return self.sinks[None]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        uniattn_shared: SharedStates | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, Any]:
        """Attention as planned, with the signature of the family's class.

        Args:
            hidden_states: [batch, tokens, hidden], normed.
            uniattn_shared: holder that the base model creates for each call.

        Returns:
            [batch, tokens, hidden], and the attention map where the backend returns it.
        """
        kind = self.plan.traits
        if not kind.caches:
            self._touch_cache(hidden_states, past_key_values)
        if not kind.attends:
            without = torch.zeros_like if self.compensation is None else self.compensation
            return without(hidden_states), None
        positions = (position_embeddings, kwargs.get("position_ids"))
        in_parts = self._reads_in_parts(hidden_states, uniattn_shared)
        queries, keys, values = self.states(hidden_states, positions, past_key_values, uniattn_shared, not in_parts)
        if self.plan.kind != "own" and hasattr(self, "attn"):
            keys, values = self._fit_engine(queries, keys, values)
        arguments, sinks = self.attention_arguments(), self.map_sinks(uniattn_shared, hidden_states.device)
        if sinks is not None:
            arguments["s_aux"] = self._without_engine(sinks).flatten()
        arguments |= {"dropout": 0.0 if not self.training else self.attention_dropout, **kwargs}
        if in_parts:
            output, weights = self._attend_in_parts(queries, values, uniattn_shared, attention_mask, arguments), None
        else:
            # vLLM reads this source, and wants one call, with the scale by name.
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
            output, weights = attention(self, queries, keys, values, attention_mask, scaling=self.scaling, **arguments)
        output = output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        output = getattr(self, self.output_name)(output)
        if self.compensation is not None:
            output = output + self.compensation(hidden_states)
        return output, weights

    def _reads_in_parts(self, hidden_states: torch.Tensor, shared: SharedStates | None) -> bool:
        """Whether copies of borrowed heads, made for this one token, would cost more than several attention calls."""
        if shared is None or len(self.parts) < 2 or hidden_states.shape[1] > 1 or hasattr(self, "attn"):
            return False
        if self.config._attn_implementation != "sdpa":
            return False
        lent = _lent(shared.keys, self.parts[0].keys.layer)
        copied = lent[:, :1].numel() * lent.element_size() * sum(heads for _, _, heads in self.key_runs)
        if self.value_groups > 1 or self.plan.traits.borrows_values:
            copied *= 2
        return copied >= len(self.parts) * CALL_BYTES.get(lent.device.type, CALL_BYTES["other"])

    def _attend_in_parts(self, queries, values, shared, attention_mask, arguments: dict) -> torch.Tensor:
        """Attention of one new token, [batch, 1, heads, head_dim], that reads borrowed heads where they lie."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager_attention)
        device, outputs = queries.device, []
        for heads, (layer, *places), own in self.parts:
            keys = shared.keys[layer].narrow(1, *places).to(device)
            read = shared.values[layer].narrow(1, *places).to(device) if values is None else values.narrow(1, *own)
            part = attention(
                self, queries.narrow(1, *heads), keys, read, attention_mask, scaling=self.scaling, **arguments
            )
            outputs.append(part[0])
        return torch.cat(outputs, dim=2)

    def _without_engine(self, sinks: torch.Tensor) -> torch.Tensor:
        """Sinks, which vLLM takes from a weight that `forward` names in the attention call, and from nowhere else.

        A borrowed map's are no weight of this layer, so the call is given them, own ones too. vLLM then makes its
        attention layer without any.

        Raises:
            ValueError: an engine's layer computes the attention.
        """
        if hasattr(self, "attn"):
            raise ValueError("vLLM cannot be given this model's attention sinks; serve it with transformers")
        return sinks

    def _fit_engine(self, queries, keys, values):
        """Keys and values with the heads that vLLM's own attention layer of this module, `attn`, expects.

        Without uniattn's plugin it gives every layer the model's number of heads, and reads other numbers as other
        tokens, silently. Pooled heads can be repeated; everything else is refused.

        Raises:
            ValueError: the numbers of heads differ.
        """
        expected, given = (self.attn.num_heads, self.attn.num_kv_heads), (queries.shape[1], keys.shape[1])
        if self.plan.traits.fewer_heads and given != expected:
            times = expected[1] // given[1]
            keys, values = keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
            given = (queries.shape[1], keys.shape[1])
        if given != expected:
            raise ValueError(
                f"layer {self.layer_idx} computes {given[0]} query and {given[1]} key heads, vLLM reserved "
                f"{expected[0]} and {expected[1]}; install uniattn for vLLM (its plugin supports head maps), serve "
                "without tensor parallelism, or convert with layout.head_map=identity"
            )
        return keys, values

    def _touch_cache(self, hidden_states: torch.Tensor, past_key_values) -> None:
        """Gives the cache tensors of zero width, once, where this layer caches nothing.

        Before 5.18, transformers crops (prompt lookup, assisted decoding) layers that were never used and fails.
        Quantised layers cannot hold tensors of zero width.
        """
        if past_key_values is None or self._is_quantised(past_key_values):
            return
        if not any(layer.is_initialized for layer in past_key_values.layers[self.layer_idx :][:1]):
            nothing = hidden_states.new_empty(*hidden_states.shape[:2], 0).unsqueeze(1)
            past_key_values.update(nothing, nothing, self.layer_idx)

    def _cache_values(self, values: torch.Tensor, past_key_values) -> torch.Tensor:
        """Adds values to the cache of a layer without keys; returns all, [batch, heads, tokens, head_dim].

        They go into the first slot: a cache layer takes its length from it, and cropping or reordering skips layers of
        length zero. The second slot stays empty, so that the bytes of the keys are really saved. A quantised layer
        cannot quantise an empty tensor, and gets one half of the heads in each slot, or of the features of a single
        head.
        """
        if not self._is_quantised(past_key_values):
            values, _ = past_key_values.update(values, values[..., :0], self.layer_idx)
            return values
        dim = 1 if values.shape[1] > 1 else -1
        halves = values.tensor_split(2, dim)
        self._fit_groups(past_key_values.layers[self.layer_idx], [half.shape[1] * half.shape[3] for half in halves])
        return torch.cat(past_key_values.update(*halves, self.layer_idx), dim)

    def _fit_groups(self, layer: Any, widths: list[int]) -> None:
        """Lets a quantised cache layer take any number of tokens in both slots, if it would in a slot of all values.

        Groups become smaller where a token would not fill whole ones. Along axis 1, which is hqq's, entries of several
        groups share a byte, so their number matters too.

        Args:
            widths: entries of a token in each slot.
        """
        if layer.is_initialized or not hasattr(layer, "q_group_size"):
            return
        size, together = layer.q_group_size, 1
        if 1 in (layer.axis_key, layer.axis_value):
            together = math.gcd(max(1, sum(widths) // size), 8 // layer.nbits)
        layer.q_group_size = math.gcd(together * size, *widths) // together

    def _is_quantised(self, past_key_values) -> bool:
        """Whether this layer's part of a cache is stored in fewer bits; not all releases have one class for these."""
        return any(hasattr(layer, "_quantize") for layer in past_key_values.layers[self.layer_idx :][:1])

    def states(self, hidden_states, positions, past_key_values, shared, gather: bool = True):
        """Queries, keys and values as the attention backend takes them, own or borrowed; updates cache and holder.

        Args:
            positions: what `embed_positions` is given beside states.
            gather: without, borrowed keys and values are None, and own values are those that are cached.
        """
        kind, device = self.plan.traits, hidden_states.device
        if kind.early:
            states = self.project(hidden_states, kind.caches) | {"q": self.early_queries(shared.inputs, device)}
        else:
            states = self.project(hidden_states, kind.projects)
        self.embed_positions(states, *positions)
        keys: Any
        if not kind.borrows:
            queries, keys, values = states["q"], states["k"], states["v"]
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.layer_idx)
            if self.is_source:
                # Under autocast rotary embedding gives float32, which the attention of every borrower would round.
                queries, keys = queries.to(values.dtype), keys.to(values.dtype)
                inputs = hidden_states if self.lends_input else None
                shared.lend(self.layer_idx, queries, keys, values, inputs, self.map_sinks(shared, device))
            return queries, keys, values
        keys = gather_heads(shared.keys, self.key_runs, device) if gather else None
        if kind.borrows_maps:
            queries = gather_heads(shared.queries, self.query_runs, device)
        else:
            queries = states["q"]
        if kind.borrows_values:
            return queries, keys, gather_heads(shared.values, self.key_runs, device) if gather else None
        values = states["v"]
        if past_key_values is not None:
            values = self._cache_values(values, past_key_values)
        if gather and self.value_groups > 1:
            values = values.repeat_interleave(self.value_groups, dim=1)
        return queries, keys, values


class WideNormAttentionMixin(SharedAttentionMixin):
    """For families that norm queries and keys before the split into heads: statistics are those of all heads."""

    pooled_names: ClassVar[tuple] = ("k_proj", "v_proj", "k_norm")
    k_norm: Any

    def shrink_kv_heads(self, kept: int) -> None:
        super().shrink_kv_heads(kept)
        self.k_norm = type(self.k_norm)(kept * self.head_dim, self.config.rms_norm_eps)

    def projected(self, part: str, hidden_states: torch.Tensor, heads: slice | None = None) -> torch.Tensor:
        states = super().projected(part, hidden_states)
        if part in self.normed:
            states = getattr(self, f"{part}_norm")(states)
        return states if heads is None else states[..., self._rows(heads)]

    def split_heads(self, part: str, projected: torch.Tensor) -> torch.Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)


class SharedPreTrainedMixin(_Model):
    """What the base model and the causal LM of a family have in common."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)

    def save_pretrained(  # type: ignore[override]  # what follows differs between releases
        self, save_directory: Any, is_main_process: bool = True, state_dict: dict | None = None, **kwargs
    ) -> None:
        """As transformers', which cannot save weights that are columns of one tensor, as an engine lays W_o and W_c."""
        if state_dict is None and not getattr(self, "_hf_peft_config_loaded", False):
            if not all(parameter.is_contiguous() for parameter in self.parameters()):
                state_dict = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def _adjust_missing_and_unexpected_keys(self, loading_info) -> None:
        """Called by `from_pretrained` at its end, which would otherwise only print what it has made up.

        Raises:
            ValueError: the files lack a weight.
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        missing = sorted(loading_info.missing_keys)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"missing weight {missing[0]}{more}: loading would leave random values")

    def _set_gradient_checkpointing(  # type: ignore[override]  # what follows differs between releases
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs
    ) -> None:
        options = getattr(gradient_checkpointing_func, "keywords", None) or {}
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True gives wrong gradients where layers share queries and "
                "keys; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable, **kwargs)


class SharedModelMixin(SharedPreTrainedMixin):
    """The base model: stock, but for the attention modules and the holder made in each forward call."""

    # Makes save_pretrained copy the model code, also where a trainer calls it.
    _auto_class = "AutoModel"
    attention_class: type
    layers: Any

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ):
        """As the family's base model."""
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            uniattn_shared=SharedStates(),
            **kwargs,
        )


class SharedCausalLMMixin(SharedPreTrainedMixin):
    """The causal LM: stock, around our base model."""

    _auto_class = "AutoModelForCausalLM"
    model_class: type

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()
