"""`foveate demo`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SEED = 12
DEMO = "As in `foveate run`; pyramiddrop if none is named."


def demo(
    seed: Annotated[int, typer.Option(help="Number of the drawn scene.")] = SEED,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=DEMO)] = None,
    keep: Annotated[list[str] | None, typer.Option(help="As in `foveate run`.")] = None,
    out: Annotated[Path, typer.Option(help="Where to save the drawing of the kept tokens.")] = Path(
        "demo-kept.png"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 20,
    quick: Annotated[
        bool, typer.Option("--quick", help="Skip the savings at real model sizes.")
    ] = False,
) -> None:
    """Ask the embedded model about a drawn scene, with all tokens and with a method. Offline.

    [bold]Example[/]

      foveate demo --seed 7 --method fastv --keep 0.25
    """
    from foveate.cli import demo as demonstration
    from foveate.core.from_text import make_methods
    from foveate.io.writing import check_file

    chosen = make_methods(method or ["pyramiddrop"], keep or ())
    check_file(out, image=True)
    demonstration.demo(seed, chosen, out, repeats, quick=quick)
