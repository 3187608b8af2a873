"""EVS, one video at a time, written from the definition."""

import torch

from foveate.methods.evs import EVS


def transcription(tensors, keep):
    """Kept positions of (T, P, D) tokens `x`; `keep` tokens survive, a frame's at least."""
    x = tensors["x"].double()
    frames, cells = x.shape[:2]
    ranked = []
    for t in range(frames):
        for i in range(cells):
            if t == 0:
                value = 255.0
            else:
                now, before = x[t, i], x[t - 1, i]
                value = 1 - float(now @ before / (now.norm() * before.norm()).clamp(min=1e-8))
            ranked.append((-value, t * cells + i))
    return torch.tensor(sorted(i for _, i in sorted(ranked)[: max(keep, cells)]))


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, each frame much like the one before."""
    return {"x": _walk(batch, 16, v // 16, 3584, generator)}


def method(keep):
    """The method that keeps as many."""
    return EVS(keep=keep)


def _walk(batch, frames, cells, width, generator):
    steps = torch.randn(batch, frames, cells, width, generator=generator)
    return (steps * torch.linspace(1, 0.3, frames)[:, None, None]).cumsum(1)


CASES = {"evs": (transcription, inputs, method)}
