"""The report of an evaluation as Markdown and as an HTML page, from templates, with the same tables and charts."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from uniattn_cli.charts import COLOURS, Chart, to_svg, write_png
from uniattn_cli.evaluation.verdict import SENTENCES, SUMMARIES
from uniattn_cli.evaluation.wording import as_difference, as_ratio
from uniattn_cli.recipe.files import write_whole
from uniattn_cli.reporting import charts, reproduce, tables
from uniattn_cli.reporting.evidence import Evidence, collect
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import file_errors
from uniattn_cli.tables import to_markdown

PAGE, TEXT, PLOT = "report.html", "report.md", "quality_vs_kv.png"
TEMPLATES = Path(__file__).parent
# The theme for the dark; that for the light is the charts' own.
DARK = {
    "page": "#14171b",
    "ink": "#eceff3",
    "soft": "#a9b2bd",
    "rule": "#3a424c",
    "heat": "#6db8f2",
    "s1": "#ff9d57",
    "s2": "#6db8f2",
    "s3": "#4fd1a5",
    "s4": "#e59ad3",
    "s5": "#e3c04d",
}
# Colours that only the page has.
LIGHT_PAGE = {"panel": "#f4f5f7", "good": "#00664a", "bad": "#a83200", "even": "#3d4f66"}
DARK_PAGE = {"panel": "#1e2329", "good": "#4fd1a5", "bad": "#ff9a66", "even": "#a9c1e0"}
THEMES = {"light": COLOURS | LIGHT_PAGE, "dark": DARK | DARK_PAGE}
# Of a card.
RATIOS = {
    "kv_bytes_per_token": "KV cache ÷ base",
    "parameters": "parameters ÷ base",
    "tokens_per_second": "tokens per second ÷ base",
}


def write_text(results: dict[str, Any], folder: Path, command: str) -> None:
    """Writes `report.md` and its picture.

    Args:
        results: as in `results.json`.
        folder: of the evaluation.
        command: that makes it again.
    """
    (folder / TEXT).write_text(markdown(results, command), encoding="utf-8")
    write_png(charts.of_models(results), folder / PLOT, note=charts.BARS)


def markdown(results: dict[str, Any], command: str) -> str:
    """The text of `report.md`."""
    return _environment(html=False).get_template(TEXT).render(**_content(results), command=command, plot=PLOT)


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
    from markupsafe import Markup

    numbers = itertools.count()

    def svg(chart: Chart) -> Markup:
        return Markup(to_svg(chart, next(numbers)))

    name = str(evidence.model).replace("\\", "/").rstrip("/").rpartition("/")[2] or "model"
    return (
        _environment(html=True)
        .get_template(PAGE)
        .render(
            **_content(results),
            title=f"{name}: converted model compared with the base",
            subtitle=_subtitle(results, evidence),
            evidence=evidence,
            cards=[_card(name, model) for name, model in results["models"].items() if model["verdict"]],
            samples=results.get("samples") or (),
            themes=THEMES,
            charts=charts,
            reproduce=reproduce,
            svg=svg,
            css=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        )
    )


def _environment(*, html: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters["markdown"] = to_markdown
    return found


def _content(results: dict[str, Any]) -> dict[str, Any]:
    """What both reports say."""
    return {
        "results": results,
        "verdicts": [model["verdict"]["sentence"] for model in results["models"].values() if model["verdict"]],
        "tables": tables.tables(results),
        "length_tables": tables.length_tables(results),
        "cost_tables": [found for make in (tables.grid_table, tables.capacity_table) if (found := make(results))],
        "models_table": tables.models_table(results),
        "settings_table": tables.settings_table(results),
        "explanation": tables.EXPLANATION,
    }


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


def _card(name: str, model: dict[str, Any]) -> dict[str, Any]:
    """The verdict on a model and what it rests on."""
    word = model["verdict"]["quality"]
    facts = [
        (words, as_difference(model["quality"][key])) for key, words in SUMMARIES.items() if key in model["quality"]
    ]
    facts += [(words, as_ratio(model["cost"][key])) for key, words in RATIOS.items() if key in model["cost"]]
    return {
        "name": name,
        "word": word,
        "summary": f"{tables.SYMBOLS[word]} {SENTENCES[word]}",
        "facts": facts,
        "sentence": model["verdict"]["sentence"],
    }
