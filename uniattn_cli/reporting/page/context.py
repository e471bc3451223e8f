"""The parts of the page on what was tested and how to reproduce it: samples, settings, versions, commands."""

from __future__ import annotations

import json
import shlex
from typing import Any

from uniattn_cli.evaluation.wording import as_setting
from uniattn_cli.reporting.markdown import models_table
from uniattn_cli.reporting.page.evidence import Evidence
from uniattn_cli.reporting.page.markup import Html, join, table, tag
from uniattn_cli.tables import NOTHING

# Sections of the recipe that decide what a stage does.
SECTIONS = {
    "analyze": ("model", "data", "analysis"),
    "group": ("model", "layout"),
    "convert": ("model", "data", "layout", "conversion"),
    "train": ("model", "data", "train"),
    "eval": ("model", "data", "evaluation"),
}
# Written by the stages themselves.
WRITTEN = ("layout.layers",)


def samples(results: dict[str, Any]) -> Html | None:
    """What each model answers to the same prompts, side by side."""
    parts = []
    for number, sample in enumerate(results.get("samples") or (), 1):
        parts.append(tag("h3", f"Prompt {number}"))
        parts.append(tag("div", sample["prompt"], class_="text prompt"))
        answers = [_answer(name, text) for name, text in sample["texts"].items()]
        if sample.get("reference"):
            answers.append(_answer("held-out response", sample["reference"]))
        parts.append(tag("div", answers, class_="samples"))
    return join(parts) if parts else None


def _answer(name: str, text: str) -> Html:
    shown = tag("div", text, class_="text") if text.strip() else tag("div", "(empty)", class_="text soft")
    return tag("div", tag("h4", name), shown)


def capacity(results: dict[str, Any]) -> Html | None:
    """What fits a given memory, as it was computed."""
    rows = []
    for entry in results.get("capacity") or ():
        for name, fits in entry["models"].items():
            rows.append(
                [
                    f"{entry['memory_gb']:g} GB",
                    name,
                    _limit(fits["context"], "tokens"),
                    f"{_limit(fits['batch'], 'sequences')} of {fits['at_context']:,} tokens",
                ]
            )
    if not rows:
        return None
    return table("What fits into memory, by formula", ["memory", "model", "longest context", "largest batch"], rows)


def _limit(number: int | None, what: str) -> str:
    return f"any number of {what}" if number is None else f"{number:,} {what}"


def _flat(entry: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys as one, such as `models converted context`."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        name = f"{before} {key}".strip()
        found |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return found


def models(results: dict[str, Any]) -> Html:
    """What the models are and where they came from."""
    found = models_table(results)
    rows = [
        [*words, tag("span", path, class_="path"), tag("code", fingerprint)] for *words, path, fingerprint in found.rows
    ]
    return table("Models", found.columns, rows, words=True)


def settings(results: dict[str, Any]) -> Html:
    """What was tested, and how."""
    rows = [[part.replace("_", " "), as_setting(value)] for part, value in results["settings"].items()]
    return table("Settings of the evaluation", ["part", "settings"], rows, words=True)


def versions(evidence: Evidence) -> Html | None:
    """Versions of what decides the figures, stage by stage where they differ."""
    records = {stage: record for stage, record in evidence.records.items() if record.get("versions")}
    if not records:
        return None
    packages = list(dict.fromkeys(name for record in records.values() for name in record["versions"]))
    rows = [[name, *(record["versions"].get(name, NOTHING) for record in records.values())] for name in packages]
    if all(len(set(row[1:])) == 1 for row in rows):
        rows = [row[:2] for row in rows]
        return table("Versions, the same in every stage", ["package", "version"], rows, words=True)
    return table("Versions by stage", ["package", *records], rows)


def reproduce(evidence: Evidence) -> Html:
    """Commands, seeds and fingerprints."""
    parts = []
    if evidence.records:
        commands = [_command(stage, record, evidence) for stage, record in evidence.records.items() if stage != "group"]
        parts.append(tag("p", "In an empty folder with the recipe below, or with --force in the run directory:"))
        parts.append(tag("pre", "\n".join(commands)))
        rows = [
            [
                stage,
                str(record.get("seed", NOTHING)),
                _inputs(record.get("inputs") or {}),
                record.get("finished") or record.get("started") or NOTHING,
            ]
            for stage, record in evidence.records.items()
        ]
        columns = ["stage", "seed", "fingerprints of inputs", "finished (UTC)"]
        parts.append(table("Stages", columns, rows, words=True))
    parts.append(
        tag(
            "p",
            "evaluation/results.json has every figure of this page in full precision, evaluation/items/ the score "
            "of every row and item, from which the figures are computed. `uniattn report` rewrites this page.",
        )
    )
    if evidence.recipe is not None:
        parts.append(tag("details", tag("summary", "recipe.yaml"), tag("pre", evidence.recipe)))
    return join(parts)


def _inputs(inputs: dict[str, Any]) -> Html | str:
    """Fingerprints by name; models of the evaluation are counted once."""
    flat = {name: value for name, value in _flat(inputs).items() if isinstance(value, str)}
    if any(name.startswith("models ") for name in flat):
        flat.pop("model", None)
    found = [join((f"{name.removeprefix('models ')} ", tag("code", value))) for name, value in flat.items()]
    return join([part for item in found for part in (", ", item)][1:]) if found else NOTHING


def _command(stage: str, record: dict[str, Any], evidence: Evidence) -> str:
    """The command, with what was set on the command line instead of in the recipe."""
    words = {
        "analyze": ["uniattn", "analyze", "--recipe", "RECIPE"],
        "convert": ["uniattn", "convert"],
        "train": ["uniattn", "train", "recipe.yaml"],
        "eval": ["uniattn", "eval"],
    }[stage]
    recorded, written = record.get("settings"), evidence.settings
    if isinstance(recorded, dict) and written is not None:
        for section in SECTIONS[stage]:
            for key, value in _differences(recorded.get(section), written.get(section), section):
                words += ["--set", f"{key}={_yaml(value)}"]
    return " ".join(word if word == "RECIPE" else shlex.quote(word) for word in words)


def _differences(recorded: Any, written: Any, path: str) -> list[tuple[str, Any]]:
    if path in WRITTEN or recorded == written:
        return []
    if isinstance(recorded, dict) and isinstance(written, dict):
        return [
            found
            for key, value in recorded.items()
            for found in _differences(value, written.get(key), f"{path}.{key}")
        ]  # fmt: skip
    return [(path, recorded)]


def _yaml(value: Any) -> str:
    """A value as `--set` reads it: JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
