"""Which family serves a model: found by the model's config type.

Modules of this package register their families when this one is imported.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.errors import UnsupportedModelError
from foveate.families.family import FAMILIES, Family
from foveate.families.unsupported import UNSUPPORTED

_HERE = Path(__file__).parent
for _info in pkgutil.iter_modules([str(_HERE)]):
    if _info.name != "find":
        importlib.import_module(f"{__package__}.{_info.name}")


def list_families() -> list[str]:
    """Model types (`config.model_type`) that foveate can attach to, sorted."""
    return sorted(FAMILIES)


def find_family(model: PreTrainedModel) -> Family:
    """The family adapter of a model.

    Raises:
        UnsupportedModelError: no family is known for the model's config type, it is one that is
            refused, or its layout is not the expected one.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers model, nor one that PEFT, torch.compile "
            "or DDP has wrapped"
        )
    if model_type not in FAMILIES:
        reason = f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported{reason}; "
            f"supported: {', '.join(list_families())}"
        )
    return FAMILIES[model_type](model)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The model within wrappers: PEFT's, `torch.compile`'s, DDP's. Other modules as they are."""
    found: Any = model
    while not isinstance(found, PreTrainedModel):
        if hasattr(found, "get_base_model"):
            inner = found.get_base_model()
        else:
            inner = getattr(found, "_orig_mod", getattr(found, "module", None))
        if not isinstance(inner, nn.Module):
            return model  # type: ignore[return-value]
        found = inner
    return found
