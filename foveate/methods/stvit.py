"""STViT-style: from some encoder layer on, a few semantic tokens stand for the grid.

Paper: Chang et al., "Making Vision Transformers Efficient from A Token Sparsification View",
arXiv:2303.08685 (CVPR 2023). Reference code: changsn/STViT-R @ b4a27a0, which is for Swin; that for
DeiT was never released.
This is not the official method, and does not claim its results. It is what the paper's idea comes
to in a plain encoder: one block makes the tokens, which go on to the end. The block is the
release's (`shortcut` on), over the whole grid unless `window` is given; learned centres are added
to the seeds before it (there: in a second block, behind a switch).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core import Method, ModelFacts, Positions, Reduction, Step, VisualTokens, register
from foveate.core.fields import Natural, Positive
from foveate.errors import FoveateError, InputError, LayerError
from foveate.ops.learning import flops_of, untrained
from foveate.ops.semantic import SemanticTokens


@register(
    "stvit",
    stage="vision",
    does="learns a few semantic tokens",
    paper="Chang et al. 2023, arXiv:2303.08685",
)
@dataclass(frozen=True)
class STViT(Method):
    """Pool the patches to a small grid of seeds, let these attend to all patches, and go on with
    them; optionally come back to all patches after the last layer, for dense heads.

    The new parameters begin as plain pooling, nearly, and are trained with the model
    (`foveate.prepare`).

    Args:
        layer: encoder layer before which it happens; `None` for the middle.
        side: semantic tokens in a row and in a column.
        window: side of the windows in which seeds are made and attend, in patches, as in STViT-R (7
            there, with `side` 6 on 14 x 14 patches); `None` for the whole grid.
        recover: let all patches, as they were, attend to the semantic tokens after the last layer.
            Without it a patch comes back as the token of its cell.
        keep: always `None`: `side` decides.
        positions: not used; encoders alone have no language model.

    Cost: one attention of the seeds to all patches, with an MLP; and one back with `recover`.
    """

    layer: Natural | None = None
    side: Positive = 4
    window: Positive | None = None
    recover: bool = False
    keep: None = None
    positions: Positions | None = None
    encoders_alone = True
    note = "stvit makes tokens by parameters of its own, which are to be trained (foveate.prepare)"

    def check_fields(self) -> None:
        """As in `Method`; a count of tokens can be written down.

        Raises:
            FoveateError: a field does not fit.
        """
        super().check_fields()
        if self.side > 1000:
            raise FoveateError(f"side must be at most 1000, got {self.side} in stvit")

    def check_budget(self, steps: int | None) -> None:
        """There is none."""

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One step, before the layer."""
        layer = (model.feature_layer + 1) // 2 if self.layer is None else self.layer
        return (Step("vision", layer, whole=True, effects=("exit",) if self.recover else ()),)

    def learned(self, model: ModelFacts) -> SemanticTokens:
        """The attention to all patches, and the one back."""
        return untrained(
            lambda: SemanticTokens(model.vision_width, self.side, self.window, self.recover)
        )

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What its attentions cost, counted on the meta device."""
        if tokens <= self.side**2:
            return 0
        learned = self.learned(model).to("meta")
        x = torch.empty(1, tokens, model.vision_width, device="meta")

        def run() -> None:
            made = learned(x, grid)
            if learned.recover is not None:
                learned.recover(x, made)

        return flops_of(run)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """The semantic tokens, or all of fewer."""
        return min(self.side**2, remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """The semantic tokens, each at the middle of its cell.

        Raises:
            InputError: the grid cannot be divided into cells.
        """
        self._check_grid(tokens)
        learned: Any = tokens.learned
        (height, width), side = tokens.grid, self.side
        first = torch.arange(side + 1, device=tokens.index.device)
        rows, columns = ((first * size + side - 1) // side for size in (height, width))
        at_row, at_column = ((edge[:-1] + edge[1:] - 1) // 2 for edge in (rows, columns))
        index = (at_row[:, None] * width + at_column).flatten().expand(len(tokens.index), -1)
        place = tokens.coordinates
        slot = place[..., 0] * side // height * side + place[..., 1] * side // width
        made = learned(tokens.x.to(learned.centres.dtype), tokens.grid)
        return replace(Reduction.mean(index, slot), values=made)

    def reinsert(self, tokens: VisualTokens, kept: Tensor, now: Tensor) -> Tensor:
        """All patches, once they have attended to the semantic tokens."""
        learned: Any = tokens.learned
        kind = learned.centres.dtype
        return learned.recover(tokens.x.to(kind), now.to(kind)).to(now.dtype)

    def _check_grid(self, tokens: VisualTokens) -> None:
        (height, width), window = tokens.grid, self.window
        if tokens.frames > 1 or tokens.count != height * width:
            raise InputError("stvit pools the grid of one image, which must lack no token")
        if self.side > min(height, width):
            raise InputError(
                f"stvit pools a grid to {self.side} x {self.side} tokens, but an image has "
                f"{height} x {width}; give a smaller side"
            )
        if window is None:
            return
        fits = height % window == width % window == 0
        if not fits or self.side % (height // window) or self.side % (width // window):
            raise LayerError(
                f"stvit cannot cut {height} x {width} tokens into windows of {window} with equally "
                f"many of {self.side} x {self.side} semantic tokens each"
            )
