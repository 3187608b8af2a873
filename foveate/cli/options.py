"""Options that several commands share, with what their help says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RANDOM = "random:"
"""Before the name of a model with random weights, in `foveate bench --speed`."""

Model = Annotated[str, typer.Argument(help="Hub id, local folder, `tiny` or `small`.")]
_METHOD = typer.Option(
    "--method",
    "-m",
    help="A name that `foveate list` shows, or a JSON file. Give it several times, or join names "
    "as in `divprune+fastv`, to combine methods; they act in stream order.",
)
Methods = Annotated[list[str], _METHOD]
OptionalMethods = Annotated[list[str] | None, _METHOD]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        help="Fraction `0.25`, count per image `64`, or schedule `0.5,0.25,0.125`. If the method "
        "drops tokens several times, one number sets the mean over the layers after its first "
        "drop. The default is the published schedule. With several methods, give one for each, in "
        "the same order."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A hyper-parameter, `field=value`, or `method.field=value` to pick one of several "
        "methods; may be repeated.",
    ),
]
KeepTotal = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Most visual tokens of a prompt; if its images would have more, all shrink alike. The "
        "last method before the language model must have a budget.",
    ),
]
Adaptive = Annotated[
    Path | None,
    typer.Option(
        help="A policy that `foveate tune --adaptive` has written: it chooses the methods for each "
        "question, instead of --method."
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(min=1, help="Most pixels per image; by default Pillow's limit, 178,956,970."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Show details, and warnings from other libraries.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
RayAddress = Annotated[
    str | None,
    typer.Option(
        help="Address of a Ray cluster, or `auto`; by default RAY_ADDRESS, or else this machine."
    ),
]
