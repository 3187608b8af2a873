"""Batches for training on several images per conversation.

All samples of a batch have one layout: images, after each but the last the same number of words
(an answered example, or none), and then slots of questions that share all of that.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.tiny.build import EOS, PAD, PATCH, SIZE
from foveate.tiny.sequences import (
    Sequence,
    SequenceQuestion,
    draw_album,
    draw_events,
    draw_order,
    draw_rule,
)
from recipes import packed
from recipes.data import GROUPS, IGNORE, WORD_ID, normalise

_LENGTH = 12  # tokens of a slot
_WORDY = (35, 15, 20, 30)


@dataclass(frozen=True)
class SequenceBatch:
    """`B` samples of `N` images of `V` patches; `E` words between images; `S` slots of `C`.

    Args:
        pixels: (B, N, H, W, 3) uint8.
        ink: (B, N, V) object pixels per patch.
        between: (B, N - 1, E) token ids after every image but the last.
        words: (B, S, C) token ids.
        labels: (B, S, C) the next token where it is part of an answer, else `IGNORE`.
        groups: (B, S, C) index into `GROUPS` where an answer is predicted, else -1.
    """

    pixels: Tensor
    ink: Tensor
    between: Tensor
    words: Tensor
    labels: Tensor
    groups: Tensor


@dataclass(frozen=True)
class Lesson:
    """One sort of batches.

    Args:
        draw: draws a sample from a seed.
        size: samples in a batch.
        slots: questions per sample.
        keep: visual tokens of an image while not all are shown.
    """

    draw: Callable[[int], Sequence]
    size: int
    slots: int
    keep: int


def _album(seed: int) -> Sequence:
    mix = Random(seed).choice((_WORDY, (50, 15, 35, 0)))
    return draw_album(seed, 2 + seed // 1024 % 3, mix=mix)


def _events(seed: int) -> Sequence:
    return draw_events(seed, 2 + seed // 1024 % 3, objects=(2, 6))


def _order(seed: int) -> Sequence:
    return draw_order(seed, 3 + seed // 1024 % 2)


def _rule(seed: int) -> Sequence:
    return draw_rule(seed, 2 + seed // 1024 % 2)


LESSONS = {
    "album": Lesson(_album, 8, 20, 48),
    "events": Lesson(_events, 12, 8, 40),
    "order": Lesson(_order, 10, 6, 32),
    "rule": Lesson(_rule, 20, 1, 32),
}
"""What is taught with several images. Seeds of one batch agree in `seed // 1024`, and with that
in the number of images."""


def make_sequences(lesson: Lesson, seeds: Listed[int]) -> SequenceBatch:
    """Draw samples and pack their questions.

    Args:
        lesson: what to draw.
        seeds: one sample each; all with the same number of images.
    """
    rows = []
    for seed in seeds:
        sample = lesson.draw(seed)
        pixels = np.stack([np.array(image) for image in sample.images])
        ink = np.stack([_ink(owner) for owner in sample.owners])
        rows.append((pixels, ink, *_pack(sample, lesson, Random(seed))))
    return SequenceBatch(
        *(torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    )


def _ink(owner: np.ndarray) -> np.ndarray:
    side = SIZE // PATCH
    return (owner >= 0).reshape(side, PATCH, side, PATCH).sum((1, 3)).reshape(-1)


def _ids(question: SequenceQuestion) -> list[int]:
    return [WORD_ID[word] for word in (*question.text.split(), question.answer)]


def _pack(sample: Sequence, lesson: Lesson, rng: Random) -> tuple[np.ndarray, ...]:
    """Lay questions into slots, those of rare kinds as often as those of frequent ones."""
    questions, between = list(sample.questions), []
    if questions[0].kind == "rule":
        between = [[*_ids(question), EOS] for question in questions[:-1]]
        questions = questions[-1:]
    else:
        between = [[] for _ in sample.images[1:]]
    shape = (lesson.slots, _LENGTH)
    words, labels = np.full(shape, PAD, np.int64), np.full(shape, IGNORE, np.int64)
    groups = np.full(shape, -1, np.int64)
    kinds: dict[str, list[SequenceQuestion]] = {}
    for question in rng.sample(questions, len(questions)):
        kinds.setdefault(question.kind, []).append(question)
    for slot in range(lesson.slots):
        pool = kinds[rng.choice(list(kinds))]
        pool.append(pool.pop(0))
        ids = _ids(pool[-1])
        end = len(ids) - 1
        words[slot, : end + 1] = ids
        labels[slot, end - 1 : end + 1] = ids[-1], EOS
        groups[slot, end - 1] = GROUPS.index(pool[-1].kind)
    return np.array(between, np.int64).reshape(len(between), -1), words, labels, groups


def answer_sequences(
    model: LlavaForConditionalGeneration, batch: SequenceBatch, keep: int | None = None
) -> tuple[Tensor, Tensor]:
    """Answer every question; the vision tower gets no gradient.

    Args:
        model: the tiny VLM.
        batch: the batch.
        keep: visual tokens of an image: all that show an object as far as they fit, and random
            others; None keeps all.

    Returns:
        (B, S * C, vocabulary) logits, and the attention that the early layers pay to the prefix.
    """
    count, images = batch.ink.shape[:2]
    with torch.no_grad():
        states, _ = packed.see(model.model.vision_tower, normalise(batch.pixels.flatten(0, 1)))
    visual = packed.project(model, states).unflatten(0, (count, images))
    order = (batch.ink > 0).float() + torch.rand(batch.ink.shape)
    kept = order.topk(keep or order.shape[-1], -1).indices.sort(-1).values
    visual = visual.gather(2, kept[..., None].expand(*kept.shape, visual.shape[-1]))
    text = model.get_input_embeddings()(batch.between).to(visual.dtype)
    extra = text.shape[2]
    stride = batch.ink.shape[2] + extra
    starts = 1 + stride * torch.arange(images)
    places = kept + starts[:, None]
    after = starts[:-1, None] + batch.ink.shape[2] + torch.arange(extra)
    parts, positions = [], []
    for n in range(images):
        parts.append(visual[:, n])
        positions.append(places[:, n])
        if extra and n < images - 1:
            parts.append(text[:, n])
            positions.append(after[n].expand(count, -1))
    start = 1 + stride * images - extra
    return packed.read(model, torch.cat(parts, 1), torch.cat(positions, 1), batch.words, start)
