"""EmbeddingHooks: what happens around a model that makes an embedding of each token.

Such a model calls its base model, projects the states and sets those of padding to zero, all at
logical length. What it returns has a row for each token that survived.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.compilation import untraced
from foveate.engine.inputs import bound
from foveate.engine.layout import Layout, take
from foveate.engine.model_hooks import ModelHooks
from foveate.engine.replaced_forward import forward_of
from foveate.engine.state import Kwargs
from foveate.engine.thread_state import ModelCall, ThreadState
from foveate.families import Family


class EmbeddingHooks:
    """Hooks around the forward of a model that embeds.

    Args:
        family: the model.
        state: what each thread is doing with the model.
        model: what happens around the base model.
        look_after: puts back hooks that others have taken off.
    """

    def __init__(
        self,
        family: Family,
        state: ThreadState,
        model: ModelHooks,
        look_after: Callable[[], None],
    ) -> None:
        self.family, self.state, self.model = family, state, model
        self._look_after = look_after

    @untraced
    def forward(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the model's forward: embeddings of removed tokens are taken out."""
        state, original = self.state, forward_of(module, before)
        self._look_after()
        state.layout = None
        try:
            if self.family.embeds_images:
                args, kwargs = (), self._with_images(bound(original, args, kwargs))
            output = original(*args, **kwargs)
            return output if state.layout is None else _shortened(output, state.layout)
        finally:
            state.now, state.layout = ModelCall(), None

    def _with_images(self, kwargs: Kwargs) -> Kwargs:
        """The arguments with features in the prompt, where the base model is handed no ids.

        Args:
            kwargs: those of the model.
        """
        ids, pixels = kwargs.get("input_ids"), kwargs.get("pixel_values")
        if ids is None or kwargs.get("inputs_embeds") is not None:
            return kwargs
        base: Any = self.family.base
        self.model.enter_base(base, (), kwargs)
        if pixels is None:
            return kwargs
        names = inspect.signature(base.get_image_features).parameters
        given = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        made = base.get_image_features(**self.family.fed(given), return_dict=True)
        embeds = base.get_input_embeddings()(ids)
        features = torch.cat(list(made.pooler_output)).to(embeds.device, embeds.dtype)
        visual = self.state.now.visual["image"].to(embeds.device)
        embeds = embeds.masked_scatter(visual[..., None], features)
        return {**kwargs, "inputs_embeds": embeds, "pixel_values": None}


@torch.compiler.disable
def _shortened(output: Any, layout: Layout) -> Any:
    """A model's output with embeddings of survivors alone; rows of padding are zero.

    Args:
        output: the output, a tuple or not, whose first entry are (B, T, D) embeddings.
        layout: (B, P) what survived.
    """
    embeddings: Tensor = output[0]
    kept = take(embeddings, layout.index.clamp(min=0))
    if layout.ragged:
        kept = kept.masked_fill((layout.index < 0)[..., None].to(kept.device), 0.0)
    if isinstance(output, tuple):
        return kept, *output[1:]
    output.embeddings = kept
    return output
