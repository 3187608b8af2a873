"""`foveate list`: its arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from foveate.cli.options import Verbose
from foveate.errors import InputError


def list_(
    model: Annotated[
        str | None,
        typer.Option(
            help="Show what works on this model, and why the rest does not; reads only its config."
        ),
    ] = None,
    families: Annotated[
        bool,
        typer.Option("--families", help="Show which model families work, and why others do not."),
    ] = False,
    verbose: Verbose = False,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Save the list as JSON here; `-` prints it.")
    ] = None,
) -> None:
    """List methods: where they act, what they do, the paper.

    [bold]Examples[/]

      foveate list

      foveate list --model llava-hf/llava-1.5-7b-hf

      foveate list --families --verbose
    """
    if families and model is not None:
        raise InputError("--families shows all families and --model one model; give one of them")
    from foveate.cli import listing
    from foveate.cli.console import deliver_json, stdout
    from foveate.io.writing import check_file
    from foveate.measure.checkpoints import check_config_name

    check_file(json_path)
    show: Callable[[Console], None]
    data: Any
    if model is not None:
        check_config_name(model)
        from foveate.cli.verdicts import judge_model

        verdicts = judge_model(model)
        data, show = verdicts.to_dict(), verdicts.show
    elif families:
        data, show = listing.families_data(), partial(listing.show_families, verbose=verbose)
    else:
        data, show = listing.methods_data(), partial(listing.show_methods, verbose=verbose)
    if json_path is None:
        show(stdout())
    else:
        deliver_json(data, json_path)
