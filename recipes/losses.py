"""What the tiny VLM is trained on: answers, and for the vision tower what every patch shows."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from foveate.tiny.build import EOS, PATCH, SIZE
from foveate.tiny.words import COLOURS, KINDS, PLACES, SHAPES, WORDS
from recipes import packed
from recipes.data import GROUPS, IGNORE, WORD_ID, Batch, Labelled, normalise

_SIDE = SIZE // PATCH
_SHARPNESS = 14.0  # cosine similarities are multiplied by this before the softmax
_EOS_WEIGHT = 0.1


class Probes(nn.Module):
    """Linear read-outs of the vision tower, used in training only and not shipped.

    Args:
        width: hidden size of the vision tower.
        present: number of labels the class token predicts.
    """

    def __init__(self, width: int, present: int = 27) -> None:
        super().__init__()
        self.kind = nn.Linear(width, 3 + len(SHAPES))
        self.tens = nn.Linear(width, 11)
        self.units = nn.Linear(width, 10)
        self.word = nn.Linear(width, len(WORDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.row = nn.Linear(width, _SIDE)
        self.column = nn.Linear(width, _SIDE)
        self.present = nn.Linear(width, present)


@dataclass(frozen=True)
class Seen:
    """What came out of the vision tower for a batch.

    Args:
        visual: (B, V, D) projected visual tokens.
        states: (B, 1 + V, D) states of the tower's last layer but one.
        summary: (B, D) class token after the last layer.
    """

    visual: Tensor
    states: Tensor
    summary: Tensor


def look(model: LlavaForConditionalGeneration, batch: Batch) -> Seen:
    """Run the vision tower and the projector over a batch."""
    states, summary = packed.see(model.model.vision_tower, normalise(batch.pixels))
    return Seen(packed.project(model, states), states, summary)


def _labels(device: torch.device) -> tuple[Tensor, ...]:
    """Labels of every kind, (KINDS,) each: group, tens, units, word.

    Groups are background (0), the shapes, numbers, words. Numbers below ten have tens of 10. What
    a kind does not have is ignored.
    """
    rows = []
    for kind in KINDS:
        number, word = kind.isdecimal(), kind in WORDS
        group = 2 + len(SHAPES) if word else 1 + (len(SHAPES) if number else SHAPES.index(kind))
        tens = IGNORE if not number else int(kind[0]) if len(kind) == 2 else 10
        units = int(kind[-1]) if number else IGNORE
        rows.append((group, tens, units, WORDS.index(kind) if word else IGNORE))
    return torch.tensor(rows, device=device).unbind(1)


def vision_loss(
    model: LlavaForConditionalGeneration, probes: Probes, seen: Seen, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Dense losses: kind, digits, colour, row and column of patches; words; image contents.

    Args:
        model: the tiny VLM.
        probes: linear read-outs.
        seen: its view of the batch.
        batch: the batch.

    Returns:
        The loss, and for the log how well kinds, numbers and colours of patches are told.
    """
    kinds, colours = batch.kinds.flatten(), batch.colours.flatten()
    states = seen.states[:, 1:].flatten(0, 1)
    on = colours != IGNORE
    groups, tens, units, words = _labels(kinds.device)
    coarse = torch.where(kinds < 0, 0, groups[kinds.clamp(min=0)])
    coarse = torch.where(kinds == IGNORE, IGNORE, coarse)
    shown, kind, colour = states[on], kinds[on], colours[on]
    kind_logits, colour_logits = probes.kind(states), probes.colour(shown)
    tens_logits, units_logits = probes.tens(shown), probes.units(shown)
    word_logits = probes.word(shown)
    cell = torch.arange(_SIDE, device=kinds.device).repeat_interleave(_SIDE)
    rows = cell.repeat(len(seen.states))
    columns = cell.view(_SIDE, _SIDE).T.flatten().repeat(len(seen.states))
    terms = [
        F.cross_entropy(kind_logits.float(), coarse, ignore_index=IGNORE),
        0.5 * F.cross_entropy(kind_logits[on].float(), coarse[on]),
        0.5 * F.cross_entropy(tens_logits.float(), tens[kind], ignore_index=IGNORE),
        0.5 * F.cross_entropy(units_logits.float(), units[kind], ignore_index=IGNORE),
        0.5 * _known(word_logits, words[kind]),
        0.5 * F.cross_entropy(colour_logits.float(), colour),
        0.3 * F.cross_entropy(probes.row(states).float(), rows),
        0.3 * F.cross_entropy(probes.column(states).float(), columns),
        F.binary_cross_entropy_with_logits(probes.present(seen.summary).float(), batch.present),
        _word_loss(model, seen.visual.flatten(0, 1), kinds, colours, rows, columns),
    ]
    number, word = tens[kind] != IGNORE, words[kind] != IGNORE
    tens_right, units_right = _right(tens_logits, tens[kind]), _right(units_logits, units[kind])
    stats = {
        "patch_kind": _right(kind_logits[on], coarse[on]).mean().item(),
        "patch_number": (tens_right * units_right)[number].mean().item(),
        "patch_colour": _right(colour_logits, colour).mean().item(),
    }
    if word.any():
        stats["patch_word"] = _right(word_logits, words[kind])[word].mean().item()
    return torch.stack(terms).sum(), stats


