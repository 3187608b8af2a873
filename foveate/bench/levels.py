"""One `keep` for all methods: what a method's own budget must be so that budgets compare.

`keep` is what survives a method's cut, as a share of each image's tokens. A method that cuts
several times has a published schedule; each of its shares is raised to one and the same power,
such that the mean share over the decoder layers from the first cut on is `keep`. What is counted
is measured all the same: see the tokens and FLOPs of every cell.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence

from foveate.errors import BudgetError
from foveate.method import Method, ModelFacts, get_method
from foveate.schedule import Scheduled

ALL = "none"
"""The name under which the model with all its tokens is listed."""

BASELINES = ("random", "uniform", "downsample")
"""Methods that are always run; what does not beat them has not found out what matters."""

_TOTAL = 576  # tokens of the image for which schedules are bent
_HALVINGS = 40
_LEAST = 0.004


def takes_keep(name: str) -> bool:
    """Whether a method's budget can be set; others run once, with their defaults."""
    cls = get_method(name)
    if typing.get_type_hints(cls).get("keep") is type(None):
        return False
    try:
        cls(keep=0.5)  # type: ignore[call-arg]
    except BudgetError:
        return False
    return True


def method_at(name: str, keep: float | None, model: ModelFacts) -> Method:
    """A method whose budget compares with that of others at the same `keep`.

    Args:
        name: of the method.
        keep: share that survives; `None` takes the method's defaults.
        model: what schedules are bent for.

    Raises:
        FoveateError: the method does not take that share.
    """
    cls = get_method(name)
    if keep is None:
        return cls()
    published = _schedule(cls())
    if published is None or keep == 1.0:
        return cls(keep=keep)  # type: ignore[call-arg]
    low, high = 0.0, 64.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if mean_share(cls(keep=_bent(published, middle)), model) > keep:  # type: ignore[call-arg]
            low = middle
        else:
            high = middle
    return cls(keep=tuple(round(x, 4) for x in _bent(published, (low + high) / 2)))  # type: ignore[call-arg]


def mean_share(method: Method, model: ModelFacts) -> float:
    """Planned share of an image's tokens alive, averaged over the layers from the first cut on."""
    alive, first = planned(method, model)
    return sum(alive[first:]) / max(len(alive) - first, 1)


def planned(method: Method, model: ModelFacts, total: int = _TOTAL) -> tuple[list[float], int]:
    """Share of an image's tokens that each decoder layer sees by plan, and the first cut layer."""
    steps = [step for step in method.steps(model) if not step.decode]
    shares, alive, done = [], total, 0
    for layer in range(model.text_layers):
        while done < len(steps) and (steps[done].stage != "llm" or steps[done].layer <= layer):
            alive = method.count(alive, total, steps[done], done)
            done += 1
        shares.append(alive / total)
    cuts = [step.layer if step.stage == "llm" else 0 for step in steps]
    return shares, min(cuts, default=0)


def _schedule(method: Method) -> tuple[float, ...] | None:
    """The published shares of a method that cuts several times, or `None`."""
    keep = method.budget if isinstance(method, Scheduled) else method.keep
    if not isinstance(keep, tuple) or not all(isinstance(share, float) for share in keep):
        return None
    if method.slug == "lvlm-csp":  # its tokens come back, so no schedule has such a mean
        return None
    return tuple(float(share) for share in keep)


def _bent(shares: Sequence[float], power: float) -> tuple[float, ...]:
    return tuple(max(share**power, _LEAST) for share in shares)
