"""RowText: from the tokens of an answer to text that can be sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what a tokenizer makes of the first bytes of a character


class RowText:
    """Text of one answer, given out as it becomes certain.

    Held back are unfinished characters, and what may be the beginning of a stop string.

    Args:
        tokenizer: of the model.
        stops: strings before which the text ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._before = self._read = 0  # tokens of the context, and of the text so far
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        self._held += self._new_text()
        return self._certain()

    def end(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        self._held += self._new_text(last=True)
        sent = self._certain()
        rest, self._held = self._held, ""
        return sent if self.stopped else sent + rest

    def _new_text(self, last: bool = False) -> str:
        """What tokens add to the text; some decoders need those before to tell spaces."""
        context = self._decode(self._tokens[self._before : self._read])
        text = self._decode(self._tokens[self._before :])
        if len(text) <= len(context) or (text.endswith(UNFINISHED) and not last):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return text[len(context) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def _certain(self) -> str:
        """Take from the held text what no stop string can begin in."""
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            sent, self._held, self.stopped = self._held[: min(found)], "", True
            return sent
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent


def _overlap(text: str, stop: str) -> int:
    """Letters at the end of a text with which a stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
