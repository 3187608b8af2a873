"""The registry: which methods there are, by name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import TypeVar

from foveate.core.method import Method
from foveate.core.step import STAGES, Stage
from foveate.errors import FoveateError, UnknownMethodError
from foveate.io.quoting import meant, quoted

BUILT_IN = "foveate.methods"
"""Registers the methods of foveate; loaded by its name, as those of other packages are."""

_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(
    slug: str,
    *,
    stage: Stage,
    does: str = "",
    needs: tuple[str, ...] = (),
    paper: str = "",
) -> Callable[[M], M]:
    """Class decorator that makes a method known under `slug`.

    Args:
        slug: short lower-case name, unique.
        stage: where the method first acts.
        does: what it does, in about five words, for listings.
        needs: names of the signals it uses, for planning and listing.
        paper: how to cite it, `Doe et al. 2025, arXiv:2501.00001`, for listings and `foveate cite`.

    Raises:
        FoveateError: the slug is taken, or the stage is unknown.
    """

    def add(cls: M) -> M:
        known = _REGISTRY.get(slug)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise FoveateError(
                f"method name {slug!r} is taken by {known.__module__}.{known.__qualname__}"
            )
        if stage not in STAGES:
            raise FoveateError(
                f"stage must be one of {', '.join(STAGES)}, got {stage!r} for {slug!r}"
            )
        cls.slug, cls.stage, cls.needs, cls.paper = slug, stage, needs, paper
        cls.does = does
        _REGISTRY[slug] = cls
        return cls

    return add


def list_methods() -> list[str]:
    """Names of all registered methods, sorted."""
    _load()
    return sorted(_REGISTRY)


def get_method(name: str) -> type[Method]:
    """The method class registered under `name`.

    Raises:
        UnknownMethodError: no such method; the message lists near matches.

    Examples:
        >>> get_method("fastv")(layer=2, keep=0.5)
        FastV(layer=2, keep=0.5, positions=None)
    """
    _load()
    if name in _REGISTRY:
        return _REGISTRY[name]
    raise unknown_method(name, _REGISTRY)


def unknown_method(name: str, known: Iterable[str]) -> UnknownMethodError:
    """What to raise of a name that is none of the known methods'."""
    hint = meant(name, known, "`foveate list` shows all")
    return UnknownMethodError(f"unknown method {quoted(name)}; {hint}")


@functools.cache
def _load() -> None:
    """Import the built-in methods, and those that other packages offer.

    Raises:
        FoveateError: a package's entry point cannot be loaded.
    """
    importlib.import_module(BUILT_IN)
    for point in entry_points(group="foveate.methods"):
        try:
            point.load()
        except Exception as error:  # somebody else's code may raise anything
            where = point.dist.name if point.dist else "an installed package"
            raise FoveateError(
                f"{where} offers the method {point.name!r} as {point.value!r}, which cannot be "
                f"loaded ({type(error).__name__}: {error}); repair or uninstall it"
            ) from error
