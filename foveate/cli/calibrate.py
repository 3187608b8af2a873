"""`foveate calibrate`: search VFlowOpt's numbers on prompts of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.markup import escape

from foveate.calibration.vflowopt import calibrate as search
from foveate.cli.console import progress, stderr, stdout
from foveate.cli.inputs import MAX_PIXELS, encode, load_image
from foveate.errors import InputError
from foveate.io.quoting import shown
from foveate.io.reading import parse_json, read_lines, reason
from foveate.io.writing import check_file, write_json
from foveate.loading import load_model
from foveate.methods.vflowopt import VFlowOpt

HELP = """Search the numbers of the method [bold]vflowopt[/] for a model, on prompts of your own.

PROMPTS is a file with one prompt a line, as JSON: [bold]{"image": "cat.jpg", "question": "What is
this?"}[/], or `images` with a list. Pictures are found beside the file. Answers are not needed:
what counts is how little the last prompt token's final state changes. A few dozen prompts like
those that you will ask are enough.

Every trial is kept in a file beside the result, NAME.trials. Interrupt the command when you like:
called again it goes on from there, and with more --trials it searches on.

[bold]Examples[/]

  foveate calibrate llava-hf/llava-1.5-7b-hf prompts.jsonl --average 0.25 --out strategy.json
  --device cuda

  foveate run llava-hf/llava-1.5-7b-hf cat.jpg "What is this?" --method strategy.json
"""


def calibrate(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, or `tiny`.")],
    prompts: Annotated[Path, typer.Argument(help="File of prompts, one JSON object a line.")],
    average: Annotated[
        float, typer.Option(help="Share of visual tokens that a layer sees on average, below 1.")
    ] = 0.25,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all.")] = 300,
    startup: Annotated[int, typer.Option(min=1, help="How many are drawn at random.")] = 27,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 42,
    out: Annotated[Path, typer.Option(help="Where the method goes, as JSON.")] = Path(
        "vflowopt.json"
    ),
    max_pixels: Annotated[int | None, typer.Option(min=1, help=MAX_PIXELS)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Search VFlowOpt's numbers."""
    trials_file = out.with_suffix(".trials") if out.name else out
    if out == trials_file:
        raise InputError(f"--out cannot be {out}: the file of that name holds the trials")
    check_file(out)
    check_file(trials_file)
    asked = read_prompts(prompts, max_pixels)
    console = stdout()
    with progress() as steps:
        steps.say(f"loading {model}")
        loaded, processor = load_model(model, device, dtype)
        samples = [encode(processor, images, text, loaded) for images, text in asked]
    if trials_file.exists():
        console.print(f"going on from {escape(str(trials_file))}", soft_wrap=True)
    found = search(
        loaded, samples, average, trials=trials, startup=startup, seed=seed,
        storage=trials_file, progress=stderr().is_terminal,
    )  # fmt: skip
    write_json(out, found.to_dict())
    console.print(f"best of {trials} trials: {escape(repr(found))}", soft_wrap=True)
    console.print(f"saved in {escape(str(out))}; use it with --method {escape(str(out))},")
    console.print(f"or with {_options(found)}", soft_wrap=True)


def read_prompts(path: Path, max_pixels: int | None = None) -> list[tuple[list[Image.Image], str]]:
    """Pictures and question of each line of a file.

    Args:
        path: lines of JSON objects with `question` and `image` or `images`, relative to its folder.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.

    Raises:
        InputError: the file or a picture cannot be read, or a line is no such object.
    """
    file = shown(path)
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read prompts from {file}: {reason(error)}") from None
    found = []
    for number, line in lines:
        names, question = _prompt(line, f"{file}:{number}")
        found.append(([load_image(path.parent / name, max_pixels) for name in names], question))
    if not found:
        raise InputError(f"{file} holds no prompt; write one JSON object a line")
    return found


def _prompt(line: str, where: str) -> tuple[list[str], str]:
    wanted = '{"image": "cat.jpg", "question": "What is this?"}'
    try:
        data: Any = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({reason(error)}); write {wanted}") from None
    names = data.get("images", [data.get("image")]) if isinstance(data, dict) else None
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) for name in names)
        or not isinstance(data.get("question"), str)
    ):
        raise InputError(f"{where} has no question with an image or images; write {wanted}")
    return names, data["question"]


def _options(found: VFlowOpt) -> str:
    """The method as options of `foveate run`."""
    shares = found.keep if isinstance(found.keep, tuple) else (found.keep,)
    keep = ",".join(map(str, shares))
    return (
        f"--method vflowopt --keep {keep} --set threshold={found.threshold} --set cell={found.cell}"
    )
