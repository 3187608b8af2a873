"""Methods inside a ViT as papers have them, with attention maps where these are read.

Written from method cards. The model is a `ViTForImageClassification`; all return its logits.
"""

import torch
import torch.nn.functional as F


def run(model, pixels, mapped, within=None, after=None):
    """Logits of a ViT.

    Args:
        model: the model.
        pixels: (B, C, H, W).
        mapped: layers whose attention maps are made; others call the kernel.
        within: (number, input, map, x) -> x, between the attention and the MLP of those.
        after: (number, map, keys, x) -> x, after those.
    """
    x = model.vit.embeddings(pixels)
    for number, layer in enumerate(model.vit.layers):
        attention, normed, given = layer.attention, layer.layernorm_before(x), x
        query, key, value = (
            of(normed).unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2)
            for of in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = None
        if number in mapped:
            weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
            mixed = weights @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        if within is not None and weights is not None:
            x = within(number, given, weights, x)
        x = x + layer.mlp(layer.layernorm_after(x))
        if after is not None and weights is not None:
            x = after(number, weights, key, x)
    return model.classifier(model.vit.layernorm(x)[:, 0])


def take(x, index):
    """(B, 1 + K, D) the class token's row and those of (B, K) patches."""
    rows = torch.cat((torch.zeros_like(index[:, :1]), index + 1), 1)
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def gtp_vit(model, pixels, removed=8, alpha=0.1, neighbours=8):
    """GTP-ViT: dense weights of the graph, of which rows and columns go with tokens."""
    graph = None

    def within(number, given, weights, x):
        nonlocal graph
        if graph is None:
            graph = links(given[:, 1:], neighbours)
        itself = weights.diagonal(dim1=2, dim2=3).amax(1)
        order = (itself * weights.sum(2).amax(1))[:, 1:].argsort(1, descending=True)
        count = order.shape[1] - removed
        kept, gone = order[:, :count].sort(1).values, order[:, count:]
        rows = graph.gather(1, kept[..., None].expand(-1, -1, graph.shape[2]))
        given_on = rows.gather(2, gone[:, None].expand(-1, count, -1)) @ take(x, gone)[:, 1:]
        graph = rows.gather(2, kept[:, None].expand(-1, count, -1))
        x = take(x, kept)
        return torch.cat((x[:, :1], x[:, 1:] + alpha * given_on), 1)

    return run(model, pixels, range(len(model.vit.layers)), within=within)


def links(x, neighbours):
    """(B, V, V) weights of a graph of patches that touch or are alike, normed by degrees."""
    count = x.shape[1]
    side = int(count**0.5)
    at = torch.arange(count)
    row, column = at // side, at % side
    apart = (row[:, None] - row).abs().maximum((column[:, None] - column).abs())
    unit = F.normalize(x, dim=-1)
    likeness = (unit @ unit.mT).masked_fill(torch.eye(count, dtype=torch.bool), -torch.inf)
    like = torch.zeros_like(likeness).scatter(2, likeness.topk(neighbours).indices, 1.0)
    linked = ((like > 0) | (apart == 1)).to(x)
    norm = linked.sum(-1).rsqrt()
    return norm[:, :, None] * linked * norm[:, None]


def zero_tprune(model, pixels, keep=(0.8, 0.54, 0.3), layers=(2, 5, 8), rounds=(30, 5, 5)):
    """Zero-TPrune: similar tokens go first, then those with the fewest votes."""
    total = (model.config.image_size // model.config.patch_size) ** 2

    def votes(weights, times, there):
        vote = there[:, None, None].expand(-1, weights.shape[1], -1, -1).clone()
        vote[..., 0] = weights.shape[-1] ** 0.5
        for _ in range(times):
            vote = vote @ weights
        return vote[:, :, 0, 1:]

    def importance(vote):
        spread = (vote / vote.mean(-1, keepdim=True)).var(-1, correction=0)
        counts = (spread >= 0.01) & (spread <= 0.7)
        counts = torch.where(counts.any(1, keepdim=True), counts, True)[..., None].to(vote)
        return ((vote**2 * counts).sum(1) / counts.sum(1)).sqrt()

    def after(number, weights, key, x):
        count, left = x.shape[1] - 1, round(keep[layers.index(number)] * total)
        every = torch.ones_like(weights[:, 0, 0])
        order = importance(votes(weights, 1, every)).argsort(1, descending=True)
        more, less = order[:, : count - count // 2], order[:, count - count // 2 :]
        keys = F.normalize(key.mean(1)[:, 1:], dim=-1)
        mine, others = (
            keys.gather(1, of[..., None].expand(-1, -1, keys.shape[2])) for of in (less, more)
        )
        alike = (mine @ others.mT).amax(-1).topk((count - left) // 2).indices
        gone = torch.zeros(len(x), count + 1, dtype=torch.bool)
        gone = gone.scatter(1, less.gather(1, alike) + 1, True)
        weights = weights.masked_fill(gone[:, None, :, None] | gone[:, None, None], 0)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        scores = importance(votes(weights, rounds[layers.index(number)], (~gone).to(x)))
        scores = scores.masked_fill(gone[:, 1:], -torch.inf)
        return take(x, scores.topk(left).indices.sort(1).values)

    return run(model, pixels, layers, after=after)


def token_transforming(model, pixels, keep=(0.7, 0.46, 0.27), layers=(2, 5, 8), temperature=0.01):
    """Token Transforming: Y = W X with a dense W of all tokens.

    A token counts by what it has of the first ones, each of which all that are left share.
    """
    total = (model.config.image_size // model.config.patch_size) ** 2
    made = torch.eye(total).expand(len(pixels), -1, -1)

    def after(number, weights, key, x):
        nonlocal made
        left, tokens = round(keep[layers.index(number)] * total), x[:, 1:]
        chosen = weights[:, :, 0, 1:].mean(1).topk(left).indices.sort(1).values
        unit = F.normalize(tokens, dim=-1)
        anchors = unit.gather(1, chosen[..., None].expand(-1, -1, unit.shape[2]))
        sizes = (made / made.sum(1, keepdim=True)).sum(-1)
        shares = (anchors @ unit.mT / temperature).softmax(1) * sizes[:, None]
        mixing = shares / shares.sum(-1, keepdim=True)
        made = mixing @ made
        return torch.cat((x[:, :1], mixing @ tokens), 1)

    return run(model, pixels, layers, after=after)
