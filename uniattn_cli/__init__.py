"""uniattn: make a pre-trained LLM's layers share their Softmax maps, post-train it, and measure what that costs and saves.

Every stage of the command line is one function here; they are imported on first use, so that `import uniattn_cli` is
instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_STAGES = {
    "analyze": "uniattn_cli.analysis.analyze",
    "group": "uniattn_cli.grouping.group",
    "convert": "uniattn_cli.conversion.convert",
    "train": "uniattn_cli.training.train",
    "evaluate": "uniattn_cli.evaluation.evaluate",
    "Recipe": "uniattn_cli.recipe",
    "RunOptions": "uniattn_cli.options",
}
__all__ = ["__version__", *_STAGES]

if TYPE_CHECKING:
    from uniattn_cli.analysis.analyze import analyze
    from uniattn_cli.conversion.convert import convert
    from uniattn_cli.evaluation.evaluate import evaluate
    from uniattn_cli.grouping.group import group
    from uniattn_cli.options import RunOptions
    from uniattn_cli.recipe import Recipe
    from uniattn_cli.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _STAGES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_STAGES[name]), name)
