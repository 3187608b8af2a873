"""M3: the pooling of the release, at each scale."""

from functools import partial

import torch
from golden_case import Case, Check, assert_close

from foveate.core import VisualTokens
from foveate.methods import M3


def checks(case: Case) -> dict[str, Check]:
    return {f"scale {n}": partial(_check, case, n) for n in case.facts["scales"]}


def _check(case: Case, scale: int) -> None:
    features, side = case.arrays["features"], int(case.facts["grid"])
    images, total, _ = features.shape
    index = torch.arange(total).expand(images, -1)
    tokens = VisualTokens(lambda: features, index, (side, side), tuple(range(images)))
    method = M3(keep=scale)
    expected = case.arrays[f"scale{scale}"]
    count = method.count(total, total, None, 0)
    assert count == expected.shape[1]
    made = features if count == total else method.reduce(tokens, count).apply(features)
    assert_close(made, expected, 1e-5, f"scale {scale}")
