"""The study: Optuna proposes recipes, generation by generation; halving decides who is asked more.

Everything follows from the seed and from what the model says, so a study that was killed is run
anew with its ledger, and comes to the same end.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from foveate.errors import FoveateError
from foveate.tune.asking import Asker
from foveate.tune.halving import MARGIN, Candidate, promoted, rungs, tightened, why_stop
from foveate.tune.ledger import Ledger, recipe_key
from foveate.tune.planning import Planner, scale
from foveate.tune.replies import Replies, Score
from foveate.tune.space import Space
from foveate.tune.targets import Aim
from foveate.tune.timing import Timer, medians

WIDEST = 0.95
"""The largest share of FLOPs that is searched where no target bounds it."""
NARROWEST = 0.08
_RESCALED = 2
_DRAWS = 10  # for each trial that is asked something, at most


@dataclass(frozen=True)
class Plan:
    """How long a study is.

    Args:
        trials: recipes that are asked something, published ones included.
        population: recipes of a generation.
        first: questions of the first rung.
        seed: of everything.
    """

    trials: int
    population: int = 12
    first: int = 16
    seed: int = 0


@dataclass
class Found:
    """What a study came to.

    Args:
        candidates: all that were asked something.
        refused: (recipe or what was drawn, why) of those that were never asked.
        unpruned: the unpruned model's replies to all questions of the search.
        finished: whether it ran to its end, and not into a time limit.
    """

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unpruned: Replies = field(default_factory=Replies)
    finished: bool = True

    @property
    def finalists(self) -> list[Candidate]:
        """Candidates that answered all questions, by number."""
        full = [c for c in self.candidates if len(c.replies) == len(self.unpruned)]
        return sorted(full, key=lambda candidate: candidate.number)


class Study:
    """A search.

    Args:
        aim: what is searched for.
        plan: how long.
        space: what trials choose from.
        planner: what recipes would cost.
        asker: asks questions.
        questions: numbers of those that the search may ask, in order.
        ledger: what was asked before.
        timer: measures times, where they are part of the aim.
        late: whether the time is up.
        tick: told what is done, after each trial.
    """

    def __init__(
        self,
        aim: Aim,
        plan: Plan,
        space: Space,
        planner: Planner,
        asker: Asker,
        questions: Sequence[int],
        ledger: Ledger,
        timer: Timer | None = None,
        late: Callable[[], bool] = lambda: False,
        tick: Callable[[Found], object] = lambda found: None,
    ) -> None:
        self._aim, self._plan, self._space, self._planner = aim, plan, space, planner
        self._asker, self._questions, self._ledger = asker, tuple(questions), ledger
        self._timer, self._late, self._tick = timer, late, tick
        sizes = rungs(plan.first, len(self._questions))
        self._steps = list(zip([0, *sizes], sizes, strict=False))
        self._found = Found()
        self._known: dict[str, Candidate] = {}

    def run(self) -> Found:
        """Search.

        Raises:
            FoveateError: Optuna is not installed, or an image cannot be read.
        """
        found = self._found
        for before, asked in self._steps:
            found.unpruned = found.unpruned + self._replies((), before, asked)
        with _study(self._aim, self._plan) as study:
            for choice in self._space.published():
                study.enqueue_trial(choice)
            generation = self._drawn(study, len(self._space.names), everything=True)
            while generation and not self._late():
                self._halve([candidate for _, candidate in generation])
                for trial, candidate in generation:
                    self._tell(study, trial, candidate)
                left = self._plan.trials - len(found.candidates)
                generation = self._drawn(study, min(self._plan.population, left))
        found.finished = not self._late()
        return found

    # -- proposing

    def _drawn(
        self, study: Any, wanted: int, everything: bool = False
    ) -> list[tuple[Any, Candidate]]:
        """Trials whose recipes keep to what the account can tell, and were not asked before.

        Args:
            study: Optuna's.
            wanted: how many.
            everything: stop after so many draws, whatever comes of them.
        """
        from optuna.trial import TrialState

        drawn: list[tuple[Any, Candidate]] = []
        for _ in range(wanted if everything else _DRAWS * wanted):
            if len(drawn) == wanted or self._late():
                break
            trial = study.ask()
            candidate = self._candidate(trial, everything)
            if isinstance(candidate, str):
                self._found.refused.append(candidate)
                study.tell(trial, state=_refusal(TrialState, self._aim))
                continue
            same = self._known.setdefault(recipe_key(candidate.recipe), candidate)
            if same is candidate:
                drawn.append((trial, candidate))
            elif same.score is None:  # of this generation
                study.tell(trial, state=TrialState.FAIL)
            else:
                self._tell(study, trial, same)
        return drawn

    def _candidate(self, trial: Any, published: bool) -> Candidate | str:
        """The recipe of a trial, or why it has none."""
        bounds = {c: self._aim.bound(c) for c in ("flops", "kv")}
        limits = {c: MARGIN * bound for c, bound in bounds.items() if bound is not None}
        if self._aim.minimize or self._aim.timed:
            most = limits.get("flops", WIDEST)
            limits["flops"] = trial.suggest_float(
                "budget", min(NARROWEST, most / 2), most, log=True
            )
        sketch = self._space.draw(trial)
        if sketch is None:
            return "no method was drawn"
        scaled = scale(sketch, limits, self._planner)
        if not scaled.recipe:
            slugs = [trial.params[part] for part in ("early", "late")]
            return f"{' + '.join(slug for slug in slugs if slug != 'none')}: {scaled.why_not}"
        return Candidate(trial.number, scaled.recipe, sketch, limits, published, scaled.shares)

    def _tell(self, study: Any, trial: Any, candidate: Candidate) -> None:
        """Tell Optuna the lower end of the quality's interval, so that few questions count less."""
        from optuna.trial import TrialState

        if candidate.score is None:
            study.tell(trial, state=_refusal(TrialState, self._aim))
            return
        score = candidate.score
        known = [t for t in self._aim.targets if t.metric in score.metrics]
        over = [(score.metrics[t.metric] - t.value) * (1 if t.at_most else -1) for t in known]
        for target, value in zip(known, over, strict=True):
            trial.set_constraint(target.metric, value)
        unmeasured = [cost for cost in self._aim.minimize if cost not in score.metrics]
        if unmeasured:
            study.tell(trial, state=_refusal(TrialState, self._aim))
            return
        costs = [score.metrics[cost] for cost in self._aim.minimize]
        study.tell(trial, [score.interval[0], *costs])

    # -- asking

    def _halve(self, alive: list[Candidate]) -> None:
        """Ask a generation, rung by rung."""
        finalists = self._found.finalists
        self._found.candidates += alive
        for before, asked in self._steps:
            going = [c for c in alive if self._climbs(c, before, asked, finalists)]
            last = asked == len(self._questions)
            alive = going if last else promoted(going, self._aim)
            for candidate in going:
                if candidate not in alive:
                    candidate.why_out = f"not among the best third after {asked} questions"

    def _climbs(
        self, candidate: Candidate, before: int, asked: int, finalists: Sequence[Candidate]
    ) -> bool:
        """Ask a candidate the questions of a rung; whether it may go on."""
        if self._late():
            candidate.why_out = candidate.why_out or f"the time was up after {before} questions"
            return False
        try:
            self._ask(candidate, before, asked)
            for _ in range(0 if before else _RESCALED):
                self._rescale(candidate, asked)
        except FoveateError as error:
            candidate.why_out = f"refused: {error}"
        except Exception as error:  # a method may fail in any way; the others go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            candidate.why_out = f"failed: {type(error).__name__}: {error} ({place})"
        else:
            reason = why_stop(candidate, self._found.unpruned, finalists, self._aim)
            candidate.why_out = f"stopped after {asked} questions: {reason}" if reason else ""
        if not before:
            self._tick(self._found)
        return not candidate.why_out

    def _ask(self, candidate: Candidate, before: int, asked: int) -> None:
        candidate.replies = candidate.replies + self._replies(candidate.recipe, before, asked)
        if self._timer is not None and not candidate.times:
            key, timer = f"time {recipe_key(candidate.recipe)}", self._timer
            candidate.times = medians(
                self._ledger.get(key, lambda: dict(timer.shares(candidate.recipe)))
            )
        candidate.score = Score.of(
            candidate.replies, self._found.unpruned, self._aim.quality, candidate.times
        )

    def _rescale(self, candidate: Candidate, asked: int) -> None:
        """Make a recipe smaller that costs more than is allowed, and ask it anew."""
        limits = tightened(candidate, self._aim)
        if not limits:
            return
        scaled = scale(candidate.sketch, limits, self._planner)
        if scaled.recipe:
            candidate.recipe, candidate.planned = scaled.recipe, scaled.shares
            candidate.limits, candidate.replies, candidate.times = limits, Replies(), {}
            self._ask(candidate, 0, asked)

    def _replies(self, recipe: Any, before: int, asked: int) -> Replies:
        """Replies to some of the questions, asked now or before."""
        numbers = self._questions[before:asked]
        key = f"asked {recipe_key(recipe)} {before}-{asked}"
        said = self._ledger.get(key, lambda: self._asker.ask(recipe, numbers).to_dict())
        return Replies.from_dict(said)


def _refusal(states: Any, aim: Aim) -> Any:
    """How Optuna learns of a recipe that was not asked: TPE avoids what it is near to."""
    return states.FAIL if aim.minimize else states.PRUNED


@contextmanager
def _study(aim: Aim, plan: Plan) -> Iterator[Any]:
    """A study in memory: TPE for quality alone, NSGA-II where costs are to be small too."""
    try:
        import optuna
    except ImportError:
        raise FoveateError("tuning needs Optuna: pip install 'foveate[tune]'") from None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: Any
            if aim.minimize:
                sampler = optuna.samplers.NSGAIISampler(
                    population_size=plan.population, seed=plan.seed
                )
            else:
                sampler = optuna.samplers.TPESampler(seed=plan.seed, multivariate=True, group=True)
            directions: list[Any] = ["maximize", *("minimize" for _ in aim.minimize)]
            yield optuna.create_study(directions=directions, sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
