"""An oracle for layers that compute less of visual tokens: everything computed, then masked."""

import math

import torch


def masked(layer, hidden, rotary, images, work, real, grid):
    """One row, everything computed: `images` are (columns, raster places) of each image."""
    attention, length = layer.self_attn, len(hidden)
    normed, width = layer.input_layernorm(hidden), attention.head_dim
    q, k, v = (
        project(normed).view(length, -1, width)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    cos, sin = rotary

    def rotate(x):
        return x * cos + torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1) * sin

    groups = len(q) // len(k)
    q, k, v = rotate(q), rotate(k).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    visual = torch.zeros(length, dtype=torch.bool)
    for columns, _ in images:
        visual[columns] = True
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & real
    allowed |= torch.eye(length, dtype=torch.bool)
    allowed &= ~(visual[:, None] & visual)
    for columns, places in images:
        frame, row, column = (
            places // (grid[0] * grid[1]),
            places // grid[1] % grid[0],
            places % grid[1],
        )
        near = frame[:, None] == frame
        for axis in (row, column):
            near &= (axis[:, None] - axis).abs() <= (work.window - 1) // 2
        allowed[columns[:, None], columns] = near
    mixed = torch.zeros(len(q), length, width)
    for head in range(len(q)):
        works = work.heads is None or work.heads[head]
        reads, may = works and work.reads_visual, allowed.clone()
        if not reads and work.renormalize:
            may &= ~visual | visual[:, None]
        scores = (q[head] @ k[head].T) / math.sqrt(width)
        weights = scores.masked_fill(~may, -torch.inf).softmax(-1)
        if not reads:
            weights = weights * ~visual
        mixed[head] = weights @ v[head]
        if not works:
            mixed[head, visual] = 0
    hidden = hidden + attention.o_proj(mixed.transpose(0, 1).reshape(length, -1))
    normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    neurons = mlp.act_fn(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    neurons[visual, int(neurons.shape[1] / work.mlp_divisor) :] = 0
    return hidden + mlp.down_proj(neurons)
