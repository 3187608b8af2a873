"""ToDRE's first stage, one image at a time: both rules read aloud, with distances to all picks
looked up again at each pick.
"""

import torch
import torch.nn.functional as F

from foveate.methods.todre import ToDRE


def _transcription(tensors, keep, how):
    x = F.normalize(tensors["x"], dim=-1)
    distance = 1 - x @ x.T
    picked = [int(distance.sum(0).argmax())]
    while len(picked) < keep:
        far = how(distance[picked])
        far[picked] = -torch.inf
        picked.append(int(far.argmax()))
    return torch.tensor(sorted(picked))


def max_sum(tensors, keep):
    """Kept positions, ascending. `x` is (V, D)."""
    return _transcription(tensors, keep, lambda rows: rows.sum(0))


def k_center(tensors, keep):
    """Kept positions, ascending. `x` is (V, D)."""
    return _transcription(tensors, keep, lambda rows: rows.amin(0))


def inputs(v, batch, generator):
    """Random tokens of a 7B model."""
    return {"x": torch.randn(batch, v, 4096, generator=generator)}


CASES = {
    "todre": (max_sum, inputs, lambda keep: ToDRE(keep=keep)),
    "todre k-center": (k_center, inputs, lambda keep: ToDRE(keep=keep, rule="k-center")),
}
