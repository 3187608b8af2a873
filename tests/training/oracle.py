"""An independent oracle of training: each sample alone, as the short sequence it becomes.

Nothing here uses foveate. A plain loop over the layers with explicit softmax attention runs one
sample at a time; at a drop the rows of removed tokens leave the tensors, and with them their
labels. The loss is next-token cross entropy of what is left.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Sample:
    """A conversation without padding.

    Args:
        embeds: (T, D) what the text model is given, with image features in place.
        labels: (T)
        images: columns of each image.
        positions: (..., T) position ids as the text model's rotary embedding takes them.
    """

    embeds: Tensor
    labels: Tensor
    images: list[Tensor]
    positions: Tensor


@dataclass
class Schedule:
    """Layer -> share of each image's original tokens that is left before it runs, rounded down.

    Tokens are ranked by the layer's own attention, averaged over heads and over the tokens before
    supervised spans.
    """

    keep: dict[int, float]
    renumber: bool


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(layer, hidden, rotary):
    """Attention probabilities (H, T, T) and values (H, T, d)."""
    attention, length = layer.self_attn, len(hidden)
    normed = layer.input_layernorm(hidden)
    q, k, v = (
        projection(normed).view(length, -1, attention.head_dim).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    cos, sin = (part[0] for part in rotary)
    groups = q.shape[0] // k.shape[0]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    scores = (q @ k.transpose(1, 2)) / attention.head_dim**0.5
    return scores.float().masked_fill(~causal, -torch.inf).softmax(-1).to(v.dtype), v


def logits_of(text, head, sample: Sample, schedule: Schedule):
    """Logits and labels of what is left of a sample, and per layer the kept raster indices."""
    hidden, labels = sample.embeds, sample.labels
    place = torch.arange(len(labels))  # original column of each row that is left
    positions, kept = sample.positions, []
    for number, layer in enumerate(text.layers):
        rotary = text.rotary_emb(hidden[None], position_ids=positions)
        if number in schedule.keep:
            supervised = labels != -100
            asks = (~supervised[:-1] & supervised[1:]).nonzero()[:, 0]
            if len(asks) and sample.images:
                with torch.no_grad():
                    row = attend(layer, hidden, rotary)[0].mean(0)[asks].mean(0)
                stays = torch.ones(len(labels), dtype=torch.bool)
                for image in sample.images:
                    here = torch.isin(place, image).nonzero()[:, 0]
                    count = max(int(len(image) * schedule.keep[number]), 1)
                    stays[here] = False
                    stays[here[row[here].topk(count).indices]] = True
                hidden, labels, place = hidden[stays], labels[stays], place[stays]
                positions = positions[..., stays]
                if schedule.renumber:
                    positions = torch.arange(len(labels)).expand_as(positions)
                rotary = text.rotary_emb(hidden[None], position_ids=positions)
            kept.append([place[torch.isin(place, image)] - image[0] for image in sample.images])
        hidden = block(layer, hidden, rotary)
    return head(text.norm(hidden)), labels, kept


def block(layer, hidden, rotary):
    """A decoder layer, for (T, D)."""
    probabilities, v = attend(layer, hidden, rotary)
    mixed = (probabilities @ v).transpose(0, 1).reshape(len(hidden), -1)
    hidden = hidden + layer.self_attn.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def given_loss_of(text, head, samples: list[Sample], kept: list[list[dict[int, Tensor]]]):
    """The loss of a batch in which somebody else has chosen; survivors stay at their positions.

    Args:
        kept: for each image of each sample, layer -> raster indices that are left before it.
    """
    total, predicted = 0.0, 0
    for sample, images in zip(samples, kept, strict=True):
        hidden, labels, positions = sample.embeds, sample.labels, sample.positions
        place = torch.arange(len(labels))
        for number, layer in enumerate(text.layers):
            stays = torch.ones(len(labels), dtype=torch.bool)
            for columns, chosen in zip(sample.images, images, strict=True):
                if number in chosen:
                    gone = columns[~torch.isin(columns - columns[0], chosen[number])]
                    stays &= ~torch.isin(place, gone)
            hidden, labels, place = hidden[stays], labels[stays], place[stays]
            positions = positions[..., stays]
            hidden = block(layer, hidden, text.rotary_emb(hidden[None], position_ids=positions))
        logits = head(text.norm(hidden))
        total = total + F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        predicted += int((labels[1:] != -100).sum())
    return total / predicted


def loss_of(text, head, samples: list[Sample], schedule: Schedule, items: int | None = None):
    """The loss of a batch, and per sample the kept indices.

    Args:
        items: divides the sum of the losses; by default the number of predicted tokens.
    """
    total, predicted, kept = 0.0, 0, []
    for sample in samples:
        logits, labels, chosen = logits_of(text, head, sample, schedule)
        total = total + F.cross_entropy(
            logits[:-1].float(), labels[1:], ignore_index=-100, reduction="sum"
        )
        predicted += int((labels[1:] != -100).sum())
        kept.append(chosen)
    return total / (items or predicted), kept
