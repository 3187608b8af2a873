"""From `keep` to token counts.

`keep` has four forms that cannot be confused: a float in (0, 1] is a share, an int is a count per
image, a tuple is a schedule over a method's steps, and `per_request([...])` holds one of those for
each row of the batch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeAlias

from foveate.errors import BudgetError
from foveate.io.quoting import quoted

Share: TypeAlias = float | int
Schedule: TypeAlias = Share | tuple[Share, ...]


@dataclass(frozen=True)
class PerRequest:
    """One `keep` for each row of the batch; make it with `per_request`."""

    values: tuple[Schedule, ...]


Keep: TypeAlias = Schedule | PerRequest
Total: TypeAlias = int | tuple[int, ...]


def per_request(values: Sequence[Schedule]) -> PerRequest:
    """Give every row of the batch its own `keep`.

    Args:
        values: a share, a count or a schedule for each row, in batch order. Rows without an image
            need one too.

    Raises:
        BudgetError: a value is out of range, or schedules differ in length.

    Examples:
        >>> per_request([0.5, 64])
        PerRequest(values=(0.5, 64))
    """
    keep = plain_keep(PerRequest(values))  # type: ignore[arg-type]
    check_keep(keep)
    return keep


def steps_in(keep: Keep) -> int:
    """Number of steps that `keep` speaks about (1 for a share or a count)."""
    if isinstance(keep, PerRequest):
        return steps_in(keep.values[0])
    return len(keep) if isinstance(keep, tuple) else 1


def plain_keep(keep: Any) -> Any:
    """A `keep` with numpy's numbers as Python's and lists as tuples; other things as they are."""
    if isinstance(keep, PerRequest) and isinstance(keep.values, list | tuple):
        values = tuple(plain_keep(value) for value in keep.values)
        return keep if keep.values is values else PerRequest(values)
    if isinstance(keep, list | tuple):
        return tuple(plain_keep(share) if isinstance(share, Real) else share for share in keep)
    if isinstance(keep, bool) or not isinstance(keep, Real):
        return keep
    return int(keep) if isinstance(keep, Integral) else float(keep)


def check_keep(keep: Keep, steps: int | None = None) -> None:
    """Check form and range of `keep`.

    Args:
        keep: any of the four forms.
        steps: how many steps the method has; `None` when any number will do.

    Raises:
        BudgetError: says which value is wrong and what is allowed.
    """
    if isinstance(keep, PerRequest):
        _check_requests(keep, steps)
        return
    shares = keep if isinstance(keep, tuple) else (keep,)
    if not shares:
        raise BudgetError("a keep schedule needs at least one entry, got ()")
    for share in shares:
        _check_share(share)
    for before, after in pairwise(shares):
        if type(before) is type(after) and after > before:
            raise BudgetError(
                f"a keep schedule cannot grow, because removed tokens do not come back: got "
                f"{after} after {before} in {quoted(shares)}"
            )
    if steps is not None and len(shares) != steps:
        raise BudgetError(
            f"keep={quoted(keep)} has {len(shares)} entries, but the method has {steps} steps"
        )


def _check_requests(keep: PerRequest, steps: int | None) -> None:
    if not isinstance(keep.values, tuple):
        raise BudgetError(f"per_request takes a list of keeps, got {quoted(keep.values)}")
    if not keep.values:
        raise BudgetError("per_request needs one keep for each row of the batch, got none")
    for value in keep.values:
        if isinstance(value, PerRequest):
            raise BudgetError("per_request takes keeps of single rows, not per_request in itself")
        check_keep(value, steps)
    if len({steps_in(value) for value in keep.values}) > 1:
        raise BudgetError(
            f"per_request schedules must have equal lengths, got {quoted(keep.values)}"
        )


def _check_share(share: object) -> None:
    if isinstance(share, bool) or not isinstance(share, float | int):
        raise BudgetError(
            "keep must be a float in (0, 1], a positive int, a tuple of those or "
            "per_request([...]), "
            f"got {quoted(share)} of type {quoted(type(share).__name__)[1:-1]}"
        )
    if isinstance(share, int) and not 1 <= share < 2**63:
        raise BudgetError(f"keep must be in (0, 1] or a positive int, got {quoted(share)}")
    if isinstance(share, float) and not 0.0 < share <= 1.0:
        hint = (
            f"; for a count per image write {int(share)}"
            if 1 < share < 2**63 and share == int(share)
            else ""
        )
        raise BudgetError(f"keep must be in (0, 1] or a positive int, got {share}{hint}")


def count(keep: Keep, total: int, *, step: int, row: int, rounding: Callable[[float], int]) -> int:
    """Tokens of one image that survive a step.

    Args:
        keep: any of the four forms.
        total: visual tokens the image has where the method begins (shares are of this count).
        step: which step of the method, 0-based.
        row: row of the batch that the image belongs to, 0-based.
        rounding: the method's rounding rule for shares.

    Returns:
        A count in [1, total]. An image never vanishes, and a count above `total` keeps all.
    """
    if isinstance(keep, PerRequest):
        keep = keep.values[row]
    share = keep[step] if isinstance(keep, tuple) else keep
    wanted = share if isinstance(share, int) else rounding(total * share)
    return min(max(int(wanted), 1), total)


def plain_total(total: Any) -> Total | None:
    """A `keep_total` as a plain int, a tuple of those, or `None`.

    Args:
        total: visual tokens of each row of the batch, together with those of its earlier turns: a
            number for all rows, or a list with one for each.

    Raises:
        BudgetError: it is something else, or a number is less than 1.
    """
    if total is None:
        return None
    if isinstance(total, list | tuple) and total:
        return tuple(map(_plain_count, total))
    return _plain_count(total)


def _plain_count(total: Any) -> int:
    whole = isinstance(total, Integral) and not isinstance(total, bool)
    if not whole or not 1 <= total < 2**63:
        raise BudgetError(
            "keep_total must be a positive int, or a list of those with one for each row of the "
            f"batch, got {quoted(total)}"
        )
    return int(total)


def divide(wants: Sequence[int], total: int) -> list[int]:
    """Divide tokens among the images of a conversation.

    They are dealt one at a time, over and over from the newest image to the oldest, to those that
    want more. So all images that get less than they want get equally many, up to one, and an image
    never gets more because another one has come.

    Args:
        wants: tokens that each image wants, oldest first.
        total: tokens that there are.

    Returns:
        Tokens of each image, at most what it wants.

    Examples:
        >>> divide([10, 40, 40], 60)
        [10, 25, 25]
    """
    if sum(wants) <= total:
        return list(wants)

    def dealt(level: int) -> int:
        return sum(min(want, level) for want in wants)

    level = bisect_right(range(max(wants) + 1), total, key=dealt) - 1
    left = total - dealt(level)
    counts = [min(want, level) for want in wants]
    for number in reversed(range(len(wants))):
        if left and wants[number] > level:
            counts[number], left = level + 1, left - 1
    return counts
