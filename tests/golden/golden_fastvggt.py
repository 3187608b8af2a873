"""FastVGGT: recorded merge maps of several frames, and a layer of attention with its weights."""

from functools import partial

import torch
import torch.nn.functional as F
from golden_case import Case, Check, assert_close, assert_same
from torch import Tensor

from foveate.core import LayerAttention, LayerShape
from foveate.methods.fastvggt import FastVGGT
from foveate.ops.merge_map import MergeMap, merge_map, one_of_each_cell, strided

FLOATS, MODEL = 1e-5, 1e-4  # absolute tolerances
SPECIAL = 5  # special tokens of each frame


def checks(case: Case) -> dict[str, Check]:
    found = {
        "token_merge_bipartite2d": {"map": _check_map, "values": _check_values},
        "attention": {"attention": _check_attention},
    }
    return {
        name: partial(check, case) for name, check in found[case.facts["params"]["kind"]].items()
    }


def _destinations(frames: int, grid: tuple[int, int], chosen: Tensor | None) -> Tensor:
    """Rows that others merge into, where every frame begins with special tokens."""
    length = SPECIAL + grid[0] * grid[1]
    parts = [torch.arange(length)]
    for frame in range(1, frames):
        parts.append(frame * length + torch.arange(SPECIAL))
        if chosen is not None:
            inside = one_of_each_cell(grid, 2, chosen[frame - 1 : frame], sheared=True)
            parts.append(frame * length + SPECIAL + inside[0])
    return torch.cat(parts)


def _grid(case: Case) -> tuple[int, int]:
    return case.facts["params"]["h"], case.facts["params"]["w"]


def _map(case: Case) -> MergeMap:
    arrays, params = case.arrays, case.facts["params"]
    chosen = None if params["no_rand"] else arrays["rand_cell_index"]
    into = _destinations(params["frames"], _grid(case), chosen)
    assert_same(into, arrays["dst_token_idx"].sort().values, "destinations")
    share = 0.1 if params["enable_protection"] else 0.0
    copies = strided(arrays["metric"].shape[1], share)
    if params["enable_protection"]:
        assert_same(copies, arrays["protected_token_idx"].sort().values, "protected")
    return merge_map(arrays["metric"], arrays["dst_token_idx"], params["r"], copies)


def _released(into: Tensor, total: int) -> Tensor:
    """Destinations in the order of a sort that is not stable."""
    marked = torch.zeros(1, total, 1, dtype=torch.long)
    marked[0, into] = -1
    return marked.argsort(dim=1)[0, : len(into), 0]


def _check_map(case: Case) -> None:
    arrays, merged = case.arrays, _map(case)
    assert merged.merged + len(merged.copies) == case.facts["params"]["out_tokens"]
    slot, into = merged.slot[0], arrays["dst_token_idx"]
    at = {int(slot[row]): row for row in into.tolist()}
    released = zip(
        arrays["merged_src_tokens"].tolist(), arrays["merged_dst_tokens"].tolist(), strict=True
    )
    ours = {
        row: at[int(slot[row])] for row in arrays["src_token_idx"].tolist() if int(slot[row]) in at
    }
    assert ours == dict(released), "which rows merge into which"
    alone = [row for row, s in enumerate(slot.tolist()) if s >= 0 and s not in at]
    assert_same(torch.tensor(alone), arrays["unmerged_src_tokens"].sort().values, "what is left")


def _check_values(case: Case) -> None:
    arrays, merged = case.arrays, _map(case)
    for name in ("x", "extra1", "extra2"):
        got = merged.merge(arrays[name][:, None])[:, 0]
        assert_close(_sorted(got), _sorted(arrays[f"merged_{name}"]), FLOATS, f"merged {name}")
        if name == "x":
            assert_close(merged.unmerge(got), arrays["unmerged_x"], FLOATS, "unmerged")


def _sorted(rows: Tensor) -> Tensor:
    """(M, D) rows of (1, M, D), by their first number: the release's order is not stable."""
    return rows[0][rows[0, :, 0].sort().indices]


def _check_attention(case: Case) -> None:
    arrays, params = case.arrays, case.facts["params"]
    for way in ("merged", "plain"):
        method = FastVGGT(ratio=params["merge_ratio"] if way == "merged" else 0.0)
        layer = _layer(case)
        mixed = _Framed(method).attend(None, layer)
        out = F.linear(mixed.flatten(2), arrays["w.proj.weight"], arrays["w.proj.bias"])
        assert_close(out, arrays[f"out_{way}"], MODEL, f"attention, {way}")
    assert params["rope"] is None


class _Framed(FastVGGT):
    """The method on frames that each begin with special tokens, which here count as patches."""

    def __init__(self, method: FastVGGT) -> None:
        super().__init__(ratio=method.ratio, as_released=True)

    def destinations(self, shape: LayerShape, chosen: Tensor | None = None) -> Tensor:
        return _released(_destinations(shape.frames, shape.grid, self.draw(shape)), shape.rows)


def _layer(case: Case) -> LayerAttention:
    arrays, params = case.arrays, case.facts["params"]
    x, heads = arrays["x"], params["heads"]
    made = F.linear(x, arrays["w.qkv.weight"], arrays["w.qkv.bias"])
    query, key, value = made.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if params["qk_norm"]:
        query, key = (
            F.layer_norm(part, part.shape[-1:], arrays[f"w.{n}_norm.weight"],
                         arrays[f"w.{n}_norm.bias"], 1e-5)
            for n, part in (("q", query), ("k", key))
        )  # fmt: skip
    shape = LayerShape(x.shape[1], 0, _grid(case), params["frames"], x.shape[2])

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)

    scaling, rows = query.shape[-1] ** -0.5, torch.arange(x.shape[1])[:, None]
    return LayerAttention(query, key, value, None, scaling, rows, x, shape, kernel)
