"""The computations of `foveate.voxels` on dense grids, where absent voxels are masked out.

A grid is a pair: features (B, C, X, Y, Z), which are 0 at absent voxels, and (B, X, Y, Z) which are
there. Attention is written out from its equation.
"""

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from foveate.voxels import SparseVoxels

SIDE = 8


@st.composite
def voxel_sets(draw, channels=4, strides=(1,), dtype=torch.float64):
    """Voxels of one to three scenes at each stride, all on a grid of 8 x 8 x 8 fine voxels."""
    scenes, made = draw(st.integers(1, 3)), []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for stride in strides:
        cells = (SIDE // stride) ** 3
        rows = []
        for scene in range(scenes):
            for cell in sorted(draw(st.sets(st.integers(0, cells - 1), min_size=1, max_size=24))):
                rows.append((scene, *(stride * n for n in unravelled(cell, SIDE // stride))))
        order = torch.randperm(len(rows), generator=generator)
        features = torch.randn(len(rows), channels, generator=generator, dtype=dtype)
        made.append(SparseVoxels(torch.tensor(rows)[order], features, stride))
    return made


def unravelled(cell, side):
    return cell // side**2, cell // side % side, cell % side


def dense(voxels):
    """The grid of sparse voxels."""
    side, scenes = SIDE // voxels.stride, len(voxels.counts)
    scene, x, y, z = (voxels.coordinates // torch.tensor([1] + [voxels.stride] * 3)).unbind(1)
    features = voxels.features.new_zeros(scenes, side, side, side, voxels.features.shape[1])
    there = torch.zeros(scenes, side, side, side, dtype=torch.bool)
    features[scene, x, y, z] = voxels.features
    there[scene, x, y, z] = True
    return features.movedim(-1, 1), there


def assert_same(voxels, grid, **tolerance):
    """Sparse voxels are those of the grid, with its features."""
    features, there = grid
    mine, at = dense(voxels)
    assert torch.equal(at, there)
    torch.testing.assert_close(mine, masked(features, there), **tolerance)


def masked(features, there):
    return torch.where(there[:, None], features, torch.zeros_like(features))


def kernel_of(layer):
    k = layer.kernel
    return layer.weight.view(k, k, k, layer.inputs, layer.outputs)


def conv(layer, grid):
    """A `SparseConv`."""
    features, there = grid
    weight = kernel_of(layer).permute(4, 3, 0, 1, 2)
    before = (layer.kernel - 1) // 2
    padded = F.pad(features, (before, layer.kernel - 1 - before) * 3)
    made = F.conv3d(padded, weight, layer.bias, stride=layer.stride)
    if layer.stride == 2:
        there = F.max_pool3d(there[:, None].double(), 2)[:, 0] > 0
    made = made[..., : there.shape[1], : there.shape[2], : there.shape[3]]
    return masked(made, there), there


def upsample(layer, grid):
    """A `GenerativeUpsample`."""
    features, there = grid
    weight = kernel_of(layer).permute(3, 4, 0, 1, 2)
    pad = {"stride": 2, "padding": (layer.kernel - 1) // 2, "output_padding": layer.kernel % 2}
    made = F.conv_transpose3d(features, weight, layer.bias, **pad)
    ones = torch.ones_like(weight[:1, :1])
    there = F.conv_transpose3d(there[:, None].to(ones), ones, **pad)[:, 0] > 0
    return masked(made, there), there


def norm_relu(layer, grid):
    features, there = grid
    norm = layer.norm
    shape = (1, -1, 1, 1, 1)
    scaled = (features - norm.running_mean.view(shape)) / (
        norm.running_var.view(shape) + norm.eps
    ).sqrt()
    made = (scaled * norm.weight.view(shape) + norm.bias.view(shape)).clamp(min=0)
    return masked(made, there), there


def conv_block(block, grid):
    return norm_relu(block[1], conv(block[0], grid))


def attend(layer, query, key, value, real):
    """softmax(q k / sqrt(d)) v, each head for itself; keys that are not real are left out."""
    w, b = layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)
    size = query.shape[-1] // layer.num_heads
    heads = [
        (x @ weight.T + bias).unflatten(-1, (-1, size)).transpose(1, 2)
        for x, weight, bias in zip((query, key, value), w, b, strict=True)
    ]
    scores = heads[0] @ heads[1].mT / size**0.5
    share = scores.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    return layer.out_proj((share @ heads[2]).transpose(1, 2).flatten(2))


def fuse(fusion, grid, words, mask, stride):
    """A `TextFusion` over every cell of the grid."""
    features, there = grid
    cells = torch.stack(torch.meshgrid(*[torch.arange(n) for n in there.shape[1:]], indexing="ij"))
    metres = cells.flatten(1).T.to(features) * stride * fusion.voxel_size
    x, place, real = features.flatten(2).mT, fusion.places(metres), there.flatten(1)
    for layer in fusion.layers:
        a, norm, mlp = layer.attention, layer.norm, layer.mlp
        x = norm["voxels"](x + attend(a["voxels"], x + place, x + place, x, real))
        words = norm["words"](words + attend(a["words"], words, words, words, mask))
        w = norm["words_to_voxels"](words + attend(a["words_to_voxels"], words, x, x, real))
        v = norm["voxels_to_words"](x + attend(a["voxels_to_words"], x + place, words, words, mask))
        x = norm["voxels_mlp"](v + mlp["voxels"](v))
        words = norm["words_mlp"](w + mlp["words"](w))
    return (masked(x.mT.unflatten(2, there.shape[1:]), there), there), words


def logits_of(score, grid):
    """(B, X, Y, Z), -inf where there is no voxel."""
    features, there = grid
    return score(features.movedim(1, -1))[..., 0].masked_fill(~there, -torch.inf)


def pruned(pruning, grid, logits):
    features, there = grid
    keep = there & (logits.sigmoid() > pruning.threshold)
    for scene, row in enumerate(logits):
        keep[scene].view(-1)[row.argmax()] = True
    return masked(features, keep), keep


def mean_around(grid):
    features, there = grid
    ones = torch.ones(1, 1, 3, 3, 3, dtype=features.dtype)
    number = F.conv3d(there[:, None].to(features), ones, padding=1)
    each = ones.expand(features.shape[1], 1, 3, 3, 3)
    total = F.conv3d(features, each, padding=1, groups=features.shape[1])
    return total / number.clamp(min=1)


def add_missing(addition, backbone, generated, fused, words, mask, stride):
    looked, words = fuse(addition.fusion, backbone, words, mask, stride)
    logits = logits_of(addition.score, looked)
    missing = (logits.sigmoid() > addition.threshold) & looked[1] & ~fused[1]
    new = looked[0] if addition.as_released else looked[0] + mean_around(generated)
    there = fused[1] | missing
    return masked(torch.where(missing[:, None], new, fused[0]), there), there, words


def refine(loop, levels, words, mask):
    """A `TwoLevelPruning` in inference."""
    strides = [level.stride for level in levels]
    grids = [dense(level) for level in levels]
    x, words = fuse(loop.pruning[1].fusion, grids[2], words, mask, strides[2])
    logits, x = logits_of(loop.pruning[1].score, x), conv_block(loop.lateral[2], x)
    for level in (1, 0):
        x = pruned(loop.pruning[level], x, logits)
        new = norm_relu(loop.up[level][1], upsample(loop.up[level][0], x))
        fused = masked(new[0] + grids[level][0], new[1]), new[1]
        if level:
            x, words = fuse(loop.pruning[0].fusion, fused, words, mask, strides[1])
            logits, x = logits_of(loop.pruning[0].score, x), conv_block(loop.lateral[1], x)
    *x, words = add_missing(loop.addition, grids[0], new, fused, words, mask, strides[0])
    return conv_block(loop.out, conv_block(loop.lateral[0], x)), words
