"""Several streams of states for each token, as in Gemma 3n (AltUp), and what comes with them.

Symbols: `T` tokens, `D` hidden, `S` streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Streams:
    """The streams of a text model; with one, each token has one state and nothing is computed.

    Args:
        hidden: D.
        count: S, of states that a layer predicts and corrects.
        tables: width of further embedding tables, for ids of other modalities; each token is looked
            up in all and projected.
    """

    hidden: int
    count: int = 1
    tables: int = 0

    @classmethod
    def of(cls, config: Any) -> Streams:
        """Read the sizes from a text config, or from a multimodal one with its tables."""
        text = getattr(config, "text_config", config)
        return cls(text.hidden_size, getattr(text, "altup_num_inputs", 1), _tables(config))

    def predicted(self, tokens: int) -> int:
        """What a layer predicts of all streams before its attention: weights by a router,
        2 T (D S + S^3), and a sum of all S for each, 2 T D S^2.
        """
        if self.count == 1:
            return 0
        routed = self.hidden * self.count + self.count**3
        return 2 * tokens * (routed + self.hidden * self.count**2)

    def in_layer(self, tokens: int) -> int:
        """The prediction, and how much each stream follows what attention and MLP have changed,
        2 T (D S + S^2).
        """
        if self.count == 1:
            return 0
        corrected = 2 * tokens * (self.hidden * self.count + self.count**2)
        return self.predicted(tokens) + corrected

    def at_entry(self, tokens: int) -> int:
        """Before the first layer, once: streams, and ids of other modalities, 2 T D times the width
        of their tables.
        """
        return self.joined(tokens) + 2 * tokens * self.hidden * self.tables

    def joined(self, tokens: int) -> int:
        """A matrix for each stream but the first, which makes it of the input embedding, or brings
        it back after the last layer: 2 T D^2 (S - 1).
        """
        return 2 * tokens * self.hidden**2 * (self.count - 1)


def _tables(config: Any) -> int:
    """Width of embedding tables of other modalities, which configs name by their first id."""
    parts: list[Any] = [getattr(config, f"{name}_config", None) for name in ("vision", "audio")]
    return sum(part.hidden_size for part in parts if hasattr(part, "vocab_offset"))
