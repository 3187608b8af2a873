"""DivPrune: the released selection on given features."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same

from foveate.core import VisualTokens
from foveate.core.budget import count
from foveate.methods.divprune import DivPrune
from foveate.ops.diversity import cosine_distance, select_diverse


def checks(case: Case) -> dict[str, Check]:
    return {
        "distance": partial(_check_distance, case),
        "selection": partial(_check_selection, case),
    }


def _check_distance(case: Case) -> None:
    expected = case.arrays["distance"]
    distance = cosine_distance(case.arrays["features"][None])[0]
    assert_close(distance[: len(expected)], expected, 1e-5, "distance")


def _check_selection(case: Case) -> None:
    x = case.arrays["features"][None]
    total = x.shape[1]
    for run, expected in case.runs():
        method = DivPrune(keep=run["ratio"])
        kept = count(method.keep, total, step=0, row=0, rounding=method.rounding)
        assert kept == run["count"], run
        order = select_diverse(cosine_distance(x), kept)
        assert_same(order[0], expected["selected_in_order"], f"order of {run}")
        tokens = VisualTokens(lambda: x, torch.arange(total)[None], (1, total))
        assert_same(method.reduce(tokens, kept).index[0], expected["kept"], f"kept of {run}")
