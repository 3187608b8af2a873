"""Model: where vLLM encodes images, tokens are removed before it caches and places them.

Shapes: `V` visual tokens of an image, `K` survivors, `D` hidden, `C` channels of a signal, `Q`
tokens of a question.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.engine.plan import Plan
from foveate.errors import UnsupportedModelError
from foveate.integrations.vllm.plans import Plans
from foveate.integrations.vllm.reducing import Encoded, Survivors, survivors
from foveate.integrations.vllm.request import KEY, Request, unpack
from foveate.integrations.vllm.signals import inputs_of
from foveate.integrations.vllm.site import Site
from foveate.signals.encoder_hooks import signal_of

Rows = dict[tuple[str, int], Tensor]  # (signal, layer of the tower) -> (N, C, P) of all tiles


class FoveateModel:
    """Stands before a model of vLLM in a class's bases."""

    site: ClassVar[Site]
    config: Any
    embed_input_ids: Callable[..., Tensor]

    @functools.cached_property
    def plans(self) -> Plans:
        """Plans of methods on the model."""
        return Plans(self.config, self.site.whole_tower)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Features of images, as vLLM makes them, with what each request asks for removed."""
        asked = {m: kwargs.pop(f"{KEY}_{m}", None) for m in self.site.modalities}
        encode: Callable[..., Any] = super().embed_multimodal  # type: ignore[misc]
        found = [(modality, packed) for modality, packed in asked.items() if packed is not None]
        if not found:
            return encode(**kwargs)
        ((modality, packed),) = found  # vLLM encodes items of one modality at a time
        return tuple(_Batch(self, modality, unpack(packed), kwargs).reduced(encode))

    def placed(
        self, modality: str, kwargs: Mapping[str, Any], item: int, images: Sequence[Survivors]
    ) -> Tensor:
        """(N, D) what vLLM caches of an item and places in the prompt.

        Args:
            modality: `image` or `video`.
            kwargs: what vLLM calls the model with, for all items of a batch.
            item: which of them.
            images: what survives of its images.
        """
        return torch.cat([image.rows for image in images])


@dataclass(frozen=True, eq=False)
class _Asked:
    """What some items of a batch are asked for.

    Args:
        request: the request.
        plan: its plan.
        members: which items they are.
        rows: signals of the tower, filled while it runs.
    """

    request: Request
    plan: Plan
    members: list[int]
    rows: Rows = field(default_factory=dict)


class _Batch:
    """Items that vLLM encodes together.

    Args:
        model: the model.
        modality: that of all items.
        texts: the request of each item.
        kwargs: what vLLM calls the model with.
    """

    def __init__(
        self, model: Any, modality: str, texts: Sequence[str], kwargs: Mapping[str, Any]
    ) -> None:
        self.model, self.modality, self.kwargs = model, modality, kwargs
        self.site: Site = model.site
        self.family = model.plans.family
        self.asked = []
        for text in dict.fromkeys(texts):
            request = Request.from_text(text)
            members = [item for item, other in enumerate(texts) if other == text]
            self.asked.append(_Asked(request, model.plans.of(request.method), members))

    @torch.no_grad()
    def reduced(self, encode: Callable[..., Any]) -> list[Tensor]:
        """(K, D) features of each item.

        Args:
            encode: makes the features of all items.
        """
        with ExitStack() as stack:
            given = []
            for asked in self.asked:
                self._collect(stack, asked)
            if any(asked.plan.before_projector for asked in self.asked):
                given = stack.enter_context(inputs_of(attrgetter(self.site.projector)(self.model)))
            features = encode(**self.kwargs)
        calls = self.site.calls(self.modality, self.kwargs)
        result: list[Tensor] = list(features)
        for asked in self.asked:
            items = [self._encoded(asked, i, result[i], calls, given) for i in asked.members]
            heads = self.family.encoder.heads if asked.rows else 1
            joined, question = Encoded.joined(items), self._question(asked)
            kept = iter(survivors(asked.plan, joined, heads, self._projector, question))
            for i, item in zip(asked.members, items, strict=True):
                found = [next(kept) for _ in item.shapes]
                result[i] = self.model.placed(self.modality, self.kwargs, i, found)
        return result

    @property
    def _projector(self) -> Any:
        """What makes tokens one by one; `None` where they are mixed after it."""
        if self.family.projector(self.site.modality(self.modality)) is None:
            return None
        return attrgetter(self.site.projector)(self.model)

    def _collect(self, stack: ExitStack, asked: _Asked) -> None:
        """Collect what a method reads of the tower as long as the stack is open."""
        wanted = asked.plan.encoder_signals
        if not wanted:
            return
        threshold = asked.plan.global_threshold
        signals = self.site.signals(self.model, self.family, wanted, threshold)
        signals.attach(stack.enter_context(self.site.hooks(self.model)))
        rows = stack.enter_context(signals.collect())
        stack.callback(lambda: asked.rows.update(rows))

    def _encoded(
        self,
        asked: _Asked,
        item: int,
        features: Tensor,
        calls: Sequence[int],
        given: Sequence[Tensor],
    ) -> Encoded:
        """The images of an item, of which vLLM has made (V, D) features."""
        family, modality = self.family, self.site.modality(self.modality)
        arguments = self.site.arguments(self.modality, self.kwargs, item)
        start = sum(calls[:item])
        stop = start + self.site.fed(family, arguments, calls[item])
        features = features.reshape(-1, features.shape[-1])
        width = self.site.width(self.model, features.shape[-1])
        features, planes = features[:, :width], features[:, width:]
        shapes = self.site.shapes(family, self.modality, len(features), arguments)
        lengths = [shape.total for shape in shapes]
        signals = {
            (name, layer): self._per_token(name, row[start:stop], lengths, arguments)
            for (name, layer), row in self._complete(asked).items()
        }
        unprojected: Sequence[Tensor] = ()
        if given and family.projector(modality) is not None:
            rows = torch.cat([x.flatten(0, -3) for x in given])[start:stop]
            unprojected = family.unprojected(modality, rows, lengths, arguments)
        sheets = planes.split(lengths) if planes.shape[-1] else ()
        return Encoded(shapes, features.split(lengths), signals, unprojected, sheets)

    def _complete(self, asked: _Asked) -> Rows:
        """Signals, of which none is missing."""
        if len(asked.rows) < sum(map(len, asked.plan.encoder_signals.values())):
            raise UnsupportedModelError(
                f"{asked.request.method.slug!r} reads the vision tower while it runs, but the "
                "tower runs as a graph here; start vLLM without compiled encoders and without "
                "CUDA graphs of them, or use a method that reads features alone"
            )
        return asked.rows

    def _per_token(
        self, name: str, rows: Tensor, lengths: Sequence[int], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor]:
        """(C, V) of each image of an item."""
        modality, newline = self.site.modality(self.modality), signal_of(name).newline
        images = self.family.per_token(modality, rows, arguments, newline)
        assert [image.shape[-1] for image in images] == list(lengths)
        return images

    def _question(self, asked: _Asked) -> Tensor | None:
        """(Q, D) input embeddings of the question; `None` if the method reads none."""
        if not asked.request.token_ids:
            return None
        device = next(self.model.parameters()).device
        return self.model.embed_input_ids(torch.tensor(asked.request.token_ids, device=device))
