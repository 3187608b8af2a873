"""What one thread is doing with the model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from foveate.core import TrainingPass
from foveate.core.transfer import Downloads
from foveate.engine import features
from foveate.engine.cached_forward import CachedForward
from foveate.engine.forward import ForwardPass
from foveate.engine.layout import Layout
from foveate.engine.prompt import PromptTokens
from foveate.engine.rollback import Rollback
from foveate.engine.state import Kwargs
from foveate.engine.vision.forward import Encoding
from foveate.engine.vision.running_layer import RunningLayer
from foveate.record.record import Record
from foveate.signals.clip import ClipQuestions


class ModelCall:
    """One forward of the base model. Made anew for each, and for the time between them."""

    inside: bool = False  # within the base model's forward
    entered: bool = False  # has come to the text model
    prompt: tuple[Tensor | None, Kwargs] | None = None  # ids and arguments
    tokens: PromptTokens | None = None  # what each token of its prompt is, where it has images
    real: Tensor | None = None  # (B, past + T) as `real_positions` gives it, where it has images
    readout: Tensor | None = None  # (B, T) visual tokens that a next token is read from, if any
    forward: ForwardPass | None = None
    cached: CachedForward | None = None  # instead of a forward, where nothing can be removed
    rollback: Rollback | None = None  # what the cache is brought back to if it dies
    expanded: int = 1  # rows per request: beams, or returned sequences
    placed: Sequence[int] | None = None  # images of the encoder that are in the prompt, if not all

    def __init__(self) -> None:
        self.read = Downloads()  # what the host knows of its arguments
        self.visual: dict[str, Tensor] = {}  # modality -> (B, T) placeholders, on the host
        self.encoded: dict[str, Any] = {}  # modality -> its features, a tagged ModelOutput

    def request_of(self, row: int) -> int:
        """The request that a row of the batch belongs to."""
        return row // self.expanded

    def images_of(self, output: Any, visual: Tensor) -> Sequence[int]:
        """Which image of an encoder's output each image of the prompt is.

        Args:
            output: tagged output.
            visual: (B, T) placeholders of its modality.

        Raises:
            InputError: transformers gives the beams of a row different images.
        """
        if self.placed is not None:
            return self.placed
        return features.members(output, visual, self.expanded)


class GenerateCall:
    """One call of `generate`; without arguments, the time outside of all calls.

    Args:
        inputs: ids or embeddings that it was called with.
        prompt: ids and arguments that it was called with.
        told: rows and length of the prompt whose record stands there.
    """

    trailing: int = 0  # drafted tokens after the prompt
    awaited: bool = False  # it has encoded images that no forward was given yet

    def __init__(
        self,
        inputs: Tensor | None = None,
        prompt: tuple[Tensor | None, Kwargs] | None = None,
        told: tuple[int, int] | None = None,
    ) -> None:
        self.requests = None if inputs is None else inputs.shape[0]
        self.prompt, self.told = prompt, told
        self.running = prompt is not None


class ThreadState(threading.local):
    """What one thread is doing with the model.

    Args:
        clip: what is asked, as CLIP embeds it, until the thread is told otherwise.
    """

    supervised: Tensor | None = None  # (B, T) positions with a label, where labels are given
    training: TrainingPass | None = None  # the forward, where methods learn
    record: Record | None = None  # of the last forward over a prompt
    expert: CachedForward | None = None  # of an expert, where the cache that it reads is pruned
    layout: Layout | None = None  # what survived a text model whose states become embeddings
    encoder_record: Record | None = None  # of the last pass through the encoder

    # While features are made:
    making_features: bool = False  # within get_image_features or get_video_features
    projector_input: Tensor | None = None  # what the projector was given there
    modality: str = "image"  # what they are of
    passes: list[Encoding] | None = None  # finished passes of the encoder, where they are wanted
    readout: Tensor | None = None  # which of the encoder's tokens may not be removed
    made: dict[str, Any] | None = None  # modality -> its features, where a policy wants them

    # While the encoder runs, for features or alone:
    encoding: Encoding | None = None  # its pass
    as_tuple: bool = False  # the caller wants a tuple of it
    maps_states: bool = False  # the caller wants the states between its layers
    fed: dict[str, Any] | None = None  # what is around it was called with, until it is called
    recomputed: RunningLayer | None = None  # a layer of it that is checkpointed, while it runs

    def __init__(self, clip: ClipQuestions | None = None) -> None:
        self.clip = clip
        self.now = ModelCall()
        self.generate = GenerateCall()
        self.collecting = ExitStack()  # signals of the encoder layers that have run
        self.signals: dict[tuple[str, int], Tensor] = {}  # what was collected of them
