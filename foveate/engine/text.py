"""The text part of a session: where its hooks go on a vision-language model."""

from __future__ import annotations

import functools

from torch import nn

from foveate.engine.attachment import Attachment
from foveate.engine.gate import Gate
from foveate.engine.hooks import Hooks, refuse_late
from foveate.engine.kernels import check_kernel
from foveate.engine.plan import Plan
from foveate.engine.vision.hooks import VisionAttachment
from foveate.families import Family
from foveate.signals.clip import ClipQuestions


class TextAttachment(Hooks, Attachment):
    """Steps on image features and between decoder layers.

    Args:
        plan: what to do where.
        family: the model.
        gate: counts the threads inside the model.
        vision: the part that shortens the stream inside the encoder, if one does.
        clip: what is asked, as CLIP embeds it, if a method wants to know.
    """

    def __init__(
        self,
        plan: Plan,
        family: Family,
        gate: Gate,
        vision: VisionAttachment | None = None,
        clip: ClipQuestions | None = None,
    ) -> None:
        Attachment.__init__(self, gate)
        Hooks.__init__(self, plan, family, vision, clip)

    @property
    def root(self) -> nn.Module:
        """The text model."""
        return self.family.text

    def check(self) -> None:
        """Refuse attention kernels that cannot be served.

        Raises:
            UnsupportedModelError: continuous batching, or flex attention.
        """
        check_kernel(self.family)

    def attach(self) -> None:
        """Install the hooks, and wrap `generate` and what makes image and video features."""
        family = self.family
        self.uncopied(family.model, family.base, family.text)
        self.replace_forward(family.base, self.base, outer=True, anchor=True)
        self.replace_forward(family.text, self.text, outer=True, below=family.base)
        if family.model is not family.base:
            self.hook(family.model, self.enter_top)
            wrapped = self.wrap(
                family.model, "generate", self.generate, outer=True, late=refuse_late
            )
            self.entries.append(wrapped)
        for modality in family.placeholder_ids:
            around = functools.partial(self.features, modality)
            name = f"get_{modality}_features"
            self.wrap(family.base, name, around, outer=True, below=family.base)
            projector = family.projector(modality) if self.plan.before_projector else None
            if projector is not None:
                self.before(projector, self.enter_projector)
        if family.one_dimensional:
            self.replace_forward(family.text.rotary_emb, self.rotate)
        for number in range(family.text_layers):
            self.replace_forward(family.layers[number], functools.partial(self.layer, number))
        for number in self.plan.watched_layers:
            for name in ("self_attn", "mlp"):
                module = family._child(family.layers[number], name)
                self.after(module, functools.partial(self.leave_module, number))
        if self.tags.signals is not None:
            self.tags.signals.attach(self)
