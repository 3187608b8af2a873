"""What the engine asks of torch.compile: not to trace its functions, and whether it was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame
from torch._dynamo.decorators import skip

F = TypeVar("F", bound=Callable[..., Any])
_callback = getattr(eval_frame, "get_eval_frame_callback", lambda: None)


def untraced(function: F) -> F:
    """Keep torch.compile from tracing a function, which keeps state, but not what it calls."""
    return skip(function)  # type: ignore[return-value]


def is_compiled() -> bool:
    """Whether torch.compile would trace what is called now: what calls this was reached by code
    that it has compiled.
    """
    return _callback() not in (None, False)
