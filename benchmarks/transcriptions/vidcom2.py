"""VidCom2, one video at a time, written from the definition."""

import math

import torch
import torch.nn.functional as F

from foveate.methods.vidcom2 import VidCom2


def transcription(tensors, keep):
    """Kept positions of (T, P, D) tokens `x`; `keep` of a video's tokens are aimed at."""
    x = tensors["x"].double()
    frames, cells, width = x.shape
    variance = x.flatten(0, 1).var(0, correction=0)
    x = F.normalize(x[..., variance.argsort(stable=True)[: width // 2]], dim=-1)
    of_video = _kernels(x, x.mean((0, 1)))
    share = (-of_video.mean(1) / 0.01).softmax(0)
    base = keep if isinstance(keep, float) else keep / (frames * cells)
    kept = []
    for t in range(frames):
        rate = min(base * (1 + float(share[t]) - 1 / frames), 1)
        scores = of_video[t] + _kernels(x[t], x[t].mean(0))
        best = scores.argsort(stable=True)[: max(round(rate * cells), 1)]
        kept += [t * cells + i for i in best.tolist()]
    return torch.tensor(sorted(kept))


def _kernels(x, center):
    distance = (x - center).square().sum(-1)
    return sum(torch.exp(-distance / 2 / math.ldexp(1, k)) for k in range(-3, 2))


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames, each frame much like the one before."""
    steps = torch.randn(batch, 16, v // 16, 3584, generator=generator)
    return {"x": (steps * torch.linspace(1, 0.3, 16)[:, None, None]).cumsum(1)}


def method(keep):
    """The method that aims at as many; the share is that of all inputs here, a quarter."""
    return VidCom2(keep=0.25)


CASES = {"vidcom2": (transcription, inputs, method)}
