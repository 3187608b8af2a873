"""Memory: what a thread takes over from one control step to the next.

Shapes: `B` rows of the batch, `C` cameras of each, padding included, `T` tokens of the prompt, `H`
and `W` of images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.robots.control_step import ControlStep, Observation, copied, equal_images
from foveate.robots.partial_prefix import PartialPrefix


@dataclass(frozen=True, eq=False)
class Reused:
    """What a control step of B rows and C cameras took over from the one before.

    Args:
        cameras: (B, C) images that the vision tower did not encode again, padding included.
        prompt: whether the prompt was not read again at all.
        tokens: of each layer, the share of the prompt's tokens whose keys and values are old.
    """

    cameras: Tensor
    prompt: bool
    tokens: tuple[float, ...]


class Memory(threading.local):
    """The last step of each thread, and the one that it is in.

    Args:
        layers: decoder layers of the policy.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.last: Reused | None = None  # what the last step took over
        self.clear()

    def clear(self) -> None:
        """Forget what could be taken over."""
        self.step: ControlStep | None = None
        self.seeing: Observation | None = None  # what the step that reads its prompt is given
        self.partial: PartialPrefix | None = None  # that prompt, where a rule is followed
        self._tower: tuple[Tensor, Tensor] | None = None  # (B C, ...) pixels, and states of them
        self._equal = torch.zeros(0, dtype=torch.bool)  # (B C) images that were not encoded again

    def recall(self, seeing: Observation, session: object) -> Cache | None:
        """Begin a step.

        Args:
            seeing: what its prompt is made from.
            session: what is attached to the text model.

        Returns:
            The cache of its prompt, if that of the step before was the same. Otherwise `None`: it
            is to be read, and is `seeing` from now on.
        """
        if self.step is not None and self.step.session is not session:
            self.step = None
        if self.step is None or not self.step.seen.equals(seeing):
            self.seeing = seeing
            return None
        every = torch.ones(seeing.cameras.shape, dtype=torch.bool)
        self.last = Reused(every, True, (1.0,) * self.layers)
        return copied(self.step.cache)

    def encoded(self, pixels: Tensor, encode: Callable[[Tensor], Any]) -> Any:
        """What the vision tower makes of images, of which it runs for those that have changed.

        Args:
            pixels: (B C, 3, H, W) images.
            encode: the tower.
        """
        known, states = self._tower or (pixels[:0], pixels)
        equal = equal_images(known, pixels)
        fresh = (~equal).nonzero()[:, 0]
        if len(fresh) == len(pixels):
            output = encode(pixels)
        else:
            if len(fresh):
                states = states.index_copy(0, fresh, encode(pixels[fresh]).last_hidden_state)
            output = BaseModelOutputWithPooling(last_hidden_state=states)
        self._tower, self._equal = (pixels.clone(), output.last_hidden_state), equal.cpu()
        return output

    def remember(self, session: object, cache: Cache) -> None:
        """Keep what the step has made, whose prompt has been read.

        Args:
            session: as in `recall`.
            cache: of the prompt alone.
        """
        assert self.seeing is not None  # as it was read
        attended, entropy, tokens = None, None, (0.0,) * self.layers
        if self.partial is not None:
            notes = self.partial.attended
            attended, entropy = notes.by_words, torch.stack(notes.entropy, 1)
            tokens = tuple(1 - x for x in notes.computed)
        self.step = ControlStep(self.seeing.copied(), session, copied(cache), attended, entropy)
        self.last = Reused(self._equal.view(self.seeing.cameras.shape), False, tokens)
