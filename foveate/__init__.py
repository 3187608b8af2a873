"""foveate: faster vision-language models by removing the visual tokens they do not need."""

from typing import TYPE_CHECKING

from foveate.lazy import exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from foveate import methods
    from foveate.core import Scorer, Step, get_method, list_methods, register
    from foveate.core.budget import per_request
    from foveate.errors import FoveateError
    from foveate.families import list_families
    from foveate.run import Session, apply, use
    from foveate.signals.clip import ClipText
    from foveate.training.prepare import load, load_adapter, prepare, save, save_adapter
    from foveate.tune.policy import adaptive
else:
    __getattr__ = exports(
        __name__,
        {
            "foveate.core": ("Scorer", "Step", "get_method", "list_methods", "register"),
            "foveate.core.budget": ("per_request",),
            "foveate.errors": ("FoveateError",),
            "foveate.families": ("list_families",),
            "foveate.run": ("Session", "apply", "use"),
            "foveate.signals.clip": ("ClipText",),
            "foveate.training.prepare": (
                "load", "load_adapter", "prepare", "save", "save_adapter",
            ),
            "foveate.tune.policy": ("adaptive",),
        },
    )[0]  # fmt: skip

__all__ = [
    "ClipText",
    "FoveateError",
    "Scorer",
    "Session",
    "Step",
    "adaptive",
    "apply",
    "get_method",
    "list_families",
    "list_methods",
    "load",
    "load_adapter",
    "methods",
    "per_request",
    "prepare",
    "register",
    "save",
    "save_adapter",
    "use",
]


def __dir__() -> list[str]:
    """Public names alone; modules are attributes too, but not what a user looks for."""
    return sorted((*__all__, "__version__"))
