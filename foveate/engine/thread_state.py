"""What one thread is doing with the model."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from foveate.engine.cached_forward import CachedForward
from foveate.engine.forward import ForwardPass
from foveate.engine.prompt import PromptTokens
from foveate.engine.rollback import Rollback
from foveate.engine.state import Kwargs
from foveate.record.record import Record
from foveate.signals.clip import ClipQuestions


class ModelCall:
    """One forward of the base model. Made anew for each, and for the time between them."""

    inside: bool = False  # within the base model's forward
    entered: bool = False  # has come to the text model
    prompt: tuple[Tensor | None, Kwargs] | None = None  # ids and arguments
    tokens: PromptTokens | None = None  # what each token of its prompt is, where it has images
    readout: Tensor | None = None  # (B, T) visual tokens that a next token is read from, if any
    forward: ForwardPass | None = None
    cached: CachedForward | None = None  # instead of a forward, where nothing can be removed
    rollback: Rollback | None = None  # what the cache is brought back to if it dies

    def __init__(self) -> None:
        self.visual: dict[str, Tensor] = {}  # modality -> (B, T) placeholders
        self.encoded: dict[str, Any] = {}  # modality -> its features, a tagged ModelOutput


class ThreadState(threading.local):
    """What one thread is doing with the model."""

    encoding: bool = False  # within get_image_features or get_video_features
    given: Tensor | None = None  # what the projector was given there
    requests: int | None = None  # rows that `generate` was called with, while it runs
    asked: tuple[Tensor | None, Kwargs] | None = None  # ids and arguments that it was called with
    trailing: int = 0  # drafted tokens after the prompt
    supervised: Tensor | None = None  # (B, T) positions with a label, where labels are given
    awaited: bool = False  # `generate` has encoded images that no forward was given yet
    generating: bool = False  # within `generate`
    told: tuple[int, int] | None = None  # rows and length of the prompt whose record stands there
    record: Record | None = None
    clip: ClipQuestions | None = None

    def __init__(self) -> None:
        self.now = ModelCall()
