"""A whole job: read, search, choose, judge; what the command does, without printing."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.settings import fingerprint, versions
from foveate.core.saving import FILE, Saved
from foveate.errors import InputError
from foveate.families import find_family
from foveate.io.locking import locked
from foveate.io.quoting import shown
from foveate.io.writing import check_folder, write_json, write_text
from foveate.measure.machine import describe_machine
from foveate.tune.adapting import Adapted, Known, Sight, adapt
from foveate.tune.asking import Asker
from foveate.tune.data import Row, Split, read_rows
from foveate.tune.ledger import Ledger
from foveate.tune.page import render
from foveate.tune.planning import Planner, typical
from foveate.tune.space import Space
from foveate.tune.study import Found, Plan, Study
from foveate.tune.targets import Aim
from foveate.tune.timing import Timer
from foveate.tune.verdict import Verdict

REPORT = "report.json"
PAGE = "report.html"
LEDGER = "asked.jsonl"
POLICY = "policy.json"


@dataclass(frozen=True)
class Options:
    """How questions are asked and recipes are searched.

    Args:
        targets: bounds, see `foveate.tune.targets`.
        minimize: costs.
        objective: of `foveate.tune.targets.OBJECTIVES`; `None` for accuracy, or agreement.
        methods: names; `None` for all that work.
        held_out: share of the questions that is kept for the end.
        batch: questions that go through the model together.
        max_new_tokens: longest answer.
        hint: put after every question.
        repeats: timed rounds of a recipe, where times matter.
        max_pixels: most pixels of an image.
        plan: trials, population, first rung and seed.
        minutes: after so many no further questions are asked in the search; `None` for no limit.
        adaptive: mean share of FLOPs of a policy that is fitted too; `None` for none.
    """

    targets: tuple[str, ...] = ()
    minimize: tuple[str, ...] = ()
    objective: str | None = None
    methods: tuple[str, ...] | None = None
    held_out: float = 0.4
    batch: int = 16
    max_new_tokens: int = 8
    hint: str = ""
    repeats: int = 7
    max_pixels: int | None = None
    plan: Plan = field(default_factory=lambda: Plan(96))
    minutes: float | None = None
    adaptive: float | None = None


class Tuning:
    """A job that was read and checked; nothing is loaded yet.

    Args:
        model: what the model is called.
        data: file of questions.
        out: folder of what comes of it.
        options: see there.

    Raises:
        FoveateError: the file, a target or the folder is wrong.
    """

    def __init__(self, model: str, data: Path, out: Path, options: Options) -> None:
        self.model, self.data, self.out, self.options = model, data, out, options
        if not 0 < options.held_out < 1:
            raise InputError(f"--held-out must be in (0, 1), got {options.held_out}")
        if options.adaptive is not None and not 0 < options.adaptive <= 1:
            raise InputError(f"--adaptive must be in (0, 1], got {options.adaptive}")
        self.rows = read_rows(data)
        answered = self.rows[0].answer is not None
        self.aim = Aim.of(options.targets, options.minimize, answered, options.objective)
        self.split = Split.of(self.rows, options.held_out, options.plan.seed)
        check_folder(out)

    def run(
        self,
        model: Any,
        processor: Any,
        tick: Callable[[Found], object] = lambda found: None,
        judging: Callable[[int], Callable[[], object]] = lambda count: lambda: None,
        asker: Asker | None = None,
    ) -> Verdict:
        """Search, and write `foveate.json`, the report and the record of what was asked.

        Args:
            model: loaded.
            processor: its processor.
            tick: told what was found after each trial.
            judging: told how many recipes are asked held-out questions; returns what is called
                after each.
            asker: what asks; by default made from the options.

        Raises:
            FoveateError: nothing can be searched, or the folder is of another search.
        """
        began, options = time.process_time(), self.options
        asker = asker or self._asker(model, processor)
        message = f"another search writes to {shown(self.out)}; wait for it, or name another --out"
        with locked(self.out / ".lock", message):
            ledger = Ledger(self.out / LEDGER, self._settings(model))
            planner = self._planner(asker, model, processor)
            limits = {c: b for c in ("flops", "kv") if (b := self.aim.bound(c)) is not None}
            space = Space(planner, options.methods, limits)
            search = self.split.search
            steps = options.max_new_tokens
            timed = self.aim.timed
            timer = Timer(asker, search[0], options.repeats, steps) if timed else None
            study = Study(
                self.aim, options.plan, space, planner, asker, search, ledger, timer,
                _clock(options.minutes), tick,
            )  # fmt: skip
            verdict = Verdict.of(study.run(), self.aim)
            after = judging(len(verdict.to_judge) + 1)
            verdict.judge(asker.ask, self.split.held_out, ledger, after)
            try:
                if options.adaptive is not None:
                    verdict.adapted = self.adapt(verdict.found, options.adaptive, asker, ledger)
            finally:
                self._write(verdict, model, space, time.process_time() - began)
        return verdict

    def adapt(self, found: Found, budget: float, asker: Asker, ledger: Ledger) -> Adapted:
        """Fit a policy on the questions of the search, and judge it on held-out ones.

        Args:
            found: what the search came to.
            budget: largest mean share of FLOPs.
            asker: asks questions.
            ledger: what was asked before.

        Raises:
            InputError: no recipe takes as little.
        """
        known = Known.of(found, self.aim.quality)
        sight = Sight(self.rows, self.options.hint, self.options.max_pixels)
        return adapt(known, sight, self.split, budget, asker.ask, ledger)

    def _asker(self, model: Any, processor: Any) -> Asker:
        options = self.options
        return Asker(
            model, processor, self.rows, batch=options.batch, hint=options.hint,
            max_new_tokens=options.max_new_tokens, max_pixels=options.max_pixels,
            states=self.aim.wants_states,
        )  # fmt: skip

    def _planner(self, asker: Asker, model: Any, processor: Any) -> Planner:
        """An account of a typical question: images of the median size, its own text."""
        typical_ones = self.split.search[:32]
        first = [self.rows[n].sample(n, self.options.max_pixels) for n in typical_ones]
        size = typical([image.size for sample in first for image in sample.images])  # type: ignore[union-attr]
        inputs = asker.inputs(typical_ones)
        visual = inputs["input_ids"] == find_family(model).placeholder_ids["image"]
        text = round(float((inputs["attention_mask"] * ~visual).sum() / len(visual)))
        return Planner(model, processor, len(first[0].images), size, text)

    def _settings(self, model: Any) -> dict[str, Any]:
        """What must be the same for the record of a search to be of use."""
        options = asdict(self.options)
        del options["minutes"], options["adaptive"], options["plan"]["trials"]
        text = json.dumps([_described(row, self.data.parent) for row in self.rows])
        return {
            **options,
            "model": fingerprint(model),
            "dtype": str(model.dtype),
            "device": model.device.type,
            "questions": hashlib.sha256(text.encode()).hexdigest()[:16],
            "versions": versions(),
        }

    def _write(self, verdict: Verdict, model: Any, space: Space, seconds: float) -> None:
        report = {
            "what": "foveate tune",
            "model": self.model,
            "options": asdict(self.options),
            "left_out": space.left_out,
            **verdict.to_dict(),
            "cpu_seconds": round(seconds, 1),
            "machine": describe_machine(model.device),
        }
        write_json(self.out / REPORT, report, indent=1)
        write_text(self.out / PAGE, render(report))
        recipe = self.out / FILE
        if verdict.chosen is not None:
            Saved(verdict.chosen.recipe).write(self.out)
        else:
            recipe.unlink(missing_ok=True)
        if verdict.adapted is not None:
            verdict.adapted.policy.write(self.out / POLICY)
        elif self.options.adaptive is not None:
            (self.out / POLICY).unlink(missing_ok=True)


def _clock(minutes: float | None) -> Callable[[], bool]:
    """Tells whether so many minutes from now are over."""
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    return lambda: ends is not None and time.monotonic() > ends


def _described(row: Row, folder: Path) -> list[Any]:
    """What a question is known by: images by name and size in bytes."""
    images = [(str(path.relative_to(folder)), path.stat().st_size) for path in row.images]
    return [images, row.question, row.answer, row.choices]
