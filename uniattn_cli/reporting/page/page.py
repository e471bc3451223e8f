"""The page as a whole, and where it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from uniattn_cli.recipe.files import write_whole
from uniattn_cli.reporting.page import context, curves, layers, plot, scores, style
from uniattn_cli.reporting.page.evidence import Evidence, collect
from uniattn_cli.reporting.page.markup import Html, join, tag
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors

PAGE = "report.html"
# Nothing may be loaded, whatever a model has written into its answers.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_page(run: RunDir, results: dict[str, Any], folder: Path) -> Path:
    """Writes `report.html`.

    Args:
        run: the run directory, whose files the page shows where they are of the evaluated models.
        results: content of `results.json`.
        folder: of the evaluation; the page goes there.

    Raises:
        StageError: it cannot be written.
    """
    path = folder / PAGE
    text = page(results, collect(run, results, folder))
    with file_errors(folder):
        write_whole(path, text)
    return path


def page(results: dict[str, Any], evidence: Evidence) -> str:
    """The HTML text: a function of its arguments and nothing else."""
    plot.restart_ids()
    name = str(evidence.model).replace("\\", "/").rstrip("/").rpartition("/")[2] or "model"
    sections = [(anchor, heading, body) for anchor, heading, body in _sections(results, evidence) if body]
    contents = tag(
        "nav",
        tag("ul", [tag("li", tag("a", heading, href=f"#{anchor}")) for anchor, heading, _ in sections]),
        aria_label="Contents",
    )
    main = tag(
        "main", [tag("section", tag("h2", heading, id=anchor), body) for anchor, heading, body in sections]
    )  # fmt: skip
    title = f"{name}: converted model compared with the base"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        # The style sheet is ours and holds no markup.
        tag("style", Html(style.sheet())),
    )
    header = tag("header", tag("h1", title), tag("p", _subtitle(results, evidence), class_="soft"), contents)
    return f"<!doctype html>\n{tag('html', head, tag('body', header, main), lang='en')}\n"


def _subtitle(results: dict[str, Any], evidence: Evidence) -> str:
    record = evidence.records.get("eval") or {}
    when = record.get("finished") or record.get("started")
    version = (record.get("versions") or {}).get("uniattn")
    speed = results["settings"].get("speed") or {}
    parts = [
        f"{len(results['models'])} models",
        None if not speed.get("device") else f"timed on {speed['device']}",
        None if not when else f"evaluated {when[:10]}",
        None if not version else f"uniattn {version}",
    ]
    return ", ".join(part for part in parts if part)


def _sections(results: dict[str, Any], evidence: Evidence) -> list[tuple[str, str, Html | None]]:
    """(anchor, heading, content) from top to bottom; content is None where there is nothing to show."""
    notes = [*results["notes"], *evidence.notes]
    samples = context.samples(results)
    return [
        ("verdict", "Verdict", scores.verdicts(results)),
        (
            "scores",
            "Quality and cost",
            join(
                (scores.quality_table(results), scores.cost_table(results), tag("p", scores.EXPLANATION, class_="soft"))
            ),
        ),
        ("frontier", "Quality against KV cache", curves.section(curves.pareto(results))),
        ("notes", "Notes", tag("ul", [tag("li", note) for note in notes]) if notes else None),
        ("agreement", "Agreement with the base", curves.section(curves.agreement(results))),
        ("length", "Long texts", curves.section(curves.lengths(results))),
        ("speed", "Speed and memory", _some(scores.speed_grid(results), context.capacity(results))),
        (
            "layers",
            "Shared layers",
            _some(
                curves.section([part for part in (layers.redundancy(evidence), layers.frontier(evidence)) if part]),
            ),
        ),
        (
            "damage",
            "Error by layer",
            _some(curves.section([part for part in (layers.damage(evidence),) if part]), layers.fit_table(evidence)),
        ),
        ("training", "Training", curves.section(curves.training(evidence))),
        (
            "samples",
            "Samples",
            samples and join((tag("p", "Greedy answers of all models to held-out prompts."), samples)),
        ),
        (
            "settings",
            "Settings and versions",
            _some(context.models(results), context.settings(results), context.versions(evidence)),
        ),
        ("repeat", "How to reproduce it", context.reproduce(evidence)),
    ]


def _some(*parts: Html | None) -> Html | None:
    found = [part for part in parts if part]
    return join(found) if found else None
