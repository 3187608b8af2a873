"""A tiny random pi0, observations for it, and an oracle of its actions.

The oracle runs a whole control step by plain loops: one row, no padding, no cache, no compaction.
All tokens stay in place; one that is removed before a layer is seen by nobody from there on,
neither in PaliGemma nor in the action expert. Attention, rotary positions and steps of denoising
are written out here; only what enters PaliGemma's layer 0 comes from the unpatched model.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import PI0Config, PI0ForConditionalGeneration

from tests.conformance.zoo.paligemma import SIGLIP, TEXT

VISUAL, IMAGE, SIDE = 16, 96, 32  # the placeholder is beyond the vocabulary, as in real checkpoints
CHUNK, STATE, ACTION, STEPS = 5, 6, 7, 3
ROWS = ((2, 4), (1, 3), (0, 5))  # cameras, and words after them, of each row


def config():
    return PI0Config(
        vlm_config={
            "model_type": "paligemma", "vision_config": {**SIGLIP, "patch_size": 8},
            "text_config": {**TEXT, "model_type": "gemma"}, "image_token_id": IMAGE,
            "projection_dim": 64, "hidden_size": 64,
        },
        dit_config={
            **TEXT, "model_type": "gemma", "hidden_size": 48, "intermediate_size": 80,
        },
        chunk_size=CHUNK, max_state_dim=STATE, max_action_dim=ACTION, num_inference_steps=STEPS,
    )  # fmt: skip


def build(attention="sdpa"):
    """A policy, always with the same weights, whose attention is peaked and whose tower matters."""
    torch.manual_seed(0)
    model = PI0ForConditionalGeneration._from_config(config(), attn_implementation=attention)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1:
                language = "language_model" in path or "dit" in path
                scale = 0.15 if language else 1.5 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn_like(weight) * scale)
            elif "norm" in path:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


@functools.cache
def policy(attention="sdpa"):
    return build(attention)


# -- observations


def observation(cameras=2, words=4, seed=0):
    """One row without padding: placeholders of all cameras, and an instruction."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 80, (words,), generator=generator).tolist()
    ids = torch.tensor([[IMAGE] * VISUAL * cameras + text])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, max(cameras, 1), 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": torch.arange(max(cameras, 1))[None] < cameras,
        "state": torch.randn(1, STATE, generator=generator),
        "noise": torch.randn(1, CHUNK, ACTION, generator=generator),
    }


def rows_of(sizes=ROWS):
    return [observation(*size, seed=number) for number, size in enumerate(sizes)]


def batch(rows, side="right"):
    """One batch of rows, padded with tokens on a side, and with cameras.

    Cameras that are missing come first in every second row, as the mask allows.
    """
    width = max(row["input_ids"].shape[1] for row in rows)
    cameras = max(row["pixel_values"].shape[1] for row in rows)

    def tokens(x):
        gap = width - x.shape[1]
        return torch.nn.functional.pad(x, (0, gap) if side == "right" else (gap, 0))

    def views(x, number):
        gap = x.new_zeros(1, cameras - x.shape[1], *x.shape[2:])
        return torch.cat((gap, x) if number % 2 else (x, gap), 1)

    together = {name: torch.cat([row[name] for row in rows]) for name in ("state", "noise")}
    for name in ("input_ids", "attention_mask"):
        together[name] = torch.cat([tokens(row[name]) for row in rows])
    for name in ("pixel_values", "pixel_attention_mask"):
        together[name] = torch.cat([views(row[name], n) for n, row in enumerate(rows)])
    return together


# -- the oracle


@dataclass
class Cut:
    """What survives before a layer.

    Args:
        layer: the layer, of PaliGemma and of the expert; 0 for the input.
        kept: for each camera of the row, raster positions among all its tokens.
        renumber: whether positions close up.
        forget: whether earlier layers of the expert no longer see it either.
    """

    layer: int
    kept: list
    renumber: bool = False
    forget: bool = False


