"""One `keep` for all methods, so that budgets compare.

`keep` is what survives a method's cut, as a share of each image's tokens. Where a method cuts
several times, it is the mean share over the decoder layers from the first cut on, here as
everywhere (see `foveate.core.schedule`). What is counted is measured all the same: see the tokens
and FLOPs of every cell.
"""

from __future__ import annotations

from foveate.core import Method, ModelFacts, get_method
from foveate.core.step import budgeted
from foveate.errors import BudgetError

ALL = "none"
"""The name under which the model with all its tokens is listed."""

BASELINES = ("random", "uniform", "downsample")
"""Methods that are always run; what does not beat them has not found out what matters."""


def takes_keep(name: str) -> bool:
    """Whether a method's budget can be set; others run once, with their defaults."""
    try:
        get_method(name)(keep=0.5)  # type: ignore[call-arg]
    except BudgetError:
        return False
    return True


def method_at(name: str, keep: float | None, model: ModelFacts) -> Method:
    """A method at a budget.

    Args:
        name: of the method.
        keep: share that survives; `None` takes the method's defaults.
        model: where it is going to run.

    Raises:
        FoveateError: the method does not take that share, or does not work on the model.
    """
    cls = get_method(name)
    method = cls() if keep is None else cls(keep=keep)  # type: ignore[call-arg]
    method.check_budget(budgeted(method.steps(model)))
    return method
