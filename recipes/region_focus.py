"""Train a Region Focus Module for the tiny VLM: `python -m recipes.region_focus --out runs/large`.

As published, the language model learns to answer from thumbnail and level 1 while the module learns
its attention. Questions about a scene share its visual tokens in one sequence; none sees another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from transformers import PreTrainedModel

from foveate import tiny
from foveate.io.writing import check_folder, filling
from foveate.large.focus import Distillation, RegionFocus, attention_logits
from foveate.large.image import Held
from foveate.large.pyramid import levels
from foveate.large.reader import Reader
from foveate.tiny.build import BOS, EARLY, EOS, PAD
from foveate.tiny.questions import Question
from foveate.tiny.scenes import Scene
from recipes.data import TRAIN_SEEDS, WORD_ID
from recipes.precision import mixed

KINDS = ("color", "shape", "number", "where", "place-color", "place-object", "exists")
"""Questions whose evidence is one object."""
LAYERS = (2, 4, 6, 8)
"""Layers the module starts from; the tiny model reads its answers out from layer 7 on."""
SIDE = 384
"""Side of training scenes: level 1 shows them as they are, and larger scenes at this size."""
SLOTS = 12  # questions in a sequence
LENGTH = 12  # tokens of the longest question and its answer
_THINNED = 0.7  # share of the run in which half of the tiles' tokens are left out, to save time


@dataclass(frozen=True, eq=False)
class Packed:
    """Prompts about some scenes, embedded.

    Args:
        hidden: (B, T, D) <bos>, thumbnail, tiles' tokens, then `SLOTS` questions with answers.
        positions: (B, T); every question follows the image.
        mask: (B, 1, T, T) added to attention scores.
        rows: (R,) the last token of every question.
        visual: columns of visual tokens.
        local: those of tiles, counted from the first of `visual`.
        answers: (B, R) what should come next there.
    """

    hidden: Tensor
    positions: Tensor
    mask: Tensor
    rows: Tensor
    visual: slice
    local: slice
    answers: Tensor


def pack(reader: Reader, scenes: Sequence[tuple[Scene, Sequence[Question]]], thin: bool) -> Packed:
    """Embed scenes with their questions.

    Args:
        reader: for the model.
        scenes: each with `SLOTS` questions.
        thin: leave out half of the tiles' tokens, the same ones in all scenes.
    """
    words, embed = [], reader.model.get_input_embeddings()
    images = []
    for scene, questions in scenes:
        images.append(_visual(reader, scene))
        words.append(torch.stack([_words(question) for question in questions]))
    ids = torch.stack(words)
    thumbnails, locals_ = (torch.stack(part) for part in zip(*images, strict=True))
    if thin:
        count = locals_.shape[1]
        locals_ = locals_[:, torch.randperm(count)[: count // 2].sort().values]
    bos = embed(torch.full((len(ids), 1), BOS))
    text = embed(ids.flatten(1))
    hidden = torch.cat((bos, *(x.to(bos.dtype) for x in (thumbnails, locals_)), text), 1)
    prefix = hidden.shape[1] - SLOTS * LENGTH
    real = ids != PAD
    after = prefix + (real.cumsum(-1) - 1).clamp(min=0).flatten(1)
    positions = torch.cat((torch.arange(prefix).expand(len(ids), -1), after), 1)
    rows = prefix + torch.arange(SLOTS) * LENGTH + LENGTH - 2
    local = slice(thumbnails.shape[1], prefix - 1)
    mask = _mask(prefix, real.flatten(1))
    return Packed(hidden, positions, mask, rows, slice(1, prefix), local, ids[:, :, -1])


def _visual(reader: Reader, scene: Scene) -> tuple[Tensor, Tensor]:
    """(V, D) tokens of the thumbnail, and of level 1."""
    image = Held(scene.image)
    pyramid = levels(image.size, reader.tile)
    thumbnail = reader.encode(image, pyramid[0], [[0, 0]]).flatten(0, 2)
    return thumbnail, reader.look(image, pyramid[1], pyramid[1].tiles()).values


def _words(question: Question) -> Tensor:
    """(LENGTH) a question and its answer, padded on the left."""
    ids = [WORD_ID[word] for word in (*question.text.split(), question.answer)]
    return torch.tensor([PAD] * (LENGTH - len(ids)) + ids)


def _mask(prefix: int, real: Tensor) -> Tensor:
    """(B, 1, T, T) causal; a question sees the image and itself, nothing sees padding."""
    own = torch.arange(SLOTS).repeat_interleave(LENGTH)
    slot = torch.cat((torch.full((prefix,), -1), own))
    seen = (slot[:, None] == slot) | (slot == -1)
    seen = seen.tril() & F.pad(real, (prefix, 0), value=True)[:, None]
    seen = seen | torch.eye(len(slot), dtype=torch.bool)  # padding sees itself
    return torch.zeros(seen.shape).masked_fill(~seen, -1e9)[:, None]


def taught(model: Any, packed: Packed, layers: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Attention scores of some layers, and the logits at answers and after them.

    Returns:
        Layer -> (B, H, R, V), and (B, 2 R, vocabulary).
    """
    text, hidden, found = model.model.language_model, packed.hidden, {}
    rotary = text.rotary_emb(hidden, position_ids=packed.positions)
    for number, layer in enumerate(text.layers):
        if number in layers:
            found[number] = attention_logits(layer, hidden, rotary, packed.rows, packed.visual)
        hidden = layer(
            hidden, attention_mask=packed.mask.to(hidden.dtype), position_embeddings=rotary
        )
    ends = torch.cat((packed.rows, packed.rows + 1))
    return found, model.lm_head(text.norm(hidden[:, ends]))


