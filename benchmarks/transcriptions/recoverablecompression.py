"""Recoverable Compression, one image at a time, written from the published steps; outliers by their
definition, over all pairs of numbers.
"""

import torch
import torch.nn.functional as F

from foveate.methods.recoverablecompression import RecoverableCompression

TEXT = 64  # tokens of the question


def outliers(values, k):
    """How many of (N) numbers have a local outlier factor above 1.5."""
    distance = (values[:, None] - values).abs().fill_diagonal_(torch.inf)
    near = distance.topk(min(k, len(values) - 1), largest=False)
    reach = torch.maximum(near.values, near.values[:, -1][near.indices])
    density = 1 / (reach.mean(1) + 1e-10)
    return int((density[near.indices].mean(1) / density > 1.5).sum())


def transcription(tensors, keep=None):
    """(K, D) tokens of the filters in raster order, clusters, and one token for the rest.

    `joint_cls_attention` is (1, V), `encoder_keys` (1, H, V, d), `x` (V, D) and
    `question_embeddings` (Q, D). The image decides how many there are, whatever `keep` says.
    """
    x, seen = tensors["x"], tensors["joint_cls_attention"][0]
    keys = F.normalize(tensors["encoder_keys"][0].transpose(0, 1).flatten(1), dim=-1)
    text = F.normalize(tensors["question_embeddings"], dim=-1)
    asked = (F.normalize(x, dim=-1) @ text.T).mean(-1) / x.shape[-1] ** 0.5
    visual = seen.topk(max(outliers(seen, 20), 1)).indices
    lowered = asked.clone()
    lowered[visual] = asked.min()
    count = (len(x) - len(visual)) * outliers(lowered, 20) // len(x)
    main = torch.cat((visual, lowered.topk(count).indices)).unique()
    rest = torch.tensor([i for i in range(len(x)) if i not in set(main.tolist())])
    order = seen[rest].argsort(descending=True, stable=True)
    count = outliers(seen[rest], 10)
    centres, spare = rest[order[:count]], rest[order[count:]]
    found = [x[main]]
    for centre in centres:
        others = rest[rest != centre]
        likeness = keys[others] @ keys[centre] + 50 * asked[others]
        members = others[likeness.topk(min(32, len(others))).indices]
        found.append((x[centre] + seen[members] @ x[members])[None])
    if len(centres) and len(spare):
        found.append((seen[spare] @ x[spare])[None])
    return torch.cat(found)


def inputs(v, batch, generator):
    """Random signals of a CLIP ViT-L, tokens and text embeddings of a 7B model."""
    attention = torch.randn(batch, 1, v, generator=generator).mul(2).softmax(-1)
    return {
        "joint_cls_attention": attention,
        "encoder_keys": torch.randn(batch, 1, 16, v, 64, generator=generator),
        "x": torch.randn(batch, v, 4096, generator=generator),
        "question_embeddings": torch.randn(batch, TEXT, 4096, generator=generator),
        "question_mask": torch.ones(batch, TEXT, dtype=torch.bool),
    }


def method(keep=None):
    """The method, which finds by itself how many to keep."""
    return RecoverableCompression()


CASES = {"recoverable-compression": (transcription, inputs, method)}
