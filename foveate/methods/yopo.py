"""YOPO: keep all visual tokens, but compute less of them.

Paper: Zhang et al., "Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See",
arXiv:2410.06169. Reference code: ZhangAIPI/YOPO_MLLM_Pruning @ f0783f4, `modeling_llama_prune.py`.
Differs from the reference: the release computes everything and masks it, here the work is left out;
any batch, several images and any grid work, also with a cache. The release zeroes probabilities
after the softmax, so what is not read still takes its share, and keys of visual tokens after the
cut matter although their values are not read; that share cannot be had without computing them. The
default takes such keys out of the softmax; `as_released=True` reproduces the release, and suits
checkpoints that were trained with it. With several images, a visual token attends to neighbours in
its own image only (our reading; the release takes one image).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from foveate.core import (
    Method,
    ModelFacts,
    PartialCompute,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.fields import Natural, Positive, Range
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.io.quoting import quoted


@register(
    "yopo",
    stage="llm",
    does="keeps all tokens, computes less",
    paper="Zhang et al. 2024, arXiv:2410.06169",
)
@dataclass(frozen=True)
class YOPO(Method):
    """Attend to spatial neighbours, in some heads, with part of the MLP, in the first layers.

    Args:
        window: w, odd side of the neighbourhood that a visual token attends to, besides the text
            before it; neighbours after it are seen too, as in the release.
        layer: c, the decoder layer from which on visual tokens are not computed and not seen.
            `None` is the published 20 of 40 layers: half of the model at hand. The number of layers
            cuts nothing.
        heads: for each decoder layer, which attention heads work on visual tokens; see
            `foveate.calibration.yopo_heads`. `None` is all of them.
        ffn_factor: f, visual tokens pass the first 1 / f of the MLP's neurons.
        as_released: probabilities that a head does not read are lost, as in the release; visual
            tokens are then computed in all layers.
        keep: takes no value: all tokens are kept up to `layer`.
        positions: takes `original` only.

    Windows, heads and neurons that are left out do not count in a report's FLOPs.

    Cost: the slicing of the weights of pruned heads, a copy in each forward over a prompt.
    """

    window: Positive = 5
    layer: Natural | None = None
    heads: tuple[tuple[bool, ...], ...] | None = None
    ffn_factor: Annotated[float, Range(1)] = 2.0
    as_released: bool = False
    keep: None = None
    positions: Positions | None = None
    published_positions = "original"
    note = "FLOPs shown leave out windows, heads and neurons; masked keys of a tile are not counted"

    def check_fields(self) -> None:
        """As in `Method`; `window` is odd, and positions stay.

        Raises:
            FoveateError: `window` is no odd number, or `positions` are given.
        """
        super().check_fields()
        if self.window % 2 == 0:
            raise FoveateError(f"window must be odd and at least 1, got {self.window} in yopo")
        if self.positions == "renumbered":
            raise FoveateError("yopo leaves positions as they are; leave positions out")

    def check_budget(self, steps: int | None) -> None:
        """Refuse a `keep`.

        Raises:
            BudgetError: it was given.
        """
        if self.keep is not None:
            raise BudgetError(
                f"yopo keeps all visual tokens up to its layer, so it takes no keep; got "
                f"{quoted(self.keep)}. Set window, layer, heads and ffn_factor"
            )

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """No visual token is left at the cut."""
        return 0

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """The cut, if there is one."""
        layer = self._cut(model)
        return () if self.as_released or layer == model.text_layers else (Step("llm", layer),)

    def partial_compute(self, model: ModelFacts) -> tuple[PartialCompute, ...]:
        """Every layer up to the cut, or all of them as released.

        Raises:
            LayerError: `heads` does not have an entry for each layer.
        """
        if self.heads is not None and len(self.heads) != model.text_layers:
            raise LayerError(
                f"yopo has a head mask of {len(self.heads)} layers, but this {model.model_type} "
                f"has {model.text_layers}; make one with foveate.calibration.yopo_heads.head_mask"
            )
        cut = self._cut(model)
        return tuple(
            PartialCompute(
                layer,
                self.window,
                heads=None if self.heads is None else tuple(map(bool, self.heads[layer])),
                mlp_divisor=self.ffn_factor,
                reads_visual=layer < cut,
                renormalize=not self.as_released,
            )
            for layer in range(model.text_layers if self.as_released else cut)
        )

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Nothing is left at the cut."""
        return Reduction(tokens.index[:, :0])

    def _cut(self, model: ModelFacts) -> int:
        if self.layer is None:
            half = max(model.text_layers // 2, model.first_llm_layer)
            return min(half, model.last_llm_layer)
        if not 0 <= self.layer <= model.text_layers:
            raise LayerError(
                f"yopo cuts before decoder layer {self.layer}, but this {model.model_type} has "
                f"layers 0 to {model.text_layers - 1}"
            )
        return self.layer
