"""Scores of plans with farther lenders, which are made only when a layout takes them.

A layer can borrow only from layers that stay as they are, so a layout that changes nearly all of them has lenders at
any distance. To score every plan with every lender would take twice as long, and most budgets need few of them: until
a layout takes such a plan it is guessed to cost as much as the worst lender that was scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from uniattn_cli.layouts.plans import proposal
from uniattn_cli.layouts.scores import Question, Score, questions, score_plans
from uniattn_cli.layouts.solver import Option
from uniattn_cli.layouts.workbench import Workbench
from uniattn_cli.run.directory import RunDir

if TYPE_CHECKING:
    from accelerate import PartialState

Name = TypeVar("Name")


class ScoresOnDemand:
    """The scores of a run, with guesses where nothing has been scored yet.

    Args:
        run: its scores are taken and added to.
        bench: scores what is missing.
        compensation: see `scores.questions`.
        process: see `score_plans`.
        force: see `score_plans`.
        load: whether weights may be loaded; without, guesses stay.

    Attributes:
        known: the scores that were made.
    """

    def __init__(
        self,
        run: RunDir,
        bench: Workbench,
        compensation: str | int,
        *,
        process: PartialState | None = None,
        force: bool = False,
        load: bool = True,
    ):
        self.run, self.bench, self.compensation = run, bench, compensation
        self.process, self.load = process, load
        self.known = score_plans(run, bench, compensation, process=process, force=force, load=load)

    @cached_property
    def _allowed(self) -> list[Question]:
        return questions(self.bench, self.compensation, None)

    def guesses(self) -> list[Score]:
        """What plans with farther lenders are taken to cost; none of those that overflow with every lender so far."""
        scored = {score.question for score in self.known}
        worst: dict[tuple, float] = {}
        for score in self.known:
            if math.isfinite(score.divergence):
                key = _but_lenders(score.question)
                worst[key] = max(worst.get(key, 0.0), score.divergence)
        found = []
        for question in self._allowed:
            key = _but_lenders(question)
            if question in scored or key not in worst:
                continue
            matcher = self.bench.matcher.for_kind(question.kind)
            plan = proposal(matcher, question.layer, question.kind, question.compensation, question.lenders)
            assert plan is not None, "only what can be proposed is allowed"
            found.append(Score(question, plan, worst[key], math.nan))
        return found

    def settled(self, solve: Callable[[Sequence[Score]], dict[Name, list[Option]]]) -> dict[Name, list[Option]]:
        """Solutions of which nothing is guessed: plans that they take are scored, and what is asked is solved again.

        Args:
            solve: finds solutions from scores.
        """
        while True:
            guesses = self.guesses()
            found = solve([*self.known, *guesses])
            taken = self._taken(found.values(), guesses) if self.load else set()
            if not taken:
                return found
            self.known = score_plans(self.run, self.bench, self.compensation, more=taken, process=self.process)

    def _taken(self, solutions: Iterable[Sequence[Option]], guesses: Sequence[Score]) -> set[Question]:
        """The questions of guessed plans, and those with another W_c, which cost next to nothing beside them."""
        options = {(option.layer, option.plan) for solution in solutions for option in solution}
        taken = [score.question for score in guesses if (score.question.layer, score.plan) in options]
        heads = set(map(_but_compensation, taken))
        return {score.question for score in guesses if _but_compensation(score.question) in heads}


def _but_lenders(question: Question) -> tuple:
    return question.layer, question.kind, question.compensation


def _but_compensation(question: Question) -> tuple:
    return question.layer, question.kind, question.lenders
