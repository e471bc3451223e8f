"""`uniattn families`: the models that can be converted."""

from __future__ import annotations

from uniattn_cli.modeling.layout_uniattn import KINDS
from uniattn_cli.models.families import FAMILIES
from uniattn_cli.tables import Result, Table


def list_families() -> Result:
    """One row per family."""
    rows = []
    others = [family.model_type for family in FAMILIES.values() if family.not_in_engine]
    for family in FAMILIES.values():
        # flash_attention_2 and _3 are one thing to a reader.
        backends = dict.fromkeys(name.split("_")[0] for name in family.backends)
        rows.append([family.model_type, family.models, family.masks, ", ".join(backends)])
    table = Table("", ["model_type", "models", "attention masks", "attention backends"], rows)
    notes = [
        f"Every kind of layer works in every family: {', '.join(KINDS)}.",
        "Layers share only with layers of the same type: full, sliding, with or without positions.",
        f"The decoding engine runs all but {', '.join(others)}, whose text transformers writes.",
        "`uniattn convert` checks on a tiny model of the same configuration that nothing else changes.",
    ]
    return Result(title=f"{len(rows)} model families", tables=[table], notes=notes)
