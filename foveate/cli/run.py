"""`foveate run`: one question, with a method and, if wanted, with all tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.markup import escape

import foveate
from foveate.cli.compare import ALL, WARMUP, Comparison, comparison_table, time_first_token
from foveate.cli.console import progress
from foveate.cli.inputs import answer, encode, load_model
from foveate.draw import stack
from foveate.method import Method
from foveate.report import Report


@dataclass(frozen=True)
class Job:
    """What is asked of which model.

    Args:
        model: hub id, local folder or `tiny`.
        pictures: in the order of the prompt.
        question: asked after the pictures.
        method: what removes tokens.
        max_new_tokens: longest answer.
        repeats: timed rounds of a comparison with all tokens; 0 for none.
        device: where the model runs.
        dtype: of its weights, or `auto`.
    """

    model: str
    pictures: list[Image.Image]
    question: str
    method: Method
    max_new_tokens: int
    repeats: int
    device: str
    dtype: str


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    job: Job
    answer: str
    report: Report
    session: foveate.Session
    comparison: Comparison | None

    def show(self, console: Console) -> None:
        """Print question, answers and costs."""
        console.print(f"[cyan]question[/] {escape(self.job.question)}")
        if self.comparison is None:
            console.print(f"[cyan]answer[/]   [bold]{escape(self.answer)}[/]\n")
            console.print(self.report)
            return
        console.print(comparison_table(self.comparison))
        for note in self.report["notes"]:
            console.print(f"[yellow]note: {escape(note)}[/]")

    def save_drawing(self, path: Path) -> None:
        """Draw what was kept of every picture."""
        stack(self.session.show(self.job.pictures)).save(path)

    def save_json(self, path: Path) -> None:
        """Write the report with question, answer and comparison beside it."""
        data = {"question": self.job.question, "answer": self.answer, **self.report}
        if self.comparison is not None:
            data["comparison"] = self.comparison.to_dict()
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def execute(job: Job) -> Outcome:
    """Load, answer, and compare if asked to; shows progress."""
    with progress() as steps:
        steps.say(f"loading {job.model}")
        model, processor = load_model(job.model, job.device, job.dtype)
        inputs = encode(processor, job.pictures, job.question, model)
        steps.say(f"answering with {job.method.slug}")
        with foveate.use(model, job.method) as session:
            answered = answer(model, processor, inputs, job.max_new_tokens)
        report, comparison = session.report(), None
        if job.repeats:
            steps.say("comparing with all tokens", 2 * (job.repeats + WARMUP))
            plain = answer(model, processor, inputs, job.max_new_tokens)
            ttft = time_first_token(model, inputs, job.method, repeats=job.repeats, tick=steps.tick)
            answers = {ALL: plain, job.method.slug: answered}
            comparison = Comparison(answers, ttft, report)
    return Outcome(job, answered, report, session, comparison)
