"""The model card of a converted checkpoint, made from `Facts` and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uniattn_cli.data.readers import EXTENSIONS
from uniattn_cli.data.rows import BUILTIN
from uniattn_cli.layouts.picture import draw_layout
from uniattn_cli.modeling.configuration_uniattn import attention_shape, layer_windows
from uniattn_cli.modeling.layout_uniattn import KINDS, Layout
from uniattn_cli.models.costs import count_parameters, kv_bytes, kv_bytes_per_token
from uniattn_cli.models.hub import context_window
from uniattn_cli.models.of_run import BASE
from uniattn_cli.publishing.facts import Facts
from uniattn_cli.reporting import markdown
from uniattn_cli.tables import Table, to_markdown

PAPER = "[UniAttn](https://arxiv.org/abs/2502.00439)"


def model_card(facts: Facts, repo_id: str) -> str:
    """The text of README.md: metadata for the hub, then what a reader has to know before using the model.

    Args:
        facts: result of `gather`.
        repo_id: OWNER/NAME, for title and example.
    """
    parts = [
        f"---\n{_metadata(facts)}\n---",
        f"# {repo_id.split('/')[-1]}",
        _summary(facts),
        "## Use",
        _usage(repo_id),
        "## Layout",
        *_layout(facts),
        "## Cost",
        *_cost(facts),
        "## Quality",
        *_quality(facts, repo_id),
        "## Data and training",
        *_data(facts),
        "## Licence",
        _licence(facts),
        *_made_with(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: Facts) -> str:
    from huggingface_hub import ModelCardData

    kinds = sorted({plan.kind for plan in facts.config.layout} - {"own"})
    tags = ["uniattn", "custom_code", *(f"uniattn-{kind}" for kind in kinds)]
    if (facts.source.path / "chat_template.jinja").is_file():
        tags.append("conversational")
    base = {"base_model": facts.base.hub_id, "base_model_relation": "finetune"} if facts.base.hub_id else {}
    data = [source["source"] for source in _sources(facts) if _is_on_hub(source)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        datasets=list(dict.fromkeys(data)) or None,
        **base,
        **facts.base.licence,
    ).to_yaml()


def _summary(facts: Facts) -> str:
    layout = facts.config.layout
    changed = f"{len(layout.changed)} of {len(layout)} layers"
    steps = [
        *(["fitted to the base's attention outputs"] if facts.conversion else []),
        *(["post-trained"] if facts.training else ["not post-trained"] if facts.conversion else []),
    ]
    made = f" It was {', and '.join(steps)}." if steps else ""
    return (
        f"{_base_name(facts)} in which {changed} borrow from earlier layers or do without attention, as listed below "
        f"({PAPER}).{made}"
    )


def _base_name(facts: Facts) -> str:
    base = facts.base
    if base.hub_id is None:
        return f"`{base.name}`" if base.name else f"A {facts.config.model_type.removeprefix('uniattn_')} model"
    revision = f" (revision `{base.revision}`)" if base.revision else ""
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id}){revision}"


def _usage(repo_id: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)\n'
        "```\n\n"
        "The model code lies beside the weights and needs torch and transformers only. Read it before you trust it: "
        "without `trust_remote_code=True` the model does not load. A stock class of the base's family refuses these "
        "files instead of inventing the weights that are missing."
    )


def _layout(facts: Facts) -> Iterator[str]:
    layout: Layout = facts.config.layout
    rows = []
    for kind in KINDS.values():
        layers = [index for index, plan in enumerate(layout) if plan.kind == kind.name]
        if layers:
            sources = sorted({source for index in layers for source in layout[index].source_layers})
            rows.append([kind.name, str(len(layers)), ranges(layers), kind.phrase, ranges(sources) or "–"])
    yield to_markdown(Table("", ["kind", "layers", "which", "each", "borrowed from"], rows))
    yield f"```\n{draw_layout(layout)}\n```"
    yield "`config.json` holds the layout head by head, under `uniattn`."


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


def _cost(facts: Facts) -> Iterator[str]:
    config, layout = facts.config, facts.config.layout
    shape, stock = attention_shape(config), Layout.own(len(layout))
    size = config.dtype.itemsize if config.dtype is not None else 4
    rows = [
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
    yield to_markdown(Table("", ["", BASE, "this model", "change"], cells))
    yield (
        "Bytes are those of transformers' own caches. Prompts and training recompute the borrowed maps; engines that "
        "own their cache may store keys for every layer."
    )


def _quality(facts: Facts, repo_id: str) -> Iterator[str]:
    if facts.evaluation is not None:
        this = facts.evaluation["models"]["this"]
        yield "This model" + this["verdict"]["sentence"].removeprefix(facts.evaluation["name"])
        named = facts.evaluation | {"models": {BASE: facts.evaluation["models"][BASE], "this model": this}}
        for table in markdown.tables(named):
            yield to_markdown(table)
        yield markdown.EXPLANATION
        return
    yield "Not evaluated beside the base."
    losses = {
        "text, base": _loss(facts.conversion, "losses", "base"),
        "text, before the fit": _loss(facts.conversion, "losses", "uncompensated"),
        "text, after the fit": _loss(facts.conversion, "losses", "converted"),
        "responses, before training": _loss(facts.training, "heldout_responses", "converted"),
        "responses, after training": _loss(facts.training, "heldout_responses", "trained"),
    }
    rows = [
        [name, f"{loss['mean']:.4f}", _error(loss["stderr"]), f"{math.exp(loss['mean']):.2f}", f"{loss['tokens']:,}"]
        for name, loss in losses.items()
        if loss
    ]
    if rows:
        title = "Loss on held-out tokens, nats per token, as the stages measured it"
        yield to_markdown(Table(title, ["held-out", "loss", "stderr", "perplexity", "tokens"], rows))


def _loss(content: dict[str, Any] | None, key: str, name: str) -> dict[str, Any] | None:
    return (content or {}).get(key, {}).get(name)


def _error(stderr: float | None) -> str:
    return "–" if stderr is None else f"{stderr:.4f}"


def _sources(facts: Facts) -> list[dict[str, Any]]:
    """The data of calibration and training as the recipes list them."""
    found = []
    for settings in (facts.conversion_settings, facts.training_settings):
        if settings:
            found += [*settings["data"]["train"], *(settings["data"]["calibration"] or ())]
    return found


def _is_on_hub(source: dict[str, Any]) -> bool:
    name = source["source"]
    return name != BUILTIN and Path(name).suffix.lower() not in EXTENSIONS


def _source_name(source: dict[str, Any]) -> str:
    """A data set in words; of local files strangers learn the name only."""
    name = source["source"]
    if name == BUILTIN:
        return "text and questions made from Python's own documentation"
    if not _is_on_hub(source):
        return f"`{Path(name).name}` (a local file)"
    details = ", ".join(str(source[key]) for key in ("config", "split") if source.get(key))
    return f"[{name}](https://huggingface.co/datasets/{name})" + (f" ({details})" if details else "")


def _data(facts: Facts) -> Iterator[str]:
    if facts.conversion_settings:
        data, spec = facts.conversion_settings["data"], facts.conversion_settings["conversion"]
        text = ", ".join(map(_source_name, data["calibration"] or data["train"]))
        yield (
            f"Fit: up to {spec['tokens']:,} tokens of {text}. Solved for: {spec['solve']}; rank of W_c: {spec['rank']}."
        )
    if facts.training and facts.training_settings:
        yield from _training(facts.training, facts.training_settings)
    if not (facts.conversion_settings or facts.training):
        yield "Not recorded."


def _training(content: dict[str, Any], settings: dict[str, Any]) -> Iterator[str]:
    counts, spec = content["data"], settings["train"]
    text = ", ".join(map(_source_name, settings["data"]["train"]))
    yield (
        f"Training: {counts['used']:,} rows of {text}, {counts['tokens']:,} tokens, of which {counts['supervised']:,} "
        f"are learned; batches of {spec['batch_size']} rows of at most {spec['max_length']:,} tokens."
    )
    rows, planned = [], iter(spec["stages"])
    for stage in content["stages"]:
        # Stages with nothing to train were skipped; the others come in the order of the recipe.
        plan = next((plan for plan in planned if (plan["name"] or plan["trains"]) == stage["name"]), {})
        rate = str(plan.get("learning_rate", "–"))
        rows.append([stage["name"], stage["trains"], rate, f"{stage['steps']:,}", f"{stage['tokens']:,}"])
    yield to_markdown(Table("", ["stage", "trains", "learning rate", "steps", "tokens"], rows))


def _licence(facts: Facts) -> str:
    licence = facts.base.licence
    if not licence:
        return f"The licence of {_base_name(facts)} applies; see there."
    name = licence.get("license_name", licence["license"]) if "license" in licence else next(iter(licence.values()))
    link = licence.get("license_link", "")
    text = f"[{name}]({link})" if link.startswith("http") else f"`{name}`"
    return f"{text}, as of the base. The model code is Apache-2.0."


def _made_with(facts: Facts) -> Iterator[str]:
    if facts.versions:
        names = ("uniattn", "torch", "transformers", "trl")
        listed = ", ".join(f"{name} {facts.versions[name]}" for name in names if name in facts.versions)
        yield f"Made with {listed}."
