"""`uniattn report`: rewrites `report.html` from the files of the run directory, without loading any model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from uniattn_cli.evaluation.figures import RESULTS, read_results
from uniattn_cli.reporting.report import write_page
from uniattn_cli.run.directory import RunDir
from uniattn_cli.tables import Result


@dataclass(frozen=True)
class Page(Result):
    """A page that was written.

    Attributes:
        path: of `report.html`.
    """

    path: Path


def report(*, run_dir: Path | str = ".") -> Page:
    """Writes `evaluation/report.html` from `results.json` and the files of the other stages.

    Args:
        run_dir: holds `evaluation/`; whatever else of the run is there is shown too.

    Raises:
        StageError: nothing was evaluated, `results.json` is damaged or of another version, or the page cannot be
            written.
    """
    run = RunDir(run_dir)
    if not run.output("eval").exists():
        raise run.missing("eval")
    results = read_results(run.output("eval") / RESULTS)
    path = write_page(run, results, run.output("eval"))
    sentences = [model["verdict"]["sentence"] for model in results["models"].values() if model["verdict"]]
    return Page(path, title="report", notes=[*sentences, f"page: {path}"])
