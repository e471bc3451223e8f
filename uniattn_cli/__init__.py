"""uniattn: let the layers of a pre-trained LLM share their Softmax maps, post-train it, and measure the outcome.

Every stage of the command line is one function here; they are imported on first use, so that `import uniattn_cli` is
instant.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_STAGES = {
    "analyze": "uniattn_cli.commands.analyze",
    "group": "uniattn_cli.commands.group",
    "convert": "uniattn_cli.commands.convert",
    "view_data": "uniattn_cli.commands.view_data",
    "synthesize": "uniattn_cli.generation.writer",
    "train": "uniattn_cli.commands.train",
    "evaluate": "uniattn_cli.commands.evaluate",
    "push": "uniattn_cli.commands.push",
    "compare": "uniattn_cli.commands.compare",
    "sweep": "uniattn_cli.commands.sweep",
    "Recipe": "uniattn_cli.recipe.schema",
    "RunOptions": "uniattn_cli.options",
}
__all__ = ["__version__", *_STAGES]


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_STAGES[name]), name)
