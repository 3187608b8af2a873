"""`foveate run`: one question, with a method and, if wanted, with all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from foveate.cli.compare import ALL, WARMUP, Comparison, comparison_table, time_first_token
from foveate.cli.console import progress
from foveate.cli.inputs import Medium, answer, encode, flat, notes_on_tiny, takes_videos
from foveate.core import Method
from foveate.errors import InputError
from foveate.io.writing import check_file, write_image, write_json
from foveate.loading import load_model
from foveate.measure.checkpoints import EMBEDDED
from foveate.report.panels import stack
from foveate.report.report import Report
from foveate.run import Session, use


@dataclass(frozen=True)
class Job:
    """One question to a model.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        media: images and videos, in the order of the prompt.
        question: asked after the images.
        methods: what removes tokens, in stream order.
        max_new_tokens: longest answer.
        repeats: timed rounds of a comparison with all tokens; 0 for none.
        device: where the model runs.
        dtype: of its weights, or `auto`.
        keep_total: most visual tokens of the prompt; `None` for any number.
    """

    model: str
    media: list[Medium]
    question: str
    methods: tuple[Method, ...]
    max_new_tokens: int
    repeats: int
    device: str
    dtype: str
    keep_total: int | None = None

    @property
    def name(self) -> str:
        """What the methods are called together."""
        return " + ".join(method.slug for method in self.methods)


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Args:
        job: what was asked.
        answer: to it.
        report: of what the methods did.
        session: which can draw it.
        comparison: with all tokens, or `None`.
        shown: what the model saw: images, and videos if it takes them.
        notes: what to bear in mind.
    """

    job: Job
    answer: str
    report: Report
    session: Session
    comparison: Comparison | None
    shown: list[Medium]
    notes: tuple[str, ...] = ()

    def deliver(self, console: Console, drawing: Path | None, data: Path | None) -> None:
        """Print it, and save the kept tokens' drawing and the report where they are wanted."""
        self.show(console)
        if drawing is not None:
            self.save_drawing(drawing)
            console.print(f"kept tokens drawn in {escape(str(drawing))}", soft_wrap=True)
        if data is not None:
            self.save_json(data)
            console.print(f"report saved in {escape(str(data))}", soft_wrap=True)

    def show(self, console: Console) -> None:
        """Print question, answers and costs."""
        for note in self.notes:
            console.print(f"[yellow]note: {escape(note)}[/]")
        console.print(f"[cyan]question[/] {escape(self.job.question)}")
        if self.comparison is None:
            console.print(f"[cyan]answer[/]   [bold]{escape(self.answer)}[/]\n")
            console.print(self.report)
            return
        console.print(comparison_table(self.comparison))
        for note in self.report["notes"]:
            console.print(f"[yellow]note: {escape(note)}[/]")

    def save_drawing(self, path: Path) -> None:
        """Draw what was kept of every image."""
        write_image(path, stack(self.session.show(self.shown)))

    def save_json(self, path: Path) -> None:
        """Write the report with question, answer and comparison beside it."""
        data = {"question": self.job.question, "answer": self.answer, **self.report}
        if self.comparison is not None:
            data["comparison"] = self.comparison.to_dict()
        write_json(path, data)


def execute(job: Job) -> Outcome:
    """Load, answer, and compare if wanted; shows progress."""
    with progress() as steps:
        steps.say(f"loading {job.model}")
        model, processor = load_model(job.model, job.device, job.dtype)
        inputs = encode(processor, job.media, job.question, model)
        shown: list[Medium] = job.media if takes_videos(processor) else [*flat(job.media)]
        steps.say(f"answering with {job.name}")
        with use(model, job.methods, keep_total=job.keep_total) as session:
            answered = answer(model, processor, inputs, job.max_new_tokens)
        report, comparison = session.report(), None
        if job.repeats:
            steps.say("comparing with all tokens", 2 * (job.repeats + WARMUP))
            plain = answer(model, processor, inputs, job.max_new_tokens)
            ttft = time_first_token(
                model,
                inputs,
                job.methods,
                repeats=job.repeats,
                tick=steps.tick,
                keep_total=job.keep_total,
            )
            answers = {ALL: plain, job.name: answered}
            comparison = Comparison(answers, ttft, report)
    notes = _notes(job, processor, model.config.model_type)
    return Outcome(job, answered, report, session, comparison, shown, notes)


def _notes(job: Job, processor: Any, model_type: str) -> tuple[str, ...]:
    """What to bear in mind of an answer."""
    notes = notes_on_tiny(processor, job.media, job.question) if job.model in EMBEDDED else []
    frames = sum(len(medium) for medium in job.media if isinstance(medium, list))
    if frames and not takes_videos(processor):
        notes.append(
            f"{model_type} does not support videos; the {frames} frames were passed as images"
        )
    return tuple(notes)


def check_paths(drawing: Path | None, data: Path | None) -> None:
    """Refuse paths that cannot be written to, or that are the same.

    Raises:
        InputError: see there.
    """
    check_file(drawing, image=True)
    check_file(data)
    if drawing is not None and data is not None and drawing.resolve() == data.resolve():
        raise InputError(f"--show and --json are both {drawing}; one would overwrite the other")
