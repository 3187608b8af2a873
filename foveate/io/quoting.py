"""What a user gave, as an error message can show it: short, and on one line."""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable
from typing import Any

LONGEST = 300
"""Characters of a message in which a user's values are quoted."""


class _Repr(reprlib.Repr):
    """`repr` that looks at the first entries of a value only."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_int(self, x: int, level: int) -> str:
        """Python writes no integers of several thousand digits."""
        if x.bit_length() > 4 * self.maxlong:
            return f"a whole number of {x.bit_length()} bits"
        return repr(x)


def quoted(value: Any, length: int = 60) -> str:
    """A value as Python writes it, cut in the middle where it is long.

    Args:
        value: anything; how large it is does not matter.
        length: most characters.
    """
    return shown(_Repr().repr(value), length)


def shown(text: str | os.PathLike[str] | Exception, length: int = 60) -> str:
    """A text, a path or an error's reason on one line, cut in the middle where it is long.

    Args:
        text: what to show.
        length: most characters.
    """
    whole = str(text)
    if len(whole) > 2 * length:  # before looking at every character of it
        whole = f"{whole[:length]}...{whole[-length:]}"
    line = " ".join(whole.split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    if len(line) <= length:
        return line
    half = (length - 3) // 2
    return f"{line[: length - 3 - half]}...{line[-half:]}"


def within(where: str | os.PathLike[str], error: Exception) -> str:
    """An error's message with where it is put before it, in `LONGEST` characters.

    Args:
        where: a file, or a line of it.
        error: what is wrong there.
    """
    reason = shown(error, LONGEST - 40)
    return f"{shown(where, LONGEST - len(reason) - 2)}: {reason}"


def meant(name: str, known: Iterable[str], otherwise: str) -> str:
    """What a mistyped name may have meant, else something else to say."""
    close = difflib.get_close_matches(name[:80].lower(), list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def near(name: Any, known: Iterable[str]) -> str:
    """What a mistyped key may have meant, else all there are."""
    known = list(known)
    close = difflib.get_close_matches(shown(quoted(name)), known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known keys: {', '.join(known)}" if len(known) < 20 else "no key is like it"


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, each once: `a`, `a and b`, `a, b and c`."""
    *first, last = dict.fromkeys(names)
    return f"{', '.join(first)} and {last}" if first else last


def each_of(names: Iterable[str]) -> str:
    """The subject of a verb in the singular: `a`, or `each of a and b`."""
    names = list(dict.fromkeys(names))
    return listed(names) if len(names) == 1 else f"each of {listed(names)}"


def none_of(names: Iterable[str], verb: str) -> str:
    """A denial: `a does not act`, or `none of a and b acts`.

    Args:
        names: who.
        verb: what they do not do, as `act`.
    """
    names = list(dict.fromkeys(names))
    return f"{names[0]} does not {verb}" if len(names) == 1 else f"none of {listed(names)} {verb}s"
