"""An independent oracle: the text model at full length, with removed tokens masked.

Nothing here uses foveate or the model's own attention code: a plain loop over the layers with
explicit softmax attention, no cache and no compaction. A removed token stays in the sequence, but
from the layer where it was removed on nobody attends to it.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tests.tinies import IMAGE


@dataclass
class Drop:
    """Before `layer`, keep `counts[i]` tokens of `images[i]`, ranked by the attention in layer
    `scored`.

    `query` is the position of the token that ranks (default: the prompt's last).
    """

    layer: int
    scored: int
    counts: list[int]
    renumber: bool = False
    images: list[int] | None = None
    query: int | None = None


@dataclass
class Spec:
    """What is removed from a row: given indices at the input, then drops.

    From the end of the prompt on, nobody sees what was removed in layers before `evict_cache`
    either, and from layer `glance` on each new token sees the half of the visual tokens that it
    attends to most in the layer before, first of all those that the token before it did not see.
    In `forgotten`, each entry is a position from which on nobody sees some others.
    """

    kept: list[Tensor] | None = None
    renumber: bool = False
    drops: list[Drop] = field(default_factory=list)
    evict_cache: int = 0
    glance: int = 0
    forgotten: list[tuple[int, Tensor]] = field(default_factory=list)


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(layer, hidden, position, alive):
    """Attention probabilities (H, T, T) over living keys, and values (H, T, d)."""
    attention, length = layer.self_attn, len(hidden)
    config, width = attention.config, attention.head_dim
    normed = layer.input_layernorm(hidden)
    q, k, v = (
        projection(normed).view(length, -1, width).transpose(0, 1)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    inverse = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
    angle = torch.outer(position.float(), inverse)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    groups = q.shape[0] // k.shape[0]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if getattr(config, "sliding_window", None) is not None:
        causal = causal.triu(1 - config.sliding_window)
    itself = torch.eye(length, dtype=torch.bool)  # removed rows stay finite
    scores = (q @ k.transpose(1, 2)) / width**0.5
    return scores.masked_fill(~(causal & alive | itself), -torch.inf).softmax(-1), v


@torch.no_grad()
def run(model, ids: Tensor, features: list[Tensor], spec: Spec, prompt: int):
    """Logits (T, vocab) of one row, and per drop the kept raster indices of each image.

    Args:
        ids: (T) prompt and teacher-forced continuation, without padding.
        features: projected features of each image.
        prompt: length of the prompt; its last token ranks.
    """
    text = model.model.language_model
    hidden = text.embed_tokens(ids)
    visual = (ids == IMAGE).nonzero()[:, 0]
    if len(visual):
        hidden[visual] = torch.cat(features).to(hidden)
    columns = list(visual.split([len(f) for f in features])) if len(visual) else []
    index = [torch.arange(len(f)) for f in features]
    length = len(ids)
    alive = torch.ones(length, dtype=torch.bool)
    shift = torch.zeros(length, dtype=torch.long)
    position = torch.arange(length)
    history = []

    def remove(image, chosen, renumber):
        before = alive.clone()
        alive[columns[image]] = False
        columns[image], index[image] = columns[image][chosen], index[image][chosen]
        alive[columns[image]] = True
        gone = (before & ~alive).long()
        return (gone.cumsum(0) - gone) if renumber else torch.zeros_like(shift)

    forgotten = torch.zeros(length, length, dtype=torch.bool)
    if spec.evict_cache and columns:  # known only at the end
        _, known = run(model, ids, features, replace(spec, evict_cache=0), prompt)
        left = [column[image] for column, image in zip(columns, known[-1], strict=True)]
        forgotten[prompt:, visual[~torch.isin(visual, torch.cat(left))]] = True
    if spec.kept is not None:
        for image, chosen in enumerate(spec.kept):
            shift += remove(image, chosen, spec.renumber)
        history.append([i.clone() for i in index])
    weights = {}
    unseen = torch.zeros(length, length, dtype=torch.bool)
    for start, gone in spec.forgotten:
        unseen[start:, gone] = forgotten[start:, gone] = True
    for number, layer in enumerate(text.layers):
        weights[number] = attend(layer, hidden, position - shift, alive)[0]
        for drop in spec.drops:
            if drop.layer != number:
                continue
            # Within one layer, a later turn ranks with what earlier turns have left in the cache.
            scores = (
                attend(layer, hidden, position - shift, alive)[0]
                if drop.scored == number
                else weights[drop.scored]
            )
            row = scores.mean(0)[prompt - 1 if drop.query is None else drop.query]
            moved = torch.zeros_like(shift)
            for image, count in zip(drop.images or range(len(features)), drop.counts, strict=True):
                chosen = _best(row[columns[image]], count)
                moved += remove(image, chosen, drop.renumber)
            shift = shift + moved
            history.append([i.clone() for i in index])
        if any(drop.layer == number for drop in spec.drops):  # later layers rank by what it sees
            weights[number] = attend(layer, hidden, position - shift, alive)[0]
        if spec.glance and number == spec.glance and columns:
            there, last = torch.cat(columns), set()
            for query in range(prompt, length):
                row = weights[number - 1].mean(0)[query, there].tolist()
                order = sorted(range(len(there)), key=lambda i: (i in last, -row[i]))
                last = set(order[: len(there) // 2])
                unseen[query, there[[i for i in range(len(there)) if i not in last]]] = True
        seen = alive & ~forgotten if number < spec.evict_cache else alive & ~unseen
        probabilities, v = attend(layer, hidden, position - shift, seen)
        mixed = (probabilities @ v).transpose(0, 1).reshape(length, -1)
        hidden = hidden + layer.self_attn.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(text.norm(hidden)), history


def _best(scores: Tensor, count: int) -> Tensor:
    """The highest scores, ascending; of those as good as equal to the least of them, the first."""
    least = scores.sort(descending=True).values[count - 1]
    near = least.abs() * 2**-20
    surely = (scores > least + near).nonzero()[:, 0]
    tied = ((scores - least).abs() <= near).nonzero()[:, 0]
    return torch.cat((surely, tied[: count - len(surely)])).sort().values
