"""`foveate flops`: its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli.options import Keep, KeepTotal, Methods, Model, Settings

HELP = """Count what a method saves on a model; reads only its config and runs nothing.

MODEL is a hub id, a local folder, or [bold]tiny[/]. Configs of well-known checkpoints are bundled,
so these need no network. FLOPs are split into vision tower, projector, selection and language
model. By default a multiply-add counts as 2, and attention counts the pairs that the causal mask
allows. Other conventions: [bold]dense[/] (what torch counts), [bold]macs[/], and the formulas of two
papers, [bold]fastv[/] and [bold]pyramiddrop[/], which count visual tokens in the decoder only.

[bold]Examples[/]

  foveate flops llava-hf/llava-1.5-7b-hf --method pyramiddrop

  foveate flops llava-hf/llava-1.5-7b-hf --method pyramiddrop --convention pyramiddrop

  foveate flops llava-hf/llava-1.5-7b-hf -m divprune --keep 0.25 --images 8 --keep-total 576

  foveate flops Qwen/Qwen2.5-VL-7B-Instruct --method fastv --keep 0.25 --image-size 1280x720 --decode
"""  # noqa: E501


def flops(
    model: Model,
    method: Methods,
    keep: Keep = None,
    keep_total: KeepTotal = None,
    setting: Settings = None,
    images: Annotated[int, typer.Option(min=1, help="Images in the prompt.")] = 1,
    image_size: Annotated[
        str, typer.Option(help="Size of each image, WIDTHxHEIGHT in pixels.")
    ] = "672x672",
    text_tokens: Annotated[int, typer.Option(min=1, help="Text tokens in the prompt.")] = 64,
    convention: Annotated[
        str, typer.Option(help="foveate, dense, macs, fastv or pyramiddrop.")
    ] = "foveate",
    decode: Annotated[bool, typer.Option("--decode", help="Also count a decoding step.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Save all numbers here.")] = None,
) -> None:
    """Count what a method saves."""
    from foveate.measure.checkpoints import check_config_name

    check_config_name(model)
    from foveate.cli.console import progress, stdout
    from foveate.cli.flops import Question, count, parse_size, save
    from foveate.cli.inputs import limit_of
    from foveate.core.from_text import make_saved
    from foveate.io.writing import check_file
    from foveate.measure.conventions import get_convention

    check_file(json_path)
    saved = make_saved(method, keep or (), setting or ())
    question = Question(
        model=model,
        methods=saved.methods,
        convention=get_convention(convention),
        images=images,
        size=parse_size(image_size),
        text_tokens=text_tokens,
        decode=decode,
        keep_total=limit_of(saved, keep_total),
    )
    with progress() as steps:
        steps.say(f"counting on {model}")
        answer = count(question)
    answer.show(stdout())
    if json_path is not None:
        save(answer, json_path)
