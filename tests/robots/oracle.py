"""An oracle of VLA-Cache on pi0: one row without padding, by plain loops over numbers.

What is taken over is found here anew, from pixels and from attention that is written out; nothing
is read of what the code under test decided. Layers, rotary positions and denoising are those of
`tests.policies`.
"""

import math
from dataclasses import dataclass

import torch

from tests.policies import (
    IMAGE,
    SIDE,
    STEPS,
    VISUAL,
    finished,
    observation,
    policy,
    projected,
    velocity,
)

PATCH, LAYERS = 8, 6
PLACES, READER = (1, 2, 3), 2  # 2, 6, 9 and 11 of 32 rounded up, of 6; and 15 of 32 rounded down


@dataclass
class Left:
    """What a step leaves: its row, keys and values of each layer, attention of the instruction,
    entropy of each layer, and the tokens that each layer took over.
    """

    row: dict
    cached: list
    attended: torch.Tensor
    entropy: list
    taken: list


@torch.no_grad()
def step(row, before=None, **rule):
    """(CHUNK, ACTION) of one row, and what the step leaves.

    Args:
        row: the observation.
        before: what the step before has left.
        **rule: fields of `VLACache`, where they differ from the paper's.
    """
    names = ("input_ids", "pixel_values", "pixel_attention_mask")
    hidden = policy().model.embed_prefix(*(row[name] for name in names))[0]
    visual = (row["input_ids"][0] == IMAGE).tolist()
    length, left = len(hidden), Left(row, [], None, [], [])
    gone = {} if before is None else taken_over(row, before, visual, **rule)
    here, hidden = torch.ones(length, dtype=torch.bool), hidden.clone()
    for number, layer in enumerate(policy().model.vlm.language_model.layers):
        for token in gone.get(number, ()):
            here[token] = False
        q, new_k, new_v = projected(layer, hidden[here], torch.arange(length)[here])
        k, v = (x.clone() for x in (before.cached[number] if before else (new_k, new_v)))
        k[:, here], v[:, here] = new_k, new_v
        every = torch.ones(int(here.sum()), length, dtype=torch.bool)
        hidden[here] = finished(layer, hidden[here], q, k, v, every)
        scores = q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)
        weights = (scores / q.shape[-1] ** 0.5).softmax(-1).mean(0)
        left.entropy.append(float(-(weights * weights.log()).sum(-1).mean()))
        if number == READER:
            words = ~torch.tensor(visual)[here]
            left.attended = weights[words].mean(0)
        left.cached.append((k, v))
        left.taken.append(int((~here).sum()))
    known = [((k, v), torch.ones(length, dtype=torch.bool), length) for k, v in left.cached]
    noise = row["noise"][0]
    for number in range(STEPS):
        noise = noise - velocity(row, noise, 1.0 - number / STEPS, known) / STEPS
    return noise, left


def steps(rows, **rule):
    """Of one row after another, actions and what the step leaves."""
    found, left = [], None
    for row in rows:
        actions, left = step(row, left, **rule)
        found.append((actions, left))
    return found


def taken_over(
    row, before, visual, similarity=0.996, static=150 / 256, relevant=100 / 256, layers=PLACES
):
    """Layer -> tokens that it and later ones take over."""
    if not torch.equal(row["input_ids"], before.row["input_ids"]):
        return {}
    columns = [token for token, is_visual in enumerate(visual) if is_visual]
    candidates = []
    for camera in range(len(columns) // VISUAL):
        mine = columns[camera * VISUAL : (camera + 1) * VISUAL]
        pictures = (of["pixel_values"][0, camera] for of in (before.row, row))
        cosines = like(*pictures)
        first = sorted(range(VISUAL), key=lambda i: (-cosines[i], i))[: round(static * VISUAL)]
        attended = [float(before.attended[token]) for token in mine]
        looked = sorted(range(VISUAL), key=lambda i: -attended[i])[: round(relevant * VISUAL)]
        still = [i for i in first if cosines[i] >= similarity and i not in looked]
        candidates += [mine[i] for i in still]
    candidates.sort(key=lambda token: float(before.attended[token]))
    shares = shares_of(before.entropy)
    gone, count = {}, 0
    for layer in layers:
        wanted = max(1, int(shares[layer] * len(candidates)))
        count = max(count, min(wanted, len(candidates)))
        gone[layer] = candidates[:count]
    return gone


def like(before, now):
    """Cosine of the pixels, from 0 to 1, of each patch; 1 where they are equal."""
    found = []
    for high in range(0, now.shape[1], PATCH):
        for wide in range(0, now.shape[2], PATCH):
            cells = (
                ((of[:, high : high + PATCH, wide : wide + PATCH] + 1) / 2).flatten().tolist()
                for of in (before, now)
            )
            one, two = cells
            size = math.hypot(*one) * math.hypot(*two)
            cosine = sum(a * b for a, b in zip(one, two, strict=True)) / max(size, 1e-8)
            found.append(1.0 if one == two else cosine)
    return found


def shares_of(entropy, growth=0.55):
    """Share of the candidates that each layer takes over."""
    span = max(entropy) - min(entropy)
    shares = [1 - (value - min(entropy)) / span for value in entropy]
    for number in range(1, len(shares)):
        rise = shares[number] - shares[number - 1]
        if rise > 0:
            shares[number] = shares[number - 1] + growth * rise
    return shares


# -- a scene


def film(cameras=2, words=4, seed=0, frames=4):
    """Observations of an arm, a bright square, that crosses a still picture; the state changes.

    At the second frame there is noise, more to the right, so that no patch is equal bit for bit;
    the second camera, if there is one, sees the arm from the third frame on.
    """
    first = observation(cameras, words, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    picture = torch.rand(first["pixel_values"].shape, generator=generator) * 2 - 1
    noise = torch.randn(picture.shape, generator=generator) * torch.linspace(0.02, 0.14, SIDE)
    rows = []
    for number in range(frames):
        row = {name: value.clone() for name, value in first.items()}
        now = picture + noise if number == 1 else picture.clone()
        for camera in range(cameras):
            if camera == 0 or number >= 2:
                now[:, camera, :, 8:20, 6 * number : 6 * number + 8] = 0.9
        row["pixel_values"] = now
        row["state"] = torch.randn(row["state"].shape, generator=generator)
        rows.append(row)
    return rows
