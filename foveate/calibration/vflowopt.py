"""Search VFlowOpt's numbers: shares, threshold and cell, for a model and a budget.

Paper: Yang et al., arXiv:2508.05211; the method itself is `foveate.methods.vflowopt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.calibration.search import SearchOptions, search
from foveate.errors import BudgetError
from foveate.families import Family, find_family
from foveate.methods.vflowopt import VFlowOpt


def second_ratio(
    average: float, keep: float, ratio: float, layers: tuple[int, int], depth: int
) -> float:
    """q2, so that a decoder layer sees a given share of the visual tokens on average.

    Args:
        average: that share.
        keep: rho, share after the projector.
        ratio: q1, what the first drop leaves of them.
        layers: decoder layers before which tokens are dropped.
        depth: number of decoder layers.

    Returns:
        At most 1; not positive where the layers before the last drop use up the budget.
    """
    first, second = layers
    remaining = depth * average - first * keep - (second - first) * keep * ratio
    return min(1.0, remaining / (depth - second) / (keep * ratio))


@dataclass(frozen=True)
class SearchSpace:
    """Strategies with which a decoder layer sees a given share of the visual tokens on average.

    rho is in [1, 1.5] times that share, q1 in [0.533, 1], the threshold in [0, 50] and the cell in
    [3, 24], the published ranges for a quarter; q2 follows from the share.

    Args:
        average: the share, in (0, 1).
        layers: decoder layers before which tokens are dropped.
        depth: number of decoder layers.

    Raises:
        BudgetError: the share is outside (0, 1).
    """

    average: float
    layers: tuple[int, int]
    depth: int

    def __post_init__(self) -> None:
        if not 0 < self.average < 1:
            raise BudgetError(f"average must be in (0, 1), got {self.average}")

    @classmethod
    def of(cls, family: Family, average: float) -> SearchSpace:
        """The space of a model, with drops before the published layers."""
        return cls(average, VFlowOpt().published_layers(family), family.text_layers)

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

    Each trial runs the prompts once. Its score is the cosine similarity of the last prompt token's
    final state with and without pruning. `SearchSpace` says what is searched. Optuna's TPE sampler
    replaces the reference's Gaussian process.

    Args:
        model: a supported vision-language model with an encoder that methods can look into.
        samples: model inputs, each with an image.
        average: share of the visual tokens that a decoder layer sees on average, in (0, 1).
        trials: trials in all, those in `storage` included.
        startup: trials drawn at random before the search follows what it found.
        seed: of the search.
        storage: file of the trials, from which an interrupted search continues.
        progress: whether to show a bar.

    Raises:
        InputError: there are no samples, or `storage` holds a search with other settings.
        FoveateError: Optuna is not installed, or no trial meets the budget.

    Examples:
        >>> best = calibrate(model, prompts, 0.25, storage="search.log")  # doctest: +SKIP
        >>> foveate.use(model, best)  # doctest: +SKIP
    """
    family = find_family(model)
    propose = SearchSpace.of(family, average).propose
    settings = {"model": family.model_type, "layers": family.text_layers, "average": average}
    options = SearchOptions(trials, startup, seed, storage, progress)
    return search(model, samples, propose, options, settings)
