"""How to make an evaluation again: commands, seeds, fingerprints and versions."""

from __future__ import annotations

import json
import shlex
from typing import Any

from uniattn_cli.reporting.evidence import Evidence
from uniattn_cli.tables import NOTHING, Table

# Sections of the recipe that decide what a stage does.
SECTIONS = {
    "analyze": ("model", "data", "analysis"),
    "score": ("model", "data", "layout", "conversion"),
    "convert": ("model", "data", "layout", "conversion"),
    "train": ("model", "data", "train"),
    "eval": ("model", "data", "evaluation"),
}
# Written by the stages themselves.
WRITTEN = ("layout.layers",)
WORDS = {"analyze": ["analyze", "--recipe", "RECIPE"], "train": ["train", "recipe.yaml"]}


def versions_table(evidence: Evidence) -> Table | None:
    """Versions of what decides the figures, stage by stage where they differ."""
    records = {stage: record["versions"] for stage, record in evidence.records.items() if record.get("versions")}
    if not records:
        return None
    packages = list(dict.fromkeys(name for versions in records.values() for name in versions))
    rows = [[name, *(versions.get(name, NOTHING) for versions in records.values())] for name in packages]
    if all(len(set(row[1:])) == 1 for row in rows):
        return Table("Versions, the same in every stage", ["package", "version"], [row[:2] for row in rows])
    return Table("Versions by stage", ["package", *records], rows)


def stages_table(evidence: Evidence) -> Table | None:
    """Seed, inputs and end of every stage."""
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
    return Table("Stages", columns, rows) if rows else None


def commands(evidence: Evidence) -> list[str]:
    """The command of every stage; the choice of a layout is repeated by the conversion."""
    return [command(stage, record, evidence) for stage, record in evidence.records.items() if stage != "group"]


def command(stage: str, record: dict[str, Any], evidence: Evidence) -> str:
    """The command, with what was set on the command line instead of in the recipe."""
    words = ["uniattn", *WORDS.get(stage, [stage])]
    recorded, written = record.get("settings"), evidence.settings
    if isinstance(recorded, dict) and written is not None:
        for section in SECTIONS[stage]:
            for key, value in _differences(recorded.get(section), written.get(section), section):
                # JSON is YAML, as `--set` reads it.
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                words += ["--set", f"{key}={text}"]
    return shlex.join(words)


def _inputs(inputs: dict[str, Any]) -> str:
    """Fingerprints by name; models of the evaluation are counted once."""
    flat = {name: value for name, value in _flat(inputs).items() if isinstance(value, str)}
    if any(name.startswith("models ") for name in flat):
        flat.pop("model", None)
    return ", ".join(f"{name.removeprefix('models ')} {value}" for name, value in flat.items()) or NOTHING


def _flat(entry: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested keys as one, such as `models converted context`."""
    found: dict[str, Any] = {}
    for key, value in entry.items():
        name = f"{before} {key}".strip()
        found |= _flat(value, name) if isinstance(value, dict) else {name: value}
    return found


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
