"""VFlowOpt: prune in three steps by one score of the vision encoder; recycle what goes first.

Paper: Yang et al., "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information
Flow-Guided Optimization", arXiv:2508.05211. Reference code: sihany077/VFlowOpt @ 129eeef.
Differs from the reference: any batch works; every image and video is recycled on its own (there:
one image, and a plain choice for several images and videos); patch entropy is left out of the
score, because its weight is zero in all published strategies and the release takes it from
wrapped-around pixel values; without a query that counts as global all queries count (there: the
mean of an empty set, NaN); every layer is causal (there: not the one before the first drop in the
language model); `keep=1.0` recycles nothing; layers given as `None` scale to the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from foveate.core import (
    Adaptive,
    Keep,
    ModelFacts,
    Need,
    PerRequest,
    Positions,
    Reduction,
    Step,
    VisualTokens,
    by_count,
    register,
)
from foveate.core.fields import Natural, Range
from foveate.errors import BudgetError, LayerError
from foveate.io.quoting import quoted
from foveate.ops.cell_merging import cells, merged, places, pool_size, recycle

STRATEGIES: dict[float, dict[str, Any]] = {
    0.5: {"keep": (0.7233, 0.7233 * 0.7487, 0.7233 * 0.7487 * 0.487), "threshold": 28.683,
          "cell": 11.757},
    0.25: {"keep": (0.2651, 0.2651 * 0.9833, 0.2651 * 0.9833 * 0.8773), "threshold": 34.76,
           "cell": 15.581},
    0.1: {"keep": (0.1166, 0.1166, 0.1166 * 0.6011), "threshold": 39.265, "cell": 17.387},
}  # fmt: skip
"""Published strategies by average share of tokens, for LLaVA-OneVision-7B: `VFlowOpt(**...)`."""


@register(
    "vflowopt",
    stage="pre_llm",
    needs=("global_attention",),
    paper="Yang et al. 2025, arXiv:2508.05211",
)
@dataclass(frozen=True)
class VFlowOpt(Adaptive):
    """Rank by the attention that global patches pay; merge cells of what goes first, then drop.

    The first step, behind the projector, takes the lowest ranked tokens of each image out; those of
    one cell of the grid become one token, their mean weighted by score, where the best of them
    stood. Two more steps, in the language model, drop the lowest ranked by the same score.

    Args:
        keep: share of the original count that each of the three steps leaves. The published rho,
            q1 and q2 are `(rho, rho * q1, rho * q1 * q2)`, and the default those for a quarter; a
            single share is that of the first step, and the others drop nothing. As in the release,
            the first step leaves only about its share: cells bring tokens back, and for them as
            many go as the image has cells.
        threshold: t, an encoder patch is global if it receives more than t times the mean
            attention; only global patches vote.
        cell: m, side of a cell in tokens, at least 1; need not be whole.
        layers: the two decoder layers before which tokens are dropped. `None` scales the published
            9 and 18 of 28 layers to the model at hand.
        positions: `None` leaves survivors at their positions (`original`), as the reference does;
            `renumbered` makes them consecutive.

    Cost: the attention of one encoder layer, summed up in chunks.
    """

    keep: Keep = STRATEGIES[0.25]["keep"]
    threshold: Annotated[float, Range(0)] = STRATEGIES[0.25]["threshold"]
    cell: Annotated[float, Range(1)] = STRATEGIES[0.25]["cell"]
    layers: tuple[Natural, ...] | None = None
    positions: Positions | None = None
    published_positions = "original"

    def check_fields(self) -> None:
        """As in `Method`; `layers` are two.

        Raises:
            LayerError: they are not, or do not ascend.
            FoveateError: another field does not fit its annotation.
        """
        super().check_fields()
        if self.layers is not None and not (
            len(self.layers) == 2 and self.layers == tuple(sorted(set(self.layers)))
        ):
            raise LayerError(
                f"layers must be two, ascending, got {quoted(self.layers)} in vflowopt"
            )

    def check_budget(self, steps: int | None) -> None:
        """Check `keep`: a share for all steps, or one for each.

        Raises:
            BudgetError: it is something else.
        """
        super().check_budget(3 if isinstance(self.keep, tuple) else None)
        if isinstance(self.keep, PerRequest) or not all(
            isinstance(share, float) for share in self._shares
        ):
            raise BudgetError(
                "vflowopt counts from what recycling leaves, so keep is a share in (0, 1] or three "
                f"of them, got {quoted(self.keep)}"
            )

    @property
    def _shares(self) -> tuple[float, ...]:
        return self.keep if isinstance(self.keep, tuple) else (self.keep,) * 3  # type: ignore[return-value]

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """One step behind the projector, two between decoder layers."""
        scored = Need("global_attention", (model.feature_layer,), global_threshold=self.threshold)
        first, second = self.layers or self._published_layers(model)
        recycled = Step("pre_llm", needs=(scored,), merges=True)
        return recycled, Step("llm", first), Step("llm", second)

    def _published_layers(self, model: ModelFacts) -> tuple[int, int]:
        lowest = model.first_llm_layer
        first = max(9 * model.text_layers // 28, lowest)
        return first, max(18 * model.text_layers // 28, min(first + 1, model.text_layers - 1))

    def reduce_each(self, tokens: VisualTokens) -> list[tuple[tuple[int, ...], Reduction]]:
        """Recycle behind the projector; drop by the same scores in the language model."""
        if tokens.number == 0:
            return self._recycle(tokens)
        scores = tokens.label
        assert scores is not None  # the first step has left them
        shares = self._shares
        gone = round(tokens.count * (1 - shares[tokens.number] / shares[tokens.number - 1]))
        return [(tuple(range(len(scores))), Reduction.top(scores, max(tokens.count - gone, 1)))]

    def _recycle(self, tokens: VisualTokens) -> list[tuple[tuple[int, ...], Reduction]]:
        scores = tokens.signal("global_attention")[:, 0]
        newline = scores == -torch.inf
        scores = scores.masked_fill(newline, 1.0)  # which keeps them, as in the release
        pool = pool_size(tokens.count, self._shares[0], self.cell)
        into, mass = recycle(scores, cells(places(tokens, newline), self.cell), pool)
        stays = into == torch.arange(tokens.count, device=into.device)
        parts = []
        for count, members in by_count(stays.sum(1)).items():
            chosen = torch.tensor(members, device=into.device)
            reduction = merged(into[chosen], mass[chosen], count)
            label = scores[chosen].gather(1, reduction.index)
            parts.append((tuple(members), replace(reduction, label=label)))
        return parts


def second_ratio(
    average: float, keep: float, ratio: float, layers: tuple[int, int], depth: int
) -> float:
    """q2, so that a decoder layer sees a given share of the visual tokens on average.

    Args:
        average: that share.
        keep: rho, share behind the projector.
        ratio: q1, what the first drop leaves of them.
        layers: decoder layers before which tokens are dropped.
        depth: number of decoder layers.

    Returns:
        At most 1; not positive where the layers before the last drop use up the budget.
    """
    first, second = layers
    left = depth * average - first * keep - (second - first) * keep * ratio
    return min(1.0, left / (depth - second) / (keep * ratio))


@dataclass(frozen=True)
class SearchSpace:
    """Strategies with which a decoder layer sees a given share of the visual tokens on average.

    rho is in [1, 1.5] times that share, q1 in [0.533, 1], the threshold in [0, 50] and the cell in
    [3, 24], the published ranges for a quarter; q2 follows from the share.

    Args:
        average: the share, in (0, 1).
        layers: decoder layers before which tokens are dropped.
        depth: number of decoder layers.
    """

    average: float
    layers: tuple[int, int]
    depth: int

    def propose(self, trial: Any) -> VFlowOpt | None:
        """The strategy of an Optuna trial; `None` if the first two numbers use up the budget."""
        keep = trial.suggest_float("keep", self.average, min(1.5 * self.average, 1.0))
        ratio = trial.suggest_float("ratio", 0.533, 1.0)
        threshold = trial.suggest_float("threshold", 0.0, 50.0)
        cell = trial.suggest_float("cell", 3.0, 24.0)
        last = second_ratio(self.average, keep, ratio, self.layers, self.depth)
        if last <= 0:
            return None
        shares = (keep, keep * ratio, keep * ratio * last)
        return VFlowOpt(keep=shares, threshold=threshold, cell=cell)


def calibrate(
    model: Any,
    samples: Iterable[Mapping[str, Any]],
    average: float = 0.25,
    *,
    trials: int = 300,
    startup: int = 27,
    seed: int = 42,
    storage: str | Path | None = None,
    progress: bool = True,
) -> VFlowOpt:
    """Find the strategy that changes a model's answers least at a given cost.

    Each trial runs the prompts once; what counts is the cosine similarity of the last prompt
    token's final state with and without pruning. `SearchSpace` says what is searched. Optuna's TPE
    sampler takes the place of the reference's Gaussian process.

    Args:
        model: a supported vision-language model with an encoder that methods can look into.
        samples: model inputs, each with an image.
        average: share of the visual tokens that a decoder layer sees on average, in (0, 1).
        trials: trials in all, those in `storage` included.
        startup: trials drawn at random before the search follows what it found.
        seed: of the search.
        storage: file to keep the trials in; a search that was interrupted goes on from it.
        progress: whether to show a bar.

    Raises:
        InputError: there are no samples, or `storage` holds a search with other settings.
        FoveateError: Optuna is not installed, or no trial meets the budget.

    Example:
        >>> best = calibrate(model, prompts, 0.25, storage="search.log")  # doctest: +SKIP
        >>> foveate.use(model, best)  # doctest: +SKIP
    """
    from foveate.calibration.search import search  # it needs the engine, which methods do without
    from foveate.families import find_family

    if not 0 < average < 1:
        raise BudgetError(f"average must be in (0, 1), got {average}")
    family = find_family(model)
    space = SearchSpace(average, VFlowOpt()._published_layers(family), family.text_layers)
    settings = {"model": family.model_type, "layers": family.text_layers, "average": average}
    best = search(
        model, samples, space.propose, trials=trials, startup=startup, seed=seed, storage=storage,
        settings=settings, progress=progress,
    )  # fmt: skip
    assert isinstance(best, VFlowOpt)
    return best
