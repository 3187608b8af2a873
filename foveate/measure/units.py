"""Numbers for people: FLOPs and bytes with prefixes."""

from __future__ import annotations

from collections.abc import Sequence


def human_flops(count: float, like: float | None = None) -> str:
    """FLOPs with a decimal prefix: 1.25e9 gives `1.25 GFLOPs`.

    Args:
        count: the number.
        like: choose the prefix for this number instead, so that two can be compared.
    """
    return f"{_prefixed(count, 1000, ('', 'k', 'M', 'G', 'T', 'P'), like)}FLOPs"


def human_bytes(count: float, like: float | None = None) -> str:
    """Bytes with a binary prefix: 2048 gives `2.00 KiB`. Arguments as in `human_flops`."""
    return f"{_prefixed(count, 1024, ('', 'Ki', 'Mi', 'Gi', 'Ti'), like)}B"


def _prefixed(count: float, base: int, prefixes: Sequence[str], like: float | None) -> str:
    size, step = like or count, 0
    while size >= base and step + 1 < len(prefixes):
        size, step = size / base, step + 1
    return f"{count / base**step:.{2 if step else 0}f} {prefixes[step]}"
