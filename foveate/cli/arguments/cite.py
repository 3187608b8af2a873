"""`foveate cite`: its arguments."""

from __future__ import annotations

from typing import Annotated

import typer


def cite(
    methods: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[METHOD]...", help="Names that `foveate list` shows; may be joined by +."
        ),
    ] = None,
) -> None:
    """Print BibTeX entries for the papers of methods; without a name, the entry of foveate.

    [bold]Examples[/]

      foveate cite pyramiddrop

      foveate cite divprune fastv >> references.bib
    """
    from foveate.cli.citing import entries

    print("\n\n".join(entries(methods or [])))
