"""DivPrune, one image at a time, written from the paper's definition: of all tokens that are left,
take the one whose nearest picked token is farthest away.
"""

import torch
import torch.nn.functional as F

from foveate.methods.divprune import DivPrune


def transcription(tensors, keep):
    """Kept positions, ascending; `x` is (V, D)."""
    x = F.normalize(tensors["x"], dim=-1)
    distance = 1 - x @ x.T
    off = distance + torch.diag(torch.full((len(x),), torch.inf))
    picked = [int(off.amin(1).argmax())]
    while len(picked) < keep:
        nearest = distance[picked].amin(0)
        nearest[picked] = -torch.inf
        picked.append(int(nearest.argmax()))
    return torch.tensor(sorted(picked))


def inputs(v, batch, generator):
    """Random tokens of a 7B model."""
    return {"x": torch.randn(batch, v, 4096, generator=generator)}


def method(keep):
    """The method that keeps as many."""
    return DivPrune(keep=keep)


CASES = {"divprune": (transcription, inputs, method)}
