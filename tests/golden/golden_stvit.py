"""STViT: the block that makes semantic tokens, and the one that recovers the grid from them."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close

from foveate.ops.semantic import CrossBlock, semantic_tokens

NAMES = {
    "attn.q": "query", "attn.kv": "key_value", "attn.proj": "output", "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2", "norm1": "norm1", "norm2": "norm2",
}  # fmt: skip


def checks(case: Case) -> dict[str, Check]:
    made = case.facts["params"]["kind"] == "SemanticAttentionBlock"
    return {"made" if made else "recovered": partial(_check_made if made else _check_back, case)}


@torch.no_grad()
def _check_made(case: Case) -> None:
    params, arrays = case.facts["params"], case.arrays
    side = params["sample_window_size"] * params["grid"] // params["window_size"]
    grid = (params["grid"], params["grid"])
    seeds = arrays.get("semantic_in")  # where an earlier block has made some
    window = params["window_size"]
    got = semantic_tokens(block(case), arrays["x"], grid, side, window, seeds=seeds)
    assert_close(got, arrays["semantic_out"], 1e-5, "semantic tokens")


@torch.no_grad()
def _check_back(case: Case) -> None:
    got = block(case)(case.arrays["x"], case.arrays["semantic"])
    assert_close(got, case.arrays["out"], 1e-5, "recovered tokens")


def block(case: Case) -> CrossBlock:
    """The block with recorded weights."""
    params = case.facts["params"]
    shortcut = params.get("shortcut", True)  # the block that recovers always has one
    made = CrossBlock(params["dim"], params["num_heads"], params["norm_eps"], shortcut=shortcut)
    weights = {"scale1": case.arrays["w.layer_scale_1"], "scale2": case.arrays["w.layer_scale_2"]}
    for theirs, ours in NAMES.items():
        for part in ("weight", "bias"):
            weights[f"{ours}.{part}"] = case.arrays[f"w.{theirs}.{part}"]
    made.load_state_dict(weights)
    return made
