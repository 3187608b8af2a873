"""The text side of a session: where its hooks go on a vision-language model."""

from __future__ import annotations

import functools

from torch import nn

from foveate.engine.attachment import Attachment
from foveate.engine.embeddings import EmbeddingHooks
from foveate.engine.feature_hooks import FeatureHooks
from foveate.engine.feature_reducer import FeatureReducer
from foveate.engine.gate import Gate
from foveate.engine.generate_hooks import GenerateHooks, refuse_late
from foveate.engine.hooks import ForwardHooks
from foveate.engine.kernels import check_kernel
from foveate.engine.model_hooks import ModelHooks
from foveate.engine.plan import Plan
from foveate.engine.policy import PolicyHooks
from foveate.engine.tags import Tags
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.hooks import VisionAttachment
from foveate.families import Family
from foveate.families.decoder_layer import mixer_of, mlp_of
from foveate.families.family import AUDIO
from foveate.families.text_facts import Expert
from foveate.record.record import Record


class TextAttachment(Attachment):
    """Steps on image features and between decoder layers.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        gate: counts the threads inside the model.
        vision: the side that shortens the stream inside the encoder, if a method does.
    """

    def __init__(
        self,
        plan: Plan,
        family: Family,
        state: ThreadState,
        gate: Gate,
        vision: VisionAttachment | None = None,
    ) -> None:
        super().__init__(gate)
        self.plan, self.family = plan, family
        self.tags = tags = Tags(plan, family, state)
        reducer = FeatureReducer(plan, family, state, tags.signals)
        self.generate = GenerateHooks(family, state, tags, reducer, self.look_after)
        self.features = FeatureHooks(family, state, tags, reducer, vision, self.look_after)
        self.model = ModelHooks(plan, family, state, tags, reducer, self.look_after)
        self.embeddings = EmbeddingHooks(family, state, self.model, self.look_after)
        self.forward = ForwardHooks(plan, family, state, tags)
        self.policy = PolicyHooks(plan, family, state, self.look_after)

    @property
    def root(self) -> nn.Module:
        """The text model."""
        return self.family.text

    @property
    def record(self) -> Record | None:
        """The last forward over a prompt: this thread's, or else any thread's."""
        return self.forward.record

    def check(self) -> None:
        """Refuse attention kernels that cannot be served.

        Raises:
            UnsupportedModelError: continuous batching, or flex attention.
        """
        check_kernel(self.family)
        if self.family.expert is not None:
            check_kernel(self.family.expert)

    def attach(self) -> None:
        """Install the hooks, and wrap `generate` and what makes features."""
        family = self.family
        self.uncopied(family.model, family.base, family.text)
        embeds = family.embedding is not None
        above = family.model if embeds else family.policy
        # The text model's first: where both are one module, it is called within the base model's.
        self.replace_forward(family.text, self.forward.text, outer=True, below=family.base)
        self.replace_forward(family.base, self.model.base, outer=True, below=above, anchor=True)
        if embeds:
            self.replace_forward(family.model, self.embeddings.forward, outer=True)
        elif family.generates:
            if self.plan.learns:
                self.replace_forward(family.model, self.model.learn)
            self.hook(family.model, self.model.enter_top)
            around = self.generate.generate
            wrapped = self.wrap(family.model, "generate", around, outer=True, late=refuse_late)
            self.entries.append(wrapped)
        self._attach_to_features()
        self._attach_to_layers()
        if family.expert is not None:
            self._attach_to_policy(family.policy, family.expert)
        if self.tags.signals is not None:
            self.tags.signals.attach(self)

    def _attach_to_features(self) -> None:
        family = self.family
        for modality in family.placeholder_ids:
            around = functools.partial(self.features.features, modality)
            name = f"get_{modality}_features"
            if modality == AUDIO:
                self.wrap(family.base, name, self.features.heard, outer=True, below=family.base)
                continue
            if (placer := family.placer(modality)) is not None:
                self.replace_forward(placer, functools.partial(self.features.placed, modality))
            else:
                self.wrap(family.base, name, around, outer=True, below=family.base)
            projector = family.projector(modality) if self.plan.before_projector else None
            if projector is not None:
                self.before(projector, self.features.enter_projector)
            if (late := family.late_projector(modality)) is not None:
                replaced = functools.partial(self.features.late_projector, modality)
                self.replace_forward(late, replaced)

    def _attach_to_policy(self, policy: nn.Module, expert: Expert) -> None:
        hooks, model = self.policy, self.family.model
        self.uncopied(policy, expert.text)
        self.replace_forward(policy, hooks.forward, outer=True)
        self.wrap(policy, "embed_prefix", hooks.embed)
        if hasattr(model, "sample_actions"):
            wrapped = self.wrap(model, "sample_actions", hooks.sample, outer=True)
            self.entries.append(wrapped)
        self.replace_forward(expert.text, hooks.expert)
        for number, layer in enumerate(expert.layers):
            self.replace_forward(layer, functools.partial(hooks.layer, number))

    def _attach_to_layers(self) -> None:
        family, hooks = self.family, self.forward
        rotary = getattr(family.text, "rotary_emb", None)
        if family.one_dimensional and rotary is not None:
            self.replace_forward(rotary, hooks.rotate)
        for number in range(family.text_layers):
            self.replace_forward(family.layers[number], functools.partial(hooks.layer, number))
        for number in self.plan.watched_layers:
            layer = family.layers[number]
            for module in (mixer_of(layer), mlp_of(layer)):
                self.after(module, functools.partial(hooks.leave_module, number))
