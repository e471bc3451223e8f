"""The model card of a converted checkpoint, made from `Facts` and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.data.rows import BUILTIN
from uniattn_cli.data.sources import may_be_on_hub
from uniattn_cli.layouts.picture import draw_layout
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import KINDS, Layout
from uniattn_cli.models.costs import count_parameters, kv_bytes, kv_bytes_per_token
from uniattn_cli.models.hub import context_window
from uniattn_cli.models.of_run import BASE
from uniattn_cli.publishing.facts import THIS, Facts
from uniattn_cli.reporting import tables
from uniattn_cli.tables import NOTHING, Table, to_markdown

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TEMPLATE = Path(__file__).with_name("model_card.md")
MADE_WITH = ("uniattn", "torch", "transformers", "trl")


def model_card(facts: Facts, repo_id: str) -> str:
    """The text of README.md: metadata for the hub, then what users of the model need to know.

    Args:
        facts: result of `gather`.
        repo_id: OWNER/NAME, for title and example.
    """
    from huggingface_hub import ModelCard

    layout = facts.config.layout
    card = ModelCard.from_template(
        _metadata(facts),
        template_path=str(TEMPLATE),
        facts=facts,
        this=THIS,
        repo_id=repo_id,
        base=_base_name(facts),
        layout=layout,
        layout_table=_layout_table(layout),
        picture=draw_layout(layout),
        cost_table=_cost_table(facts.config),
        quality_tables=tables.tables(facts.evaluation) if facts.evaluation else [],
        explanation=tables.EXPLANATION,
        loss_table=_loss_table(facts),
        stage_table=_stage_table,
        to_markdown=to_markdown,
        sources=_source_names,
        licence=_licence(facts),
        versions=", ".join(f"{name} {facts.versions[name]}" for name in MADE_WITH if name in facts.versions),
    )
    return f"{card}\n"


def _metadata(facts: Facts) -> ModelCardData:
    from huggingface_hub import ModelCardData

    kinds = sorted({plan.kind for plan in facts.config.layout} - {"own"})
    tags = ["uniattn", "custom_code", *(f"uniattn-{kind}" for kind in kinds)]
    if (facts.source.path / "chat_template.jinja").is_file():
        tags.append("conversational")
    more: dict[str, Any] = {**facts.base.licence}
    if facts.base.hub_id:
        more |= {"base_model": facts.base.hub_id, "base_model_relation": "finetune"}
    data = [source["source"] for source in _sources(facts) if _is_on_hub(source)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=list(dict.fromkeys(data)) or None,
        **more,
    )


def _base_name(facts: Facts) -> str:
    base = facts.base
    if base.hub_id is None:
        return f"`{base.name}`" if base.name else f"A {facts.config.model_type.removeprefix('uniattn_')} model"
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){revision}"


def _layout_table(layout: Layout) -> Table:
    rows = []
    for kind in KINDS.values():
        layers = [index for index, plan in enumerate(layout) if plan.kind == kind.name]
        if layers:
            sources = sorted({source for index in layers for source in layout[index].source_layers})
            rows.append([kind.name, str(len(layers)), ranges(layers), kind.phrase, ranges(sources) or NOTHING])
    return Table("", ["kind", "number", "layers", "change", "borrowed from"], rows)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours joined.

    >>> ranges([1, 2, 3, 7, 9, 10])
    '1-3, 7, 9-10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _cost_table(config: Any) -> Table:
    layout = config.layout
    shape, stock = attention_shape(config), Layout.own(len(layout))
    size = config.dtype.itemsize if config.dtype is not None else 4
    rows: list[tuple[Any, ...]] = [
        ("parameters", *(count_parameters(config, each) for each in (stock, layout))),
        ("KV cache, bytes per token", *(kv_bytes_per_token(each, shape, size) for each in (stock, layout))),
    ]
    tokens = context_window(config)
    windows = [window for window in layer_windows(config) if window]
    if tokens and windows and tokens > min(windows):
        rows.append(
            (
                f"KV cache of {tokens:,} tokens, bytes",
                *(kv_bytes(config, each, tokens, size) for each in (stock, layout)),
            )
        )
    cells = [[name, f"{base:,}", f"{ours:,}", f"{ours / base - 1:+.1%}"] for name, base, ours in rows]
    return Table("", ["", BASE, THIS, "change"], cells)


def _loss_table(facts: Facts) -> Table:
    """Held-out losses as the stages measured them, as far as they did."""
    losses = {
        "text, base": _loss(facts.conversion, "losses", "base"),
        "text, before the fit": _loss(facts.conversion, "losses", "uncompensated"),
        "text, after the fit": _loss(facts.conversion, "losses", "converted"),
        "responses, before training": _loss(facts.training, "heldout_responses", "converted"),
        "responses, after training": _loss(facts.training, "heldout_responses", "trained"),
    }
    rows = [
        [
            name,
            f"{loss['mean']:.4f}",
            NOTHING if loss["stderr"] is None else f"{loss['stderr']:.4f}",
            f"{math.exp(loss['mean']):.2f}",
            f"{loss['tokens']:,}",
        ]
        for name, loss in losses.items()
        if loss
    ]
    title = "Loss on held-out tokens, nats per token"
    return Table(title, ["held-out", "loss", "stderr", "perplexity", "tokens"], rows)


def _loss(content: dict[str, Any] | None, key: str, name: str) -> dict[str, Any] | None:
    return (content or {}).get(key, {}).get(name)


def _sources(facts: Facts) -> list[dict[str, Any]]:
    """The data of calibration and training as the recipes list them."""
    found = []
    for settings in (facts.conversion_settings, facts.training_settings):
        if settings:
            found += [*settings["data"]["train"], *(settings["data"]["calibration"] or ())]
    return found


def _is_on_hub(source: dict[str, Any]) -> bool:
    return source["source"] != BUILTIN and may_be_on_hub(source["source"])


def _source_names(sources: Sequence[dict[str, Any]]) -> str:
    return ", ".join(map(_source_name, sources))


def _source_name(source: dict[str, Any]) -> str:
    """A data set in words; of local files strangers learn the name only."""
    name = source["source"]
    if name == BUILTIN:
        return "text and questions generated from Python's own documentation"
    if not _is_on_hub(source):
        return f"`{Path(name).name}` (a local file)"
    details = ", ".join(str(source[key]) for key in ("config", "split") if source.get(key))
    return f"[{name}](https://huggingface.co/datasets/{name})" + (f" ({details})" if details else "")


def _stage_table(report: dict[str, Any], settings: dict[str, Any]) -> Table:
    rows, planned = [], iter(settings["train"]["stages"])
    for stage in report["stages"]:
        # Stages with nothing to train were skipped; the others come in the order of the recipe.
        plan = next((plan for plan in planned if (plan["name"] or plan["trains"]) == stage["name"]), None)
        rate = str(plan.get("learning_rate", NOTHING) if plan else NOTHING)
        if plan and (changed := plan.get("changed_learning_rate")):
            rate += f", changed attention {changed}"
        rows.append([stage["name"], stage["trains"], rate, f"{stage['steps']:,}", f"{stage['tokens']:,}"])
    return Table("", ["stage", "trains", "learning rate", "steps", "tokens"], rows)


def _licence(facts: Facts) -> str:
    licence = facts.base.licence
    if not licence:
        return f"See the licence of {_base_name(facts)}."
    name = next(licence[key] for key in ("license_name", "license", "license_link") if key in licence)
    link = licence.get("license_link", "")
    text = f"[{name}]({link})" if link.startswith("http") else f"`{name}`"
    return f"{text}, as the base. The model code is Apache-2.0."