@torch.no_grad()
def actions(row, cuts=(), steps=STEPS, embeds=None, first=0):
    """(CHUNK, ACTION) that one row without padding leads to.

    Args:
        row: the observation.
        cuts: what is removed where.
        steps: of denoising.
        embeds: (1, T, D) input of PaliGemma's layer 0, if not the unpatched model's.
        first: position of the first token of the prompt.
    """
    known, noise = prefix(row, cuts, embeds, first), row["noise"][0]
    for step in range(steps):
        noise = noise - velocity(row, noise, 1.0 - step / steps, known) / steps
    return noise


def prefix(row, cuts, embeds=None, first=0):
    """Of each layer, keys and values (g, T, d) of the prompt, (T) which of them the expert sees
    there, and the position of the first token after them.
    """
    model = policy()
    if embeds is None:
        names = ("input_ids", "pixel_values", "pixel_attention_mask")
        embeds = model.model.embed_prefix(*(row[name] for name in names))
    hidden, text = embeds[0], model.model.vlm.language_model
    length = len(hidden)
    alive, shift = torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.long)
    columns = (row["input_ids"][0] == IMAGE).nonzero()[:, 0].split(VISUAL)
    cached, sees, starts = [], [], []
    for number, layer in enumerate(text.layers):
        for cut in (cut for cut in cuts if cut.layer == number):
            gone = torch.zeros(length, dtype=torch.bool)
            for where, kept in zip(columns, cut.kept, strict=True):
                gone[where] = True
                gone[where[kept]] = False
            if cut.renumber:
                shift = shift + (gone & alive).long().cumsum(0)
            alive = alive & ~gone
            if cut.forget:
                sees = [seen & alive for seen in sees]
        q, k, v = projected(layer, hidden, first + torch.arange(length) - shift)
        mask = alive.expand(length, length) | torch.eye(length, dtype=torch.bool)  # stay finite
        hidden = finished(layer, hidden, q, k, v, mask)
        cached.append((k, v))
        sees.append(alive)
        starts.append(length - int(shift[-1]))
    return list(zip(cached, sees, starts, strict=True))


def velocity(row, noise, time, known):
    """(CHUNK, ACTION) that the expert predicts of noisy actions.

    Args:
        row: the observation.
        noise: (CHUNK, ACTION) the noisy actions.
        time: of denoising, from 1 to 0.
        known: what `prefix` returns.
    """
    model = policy()
    hidden = model.embed_action_time(row["state"], noise[None], torch.tensor([time]))[0]
    count = len(hidden)
    own = torch.ones(count, count, dtype=torch.bool)
    own[0, 1:] = False  # the state sees no actions
    for layer, ((keys, values), seen, start) in zip(model.model.dit.layers, known, strict=True):
        q, k, v = projected(layer, hidden, start + torch.arange(count))
        k, v = torch.cat((keys, k), 1), torch.cat((values, v), 1)
        mask = torch.cat((seen.expand(count, -1), own), 1)
        hidden = finished(layer, hidden, q, k, v, mask)
    return model.action_out_proj(model.model.dit.norm(hidden)[-CHUNK:])


def projected(layer, hidden, positions):
    """Rotated queries and keys, and values: (heads, T, d)."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    width = attention.head_dim
    q, k, v = (
        matrix(normed).view(len(hidden), -1, width).transpose(0, 1)
        for matrix in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    theta = attention.config.rope_parameters["rope_theta"]
    inverse = 1 / theta ** (torch.arange(0, width, 2) / width)
    angle = torch.outer(positions.float(), inverse).repeat(1, 2)

    def rotate(x):
        first, second = x.chunk(2, -1)
        return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()

    return rotate(q), rotate(k), v


def finished(layer, hidden, q, k, v, mask):
    """(T, D) output of a layer."""
    groups = len(q) // len(k)
    scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    mixed = (weights @ v.repeat_interleave(groups, 0)).transpose(0, 1).reshape(len(hidden), -1)
    hidden = hidden + layer.self_attn.o_proj(mixed)
    return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
