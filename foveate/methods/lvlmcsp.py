"""LVLM_CSP: few visual tokens first, all of them in the middle, almost none at the end.

Paper: Chen et al., "LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering,
and Pruning for Reasoning Segmentation", arXiv:2504.10854. No reference code was found, and what is
known of the paper leaves much open, so this is our reading: which layers begin the three phases and
how many tokens they see; that suspended tokens come back as they went, or moved like their
representative; and that the last prompt token ranks in the last phase, as the segmentation token
does where it ends the prompt. Of the four choices of representatives, those that follow the class
token and instance masks are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    register,
)
from foveate.core.budget import check_keep
from foveate.core.fields import Natural
from foveate.core.ranking import highest
from foveate.errors import FoveateError, LayerError
from foveate.io.quoting import quoted


@register(
    "lvlm-csp",
    stage="llm",
    does="few tokens, then all, then fewer",
    needs=("text_attention",),
    paper="Chen et al. 2025, arXiv:2504.10854",
)
@dataclass(frozen=True)
class LVLMCSP(Method):
    """Run representatives, bring all tokens back, and keep what the last prompt token attends to.

    Args:
        layers: decoder layers before which the three phases begin, ascending. `None` clusters from
            the first layer where tokens may be removed, scatters from the middle of the model and
            prunes from three quarters, moved to the next layer that sees the whole sequence.
        keep: what takes part in the first and in the last phase, as shares of the original count
            (rounded down) or counts; one value serves both.
        select: how representatives are chosen: `uniform`, every floor(N / N_c)-th token, or
            `random`.
        reentry: state of suspended tokens when they come back: `suspended`, as they went, or
            `moved`, by what has become of the representative that was most like them (cosine).
        seed: of the random choice.
        positions: takes `original` only, since tokens come back.

    Cost: one key projection of all tokens and one query row; `moved` compares all tokens with the
    representatives.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.125, 0.03125)
    select: Literal["uniform", "random"] = "uniform"
    reentry: Literal["suspended", "moved"] = "suspended"
    seed: Natural = 0
    positions: Positions | None = None
    published_positions = "original"

    def check_fields(self) -> None:
        """As in `Method`; `layers` are three, and positions stay.

        Raises:
            LayerError: `layers` are not three, ascending.
            FoveateError: `positions` is given, or a field does not fit its annotation.
        """
        names = {"select": ("uniform", "random"), "reentry": ("suspended", "moved")}
        for field, known in names.items():
            given = getattr(self, field)
            if not isinstance(given, str) or given not in known:
                raise FoveateError(
                    f"{field} must be {' or '.join(known)}, got {quoted(given)} in lvlm-csp"
                )
        super().check_fields()
        if self.layers is not None and (
            len(self.layers) != 3 or list(self.layers) != sorted(set(self.layers))
        ):
            raise LayerError(
                f"layers must be three, ascending, got {quoted(self.layers)} in lvlm-csp"
            )
        if self.positions == "renumbered":
            raise FoveateError("lvlm-csp brings tokens back; leave positions out")

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`: one value, or one for each of the phases that leave tokens out.

        Raises:
            BudgetError: it is out of range or of another length.
        """
        values = self.keep.values if isinstance(self.keep, PerRequest) else (self.keep,)
        for value in values:
            check_keep(value, 2 if isinstance(value, tuple) else None)

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """Representatives, all tokens, or what is left at the end."""
        if "reinsert" in step.effects:
            return total
        keep = self.keep.values[row] if isinstance(self.keep, PerRequest) else self.keep
        both = keep if isinstance(keep, tuple) else (keep, keep)
        phase = replace(self, keep=both[1 if number else 0])
        return Method.count(phase, remaining, total, step, 0, row)

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """Take tokens out, bring them back, and drop all but a few."""
        cluster, scatter, prune = self.layers or self._phases(model)
        return (
            Step("llm", cluster),
            Step("llm", scatter, effects=("reinsert",)),
            Step("llm", prune, (Need("text_attention", (prune,)),)),
        )

    def _phases(self, model: ModelFacts) -> tuple[int, int, int]:
        first, depth = model.first_llm_layer, model.last_llm_layer + 1
        scatter = max(depth // 2, first + 1)
        ranks = [layer for layer in model.attention_layers if layer > scatter]
        if not ranks:
            way = "give layers" if model.attention_layers else "use a pre_llm method"
            raise LayerError(
                f"lvlm-csp needs a layer after {scatter} that sees the whole sequence; this "
                f"{model.model_type} has none; {way}"
            )
        later = [layer for layer in ranks if layer >= 3 * depth // 4]
        return first, scatter, (later or ranks[-1:])[0]

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Representatives in the first phase; in the last, what the prompt's end attends to."""
        if tokens.signals:
            return Reduction.top(tokens.signal("text_attention")[:, 0].mean(1), count)
        if self.select == "uniform":
            chosen = torch.arange(count, device=tokens.index.device) * (tokens.count // count)
        else:
            generator = torch.Generator().manual_seed(self.seed)
            chosen = torch.randperm(tokens.count, generator=generator)[:count].sort().values
            chosen = chosen.to(tokens.index.device)
        return Reduction(chosen.expand(len(tokens.index), -1))

    def reinsert(self, tokens: VisualTokens, kept: Tensor, now: Tensor) -> Tensor:
        """Suspended tokens as they went, or moved like their representative."""
        if self.reentry == "suspended":
            return super().reinsert(tokens, kept, now)
        x = tokens.x
        then = x.gather(1, kept[..., None].expand_as(now))
        like = torch.matmul(F.normalize(x, dim=-1), F.normalize(then, dim=-1).transpose(1, 2))
        nearest = highest(like, 1.0)[..., None].expand_as(x)
        moved = x + (now - then).gather(1, nearest)
        return moved.scatter(1, kept[..., None].expand_as(now), now)
