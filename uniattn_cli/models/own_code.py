"""The model code that travels in a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from uniattn_cli.errors import CheckpointError
from uniattn_cli.models.loading import read_config

# How a file of `modeling/` names another one; transformers copies exactly these.
NAMED = re.compile(r"^\s*from \.(\w+) import", re.MULTILINE)


def check_own_code(folder: Path) -> None:
    """Looks for the files that the configuration names, and for those that they name.

    Raises:
        CheckpointError: one is missing, or none is named.
    """
    waiting = sorted({name.partition(".")[0] for name in (read_config(folder).get("auto_map") or {}).values()})
    if not waiting:
        raise CheckpointError(f"{folder} lacks its model code (config.json has no auto_map); copy all files again")
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        path = folder / f"{name}.py"
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks its model code ({path.name}); copy all files again")
        seen.add(name)
        waiting += sorted({*NAMED.findall(path.read_text(encoding="utf-8", errors="replace"))} - seen)
