"""Judging: is an answer right, and does a model with fewer tokens say what the unpruned one says?

Shapes: `N` questions, `W` words of the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SAME = {word: str(number) for number, word in enumerate(_NUMBERS)} | {
    "grey": "gray",
    "colour": "color",
    "true": "yes",
    "false": "no",
}
_FILLER = {"a", "an", "the", "it", "is", "its", "there", "answer", "are"}
_WORD = re.compile(r"[\w-]+")


def normalise(text: str) -> str:
    """An answer without case, punctuation and articles, and with numbers as digits.

    Examples:
        >>> normalise("The answer is Three.")
        '3'
    """
    words = [_SAME.get(word, word) for word in _WORD.findall(text.lower())]
    return " ".join(word for word in words if word not in _FILLER)


def is_right(said: str, answer: str, choices: Sequence[str] = ()) -> bool:
    """Whether what was said gives the right answer.

    It does if it is the answer, or begins with it. A longer sentence also counts if, of all
    choices, it names the right one only.

    Args:
        said: what the model said.
        answer: the right answer.
        choices: what the answer could have been; empty where open.
    """
    mine, right = normalise(said), normalise(answer)
    if mine == right or mine.startswith(right + " "):
        return True
    named = {choice for choice in map(normalise, choices) if f" {choice} " in f" {mine} "}
    return named == {right}


def kl(unpruned: Tensor, pruned: Tensor) -> Tensor:
    """(N,) KL divergence in nats of first words, from the unpruned model's to the pruned one's.

    Args:
        unpruned: (N, W) log-probabilities with all visual tokens.
        pruned: (N, W) log-probabilities with fewer.
    """
    share = unpruned.exp()
    return (share * (unpruned - pruned)).masked_fill(share == 0, 0).sum(-1).clamp(min=0)


def majority(answers: Sequence[str]) -> float:
    """Share of questions that the commonest answer gets right: what a blind model can reach."""
    counts = Counter(map(normalise, answers))
    return max(counts.values(), default=0) / max(len(answers), 1)
