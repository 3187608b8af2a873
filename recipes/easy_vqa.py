"""Teach the tiny VLM a data set: `python -m recipes.easy_vqa --data DIR --out RUN`.

The result is a folder like the packaged model's. It is not packaged: it knows one data set.
"""

import json
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from foveate.bench import data as files
from foveate.io.writing import check_folder
from foveate.tiny import PATH
from foveate.tiny.build import EOS, PAD, SIZE, build_config, build_model, build_tokenizer
from recipes import packed
from recipes.data import normalise
from recipes.precision import mixed
from recipes.sequences import adopt, vocabulary_of
from recipes.train import export

_IMAGES, _SLOTS, _LENGTH = 16, 12, 14
_RATE = 1e-3
_END = 0.1  # weight of the end after the answer


def vocabulary(start: Path, rows: tuple[files.Row, ...]) -> tuple[str, ...]:
    """The words of a model, and after them those of a data set that it does not know."""
    known = vocabulary_of(start)
    found = {word for row in rows for word in row.question.replace("?", " ?").lower().split()}
    found |= {row.answer for row in rows}
    return (*known, *sorted(found - set(known)))


def batch(
    tokenizer: PreTrainedTokenizerFast, picked: list[tuple[Image.Image, list[files.Row]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, H, W, 3), words (B, S, C), and the positions (B, S) of the answers in them."""
    pixels, words, places = [], [], []
    for image, rows in picked:
        resized = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels.append(np.array(resized))
        for row in rows:
            ids = tokenizer(f"{row.question} {row.answer}")["input_ids"][1:]
            words.append(ids + [PAD] * (_LENGTH - len(ids)))
            places.append(len(ids) - 1)
    shape = (len(picked), _SLOTS)
    return (
        torch.from_numpy(np.stack(pixels)),
        torch.tensor(words).unflatten(0, shape),
        torch.tensor(places).unflatten(0, shape),
    )


def answer_loss(model: LlavaForConditionalGeneration, parts: tuple[Tensor, ...]) -> Tensor:
    """Cross entropy of the answers of one batch, and of the end after each."""
    pixels, words, places = parts
    states, _ = packed.see(model.model.vision_tower, normalise(pixels))
    visual = packed.project(model, states)
    positions = torch.arange(1, 1 + visual.shape[1]).expand(len(visual), -1)
    logits, _ = packed.read(model, visual, positions, words, 1 + visual.shape[1])
    logits = logits.unflatten(1, words.shape[1:])
    answers = words.gather(2, places[..., None]).flatten()
    said, then = (
        logits.gather(2, at[..., None, None].expand(-1, -1, 1, logits.shape[-1])).flatten(0, 2)
        for at in (places - 1, places)
    )
    end = torch.full_like(answers, EOS)
    return F.cross_entropy(said.float(), answers) + _END * F.cross_entropy(then.float(), end)


def finetune(folder: Path, out: Path, start: Path, steps: int, seed: int) -> None:
    """Train on easy-VQA's train part and write the model's folder.

    Args:
        folder: holds `easy-vqa/`.
        out: where to write.
        start: folder of the model to begin with.
        steps: of 16 images with 12 questions each.
        seed: of the order, and of new words.

    Raises:
        BenchError: the data set is missing or damaged.
    """
    check_folder(out)
    rows = files.easy_vqa(folder, "train")
    words = vocabulary(start, rows)
    torch.manual_seed(seed)
    model = build_model(build_config(words=len(words)))
    adopt(model, start, words)
    tokenizer = build_tokenizer(words)
    by_image: dict[str, list[files.Row]] = defaultdict(list)
    for row in rows:
        by_image[row.image].append(row)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.01)
    rng = Random(seed)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    with (out / "log.jsonl").open("w") as log:
        for step in range(steps):
            picked = [
                (
                    files.packed_image(folder, "easy-vqa", "train", image),
                    rng.choices(by_image[image], k=_SLOTS),
                )
                for image in rng.sample(list(by_image), _IMAGES)
            ]
            for group in optimizer.param_groups:
                group["lr"] = _RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
            with mixed():
                loss = answer_loss(model, batch(tokenizer, picked))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = round(time.process_time() - begun)
            log.write(json.dumps({"step": step + 1, "cpu_s": seconds, "loss": loss.item()}) + "\n")
            log.flush()
    export(model, out, words)


def main(
    data: Annotated[Path, typer.Option(help="Folder that holds easy-vqa/.")],
    out: Annotated[Path, typer.Option(help="Folder for the model.")],
    start: Annotated[Path, typer.Option(help="Folder of the model to begin with.")] = PATH,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 120,
    seed: Annotated[int, typer.Option(help="Seed of the order of the images.")] = 0,
) -> None:
    """Fine-tune the tiny VLM on easy-VQA."""
    torch.set_num_threads(1)
    finetune(data, out, start, steps, seed)


if __name__ == "__main__":
    typer.run(main)
