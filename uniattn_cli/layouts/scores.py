"""Scores: what replacing one layer by one plan costs, all other layers being the base's, and the stage that keeps them.

Every plan that a recipe allows is converted once, alone, aligned and fitted with a part of the steps. As
a borrowing layer may only borrow from layers that stay as they are, it is scored with several choices of lenders: all
layers that may lend together, each of the `NEAREST` alone, and others alone where a layout needs them (`on_demand`). A
solver then puts layouts together for any budget.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniattn_cli.errors import LayoutError, StageError
from uniattn_cli.layouts.plans import may_change, proposal
from uniattn_cli.layouts.solver import Option, layout_of
from uniattn_cli.layouts.workbench import Workbench, stderr
from uniattn_cli.modeling.layout_uniattn import KINDS, LayerPlan
from uniattn_cli.run.directory import RunDir
from uniattn_cli.run.files import read_json, write_json
from uniattn_cli.run.process import shared_output

if TYPE_CHECKING:
    from accelerate import PartialState

    from uniattn_cli.analysis.measured import Measured
    from uniattn_cli.layouts.alone import Alone
    from uniattn_cli.layouts.trials import Trials

SCHEMA = 1
JSON_FILE = "scores.json"
# Lenders that are also tried alone. Each adds a conversion for every plan that borrows.
NEAREST = 3


@dataclass(frozen=True)
class Question:
    """A plan to score, before its heads are matched.

    Attributes:
        layer: the layer that is replaced.
        kind: what it becomes.
        compensation: its W_c.
        lenders: layers that it may borrow from.
    """

    layer: int
    kind: str
    compensation: str | int
    lenders: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What one plan costs.

    Attributes:
        question: what was asked.
        plan: with the heads that were matched.
        divergence: mean KL(base || converted) in nats per token; infinity where the conversion overflows.
        stderr: its standard error over sequences; NaN for a single one.
    """

    question: Question
    plan: LayerPlan
    divergence: float
    stderr: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has neither infinity nor NaN."""
        return {
            "layer": self.question.layer,
            "lenders": list(self.question.lenders),
            "plan": self.plan.to_dict(),
            "divergence": self.divergence if math.isfinite(self.divergence) else None,
            "stderr": self.stderr if math.isfinite(self.stderr) else None,
        }

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Score:
        """Reads `to_dict`. Raises `ValueError`, `TypeError` or `KeyError` where it is something else."""
        plan = LayerPlan.from_dict(entry["plan"])
        question = Question(int(entry["layer"]), plan.kind, plan.compensation, tuple(map(int, entry["lenders"])))
        divergence, stderr = entry["divergence"], entry["stderr"]
        if divergence is not None and math.isnan(divergence):
            raise ValueError("a divergence that is not a number")
        return cls(
            question,
            plan,
            math.inf if divergence is None else float(divergence),
            math.nan if stderr is None else float(stderr),
        )


def questions(bench: Workbench, compensation: str | int, nearest: int | None = NEAREST) -> list[Question]:
    """Every plan that the recipe allows, layer by layer.

    Args:
        compensation: W_c that is asked for, see `choose.compensation_of`; where W_o is solved beside it, plans without
            a W_c are scored too.
        nearest: how many of the lenders, from the nearest on, may also be the only one; None for all.
    """
    recipe, matcher = bench.recipe, bench.matcher
    asked = (
        ("none", "full" if compensation == "auto" else compensation)
        if recipe.conversion.solve == "both"
        else (compensation,)
    )
    found = []
    for layer in range(matcher.shape.layers):
        if not may_change(matcher.shape, layer) or layer in recipe.layout.protect:
            continue
        candidates = matcher.candidates(layer)
        for kind in recipe.layout.kinds:
            lenders = [tuple(candidates), *((one,) for one in candidates[:nearest])] if KINDS[kind].borrows else [()]
            for choice in dict.fromkeys(lenders):
                plans = [proposal(matcher.for_kind(kind), layer, kind, each, choice) for each in asked]
                found += [Question(layer, kind, plan.compensation, choice) for plan in plans if plan is not None]
    return list(dict.fromkeys(found))


def score_plans(
    run: RunDir,
    bench: Workbench,
    compensation: str | int,
    *,
    more: Collection[Question] = (),
    process: PartialState | None = None,
    force: bool = False,
    load: bool = True,
) -> list[Score]:
    """The scores of the plans that the recipe allows, in the order of `questions`; all that are known of far lenders.

    Those in `scores/`, or left by an interrupted run, are taken from there if they are of the same model, text and fit;
    the others are made and added.

    Args:
        compensation: see `questions`.
        more: plans with farther lenders to score as well.
        process: one of several that share the layers among them, and all end with all scores; None is alone.
        force: replace scores of another model, text or fit, and make all anew.
        load: whether weights may be loaded.

    Raises:
        StageError: `scores/` holds others, or is damaged.
        LayoutError: no plan can be scored, or the model does not fit on the GPU.
    """
    near, allowed = set(questions(bench, compensation)), questions(bench, compensation, None)
    asked = [question for question in allowed if question in near or question in more]
    if not asked:
        raise LayoutError("no layer can be changed; see layout.protect, layout.kinds and analysis.max_distance")
    if not run.is_complete("score"):
        run.check_free("score", force)
    inputs = inputs_of(bench)
    known = {} if force else stored(run, inputs)
    if all(question in known for question in asked):
        return [known[question] for question in allowed if question in known]
    if not load:
        raise LayoutError("a dry run cannot score plans; run `uniattn score` first, or use --search fast")
    if not bench.placement.whole:
        raise LayoutError("scores need the whole model in the memory of its device; use --search fast")
    with shared_output(process, run, "score", bench.recipe, inputs, force=True, decisive=()) as directory:
        path = directory / JSON_FILE
        with contextlib.suppress(StageError):  # what an interrupted run left is missing or damaged
            known |= _read(path)
        _score_missing(bench, asked, known, path, process)
    return [known[question] for question in allowed if question in known]


@dataclass(frozen=True)
class Company:
    """How much more or less layers cost where the other layers of a layout are changed too.

    Attributes:
        factors: of all plans of each layer that the layout changes.
        mean: of those of other layers.
    """

    factors: dict[int, float]
    mean: float

    def corrected(self, scores: Sequence[Score]) -> list[Score]:
        """Scores as they are in that company; those of the layout sum up to its loss."""
        return [
            replace(score, divergence=score.divergence * self.factors.get(score.question.layer, self.mean))
            for score in scores
        ]


def company_of(bench: Workbench, solution: Sequence[Option]) -> Company:
    """The company that the layers of a solution are in: it is converted, and each of its layers left out in turn."""
    trials = _trials(bench)
    whole = trials.convert(layout_of(solution), bench.chooser(bench.lenders), keep=True)
    rest = {
        layer: trials.convert(whole.layout.with_plan(layer, LayerPlan())).divergence for layer in whole.layout.changed
    }
    added = {layer: max(whole.divergence - divergence, 0.0) for layer, divergence in rest.items()}
    alone = {option.layer: option.loss for option in solution if option.layer in added}
    scale = whole.divergence / max(sum(added.values()), 1e-12)
    factors = {layer: scale * added[layer] / max(alone[layer], 1e-12) for layer in added}
    return Company(factors, whole.divergence / max(sum(alone.values()), 1e-12))


def _trials(bench: Workbench) -> Trials:
    import torch

    from uniattn_cli.layouts.trials import Trials

    torch.manual_seed(bench.recipe.seed)
    recipe, texts = bench.recipe, bench.texts
    return Trials(bench.base, texts.fit, texts.score, recipe.conversion, batch_size=recipe.evaluation.batch_size)


def stored(run: RunDir, inputs: dict[str, Any]) -> dict[Question, Score]:
    """The scores in `scores/`; none if there is no such folder.

    Raises:
        StageError: they are of another model, text or fit, or damaged.
    """
    if not run.is_complete("score"):
        return {}
    before = run.record("score")["inputs"]
    if before != inputs:
        changed = [key for key in inputs if before.get(key) != inputs[key]]
        raise StageError(
            f"{run.output('score')} is of another {' and '.join(changed) or 'input'}; run `uniattn score --force`"
        )
    return _read(run.output("score") / JSON_FILE)


def kept(run: RunDir, fingerprint: str, measured: Measured) -> list[Score]:
    """The scores in `scores/`, whatever text and fit they are of; none if they are of another model or analysis.

    Raises:
        StageError: they are damaged.
    """
    wanted = {"model": fingerprint, "analysis": _digest(measured)}
    if not run.is_complete("score") or not wanted.items() <= run.record("score")["inputs"].items():
        return []
    return list(_read(run.output("score") / JSON_FILE).values())


def _digest(measured: Measured) -> str:
    digest = hashlib.sha256()
    for name in sorted(measured.heads):
        # As they are in their file.
        digest.update(measured.heads[name].astype("float32").tobytes())
    return digest.hexdigest()[:16]


def inputs_of(bench: Workbench) -> dict[str, Any]:
    """All that scores depend on, beside the plans."""
    recipe, texts = bench.recipe, bench.texts
    fit, layout = recipe.conversion, recipe.layout
    digest = hashlib.sha256()
    for windows in (texts.fit, texts.score):
        digest.update(f"{tuple(windows.shape)};".encode() + windows.numpy().tobytes())
    return {
        "model": bench.source.fingerprint,
        "dtype": recipe.model.dtype,
        "text": digest.hexdigest()[:16],
        "analysis": _digest(bench.measured),
        "fit": [fit.solve, fit.align, fit.aim, fit.holdout, recipe.seed],
        "head matching": [layout.head_map, layout.match, layout.sources],
    }


def _read(path: Path) -> dict[Question, Score]:
    next_step = "run `uniattn score --force`"
    try:
        found = [Score.from_dict(entry) for entry in read_json(path, next_step)["scores"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(f"{path} is damaged ({error!r}); {next_step}") from None
    return {score.question: score for score in found}


def _score_missing(
    bench: Workbench,
    asked: Sequence[Question],
    known: dict[Question, Score],
    path: Path,
    process: PartialState | None = None,
) -> None:
    """Adds the scores that are missing, and writes the file whenever each process is done with a layer."""
    from accelerate.utils import gather_object

    missing = [question for question in asked if question not in known]
    layers = [list(group) for _, group in itertools.groupby(missing, key=lambda question: question.layer)]
    count, number = (process.num_processes, process.process_index) if process else (1, 0)
    trials = _trials(bench)
    with bench.options.progress.track("scoring plans", len(missing)) as advance:
        # Neighbouring layers take about as long.
        for start in range(0, len(layers), count):
            found = []
            for plans in layers[start : start + count][number : number + 1]:
                for score in _of_layer(bench, trials, plans, known):
                    found.append(score)
                    advance(count, f"layer {score.question.layer} {score.question.kind}: KL {score.divergence:.4f}")
            known |= {score.question: score for score in (gather_object(found) if count > 1 else found)}
            if number == 0:
                write_json(path, {"schema": SCHEMA, "scores": [score.to_dict() for score in known.values()]})


def _of_layer(
    bench: Workbench, trials: Trials, asked: Sequence[Question], known: dict[Question, Score]
) -> Iterator[Score]:
    """The scores of plans of one layer, in their order."""
    from uniattn_cli.layouts.alone import Alone

    layer = asked[0].layer
    alone = Alone(trials, layer, bench.matcher.candidates(layer))
    for _, of_kind in itertools.groupby(asked, key=lambda question: question.kind):
        groups = [list(group) for _, group in itertools.groupby(of_kind, key=lambda question: question.lenders)]
        for group, plan in zip(groups, _matched(bench, alone, [group[0] for group in groups], known), strict=True):
            trial_of = alone.convert([replace(plan, compensation=question.compensation) for question in group])
            for question, trial in zip(group, trial_of, strict=True):
                yield Score(question, trial.layout[layer], trial.divergence, stderr(trial.rows))


def _matched(
    bench: Workbench, alone: Alone, asked: Sequence[Question], known: dict[Question, Score]
) -> list[LayerPlan]:
    """Plans of one kind with matched heads, for questions that differ in their lenders."""
    # Heads are matched beside any W_c, so those of another one are the same.
    found = {score.question.lenders: score.plan for score in known.values() if _alike(score.question, asked[0])}
    missing = [question for question in asked if question.lenders not in found]
    for question in missing:
        matcher = bench.matcher.for_kind(question.kind)
        plan = proposal(matcher, question.layer, question.kind, question.compensation, question.lenders)
        assert plan is not None, "only what can be proposed is asked for"
        found[question.lenders] = plan
    chooser = bench.chooser(bench.lenders) if missing and KINDS[asked[0].kind].borrows else None
    if chooser is not None:
        choices = [question.lenders for question in missing]
        found |= zip(choices, alone.choose(found[choices[0]], chooser, choices), strict=True)
    return [found[question.lenders] for question in asked]


def _alike(one: Question, other: Question) -> bool:
    return (one.layer, one.kind) == (other.layer, other.kind)