def _known(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy where there is a label; zero, not nan, where there is none at all."""
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def _right(logits: Tensor, target: Tensor) -> Tensor:
    return (logits.argmax(-1) == target).float()


def _word_loss(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    kinds: Tensor,
    colours: Tensor,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Pull visual tokens towards the words for their kind, their colour and their place."""
    words: Any = model.get_input_embeddings()
    table = F.normalize(words.weight.float(), dim=-1)
    visual = F.normalize(visual.float(), dim=-1)
    on = colours != IGNORE
    places = (3 * rows // _SIDE) * 3 + 3 * columns // _SIDE

    def loss(tokens: Tensor, names: tuple[str, ...], target: Tensor) -> Tensor:
        chosen = table[[WORD_ID[name] for name in names]]
        return F.cross_entropy(_SHARPNESS * tokens @ chosen.T, target)

    return (
        loss(visual[on], KINDS, kinds[on])
        + loss(visual[on], tuple(COLOURS), colours[on])
        + 0.3 * loss(visual, PLACES, places)
    )


def choose(batch: Batch, keep: int | None) -> Tensor:
    """Choose visual tokens for the curriculum: everything that shows an object, then others.

    Args:
        batch: the batch.
        keep: tokens per image; None keeps all.

    Returns:
        (B, K) ascending patch indices.
    """
    ink = batch.ink
    if keep is None:
        return torch.arange(ink.shape[1]).expand(len(ink), -1)
    order = (ink > 0).float() + torch.rand(ink.shape)
    return order.topk(keep, 1).indices.sort(1).values


def answer_logits(
    model: LlavaForConditionalGeneration,
    seen: Seen,
    batch: Batch,
    keep: int | None = None,
    skip: int = 0,
) -> tuple[Tensor, Tensor]:
    """Answer every question of a batch.

    Args:
        model: the tiny VLM.
        seen: its view of the batch.
        batch: the batch.
        keep: visual tokens per image; None keeps all.
        skip: layers of the language model to leave out at the bottom.

    Returns:
        (B, S * C, vocabulary) logits, and the attention that the early layers pay to the image.
    """
    index = choose(batch, keep)
    visual = seen.visual.gather(1, index[..., None].expand(-1, -1, seen.visual.shape[-1]))
    start = 1 + batch.ink.shape[1]
    return packed.read(model, visual, index + 1, batch.words, start, skip)


def answer_loss(logits: Tensor, batch: Labelled) -> Tensor:
    """Cross entropy of the answers, and with a small weight of the end after them."""
    labels = batch.labels.flatten()
    asked = labels != IGNORE
    target = labels[asked]
    losses = F.cross_entropy(logits.flatten(0, 1)[asked].float(), target, reduction="none")
    weights = torch.where(target == EOS, _EOS_WEIGHT, 1.0)
    return (losses * weights).sum() / weights.sum()


def tally(logits: Tensor, batch: Labelled) -> Tensor:
    """Count right answers and questions of every group: (2, groups)."""
    groups, labels = batch.groups.flatten(), batch.labels.flatten()
    asked = groups >= 0
    right = (logits.flatten(0, 1)[asked].argmax(-1) == labels[asked]).long()
    total = torch.zeros(2, len(GROUPS), dtype=torch.long)
    total[0].index_add_(0, groups[asked], right)
    total[1].index_add_(0, groups[asked], torch.ones_like(right))
    return total
