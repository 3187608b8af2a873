"""`foveate run`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import (
    Adaptive,
    Device,
    Dtype,
    Keep,
    KeepTotal,
    MaxPixels,
    Model,
    OptionalMethods,
    Settings,
)
from foveate.errors import InputError

HELP = """Ask a model about images or videos, with a method that removes visual tokens.

MODEL is a hub id, a local folder, or [bold]tiny[/] for the model that comes with foveate. Give any
number of images and videos, then the question. A video is a folder of frames or, if
foveate\\[video] is installed, a video file.

[bold]Examples[/]

  foveate run tiny scene.png "what color is the star ?" --method pyramiddrop --compare

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method fastv --keep 0.25 --show
  kept.png

  foveate run tiny a.png b.png "what number is red ?" --method fastv --set layer=3 --keep 32 --json
  out.json

  foveate run tiny scene.png "what color is the star ?" -m divprune+fastv

  foveate run tiny a.png b.png c.png "what number is red ?" -m divprune --keep 64 --keep-total 160

  foveate run Qwen/Qwen3-VL-8B-Instruct clip.mp4 "What happens?" --method holitom --frames 32
"""


def run(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar='IMAGE|VIDEO... "QUESTION"', help="Images and videos, then the question."
        ),
    ],
    method: OptionalMethods = None,
    keep: Keep = None,
    keep_total: KeepTotal = None,
    setting: Settings = None,
    adaptive: Adaptive = None,
    with_all: Annotated[
        bool, typer.Option("--compare", help="Also run with all tokens, and time both.")
    ] = False,
    show: Annotated[Path | None, typer.Option(help="Save a drawing of the kept tokens.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Save the answers and the report here.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Most frames per video.")] = 16,
    max_pixels: MaxPixels = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds of --compare.")] = 20,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Ask a model about images and videos."""
    _check(inputs, method, adaptive, budgets=bool(keep or setting))
    from foveate.measure.checkpoints import check_name

    check_name(model)
    from foveate.cli.console import stdout
    from foveate.cli.inputs import flat, limit_of, load_media
    from foveate.cli.run import Job, check_paths, execute
    from foveate.core.from_text import make_saved
    from foveate.core.saving import Saved
    from foveate.tune.policy import adaptive as read_policy

    saved = make_saved(method, keep or (), setting or ()) if method else Saved(())
    chosen, total = saved.methods, limit_of(saved, keep_total)
    policy = None if adaptive is None else read_policy(adaptive)
    *paths, question = inputs
    check_paths(show, json_path)
    media = load_media(paths, frames, max_pixels)
    if policy is not None:
        chosen = policy.choose(question, flat(media))
    rounds = repeats if with_all else 0
    job = Job(model, media, question, chosen, max_new_tokens, rounds, device, dtype, total)
    execute(job).deliver(stdout(), show, json_path)


def _check(
    inputs: list[str], method: list[str] | None, adaptive: Path | None, *, budgets: bool
) -> None:
    """Refuse arguments that do not go together.

    Raises:
        InputError: some do not.
    """
    if len(inputs) < 2:
        raise InputError(
            "run needs at least one image or video and a question after MODEL, got only "
            f"{inputs[0]!r}"
        )
    if (adaptive is None) == (method is None):
        raise InputError("run needs --method, or --adaptive with a policy, and not both")
    if adaptive is not None and budgets:
        raise InputError("--keep and --set need a --method; a policy has budgets of its own")