def losses(model: PreTrainedModel, focus: RegionFocus, packed: Packed) -> tuple[Tensor, Tensor]:
    """Loss of answers, and of the module's first and last layer against their sources."""
    pairs = (focus.sources[0], focus.sources[-1])
    teacher, logits = taught(model, packed, pairs)
    ends = torch.full_like(packed.answers, EOS)
    wanted = torch.cat((packed.answers, ends), 1)
    answer = F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
    hidden, mask = packed.hidden.detach(), packed.mask.to(packed.hidden.dtype)
    student = focus.logits(hidden, packed.positions, packed.rows, packed.visual, mask)
    distil = Distillation()
    terms = [
        distil(teacher[source].detach(), scores, packed.local)
        for source, scores in zip(focus.sources, student, strict=True)
        if source in pairs
    ]
    return answer, torch.stack(terms).mean()


def asked(scene: Scene, kinds: Sequence[str] = KINDS) -> list[Question]:
    """Questions of some kinds that have evidence, shuffled."""
    found = [q for q in scene.questions if q.kind in kinds and q.boxes]
    Random(scene.seed).shuffle(found)
    return found


def train(out: Path, steps: int, seed: int, batch: int = 2, rate: float = 3e-3) -> None:
    """Train the module and the language model, and write both.

    Args:
        out: folder; gets `model`, `focus` and `log.jsonl`.
        steps: optimizer steps.
        seed: of scenes and choices.
        batch: scenes in a step.
        rate: learning rate of Muon, which decays to zero.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(f"needs torch.optim.Muon (torch 2.9+), found {torch.__version__}")
    check_folder(out)
    torch.manual_seed(seed)
    model, processor = tiny.load()
    focus = RegionFocus.of(model, LAYERS).requires_grad_(True)
    reader = Reader(model, processor, focus)
    learn: Any = model.model
    learn.vision_tower.requires_grad_(False)
    learn.language_model.layers[:EARLY].requires_grad_(False)
    parts = (learn.language_model.layers, learn.multi_modal_projector, focus)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad and p.ndim == 2]
    optimizer = torch.optim.Muon(trained, lr=rate, weight_decay=0.0)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    with (out / "log.jsonl").open("w") as log:
        for step in range(steps):
            first = TRAIN_SEEDS + (seed * 10**6 + step) * batch
            scenes = [_scene(first + i) for i in range(batch)]
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 10) * (1 - step / steps)
            with mixed():
                packed = pack(reader, scenes, thin=step < _THINNED * steps)
                answer, distilled = losses(model, focus, packed)
            (answer + distilled).backward()
            optimizer.step()
            for module in (model, focus):
                module.zero_grad(set_to_none=True)
            told = {"step": step, "answer": answer.item(), "distillation": distilled.item()}
            log.write(json.dumps({**told, "cpu_s": round(time.process_time() - begun, 1)}) + "\n")
            log.flush()
    focus.save(out / "focus")
    with filling(out / "model") as stage:
        model.save_pretrained(stage)
        processor.save_pretrained(stage)


def _scene(seed: int) -> tuple[Scene, list[Question]]:
    scene = tiny.draw_scene(seed, objects=(6, 12), size=SIDE, per_kind=6)
    questions = asked(scene)
    return scene, (questions * SLOTS)[:SLOTS]


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model and the module.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 130,
    seed: Annotated[int, typer.Option(help="Seed of scenes and choices.")] = 0,
) -> None:
    """Train the module and adapt the tiny model; about two CPU seconds a step."""
    train(out, steps, seed)


if __name__ == "__main__":
    typer.run(main)
