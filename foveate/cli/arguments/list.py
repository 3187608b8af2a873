"""`foveate list`: its arguments."""

from __future__ import annotations

from typing import Annotated

import typer


def list_(
    model: Annotated[
        str | None,
        typer.Option(
            help="Show what works on this model, and why others do not; reads only its config."
        ),
    ] = None,
    families: Annotated[
        bool,
        typer.Option(
            "--families", help="Show which method works on which family of models instead."
        ),
    ] = False,
) -> None:
    """List methods: where they act, what they need, the paper.

    [bold]Examples[/]

      foveate list

      foveate list --model llava-hf/llava-1.5-7b-hf
    """
    from foveate.cli import listing
    from foveate.cli.console import stdout

    if families:
        listing.show_families(stdout())
    elif model is None:
        stdout().print(listing.method_table())
    else:
        from foveate.cli.verdicts import show_model

        show_model(model, stdout())
