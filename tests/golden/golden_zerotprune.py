"""Zero-TPrune: the iteration and the mean over heads, of an earlier form by the same authors."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same

from foveate.methods.zerotprune import ZeroTPrune
from foveate.ops.page_rank import page_rank


def checks(case: Case) -> dict[str, Check]:
    return {case.facts["params"]["kind"]: partial(_votes, case)}


def _votes(case: Case) -> None:
    """No head is left out there; where heads are averaged, their scores are before softmax."""
    params, logits = case.facts["params"], case.arrays["attn_logits"]
    if params["kind"].startswith("headmean"):
        logits = logits.mean(1, keepdim=True)
    weights = (logits / params["tau_imp"]).softmax(-1)
    votes = page_rank(weights, torch.ones(weights.shape[-1]), params["iters"])[..., 1:]
    got = ZeroTPrune(variance=(0.0, 1e9)).over_heads(votes)
    want = case.arrays["importance"]
    assert_close(got / got.sum(1, keepdim=True), want / want.sum(1, keepdim=True), 1e-5, "votes")
    assert_same(
        got.topk(params["keep"], dim=1).indices.sort(dim=1).values,
        case.arrays["kept_sorted"],
        "kept",
    )
