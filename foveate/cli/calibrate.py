"""`foveate calibrate`: search VFlowOpt's numbers on prompts of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.markup import escape

from foveate.calibration.vflowopt import calibrate as search
from foveate.cli.console import progress, stderr, stdout
from foveate.cli.inputs import encode, load_image
from foveate.cli.interrupts import AGAIN, keeping
from foveate.errors import InputError
from foveate.io.quoting import shown
from foveate.io.reading import parse_json, read_lines, reason
from foveate.io.writing import check_file, write_json
from foveate.loading import load_model
from foveate.methods.vflowopt import VFlowOpt


@dataclass(frozen=True)
class Calibration:
    """What is searched on which model.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        prompts: file of prompts, see `read_prompts`.
        out: where the method goes; trials go beside it.
        average: share of visual tokens that a layer sees on average.
        trials: in all.
        startup: how many of them are drawn at random.
        seed: of the search.
        max_pixels: most pixels of an image.
        device: where the model runs.
        dtype: of its weights, or `auto`.
    """

    model: str
    prompts: Path
    out: Path
    average: float
    trials: int
    startup: int
    seed: int
    max_pixels: int | None
    device: str
    dtype: str


def calibrate(job: Calibration) -> None:
    """Search, save the method, and print how to use it."""
    out = job.out
    trials_file = out.with_suffix(".trials") if out.name else out
    if out == trials_file:
        raise InputError(f"--out cannot be {out}: the file of that name is for the trials")
    check_file(out)
    check_file(trials_file)
    questions = read_prompts(job.prompts, job.max_pixels)
    console = stdout()
    with progress() as steps:
        steps.say(f"loading {job.model}")
        loaded, processor = load_model(job.model, job.device, job.dtype)
        samples = [encode(processor, images, text, loaded) for images, text in questions]
    if trials_file.exists():
        console.print(f"resuming from {escape(str(trials_file))}", soft_wrap=True)
    with keeping(lambda: f"finished trials are saved in {shown(trials_file, 120)}; {AGAIN}"):
        found = search(
            loaded, samples, job.average, trials=job.trials, startup=job.startup, seed=job.seed,
            storage=trials_file, progress=stderr().is_terminal,
        )  # fmt: skip
    write_json(out, found.to_dict())
    console.print(f"best of {job.trials} trials: {escape(repr(found))}", soft_wrap=True)
    console.print(f"saved in {escape(str(out))}; use it with --method {escape(str(out))},")
    console.print(f"or with {_options(found)}", soft_wrap=True)


def read_prompts(path: Path, max_pixels: int | None = None) -> list[tuple[list[Image.Image], str]]:
    """Images and question of each line of a file.

    Args:
        path: lines of JSON objects with `question` and `image` or `images`, relative to its folder.
        max_pixels: most pixels of an image, see `foveate.io.images.load_image`.

    Raises:
        InputError: the file or an image cannot be read, or a line is no such object.
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
        raise InputError(f"{file} contains no prompt; write one JSON object per line")
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
