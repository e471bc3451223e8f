"""uniattn: let layers of a pre-trained LLM share attention maps or keys, post-train it, and measure the result.

Every command is one function here, and `load` opens a model. Inputs come first, everything else is given by keyword:
`run_dir`, `recipe`, what only this command has, `overrides`, `options`. They are imported on first use, so that
`import uniattn_cli` is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniattn_cli.commands.analyze import analyze
    from uniattn_cli.commands.bench import bench
    from uniattn_cli.commands.bench_serving import bench_serving
    from uniattn_cli.commands.compare import compare
    from uniattn_cli.commands.convert import convert
    from uniattn_cli.commands.evaluate import evaluate
    from uniattn_cli.commands.generate import generate
    from uniattn_cli.commands.group import group
    from uniattn_cli.commands.push import push
    from uniattn_cli.commands.report import report
    from uniattn_cli.commands.score import score
    from uniattn_cli.commands.serve import serve
    from uniattn_cli.commands.sweep import sweep
    from uniattn_cli.commands.synthesize import synthesize
    from uniattn_cli.commands.train import train
    from uniattn_cli.commands.view_data import view_data
    from uniattn_cli.errors import UniAttnError
    from uniattn_cli.models.of_run import load
    from uniattn_cli.options import RunOptions
    from uniattn_cli.recipe.schema import Recipe

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "RunOptions",
    "UniAttnError",
    "__version__",
    "analyze",
    "bench",
    "bench_serving",
    "compare",
    "convert",
    "evaluate",
    "generate",
    "group",
    "load",
    "push",
    "report",
    "score",
    "serve",
    "sweep",
    "synthesize",
    "train",
    "view_data",
]

_ELSEWHERE = {"Recipe": "recipe.schema", "RunOptions": "options", "UniAttnError": "errors", "load": "models.of_run"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, f'commands.{name}')}"), name)
