"""Attention of encoder layers as papers have it, one image at a time, written from method cards."""

import torch
import torch.nn.functional as F


def fastvggt(layer, into, ratio, protect):
    """(B, N, H, d) of a `LayerAttention`, merging into the rows `into`."""
    results = []
    for image in range(len(layer.query)):
        states, total = layer.states[image], layer.shape.rows
        protected = torch.arange(int(total * protect)) * (total // max(int(total * protect), 1))
        source = torch.tensor(sorted(set(range(total)) - set(into.tolist())))
        unit = (states / states.norm(dim=-1, keepdim=True)).bfloat16()
        best, partner = (unit[source] @ unit[into].T).max(-1)
        order = best.argsort(descending=True, stable=True)
        order = order[~torch.isin(source[order], protected)]
        goes, rest = order[: int(total * ratio)], order[int(total * ratio) :]

        def merged(x, goes=goes, rest=rest, source=source, partner=partner, protected=protected):
            x = x.transpose(0, 1).flatten(1)
            at = partner[goes][:, None].expand(-1, x.shape[1])
            means = x[into].scatter_reduce(0, at, x[source[goes]], "mean")
            return torch.cat((x[source[rest]], means, x[protected]))

        heads = layer.query.shape[1]
        query, key, value = (
            merged(part[image]).unflatten(1, (heads, -1)).transpose(0, 1)[None]
            for part in (layer.query, layer.key, layer.value)
        )
        mixed = layer.kernel(query, key, value, None)[0]
        out = mixed.new_empty(total, *mixed.shape[1:])
        left, targets = len(rest), len(into)
        out[source[rest]] = mixed[:left]
        out[into] = mixed[left : left + targets]
        out[source[goes]] = mixed[left + partner[goes]]
        out[protected] = mixed[left + targets :]
        results.append(out)
    return torch.stack(results)


def biformer(layer, regions, topk):
    """(B, N, H, d) of a `LayerAttention` without special rows, whose grid divides into regions."""
    height, width = layer.shape.grid
    tall, wide = height // regions, width // regions

    def windows(x):
        """(S^2, n, H, d) of (H, N, d)."""
        x = x.transpose(0, 1).unflatten(0, (regions, tall, regions, wide))
        return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    results = []
    for image in range(len(layer.query)):
        query, key, value = (windows(part[image]) for part in (layer.query, layer.key, layer.value))
        affinity = query.mean(1).flatten(1) @ key.mean(1).flatten(1).T
        chosen = affinity.topk(topk).indices
        keys, values = (part[chosen].flatten(1, 2).transpose(1, 2) for part in (key, value))
        mixed = layer.kernel(query.transpose(1, 2), keys, values, None)
        mixed = mixed.unflatten(1, (tall, wide)).unflatten(0, (regions, regions))
        results.append(mixed.transpose(1, 2).flatten(0, 3))
    return torch.stack(results)


def biformer_by_mask(layer, index, chosen):
    """The same by a boolean mask of all pairs, which computes all of them.

    Args:
        layer: as above.
        index: (R, n) patches of each region.
        chosen: (B, R, k) regions that each attends to.
    """
    total = layer.shape.rows
    region = torch.empty(total, dtype=torch.long)
    region[index.flatten()] = torch.arange(len(index)).repeat_interleave(index.shape[1])
    seen = torch.zeros(len(chosen), len(index), len(index), dtype=torch.bool)
    seen = seen.scatter(2, chosen, True)[:, region][:, :, region]
    query, key, value = layer.query, layer.key, layer.value
    return F.scaled_dot_product_attention(query, key, value, seen[:, None]).transpose(1, 2)
