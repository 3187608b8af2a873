"""`foveate run`: one question, with a method and, if wanted, with all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.markup import escape

from foveate.cli.compare import ALL, WARMUP, Comparison, comparison_table, time_first_token
from foveate.cli.console import progress, stdout
from foveate.cli.inputs import MAX_PIXELS, answer, encode, load_image
from foveate.cli.options import KEEP, METHOD, SETTING
from foveate.core import Method
from foveate.core.from_text import make_methods
from foveate.errors import InputError
from foveate.io.writing import check_file, write_image, write_json
from foveate.loading import load_model
from foveate.report.draw import stack
from foveate.report.report import Report
from foveate.run import Session, use

HELP = """Ask a model about pictures, with a method that removes visual tokens.

MODEL is a hub id, a local folder, or [bold]tiny[/] for the model that comes with foveate. Any
number of pictures, then the question.

[bold]Examples[/]

  foveate run tiny scene.png "what color is the star ?" --method pyramiddrop --compare

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method fastv --keep 0.25 --show
  kept.png

  foveate run tiny a.png b.png "what digit is red ?" --method fastv --set layer=3 --keep 32 --json
  out.json

  foveate run tiny scene.png "what color is the star ?" -m divprune --keep 0.5 -m fastv --keep 0.25
"""


def run(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or `tiny`.")],
    inputs: Annotated[
        list[str],
        typer.Argument(metavar='IMAGE... "QUESTION"', help="Picture files, then the question."),
    ],
    method: Annotated[list[str], typer.Option("--method", "-m", help=METHOD)],
    keep: Annotated[list[str] | None, typer.Option(help=KEEP)] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help=SETTING)] = None,
    with_all: Annotated[
        bool, typer.Option("--compare", help="Run with all tokens too, and time both.")
    ] = False,
    show: Annotated[
        Path | None, typer.Option(help="Save a picture of the kept tokens here.")
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Save answers and report here.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help=MAX_PIXELS)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of --compare.")] = 20,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Ask a model about pictures."""
    chosen = make_methods(method, keep or (), setting or ())
    if len(inputs) < 2:
        raise InputError(
            f"run needs at least one image file and a question after MODEL, got only {inputs[0]!r}"
        )
    *paths, question = inputs
    check_file(show, image=True)
    check_file(json_path)
    if show is not None and json_path is not None and show.resolve() == json_path.resolve():
        raise InputError(f"--show and --json are both {show}; one would replace the other")
    pictures = [load_image(path, max_pixels) for path in paths]
    rounds = repeats if with_all else 0
    job = Job(model, pictures, question, chosen, max_new_tokens, rounds, device, dtype)
    execute(job).deliver(stdout(), show, json_path)


@dataclass(frozen=True)
class Job:
    """What is asked of which model.

    Args:
        model: hub id, local folder or `tiny`.
        pictures: in the order of the prompt.
        question: asked after the pictures.
        methods: what removes tokens, in stream order.
        max_new_tokens: longest answer.
        repeats: timed rounds of a comparison with all tokens; 0 for none.
        device: where the model runs.
        dtype: of its weights, or `auto`.
    """

    model: str
    pictures: list[Image.Image]
    question: str
    methods: tuple[Method, ...]
    max_new_tokens: int
    repeats: int
    device: str
    dtype: str

    @property
    def name(self) -> str:
        """What the methods are called together."""
        return " + ".join(method.slug for method in self.methods)


@dataclass(frozen=True)
class Outcome:
    """What came of a job."""

    job: Job
    answer: str
    report: Report
    session: Session
    comparison: Comparison | None

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
        write_image(path, stack(self.session.show(self.job.pictures)))

    def save_json(self, path: Path) -> None:
        """Write the report with question, answer and comparison beside it."""
        data = {"question": self.job.question, "answer": self.answer, **self.report}
        if self.comparison is not None:
            data["comparison"] = self.comparison.to_dict()
        write_json(path, data)


def execute(job: Job) -> Outcome:
    """Load, answer, and compare if asked to; shows progress."""
    with progress() as steps:
        steps.say(f"loading {job.model}")
        model, processor = load_model(job.model, job.device, job.dtype)
        inputs = encode(processor, job.pictures, job.question, model)
        steps.say(f"answering with {job.name}")
        with use(model, job.methods) as session:
            answered = answer(model, processor, inputs, job.max_new_tokens)
        report, comparison = session.report(), None
        if job.repeats:
            steps.say("comparing with all tokens", 2 * (job.repeats + WARMUP))
            plain = answer(model, processor, inputs, job.max_new_tokens)
            ttft = time_first_token(
                model, inputs, job.methods, repeats=job.repeats, tick=steps.tick
            )
            answers = {ALL: plain, job.name: answered}
            comparison = Comparison(answers, ttft, report)
    return Outcome(job, answered, report, session, comparison)
