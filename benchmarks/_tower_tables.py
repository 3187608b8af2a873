"""Cells and tables that the pages on a real tower share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

KEEPS = (0.5, 0.25, 0.125, 0.0625)


def share(of: Mapping[str, float], digits: int = 1) -> str:
    """A share with its interval, in per cent."""
    mean, low, high = (100 * of[key] for key in ("mean", "low", "high"))
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def points(of: Mapping[str, float], digits: int = 1) -> str:
    """A difference with its interval, in points."""
    mean, low, high = (100 * of[key] for key in ("mean", "low", "high"))
    return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def sure(of: Mapping[str, float]) -> bool:
    """Whether the interval of a difference leaves out 0."""
    return of["low"] > 0 or of["high"] < 0


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def name(method: str) -> str:
    """A method as the tables show it; words that are no method are left as they are."""
    slug, comma, place = method.partition(",")
    return method if " " in slug else f"`{slug}`{comma}{place}"
