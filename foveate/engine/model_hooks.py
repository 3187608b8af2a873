"""ModelHooks: what happens where a forward enters the model, before it comes to the text model.

The model with its head calls the base model, which encodes images, puts their features in the
prompt and calls the text model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core import TrainingPass
from foveate.core.transfer import tables, upload
from foveate.engine import features
from foveate.engine.cache_argument import cache_of
from foveate.engine.compilation import untraced
from foveate.engine.extensions.labels import (
    IGNORED,
    check_labels,
    is_training,
    labels_of,
    only_labelled,
    supervise,
)
from foveate.engine.extensions.losses import averaged, with_losses
from foveate.engine.feature_reducer import FeatureReducer
from foveate.engine.gate import is_generating, is_sampling
from foveate.engine.inputs import bound, check_positions, placeholders, prompt_tokens, tells
from foveate.engine.kernels import check_kernel, takes_2d_masks
from foveate.engine.long_rope import check_cache_kept
from foveate.engine.masks import samples
from foveate.engine.plan import Plan
from foveate.engine.policy import prefix_of
from foveate.engine.replaced_forward import bypassed, forward_of
from foveate.engine.rollback import ROPE, reset_rope
from foveate.engine.state import Args, Kwargs
from foveate.engine.tags import Tags
from foveate.engine.thread_state import ModelCall, ThreadState
from foveate.engine.total import check_modalities
from foveate.errors import BudgetError, InputError
from foveate.families import Family
from foveate.families.family import AUDIO


class ModelHooks:
    """Hooks before the model with its head, and around the base model.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
        tags: what tags encoder output.
        reducer: what removes tokens from it.
        look_after: puts back hooks that others have taken off.
    """

    def __init__(
        self,
        plan: Plan,
        family: Family,
        state: ThreadState,
        tags: Tags,
        reducer: FeatureReducer,
        look_after: Callable[[], None],
    ) -> None:
        self.plan, self.family, self.state, self.tags = plan, family, state, tags
        self.labelled_logits = False  # whether logits are made for labels alone, in training
        self._reducer, self._look_after = reducer, look_after

    def enter_top(
        self, module: nn.Module, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs] | None:
        """Before the model with its head: see what is supervised, and how many tokens after the
        prompt are drafts.

        In assisted decoding the first forward holds drafts already, and logits are kept for each
        of them.
        """
        self._look_after()
        keep, call = kwargs.get("logits_to_keep", 0), self.state.generate
        drafting = call.requests is not None and isinstance(keep, int)
        call.trailing = max(keep - 1, 0) if drafting else 0
        labels = labels_of(module, args, kwargs)
        self.state.supervised = None if labels is None else labels != IGNORED
        if not self.labelled_logits or labels is None or not module.training:
            return None
        return args, only_labelled(labels, kwargs)

    @untraced
    def learn(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the forward of the model with its head, where methods learn: all passes of a
        training step, and what methods add to the loss.
        """
        forward, state = forward_of(module, before), self.state
        if not is_training(module):
            return forward(*args, **kwargs)
        supervised, outputs = state.supervised, []
        try:
            for number in range(self.plan.passes):
                state.supervised, state.training = supervised, TrainingPass(number)
                output = forward(*args, **kwargs)
                outputs.append(with_losses(output, state.training.losses, supervised, kwargs))
        finally:
            state.training = None
        return averaged(outputs)

    @untraced
    def base(
        self, module: nn.Module, before: Callable[..., Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the base model's forward: all that is known of it is forgotten after it."""
        rope, state = getattr(module, ROPE, None), self.state
        try:
            if not state.now.inside:  # else its prompt is known from the model around it
                kwargs = self.enter_base(module, args, kwargs)
                if state.now.visual and module is self.family.text:
                    kwargs = self.family.with_embeddings(bound(module.forward, args, kwargs))
                    args = ()
            output = forward_of(module, before)(*args, **kwargs)
            if state.now.visual and not state.now.entered:
                raise bypassed(self.family.text)
            return output
        except BaseException:
            reset_rope(module, rope)
            raise
        finally:
            state.now, state.supervised = ModelCall(), None

    @torch.compiler.disable
    def enter_base(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Kwargs:
        """Before the base model: find placeholders, and reduce features encoded before."""
        state = self.state
        state.now = now = ModelCall()
        ids = args[0] if args else kwargs.get("input_ids")
        given = {m: o for m, o in (kwargs.get("mm_encoder_outputs") or {}).items() if o is not None}
        prefix = prefix_of(kwargs.get("inputs_embeds"), self.plan)
        if prefix is not None:
            ids, given, now.placed = prefix.ids, dict(prefix.made), prefix.placed
        elif self.family.policy is not None and is_sampling(self.family.model):
            return kwargs  # it has begun before the session
        now.inside = True
        self._check_call(ids, kwargs, given)
        untagged = [output for output in given.values() if not features.is_tagged(output)]
        if untagged and state.generate.requests is None and is_generating(self.family.model):
            return kwargs  # it has begun before the session
        if ids is None or ids.shape[1] > 1 or given:  # more than a decoding step
            listed = tables(kwargs, self.family.placed_by)
            now.read.fetch((*tells(ids, kwargs), *listed.values()))
        now.visual = placeholders(self.family, ids, kwargs, given, now.read)
        if not now.visual:
            return kwargs
        check_modalities(self.plan, now.visual)
        self._enter_prompt(module, now, ids, kwargs)
        if prefix is not None:
            # Tables of embeddings may end before the placeholder.
            everything = upload(torch.stack(list(now.visual.values())).any(0), prefix.ids.device)
            now.prompt = prefix.ids.masked_fill(everything, 0), kwargs
            self._take(given, now, {})
            embeds = prefix.embeddings(kwargs["inputs_embeds"], now.visual)
            return {**kwargs, "inputs_embeds": embeds}
        if given:
            return self._take(given, now, kwargs)
        if state.generate.awaited:
            raise InputError(
                "the images that generate has encoded did not reach the model: chunked prefill "
                "of the installed transformers loses them; use prefill_chunk_size=None"
            )
        return kwargs

    def _enter_prompt(
        self, module: nn.Module, now: ModelCall, ids: Tensor | None, kwargs: Kwargs
    ) -> None:
        """See what the prompt of a forward with images says of them, and refuse what does not go
        with the plan.
        """
        state = self.state
        now.prompt = (ids, kwargs)
        if now.visual.keys() != {AUDIO}:
            check_positions(self.family, kwargs)
        kernel = self.family.text.config._attn_implementation
        splits = takes_2d_masks(kernel) or not self._caches(kwargs)
        sample = samples(kwargs, now.read) if splits else None
        tokens, now.real = prompt_tokens(now.visual, kwargs, now.read)
        tokens = replace(tokens, trailing=state.generate.trailing, sample=sample)
        if state.supervised is not None:
            if is_training(module):
                self.plan.check_untotalled()
            tokens = supervise(tokens, module, now.read.of(state.supervised))
        elif self._may_hold_answers and self.plan.asks_text:
            check_labels(module, self.plan.asks_text)
        now.tokens = tokens
        reads = self.family.expert is None  # a next token from the prompt
        if reads and (tokens.supervised is None or not is_training(module)):
            now.readout = tokens.readout  # in training each token is read from the one before it
        batch, requests = next(iter(now.visual.values())).shape[0], state.generate.requests
        if requests and batch % requests == 0:
            now.expanded = batch // requests
        self._check_requests(batch // now.expanded)

    @property
    def _may_hold_answers(self) -> bool:
        """Whether what follows a prompt may be an answer: not in `generate`, nor on a model that
        makes embeddings, or whose answers are actions.
        """
        family = self.family
        answers = family.embedding is None and family.expert is None
        return answers and self.state.generate.requests is None

    def _take(self, given: dict[str, Any], now: ModelCall, kwargs: Kwargs) -> Kwargs:
        """Reduce features that were encoded before: the arguments with them."""
        self.state.generate.awaited = changed = False
        for modality in [m for m in given if m in now.visual]:
            if features.is_slice(given[modality]):
                self._check_slice()
                if self.family.late_projector(modality) is not None:  # to which it is no input
                    given[modality].last_hidden_state = given[modality].pooler_output
            elif not features.is_tagged(given[modality]):
                given[modality], changed = self.tags.adopt(modality, given[modality], kwargs), True
            if not features.is_slice(given[modality]):
                self._reducer.reduce(modality, given[modality])
            now.encoded[modality] = given[modality]
        return {**kwargs, "mm_encoder_outputs": given} if changed else kwargs

    def _caches(self, kwargs: Kwargs) -> bool:
        """Whether the text model is given a cache, or makes one."""
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.family.text.config, "use_cache", False)
        return cache_of(kwargs) is not None or bool(use_cache)

    def _check_requests(self, rows: int) -> None:
        if self.state.clip is not None:
            self.state.clip.check(rows)
        lengths = [("per_request", len(keep.values)) for keep in self.plan.per_request]
        if isinstance(self.plan.total, tuple):
            lengths.append(("keep_total", len(self.plan.total)))
        for name, length in lengths:
            if length != rows:
                raise BudgetError(
                    f"{name} has {length} entries, but the batch has {rows} rows; "
                    "give one for each row, "
                    "also for rows without an image"
                )

    def _check_call(self, ids: Tensor | None, kwargs: Kwargs, given: dict[str, Any]) -> None:
        if ids is None or ids.shape[1] > 1:
            check_kernel(self.family)
        if self.state.generate.running:
            check_cache_kept(self.family, kwargs)
        self._check_given(given)

    def _check_given(self, given: dict[str, Any]) -> None:
        for modality in given:
            if modality == AUDIO and self.family.hears:
                raise InputError(
                    f"{self.family.model_type} does not read audio from mm_encoder_outputs; pass "
                    "input_features instead"
                )
            if self.family.placer(modality) is not None:
                raise InputError(
                    f"{self.family.model_type} encodes {modality}s while it embeds the prompt, and "
                    "does not read mm_encoder_outputs; pass the pixels instead"
                )

    def _check_slice(self) -> None:
        if self.plan.llm or self.plan.waits or self.plan.decode_step:
            names = ", ".join(m.slug for m in self.plan.methods)
            raise InputError(
                f"chunked prefill cannot be used with {names}: each chunk would choose tokens by "
                "its own last token, or "
                "without knowing its row; use prefill_chunk_size=None, or a pre_llm method with "
                "one keep for all"
            )
