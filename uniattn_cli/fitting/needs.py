"""What a conversion will take of the memory of its device and of the computer, and of the disk, told from shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uniattn_cli.fitting.solve import solved_parts
from uniattn_cli.modeling.configuration_uniattn import attention_shape
from uniattn_cli.modeling.layout_uniattn import AttentionShape, Layout
from uniattn_cli.models.building import converted_classes, make_config
from uniattn_cli.tables import NOTHING, Table

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from uniattn_cli.models.placement import Placement
    from uniattn_cli.recipe.schema import ConversionSpec, EvaluationSpec

DOUBLE = 8
# Matrices that are alive where a ridge problem is solved for all tokens: moments of features (of the tokens that are
# fitted, held out, and both), the system and its factor; and those as wide as the target.
SQUARE, WIDE = 5, 6
# As wide as the residual stream while a layer runs: what comes in, its norm, what each block answers.
STREAMS = 4
PLACES = {"device": "device", "cpu": "CPU", "disk": "disk"}


@dataclass(frozen=True)
class Need:
    """Memory for one purpose.

    Attributes:
        purpose: in words.
        place: `device`, `cpu` or `disk`; where the device is the CPU, `cpu`.
        size: bytes.
    """

    purpose: str
    place: str
    size: int


def conversion_needs(
    config: Any,
    layout: Layout,
    placed: Placement,
    element: int,
    spec: ConversionSpec,
    scored: EvaluationSpec,
    heldout: int,
) -> list[Need]:
    """What `convert` will take, beside some hundred megabytes for the libraries.

    Args:
        config: of the base.
        layout: what it is converted to.
        placed: where it is kept and run.
        element: bytes of a weight.
        spec: tokens, and what is solved.
        scored: batches.
        heldout: tokens that losses are told on.
    """
    shape = attention_shape(config)
    base, converted = (_without_memory(config, each) for each in (Layout.own(len(layout)), layout))
    runs = "cpu" if (placed.device or placed.home).type == "cpu" else "device"
    kept = runs if placed.whole else "cpu"
    layers = [_size(layer) * element for layer in base.model.layers]
    # All that a changed layer has of its own may be fitted.
    own = [
        _size(layer.self_attn) * element if plan.kind != "own" else 0
        for plan, layer in zip(layout, converted.model.layers, strict=True)
    ]
    outside = _size(base) * element - sum(layers)
    needs = []
    if not placed.on_disk:
        needs.append(Need("weights", kept, outside + sum(layers) + sum(own)))
    if not placed.whole:
        needs.append(Need("one layer, and what is outside of layers", runs, outside + max(layers) + max(own)))
    features = max(_features(layer.self_attn, spec) for layer in converted.model.layers)
    wide = max(config.vocab_size, 3 * config.intermediate_size + STREAMS * shape.hidden_size)
    batch = scored.batch_size * max(spec.length, scored.length)
    needs += [
        Need("hidden states between layers", kept, 3 * (spec.tokens + heldout) * shape.hidden_size * element),
        Need("what layers lend", kept, (spec.tokens + 2 * heldout) * _lent(layout, shape) * element),
        Need("one batch in a layer", runs, batch * (wide * element + features * 4)),
        Need("sums and solutions of a fit", runs, DOUBLE * features * (SQUARE * features + WIDE * shape.hidden_size)),
        Need("the checkpoint", "disk", _size(converted) * element),
    ]
    return [need for need in needs if need.size]


def needs_table(needs: list[Need], free: dict[str, int], where: str) -> Table:
    """What is needed where, in sum, and what is free there.

    Args:
        free: bytes by place.
        where: the model is kept and run, in words.
    """
    places = [place for place in PLACES if any(need.place == place for need in needs)]

    def row(name: str, sizes: dict[str, int]) -> list[str]:
        return [name, *(f"{sizes[place] / 1e9:,.2f}" if place in sizes else NOTHING for place in places)]

    rows = [row(need.purpose, {need.place: need.size}) for need in needs]
    total = {place: sum(need.size for need in needs if need.place == place) for place in places}
    return Table(
        f"what it will take, in GB, with the model {where}",
        ["", *(PLACES[place] for place in places)],
        [*rows, row("in all", total), row("free now", free)],
    )


def _without_memory(config: Any, layout: Layout) -> PreTrainedModel:
    import torch

    with torch.device("meta"):
        return converted_classes(config.model_type).causal_lm(make_config(config, layout))


def _size(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _features(attention: Any, spec: ConversionSpec) -> int:
    """Width of the least-squares problem of a layer; 0 where nothing is solved."""
    output, compensation = solved_parts(attention, spec)
    heads = getattr(attention, attention.output_name).in_features if output else 0
    return heads + (attention.config.hidden_size if compensation else 0)


def _lent(layout: Layout, shape: AttentionShape) -> int:
    """Numbers for each token that are kept for borrowers, where they are most."""
    parts = shape.query_heads + shape.kv_heads
    if any(plan.traits.borrows_values for plan in layout):
        parts += shape.kv_heads
    sizes = {
        layer: parts * shape.head_dim + (shape.hidden_size if layer in layout.input_lenders else 0)
        for layer in layout.last_use
    }
    return max(
        sum(size for layer, size in sizes.items() if layer <= index <= layout.last_use[layer])
        for index in range(len(layout))
    )
