"""The commands: `run`, `batch`, `list`, `flops`, `bench`, `calibrate`, `tune`, `train`, `serve`,
`demo`, `cite` and `env`.

Help, and what is wrong with a command line, come without torch: nothing heavy is imported here.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from foveate import __version__
from foveate.cli.arguments import (
    batch,
    bench,
    bench_speed,
    calibrate,
    cite,
    demo,
    env,
    flops,
    run,
    serve,
    train,
    tune,
)
from foveate.cli.arguments.list import list_
from foveate.cli.console import hush, stderr
from foveate.cli.elsewhere import why_absent
from foveate.cli.interrupts import CODE, answer_interrupt
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import LONGEST, shown
from foveate.io.writing import is_full

SPEED = "bench --speed"
VERBOSE = "--verbose"


class _Command(TyperCommand):
    """A command that refuses an option given twice of which only the last would count.

    What other libraries warn of is shown with --verbose alone, which every command takes.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if VERBOSE in args and all(option.name != "verbose" for option in self.params):
            args = [argument for argument in args if argument != VERBOSE]
            ctx.meta[VERBOSE] = True
        given = self._options_in(ctx, args)
        for option in self.params:
            once = getattr(option, "multiple", None) is False
            if once and not getattr(option, "is_flag", False) and given.count(option) > 1:
                raise InputError(f"{option.opts[0]} is given twice; give it once")
        rest = super().parse_args(ctx, args)
        names = ctx.params.get("method")
        if isinstance(names, list | tuple) and len(names) == 1:
            (ctx.params["method"],) = names  # one method is its name
        return rest

    def _options_in(self, ctx: Any, args: list[str]) -> list[Any]:
        """The options of a command line, in its order."""
        try:
            return self.make_parser(ctx).parse_args(list(args))[2]
        except Exception as error:
            name = getattr(error, "option_name", None)
            why = None if name is None else why_absent(self.name or "", name)
            if why is None:
                raise
        raise InputError(f"foveate {self.name} has no {name}: {why}")

    def invoke(self, ctx: Any) -> Any:
        if not (ctx.meta.get(VERBOSE) or ctx.params.get("verbose")):
            hush()
        if isinstance(name := ctx.params.get("method"), str):
            ctx.params["method"] = [name]
        return super().invoke(ctx)


class _Group(TyperGroup):
    """Commands whose foreseeable errors are one red line and exit code 2, and Ctrl-C another."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`bench --speed` has options of its own, so it is a command of its own."""
        if args[0] == "bench" and "--speed" in args:
            args = [SPEED, *(a for a in args[1:] if a != "--speed")]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            if answer_interrupt(error):
                raise typer.Exit(CODE) from None
            reason = _reason(error)
            if reason is None:
                raise
        stderr().print(f"[bold red]error:[/] [red]{escape(reason)}[/]", soft_wrap=True)
        raise typer.Exit(2)


def _reason(error: BaseException) -> str | None:
    """What is said of an error that can be foreseen; `None` for others."""
    if isinstance(error, FoveateError):
        return str(error)
    if isinstance(error, OSError) and is_full(error):  # what is printed goes to a full disk too
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return f"cannot go on: {error.strerror}"
    told = getattr(error, "format_message", str)()  # of a wrong option
    return shown(told, LONGEST) if len(told) > LONGEST else None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Faster vision-language models: remove the visual tokens they do not need.",
)

app.command("run", cls=_Command, help=run.HELP)(run.run)
app.command("batch", cls=_Command, help=batch.HELP)(batch.batch)
app.command("list", cls=_Command)(list_)
app.command("calibrate", cls=_Command, help=calibrate.HELP)(calibrate.calibrate)
app.command("tune", cls=_Command, help=tune.HELP)(tune.tune)
app.command("flops", cls=_Command, help=flops.HELP)(flops.flops)
app.command("demo", cls=_Command)(demo.demo)
app.command("bench", cls=_Command, help=bench.HELP)(bench.bench)
app.command(SPEED, cls=_Command, help=bench_speed.HELP, hidden=True)(bench_speed.speed)
app.command("train", cls=_Command, help=train.HELP)(train.train)
app.command("cite", cls=_Command)(cite.cite)
app.command("env", cls=_Command)(env.env)
app.command("serve", cls=_Command, help=serve.HELP)(serve.serve)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    print(f"foveate {__version__}")
    raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    verbose: Annotated[
        bool,
        typer.Option(
            VERBOSE, help="Show warnings from other libraries; every command accepts this option."
        ),
    ] = False,
    show_version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Options of no command."""
    ctx.meta[VERBOSE] = verbose
