"""foveate: faster vision-language models by removing the visual tokens they do not need."""

from foveate import methods
from foveate.budget import per_request
from foveate.clip import ClipText
from foveate.engine.session import Session, apply, use
from foveate.errors import FoveateError
from foveate.method import Scorer, Step, get_method, list_methods, register
from foveate.models import list_families
from foveate.training import load, prepare, save

__all__ = [
    "ClipText",
    "FoveateError",
    "Scorer",
    "Session",
    "Step",
    "apply",
    "get_method",
    "list_families",
    "list_methods",
    "load",
    "methods",
    "per_request",
    "prepare",
    "register",
    "save",
    "use",
]
