"""What the engine asks of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._C._dynamo import eval_frame
from torch._dynamo.decorators import skip

F = TypeVar("F", bound=Callable[..., Any])

# Keeps it from tracing a function, which keeps state, but not what the function calls.
untraced: Callable[[F], F] = skip  # type: ignore[assignment]

# What would trace the function that is called next; `None` or `False` where no compiled code led.
tracing: Callable[[], Any] = getattr(eval_frame, "get_eval_frame_callback", lambda: None)
