"""Measure the tiny VLM on held-out scenes: `python -m recipes.evaluate --n 2000`.

Questions go through the processor and `generate`, batched and padded on the left, exactly as a
user would ask them. `--readout` also finds out by which layer the answer has been read out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from foveate.tiny import PATH
from foveate.tiny.questions import KINDS_OF_QUESTION, Question
from foveate.tiny.scenes import draw_scene
from recipes.data import load_photos, photo_paths

_PER_SCENE = 4
_READOUT = 512  # questions used to find the layer of the read-out


@dataclass(frozen=True)
class Item:
    """An image and one question about it."""

    image: Image.Image
    question: Question


class Tally:
    """Right answers and questions, by kind of question."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys((*KINDS_OF_QUESTION, "all"), (0, 0))

    def add(self, items: list[Item], said: list[str]) -> None:
        """Count one batch of answers."""
        for item, answer in zip(items, said, strict=True):
            for kind in (item.question.kind, "all"):
                right, asked = self._counts[kind]
                self._counts[kind] = (right + (answer == item.question.answer), asked + 1)

    def counts(self) -> dict[str, tuple[int, int]]:
        """(right, asked) of every kind that was asked about, and of "all"."""
        return {kind: pair for kind, pair in self._counts.items() if pair[1]}


def held_out(
    n: int, *, first_seed: int = 10**6, photos: list[Image.Image] | None = None
) -> list[Item]:
    """Draw held-out questions: of every scene four, each of another kind.

    Args:
        n: how many questions.
        first_seed: seed of the first scene; below 2**40, so that no scene was trained on.
        photos: backgrounds; textures when left out.

    Returns:
        The questions with their images.
    """

    def items() -> Iterator[Item]:
        for seed in count(first_seed):
            rng = Random(seed)
            scene = draw_scene(seed, background=rng.choice(photos) if photos else "texture")
            by_kind: dict[str, list[Question]] = {}
            for question in scene.questions:
                by_kind.setdefault(question.kind, []).append(question)
            for kind in rng.sample(list(by_kind), min(_PER_SCENE, len(by_kind))):
                yield Item(scene.image, rng.choice(by_kind[kind]))

    return list(islice(items(), n))


def encode(processor: LlavaProcessor, items: list[Item]) -> Any:
    """Turn questions into one left-padded batch."""
    return processor(
        images=[item.image for item in items],
        text=[f"<image> {item.question.text}" for item in items],
        padding=True,
        return_tensors="pt",
    )


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: list[Item]
) -> list[str]:
    """Answer one batch of questions with `generate`.

    Args:
        model: the model.
        processor: its processor.
        items: the questions.

    Returns:
        One decoded answer each.
    """
    inputs = encode(processor, items).to(model.device)
    generator: Any = model
    output = generator.generate(**inputs)
    return processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: list[Item],
    batch: int = 16,
    note: str = "answering",
) -> dict[str, tuple[int, int]]:
    """Count right answers.

    Args:
        model: the model.
        processor: its processor.
        items: the questions.
        batch: questions per call of `generate`.
        note: label of the progress bar.

    Returns:
        For every kind of question, and for "all": (right, asked).
    """
    tally = Tally()
    for first in track(range(0, len(items), batch), note, transient=True):
        part = items[first : first + batch]
        tally.add(part, answers(model, processor, part))
    return tally.counts()


@torch.inference_mode()
def readout(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: list[Item],
    depths: Sequence[int] | None = None,
) -> dict[int, dict[str, tuple[int, int]]]:
    """Accuracy if from some layer on only one random visual token can still be attended to.

    Where this stays close to the full accuracy, the answer has already been read out of the
    visual tokens, and pruning from there on tests nothing.

    Args:
        model: the model.
        processor: its processor.
        items: the questions.
        depths: how many layers see all tokens; 0, 1, ... up to all layers when left out.

    Returns:
        For every depth, and every kind of question and "all": (right, asked).
    """
    layers = model.model.language_model.layers
    generator = torch.Generator().manual_seed(0)
    depths = range(len(layers) + 1) if depths is None else depths
    tally = {depth: Tally() for depth in depths}
    for first in track(range(0, len(items), 16), "reading out", transient=True):
        part = items[first : first + 16]
        inputs = encode(processor, part).to(model.device)
        mask = _one_token_mask(model, inputs, generator)
        for depth in depths:
            hooks = [
                layer.register_forward_pre_hook(_use(mask), with_kwargs=True)
                for layer in layers[depth:]
            ]
            try:
                words = model(**inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
            finally:
                for hook in hooks:
                    hook.remove()
            said = processor.batch_decode(words[:, None])
            tally[depth].add(part, said)
    return {depth: counts.counts() for depth, counts in tally.items()}


def _one_token_mask(
    model: LlavaForConditionalGeneration, inputs: Any, generator: torch.Generator
) -> Tensor:
    """Additive (B, 1, T, T) causal mask that hides all visual tokens but one per row."""
    ids = inputs["input_ids"]
    visual = ids == model.config.image_token_id
    chance = torch.rand(ids.shape, generator=generator).to(ids.device) * visual
    kept = torch.zeros_like(visual).scatter_(1, chance.argmax(1, keepdim=True), True)
    usable = inputs["attention_mask"].bool() & (~visual | kept)
    size = ids.shape[1]
    square = torch.ones(size, size, dtype=torch.bool, device=ids.device)
    allowed = (usable[:, None] & square.tril()) | square.tril().triu()
    mask = torch.zeros(allowed.shape, dtype=model.dtype, device=ids.device)
    return mask.masked_fill(~allowed, torch.finfo(model.dtype).min)[:, None]


def _use(mask: Tensor) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": mask}

    return hook


def _readout_table(results: dict[int, dict[str, tuple[int, int]]]) -> Table:
    kinds = list(next(iter(results.values())))
    table = Table("layers that see all tokens", *kinds)
    for depth, counts in results.items():
        table.add_row(str(depth), *(f"{100 * r / n:.0f}" for r, n in counts.values()))
    return table


def main(
    n: Annotated[int, typer.Option(help="Questions per background.")] = 2000,
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEG backgrounds.")] = None,
    model: Annotated[Path, typer.Option(help="Model folder.")] = PATH,
    batch: Annotated[int, typer.Option(help="Questions per batch.")] = 16,
    read_out: Annotated[bool, typer.Option("--readout", help="Also find the layer.")] = False,
) -> None:
    """Print accuracy by kind of question, on textures and on held-out photos."""
    vlm = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model)
    columns = {"texture": held_out(n)}
    if photos is not None:
        images = load_photos(photo_paths(photos, held_out=True))
        columns["photo"] = held_out(n, first_seed=2 * 10**6, photos=images)
    results = {
        name: accuracy(vlm, processor, items, batch, name) for name, items in columns.items()
    }
    table = Table(
        "question", *(f"{name} %" for name in results), *(f"n {name}" for name in results)
    )
    for kind in results["texture"]:
        counts = [result.get(kind, (0, 0)) for result in results.values()]
        shares = [f"{100 * right / max(1, asked):.1f}" for right, asked in counts]
        table.add_row(kind, *shares, *(str(asked) for _, asked in counts))
    console = Console()
    console.print(table)
    if read_out:
        console.print(_readout_table(readout(vlm, processor, columns["texture"][:_READOUT])))


if __name__ == "__main__":
    typer.run(main)
