"""HiPrune on a recorded Qwen2.5-VL encoder, whose tokens are cells of 2 x 2 patches."""

from collections.abc import Iterator
from functools import partial

import torch
from golden_case import Case, Check, assert_same
from torch import Tensor

from foveate.methods.hiprune import HiPrune
from foveate.tokens import VisualTokens


def checks(case: Case) -> dict[str, Check]:
    return {"selection": partial(_check_selection, case)}


def _runs(case: Case) -> Iterator[tuple[str, HiPrune, dict[str, Tensor]]]:
    for run, expected in case.runs():
        method = HiPrune(
            keep=run["retention"],
            alpha=run["alpha"],
            layer=run["object_layer_1based"] - 1,
            as_released="qwen",
        )
        yield str(run), method, expected


def _check_selection(case: Case) -> None:
    """The method alone, on the recorded sums over queries, of which it is given means."""
    scores = case.arrays["merged_token_scores_per_block"]
    ((_, height, width),) = case.arrays["image_grid_thw"].tolist()
    total = scores.shape[1]
    for name, method, expected in _runs(case):
        signal = torch.stack((scores[method.layer], scores[-1]))[None] / (height * width)
        tokens = VisualTokens(
            lambda: torch.empty(0),
            torch.arange(total)[None],
            (height // 2, width // 2),
            signals={"received_attention": signal},
        )
        kept = method.reduce(tokens, round(method.keep * total)).index
        assert_same(kept[0], expected["kept"], f"kept of {name}")
