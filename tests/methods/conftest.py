"""Visual tokens made by hand: what a method is shown, without a model."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from foveate.tokens import VisualTokens


@dataclass(frozen=True)
class Facts:
    """A model's numbers; the defaults are LLaVA-1.5-7B's."""

    text_layers: int = 32
    vision_layers: int = 24
    feature_layer: int = 22
    class_token: bool = True


@pytest.fixture
def facts() -> type[Facts]:
    return Facts


@pytest.fixture
def make_tokens() -> Callable[..., VisualTokens]:
    """Tokens on a full grid, or with `index` what earlier methods left of it."""

    def make(
        grid: tuple[int, int] = (4, 6),
        images: int = 1,
        x: Tensor | None = None,
        index: Tensor | None = None,
        **signals: Tensor,
    ) -> VisualTokens:
        if index is None:
            index = torch.arange(grid[0] * grid[1]).expand(images, -1)
        return VisualTokens(
            features=lambda: x if x is not None else pytest.fail("the method asked for features"),
            index=index,
            grid=grid,
            rows=tuple(range(len(index))),
            signals=signals,
        )

    return make


@pytest.fixture
def check_index() -> Callable[[Tensor, int, int], None]:
    """Exactly `count` of `total` positions per image, ascending and unique."""

    def check(index: Tensor, count: int, total: int) -> None:
        assert index.dtype == torch.int64
        assert index.shape[-1] == count
        assert (index.diff(dim=-1) > 0).all()
        assert index.min() >= 0
        assert index.max() < total

    return check
