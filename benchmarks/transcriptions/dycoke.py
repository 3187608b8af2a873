"""DyCoke's temporal merging, one video at a time, written from the definition."""

import torch

from foveate.methods.dycoke import DyCoke


def transcription(tensors, k):
    """Kept positions of (T, P, D) tokens `x`, where frames lose the share `k`."""
    x = tensors["x"].double()
    frames, cells = x.shape[:2]
    kept = []
    for first in range(0, frames, 4):
        kept += [first * cells + i for i in range(cells)]
        for t, other in ((first + 1, first), (first + 2, first), (first + 3, first + 2)):
            if t < frames:
                alike = torch.cosine_similarity(x[t], x[other], dim=-1).tolist()
                new = sorted(range(cells), key=alike.__getitem__)[: int((1 - k) * cells)]
                kept += [t * cells + i for i in sorted(new)]
    return torch.tensor(kept)


def inputs(v, batch, generator):
    """Random tokens of a 7B model in 16 frames."""
    return {"x": torch.randn(batch, 16, v // 16, 3584, generator=generator)}


def method(k):
    """The method with the same share."""
    return DyCoke(k=k)


CASES = {"dycoke": (lambda tensors, _: transcription(tensors, 0.7), inputs, lambda _: method(0.7))}
