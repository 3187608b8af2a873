"""BiFormer: the recorded module, whose attention is the method's on its queries, keys, values."""

from functools import partial

import torch
import torch.nn.functional as F
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor

from foveate.core import LayerAttention, LayerShape
from foveate.methods.biformer import attend_routed, blocks, gathered, means, route

FLOATS, MODEL = 1e-5, 1e-4  # absolute tolerances


def checks(case: Case) -> dict[str, Check]:
    assert case.facts["params"]["kind"] == "BiLevelRoutingAttention"
    return {"routing": partial(_check_routing, case), "module": partial(_check_module, case)}


def _padded(case: Case) -> Tensor:
    """(B, H, W, C) of which both sides divide into regions, with zeros after them."""
    x, regions = case.arrays["x"], case.facts["params"]["n_win"]
    height, width = x.shape[1:3]
    if case.facts["params"]["auto_pad"]:
        return F.pad(x, (0, 0, 0, -width % regions, 0, -height % regions))
    return x


def _layer(case: Case) -> LayerAttention:
    params, x = case.facts["params"], _padded(case)
    heads, width = params["num_heads"], x.shape[-1]
    made = F.linear(x.flatten(1, 2), case.arrays["w.qkv.qkv.weight"], case.arrays["w.qkv.qkv.bias"])
    parts = made.split((params["qk_dim"], params["qk_dim"], width), -1)
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = params["scale"]
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2)

    height, wide = x.shape[1:3]
    shape = LayerShape(height * wide, 0, (height, wide), 1, width)
    states, rows = x.flatten(1, 2), torch.arange(height * wide)[:, None]
    scaling = params["scale"]
    return LayerAttention(query, key, value, None, scaling, rows, states, shape, kernel)


def _check_routing(case: Case) -> None:
    params, layer = case.facts["params"], _layer(case)
    index = blocks(layer.shape, params["n_win"])
    query, key = (gathered(part, index) for part in (layer.query, layer.key))
    chosen = route(query, key, index, params["topk"])
    assert_same(chosen, case.arrays["region_index"], "regions")
    query, key = (means(part, index).flatten(2) for part in (query, key))
    scores = (params["scale"] * query @ key.transpose(1, 2)).gather(2, chosen)
    assert_close(scores.softmax(-1), case.arrays["region_weight"], FLOATS, "weights of regions")


def _check_module(case: Case) -> None:
    params, arrays, layer = case.facts["params"], case.arrays, _layer(case)
    mixed = attend_routed(layer, blocks(layer.shape, params["n_win"]), params["topk"])
    grid, width = layer.shape.grid, layer.shape.width
    value = layer.value.transpose(2, 3).flatten(1, 2).unflatten(2, grid)  # (B, C, H, W)
    side = params["side_dwconv"]
    added = 0.0
    if side:
        weight, bias = arrays["w.lepe.weight"], arrays["w.lepe.bias"]
        added = F.conv2d(value, weight, bias, padding=side // 2, groups=width)
        added = added.permute(0, 2, 3, 1)
    out = mixed.flatten(2).unflatten(1, grid) + added
    out = F.linear(out, arrays["w.wo.weight"], arrays["w.wo.bias"])
    height, wide = arrays["x"].shape[1:3]
    assert_close(out[:, :height, :wide], arrays["out"], MODEL, "output")
