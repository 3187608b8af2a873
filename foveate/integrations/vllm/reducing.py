"""Reducing: a plan's steps on the features of images, with the engine's own arithmetic.

Shapes: `V` visual tokens of an image, `K` survivors, `D` hidden, `C` channels of a signal, `Q`
tokens of the question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from foveate.core.tokens import Shape
from foveate.engine.features import EncoderOutputInfo, sheets
from foveate.engine.images import Image
from foveate.engine.plan import Plan
from foveate.engine.prompt import PromptContext, QuestionText
from foveate.engine.reduce_features import mark
from foveate.signals.encoder_hooks import signal_of


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images, and what methods may read of them.

    Args:
        shapes: tokens, grid and frames of each.
        features: (V, D) of each.
        signals: (signal, layer of the tower) -> (C, V) of each.
        unprojected: (V, C) what the projector was given for each; empty if no method merges that.
        planes: (V, P) what is added to the tokens of each after the first layers of the language
            model (DeepStack), one plane beside the other; empty if nothing is.
    """

    shapes: Sequence[Shape]
    features: Sequence[Tensor]
    signals: Mapping[tuple[str, int], Sequence[Tensor]] = field(default_factory=dict)
    unprojected: Sequence[Tensor] = ()
    planes: Sequence[Tensor] = ()

    @classmethod
    def joined(cls, parts: Sequence[Encoded]) -> Encoded:
        """The images of several, one after another."""
        return cls(
            [shape for part in parts for shape in part.shapes],
            [x for part in parts for x in part.features],
            {key: [x for part in parts for x in part.signals[key]] for key in parts[0].signals},
            [x for part in parts for x in part.unprojected],
            [x for part in parts for x in part.planes],
        )


@dataclass(frozen=True, eq=False)
class Survivors:
    """What survives of an image.

    Args:
        rows: (K, D) its tokens, in the order in which they are to be read; planes, if there are
            any, stand beside them.
        places: (K) positions among the tokens of the image that they take, ascending.
    """

    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, sheets: Sequence[Tensor], places: Tensor) -> Survivors:
        """Of the (V, D) tokens of an image and of its planes.

        Args:
            sheets: the tokens, and the planes.
            places: (K) which survive.
        """
        return cls(torch.cat([sheet[places] for sheet in sheets], -1), places)


def survivors(
    plan: Plan,
    encoded: Encoded,
    heads: int,
    projector: Callable[[Tensor], Tensor] | None = None,
    question: Tensor | None = None,
) -> list[Survivors]:
    """What survives of each image.

    Args:
        plan: steps before the language model.
        encoded: the images.
        heads: attention heads of the vision tower.
        projector: makes tokens of what methods merge before it; not called if nothing is merged.
        question: (Q, D) input embeddings of the question, which follows each image.
    """
    images = [Image(number, number, end=0) for number in range(len(encoded.shapes))]
    info = EncoderOutputInfo(
        encoded.shapes,
        encoded.signals,
        projector=projector if encoded.unprojected else None,
        unprojected=encoded.unprojected,
    )
    output: Any = SimpleNamespace(
        pooler_output=list(encoded.features),
        marked=False,
        encoded=info,
        deepstack_features=[list(encoded.planes)] if encoded.planes else None,
    )

    def deliver(name: str, values: Tensor) -> Tensor:
        signal = signal_of(name)
        values = signal.shape(values, heads)
        return values if signal.of_states is None else signal.of_states(values, None)

    mark(output, plan, _context(images, question), deliver)
    # Not the rows that are no NaN: a model that overflows makes some too.
    places = [list(state.kept.values())[-1] for state in output.encoded.states]
    of_images = zip(zip(*sheets(output), strict=True), places, strict=True)
    return [Survivors.of(parts, at) for parts, at in of_images]


def _context(images: Sequence[Image], question: Tensor | None) -> PromptContext:
    """What is known of the prompt: each image is a row, and the question follows it."""
    source = range(len(images))
    if question is None:
        return PromptContext(images, source)
    columns = torch.arange(1, len(question) + 1, device=question.device).expand(len(images), -1)
    text = QuestionText(columns, torch.ones_like(columns, dtype=torch.bool))
    return PromptContext(images, source, (text, question.expand(len(images), -1, -1)))


def rehearse(plan: Plan, shapes: Sequence[Shape], heads: int) -> list[int]:
    """Let a method reduce random tokens, to know how many survive of each image, and so that it
    refuses a budget before an engine runs.

    Args:
        plan: steps before the language model.
        shapes: tokens of each image.
        heads: attention heads of the vision tower.

    Raises:
        FoveateError: the method cannot reduce images of this shape so far.
    """
    random = torch.Generator().manual_seed(0)

    def rows(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random)

    keys = [(name, layer) for name, of in plan.encoder_signals.items() for layer in of]
    encoded = Encoded(
        shapes,
        [rows(shape.total, _WIDTH) for shape in shapes],
        {key: [rows(heads, shape.total) for shape in shapes] for key in keys},
        [rows(shape.total, _WIDTH) for shape in shapes] if plan.before_projector else (),
    )
    question = rows(1, _WIDTH) if plan.asks_embeddings else None
    kept = survivors(plan, encoded, heads, lambda x: x, question)
    return [len(image.places) for image in kept]


_WIDTH = 8
