"""CDPruner: the released choice, on given features and embeddings in CLIP's space."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close, assert_same

from foveate.core import VisualTokens
from foveate.methods.cdpruner import CDPruner, relevance_kernel
from foveate.ops.diversity import select_determinant

METHOD = CDPruner(relevance="clip", as_released=True)


def checks(case: Case) -> dict[str, Check]:
    return {
        "relevance": partial(_check_relevance, case),
        "selection": partial(_check_selection, case),
    }


def _tokens(case: Case) -> VisualTokens:
    """The crops of one prompt."""
    x, text = case.arrays["projected_features"], case.arrays["text_embeds"]
    crops, total = x.shape[:2]
    signals = {
        "clip_patches": case.arrays["image_embeds"][:, None],
        "clip_questions": text.expand(crops, -1, -1),
        "clip_questions_mask": torch.ones(crops, len(text), dtype=torch.bool),
    }
    index = torch.arange(total).expand(crops, -1)
    return VisualTokens(lambda: x, index, (1, total), (0,) * crops, signals)


def _check_relevance(case: Case) -> None:
    found = METHOD.scaled_relevance(_tokens(case))
    assert_close(found, case.arrays["relevance"], 1e-5, "relevance")


def _check_selection(case: Case) -> None:
    tokens = _tokens(case)
    kernel = relevance_kernel(tokens.x, METHOD.scaled_relevance(tokens))
    for run, expected in case.runs():
        order, _ = select_determinant(kernel, run["visual_token_num"])
        assert_same(order, expected["selected_in_order"], f"order of {run}")
        kept = METHOD.reduce(tokens, run["visual_token_num"]).index
        assert_same(kept, expected["kept"], f"kept of {run}")
