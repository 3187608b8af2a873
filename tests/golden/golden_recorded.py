"""Methods that choose before the language model, on recorded features and signals.

The cases lie in `recorded` beside this file. Their metadata says which code was run.
"""

from functools import partial

import torch
from golden_case import Case, Check, assert_same
from torch import Tensor

from foveate.core import VisualTokens, get_method
from foveate.core.budget import count
from foveate.methods import prunesid
from foveate.methods.holov import HoloV

FIELDS = {  # of the release -> ours
    "alpha": "alpha",
    "mmr_lambda": "mmr_lambda",
    "important_ratio_of_kept": "important_ratio",
}


def checks(case: Case) -> dict[str, Check]:
    check = {"holov": _check_holov, "prunesid": _check_prunesid}.get(case.slug, _check_kept)
    return {"kept": partial(check, case)}


def tokens_of(x: Tensor, **signals: Tensor) -> VisualTokens:
    """Images of (G, V, D) features, with (G, ...) signals of one layer."""
    images, total = x.shape[:2]
    return VisualTokens(
        lambda: x,
        torch.arange(total).expand(images, -1),
        (1, total),
        tuple(range(images)),
        {name: signal[:, None] for name, signal in signals.items()},
    )


def _check_kept(case: Case) -> None:
    (name,) = case.names & {"cls_attention", "received_attention", "importance"}
    # A selector's scores have no unit; they take the place of attention.
    signal = {"received_attention" if name == "importance" else name: case.arrays[name][None]}
    tokens = tokens_of(case.arrays["x"][None], **signal)
    for run, expected in case.runs():
        fields = {FIELDS[name]: value for name, value in run.items() if name != "ratio"}
        method = get_method(case.slug)(keep=1 - run["ratio"], **fields)
        kept = count(method.keep, tokens.count, step=0, row=0, rounding=method.rounding)
        assert_same(method.reduce(tokens, kept).index[0], expected["kept"], f"kept of {run}")


def _check_holov(case: Case) -> None:
    """Where the release fills a budget up with zeros, what it keeps is kept beside others."""
    tokens = tokens_of(case.arrays["x"], cls_attention=case.arrays["cls_attention"])
    for run, expected in case.runs():
        method = HoloV(keep=run["count"], num_patches=run["num_patches"])
        index = method.reduce(tokens, run["count"]).index
        for kept, wanted in zip(index.tolist(), expected["kept"], strict=True):
            wanted = wanted.nonzero()[:, 0].tolist()
            assert len(kept) == run["count"]
            if len(wanted) == run["count"]:
                assert kept == wanted, f"kept of {run}"
            assert set(wanted) <= set(kept), f"kept of {run}"


def _check_prunesid(case: Case) -> None:
    """The release keeps the class token's feature, and counts it."""
    seen = case.arrays["cls_attention"].mean(1)
    for run, expected in case.runs():
        budget = run["need_token_num"]
        kept = prunesid.select(case.arrays["x"], seen, budget, budget - 1)
        for image, wanted in zip(kept, expected["kept"], strict=True):
            assert_same(image.nonzero()[:, 0], wanted, f"kept of {run}")
