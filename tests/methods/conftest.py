"""Visual tokens made by hand: what a method is shown, without a model."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from foveate.core import VisualTokens


@dataclass(frozen=True)
class Facts:
    """A model's numbers; the defaults are LLaVA-1.5-7B's."""

    text_layers: int = 32
    vision_layers: int = 24
    feature_layer: int = 22
    first_llm_layer: int = 0
    class_token: bool = True
    attention_layers: tuple[int, ...] = tuple(range(32))

    @property
    def last_llm_layer(self) -> int:
        return self.text_layers - 1

    @property
    def keyed_layers(self) -> tuple[int, ...]:
        return tuple(range(self.text_layers))


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
def make_videos() -> Callable[..., VisualTokens]:
    """Videos of (G, T, P, D) tokens, with `after` more after the last frame; half may stay."""

    def make(x: Tensor, after: int = 0, **signals: Tensor) -> VisualTokens:
        videos, frames, cells, width = x.shape
        rest = torch.randn(videos, after, width)
        features = torch.cat((x.flatten(1, 2), rest), 1)
        return VisualTokens(
            features=lambda: features,
            index=torch.arange(features.shape[1]).expand(videos, -1),
            grid=(1, cells),
            rows=tuple(range(videos)),
            signals=signals,
            frames=frames,
            site="pre_llm",
            quota=frames * cells // 2 + after,
        )

    return make


@pytest.fixture
def transcribed() -> Callable[[str], ModuleType]:
    """The plain transcription of a method that its speed is measured against."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[2] / "benchmarks" / "transcriptions" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


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
