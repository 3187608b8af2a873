"""Methods that choose before the language model, on recorded features and signals.

The cases lie in `recorded` beside this file. Their metadata says which code was run.
"""

from functools import partial

import torch
from golden_case import Case, Check, assert_same
from torch import Tensor

from foveate.core import VisualTokens, get_method
from foveate.core.budget import count

FIELDS = {  # of the release -> ours
    "alpha": "alpha",
    "mmr_lambda": "mmr_lambda",
    "important_ratio_of_kept": "important_ratio",
}


def checks(case: Case) -> dict[str, Check]:
    return {"kept": partial(_check_kept, case)}


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
