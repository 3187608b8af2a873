"""Conventions: what papers and tools mean by FLOPs, by name."""

from __future__ import annotations

from dataclasses import dataclass

from foveate.errors import InputError


@dataclass(frozen=True)
class Convention:
    """How work becomes a number.

    Args:
        name: what it is called here.
        what: the same in words.
        multiply_add: what a multiply-add counts as.
        causal: whether only the query-key pairs that a decoder's mask lets through count, or all.
        visual_only: whether only decoder layers count, and in these only visual tokens, by
            4 n d^2 + 2 n^2 d + `mlp` n d m for n tokens, width d and MLP width m. The formula
            takes keys and values to be as wide as queries.
        mlp: matrices of the MLP in that formula.
    """

    name: str
    what: str
    multiply_add: int = 2
    causal: bool = True
    visual_only: bool = False
    mlp: int = 3


CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention("foveate", "a multiply-add is 2; causal attention as the mask lets it"),
        Convention("dense", "a multiply-add is 2; all attention, as torch counts", causal=False),
        Convention("macs", "a multiply-add is 1; attention in full", multiply_add=1, causal=False),
        Convention(
            "pyramiddrop",
            "4nd^2 + 2n^2d + 3ndm for each decoder layer, visual tokens only (also SparseVLM)",
            visual_only=True,
        ),
        Convention(
            "fastv",
            "4nd^2 + 2n^2d + 2ndm for each decoder layer, visual tokens only (also DivPrune)",
            visual_only=True,
            mlp=2,
        ),
    )
}


def get_convention(name: str) -> Convention:
    """The convention of a name.

    Raises:
        InputError: there is none; the message lists those there are.
    """
    if name not in CONVENTIONS:
        raise InputError(f"unknown convention {name!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]
