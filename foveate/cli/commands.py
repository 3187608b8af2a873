"""The commands: `run`, `list`, `flops`, `bench`, `calibrate`, `train`, `demo`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from foveate.cli import bench as benchmark
from foveate.cli import bench_speed, listing
from foveate.cli import calibrate as calibration
from foveate.cli import demo as demonstration
from foveate.cli import flops as counting
from foveate.cli import run as running
from foveate.cli import train as training
from foveate.cli.console import progress, stderr, stdout
from foveate.core.from_text import make_methods
from foveate.errors import FoveateError, InputError
from foveate.families import unsupported_families
from foveate.io.quoting import LONGEST, shown
from foveate.io.writing import check_file, is_full
from foveate.loading import load_skeleton

SPEED = "bench --speed"
DEMO = "As in `foveate run`; pyramiddrop if none is named."


class _Command(TyperCommand):
    """A command that refuses an option given twice of which only the last would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = self.make_parser(ctx).parse_args(list(args))[2]
        for option in self.params:
            once = getattr(option, "multiple", None) is False
            if once and not getattr(option, "is_flag", False) and given.count(option) > 1:
                raise InputError(f"{option.opts[0]} is given twice; give it once")
        rest = super().parse_args(ctx, args)
        names = ctx.params.get("method")
        if isinstance(names, list | tuple) and len(names) == 1:
            (ctx.params["method"],) = names  # one method is its name
        return rest

    def invoke(self, ctx: Any) -> Any:
        if isinstance(name := ctx.params.get("method"), str):
            ctx.params["method"] = [name]
        return super().invoke(ctx)


class _Group(TyperGroup):
    """Commands whose foreseeable errors are one red line and exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`bench --speed` has options of its own, so it is a command of its own."""
        if args[0] == "bench" and "--speed" in args:
            args = [SPEED, *(a for a in args[1:] if a != "--speed")]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoveateError as error:
            reason = str(error)
        except OSError as error:  # what is printed goes to a full disk too
            if not is_full(error):
                raise
            reason = f"cannot go on: {error.strerror}"
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        except Exception as error:
            told = getattr(error, "format_message", str)()  # of a wrong option
            if len(told) <= LONGEST:
                raise
            reason = shown(told, LONGEST)
        stderr().print(f"[bold red]error:[/] [red]{escape(reason)}[/]", soft_wrap=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Faster vision-language models: remove the visual tokens they do not need.",
)

app.command("run", cls=_Command, help=running.HELP)(running.run)


@app.command("list", cls=_Command)
def list_(
    model: Annotated[
        str | None,
        typer.Option(help="Say what works on this model and why not; reads only its config."),
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="Say what works on which family of models instead.")
    ] = False,
) -> None:
    """List methods: where they act, what they need, the paper.

    [bold]Examples[/]

      foveate list

      foveate list --model llava-hf/llava-1.5-7b-hf
    """
    console = stdout()
    if families:
        tick = "✓" if console.encoding.startswith("utf") else "yes"
        table, letters, notes = listing.family_table(tick)
        for letter, names in letters.items():
            console.print(f"[bold cyan]{letter}[/] {', '.join(names)}", soft_wrap=True)
        console.print(table)
        for number, note in enumerate(notes, 1):
            console.print(f"[yellow]{number}[/] {escape(note)}", soft_wrap=True)
        console.print()
        for family, reason in unsupported_families().items():
            console.print(f"[dim]{family} is not supported: {escape(reason)}[/]", soft_wrap=True)
        return
    if model is None:
        console.print(listing.method_table())
        return
    with progress() as steps:
        steps.say(f"reading the config of {model}")
        skeleton = load_skeleton(model)
        description = listing.describe_model(skeleton)
    console.print(f"[bold]{escape(model)}[/] is {escape(description)}")
    console.print(listing.method_table(skeleton))


app.command("calibrate", cls=_Command, help=calibration.HELP)(calibration.calibrate)


app.command("flops", cls=_Command, help=counting.HELP)(counting.flops)


@app.command("demo", cls=_Command)
def demo(
    seed: Annotated[int, typer.Option(help="Which scene to draw.")] = demonstration.SEED,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=DEMO)] = None,
    keep: Annotated[list[str] | None, typer.Option(help="As in `foveate run`.")] = None,
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("demo-kept.png"),
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
) -> None:
    """Ask the embedded model about a drawn scene, with all tokens and with a method. Offline.

    [bold]Example[/]

      foveate demo --seed 7 --method fastv --keep 0.25
    """
    chosen = make_methods(method or ["pyramiddrop"], keep or ())
    check_file(out, image=True)
    demonstration.demo(seed, chosen, out, repeats)


app.command("bench", cls=_Command, help=benchmark.HELP)(benchmark.bench)
app.command(SPEED, cls=_Command, help=bench_speed.HELP, hidden=True)(bench_speed.speed)


@app.command("train", cls=_Command, help=training.HELP)
def train(
    config: Annotated[Path | None, typer.Argument(help="A YAML file.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Print a YAML file to begin with.")
    ] = False,
) -> None:
    """Train a model with a method."""
    if example:
        print(training.EXAMPLE, end="")
    elif config is None:
        raise InputError("train needs a YAML file; `foveate train --example` prints one")
    else:
        training.run(config, stdout())


def main() -> None:
    """Entry point of the `foveate` command."""
    app()
