"""`foveate demo`: the embedded model answers questions about a drawn scene, twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from foveate.cli.compare import ALL, WARMUP, cost_table, time_first_token
from foveate.cli.console import progress, stdout
from foveate.cli.inputs import answer, encode
from foveate.core import Method
from foveate.errors import FoveateError
from foveate.io.writing import write_image
from foveate.loading import load_model
from foveate.measure.timing import Timing
from foveate.report.panels import stack
from foveate.report.report import Report
from foveate.report.tables import describe
from foveate.run import use

if TYPE_CHECKING:
    from foveate.tiny import Question

QUESTIONS = 6
DRAWN = 3
LONGEST_ANSWER = 8


@dataclass(frozen=True)
class Answered:
    """A question, both answers, and what was kept for it."""

    question: Question
    plain: str
    pruned: str
    report: Report
    drawing: Image.Image


def demo(
    seed: int, methods: Sequence[Method], out: Path, repeats: int, *, quick: bool = False
) -> None:
    """Ask, compare, time, draw; print what was measured.

    Args:
        seed: of the scene.
        methods: what is compared with all tokens, in stream order.
        out: where the drawing of the kept tokens goes.
        repeats: timed rounds.
        quick: leave out what the methods save at real size.
    """
    from foveate.tiny import draw_scene

    console = stdout()
    with progress() as steps:
        steps.say("loading the embedded model")
        model, processor = load_model("tiny")
        scene = draw_scene(seed)
        questions = one_of_each_kind(scene.questions)
        steps.say("asking", len(questions))
        answered = []
        for question in questions:
            answered.append(ask(model, processor, scene.image, question, methods))
            steps.tick()
        steps.say("timing the first token", 2 * (repeats + WARMUP))
        inputs = encode(processor, [scene.image], questions[0].text, model)
        ttft = time_first_token(model, inputs, methods, repeats=repeats, tick=steps.tick)
    described = " + ".join(describe(method.to_dict()) for method in methods)
    console.print(f"scene {seed}, {escape(described)}")
    console.print(answer_table(answered, " + ".join(method.slug for method in methods)))
    console.print(cost_table(answered[0].report, ttft))
    console.print(ttft_remark(ttft, answered[0].report), style="dim")
    for note in answered[0].report["notes"]:
        console.print(f"[yellow]note: {escape(note)}[/]", soft_wrap=True)
    if not quick:
        at_real_size(methods, console)
    drawn = answered[:DRAWN]
    headings = [f"{a.question.text}  {a.pruned}" for a in drawn]
    write_image(out, stack([a.drawing for a in drawn], headings))
    console.print(
        f"\nkept tokens of each stage drawn in [bold]{escape(str(out))}[/]", soft_wrap=True
    )


def at_real_size(methods: Sequence[Method], console: Console) -> None:
    """Count what the methods save on well-known models, and time a prefill that is not tiny."""
    from foveate.cli import demo_sizes as sizes

    with progress() as steps:
        steps.say("counting for models of real size")
        counted = sizes.count_sizes(methods)
    sizes.show_sizes(counted, console)
    with progress() as steps:
        steps.say("timing a prefill of 576 visual tokens", 1 + 2 * sizes.ROUNDS)
        try:
            measured = sizes.measure_prefill(methods, steps.tick)
        except FoveateError:
            return  # made for another kind of model; the table says so
    sizes.show_measured(measured, console)


def one_of_each_kind(questions: Sequence[Question]) -> list[Question]:
    """The first question of each kind, up to a handful."""
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.kind, question)
    return list(first.values())[:QUESTIONS]


def ask(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: Question,
    methods: Sequence[Method],
) -> Answered:
    """Ask one question with all tokens and with the methods."""
    inputs = encode(processor, [image], question.text, model)
    plain = answer(model, processor, inputs, LONGEST_ANSWER)
    with use(model, methods) as session:
        pruned = answer(model, processor, inputs, LONGEST_ANSWER)
    return Answered(question, plain, pruned, session.report(), session.show([image])[0])


def answer_table(answered: Sequence[Answered], name: str) -> Table:
    """Questions with the true answer and both given ones; wrong ones are red."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")
    for heading in ("question", "true answer", ALL, name):
        table.add_column(heading)
    for item in answered:
        truth = item.question.answer
        cells = [_mark(given, truth) for given in (item.plain, item.pruned)]
        table.add_row(escape(item.question.text), truth, *cells)
    table.add_section()
    rights = [
        sum(getattr(item, side) == item.question.answer for item in answered)
        for side in ("plain", "pruned")
    ]
    table.add_row("correct", "", *(f"{right} of {len(answered)}" for right in rights))
    return table


def _mark(given: str, truth: str) -> str:
    colour = "green" if given == truth else "red"
    return f"[{colour}]{escape(given) or '(nothing)'}[/]"


def ttft_remark(ttft: dict[str, Timing], report: Report) -> str:
    """One honest line on the measured time against the FLOPs."""
    medians = [timing.median_ms for timing in ttft.values()]
    time, work = medians[1] / medians[0], report["flops"]["ratio"]
    line = f"The first token takes {time:.0%} of the time, for {work:.0%} of the FLOPs."
    if time > work + 0.05:
        line += " In such a small model, fixed costs per layer and call outweigh the arithmetic."
    return line
