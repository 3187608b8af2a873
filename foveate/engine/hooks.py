"""Hooks: what happens when a forward passes each point of the model.

The model's wrapper calls the base model, which encodes images and calls the text model, which
calls its layers. Each thread has its own state; the state of a forward is a `Turn`, made when the
text model is entered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.utils.generic import ModelOutput

from foveate.engine import features
from foveate.engine.cache import PrunedLayer, check_cache
from foveate.engine.images import Group, locate, rows_of
from foveate.engine.plan import Plan
from foveate.engine.turn import Prompt, Turn
from foveate.engine.vision import VisionPart, survivors
from foveate.errors import BudgetError, InputError, UnsupportedModelError
from foveate.models import Family
from foveate.record import ImageRecord, Record
from foveate.signals.cls_attention import ClassAttention

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _Local(threading.local):
    """What one thread is doing with the model."""

    inside: bool = False  # within the base model's forward
    visual: Tensor | None = None  # (B, T) placeholders of that forward
    encoded: Any = None  # its image features, a tagged ModelOutput
    turn: Turn | None = None
    requests: int | None = None  # rows that `generate` was called with, while it runs
    trailing: int = 0  # drafted tokens behind the prompt
    record: Record | None = None


class Hooks:
    """The hooks of one session.

    Args:
        plan: what to do where.
        family: the model.
        vision: the part that shortens the stream inside the encoder, if one does.
    """

    def __init__(self, plan: Plan, family: Family, vision: VisionPart | None = None) -> None:
        self.plan = plan
        self.family = family
        self.vision = vision
        self.class_attention: ClassAttention | None = None
        if layers := plan.class_attention_layers:
            running = (lambda: None) if vision is None else (lambda: vision.running)
            self.class_attention = ClassAttention(family.encoder, layers, running)
        self._local = _Local()
        self._last: Record | None = None

    @property
    def record(self) -> Record | None:
        """The last forward over a prompt: this thread's, or else any thread's."""
        return self._local.record or self._last

    # -- around the model

    def generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `generate`: note the rows it is called with, and keep it from compiling the
        decoding step.
        """
        inputs = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        kwargs.setdefault("disable_compile", True)  # slots change shape with every token
        self._local.requests = None if inputs is None else inputs.shape[0]
        try:
            return original(*args, **kwargs)
        finally:
            self._local.requests, self._local.trailing = None, 0

    def enter_top(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the model with its head: see how many tokens behind the prompt are drafts.

        In assisted decoding the first forward holds drafts already, and logits are kept for each
        of them.
        """
        keep = kwargs.get("logits_to_keep", 0)
        drafting = self._local.requests is not None and isinstance(keep, int)
        self._local.trailing = max(keep - 1, 0) if drafting else 0

    def image_features(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around `get_image_features`: collect signals, and reduce as soon as all is known that
        budgets need.
        """
        with ExitStack() as stack:
            attention, vision = self.class_attention, self.vision
            rows = {} if attention is None else stack.enter_context(attention.collect())
            passes = [] if vision is None else stack.enter_context(vision.collect())
            output = original(*args, **kwargs)
        if not hasattr(output, "pooler_output"):  # a tuple, asked for by a user's own call
            return output
        pixels = args[0] if args else kwargs.get("pixel_values")
        signals = features.Signals(tuple(output.pooler_output), rows, pixels, survivors(passes))
        signals.check()
        features.tag(output, signals)
        if self._local.inside or not self.plan.per_request:
            self._mark(output)
        if self._local.inside:
            self._local.encoded = output
        return output

    def enter_model(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before the base model: find the placeholders, and reduce features that were encoded
        before.
        """
        local = self._local
        local.inside, local.visual, local.encoded, local.turn = True, None, None, None
        ids = args[0] if args else kwargs.get("input_ids")
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if ids is None or ids.shape[1] > 1:
            check_kernel(self.family)
        if ids is None:
            local.visual = self._placeholders_in_embeddings(kwargs, encoded)
        elif ids.shape[1] > 1 or encoded is not None:
            visual = torch.isin(ids, torch.tensor(self.family.placeholder_ids, device=ids.device))
            local.visual = visual if bool(visual.any()) else None
        if local.visual is None:
            return None
        self._check_requests(local.visual.shape[0])
        if encoded is None:
            return None
        local.encoded = encoded
        if features.is_slice(encoded):
            self._check_slice()
            return None
        if not features.is_tagged(encoded):
            local.encoded = self._adopt(encoded)
            kwargs = {
                **kwargs,
                "mm_encoder_outputs": {**kwargs["mm_encoder_outputs"], "image": local.encoded},
            }
        self._mark(local.encoded)
        return args, kwargs

    def leave_model(self, module: nn.Module, args: Args, output: Any) -> None:
        """After the base model, also when it raised: forget the forward."""
        local = self._local
        local.inside, local.visual, local.encoded, local.turn = False, None, None, None

    # -- around the text model

    def enter_text(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Before the text model: begin the turn."""
        local = self._local
        sequence = kwargs.get("inputs_embeds")
        if sequence is None:
            sequence = args[0] if args else kwargs["input_ids"]
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, length = sequence.shape[:2]
        groups: list[Group] = []
        if local.visual is not None and local.encoded is not None:
            check_cache(cache)
            groups = self._images(local.visual, local.encoded, sequence)
        prompt = Prompt(
            batch=batch,
            length=length,
            past=past,
            device=sequence.device,
            groups=groups,
            real=_real_positions(kwargs.get("attention_mask"), past + length) if groups else None,
            trailing=0 if past else local.trailing,
            request=self._request(batch),
            flash=_takes_2d_masks(self.family.text.config._attn_implementation),
        )
        local.turn = Turn(self.plan, self.family, prompt)

    def enter_layer(self, number: int, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        """Before a decoder layer: hand it what is alive."""
        turn = self._local.turn
        if turn is None:
            return None
        hidden, changed = turn.enter(number, module, args[0], kwargs)
        if hidden is args[0] and changed is kwargs:
            return None
        return (hidden, *args[1:]), changed

    def leave_text(self, module: nn.Module, args: Args, output: Any) -> Any:
        """After the text model: write the record, and bring hidden states back to logical
        length.
        """
        turn, self._local.turn = self._local.turn, None
        if turn is None:
            return None
        if turn.prompt.groups:
            self._keep_record(self._describe(turn, output.past_key_values))
        elif turn.prompt.length > 1 and self.record is None:
            note = "no image in the prompt: it passed through untouched"
            self._keep_record(Record(turn.prompt.batch, turn.tokens, [], [], [], notes=[note]))
        return turn.leave(output, self.plan.first_layer)

    # -- images

    def _mark(self, output: Any) -> None:
        """Run the pre_llm steps on encoder output, and mark what is gone, once."""
        if output.marked:
            return
        output.marked = True
        if not self.plan.marks:
            return
        visual, pooled = self._local.visual, output.pooler_output
        lengths = [len(feature) for feature in pooled]
        rows = [0] * len(lengths) if visual is None else rows_of(visual, lengths)
        request = (lambda row: row) if visual is None else self._request(visual.shape[0])
        reduced = features.reduce_features(
            self.plan, self.family, list(pooled), rows, output.signals, request
        )
        output.pooler_output = torch.stack(reduced) if isinstance(pooled, Tensor) else reduced

    def _adopt(self, encoded: ModelOutput) -> ModelOutput:
        """Tag features that were made outside the session, in a copy."""
        if self.plan.vision:
            names = ", ".join(dict.fromkeys(s.method.slug for s in self.plan.vision))
            raise InputError(
                f"{names} acts inside the encoder, but the image features in mm_encoder_outputs "
                "were made outside the session; pass pixel_values, or call get_image_features "
                "within the session"
            )
        if self.plan.class_attention_layers:
            names = ", ".join(m.slug for m in self.plan.methods if "cls_attention" in m.needs)
            raise InputError(
                f"{names} needs the encoder's class-token attention, but the image features in "
                "mm_encoder_outputs were "
                "made outside the session; pass pixel_values, or call get_image_features within "
                "the session"
            )
        copy = type(encoded)(**encoded)
        features.tag(copy, features.Signals(tuple(copy["pooler_output"]), {}, None))
        return copy

    def _images(self, visual: Tensor, encoded: Any, sequence: Tensor) -> list[Group]:
        if features.is_slice(encoded):
            lengths = [n for n in visual.sum(1).tolist() if n]
        else:
            lengths = [len(feature) for feature in encoded.pooler_output]
        dead = sequence[visual][:, 0].isnan() if self.plan.marks else None
        return locate(visual, lengths, dead)

    def _placeholders_in_embeddings(self, kwargs: Kwargs, encoded: Any) -> Tensor | None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None or embeds.shape[1] == 1:
            return None
        if encoded is None and kwargs.get("pixel_values") is None:
            raise InputError(
                "inputs_embeds without input_ids do not say which rows are visual tokens; pass "
                "input_ids with "
                "pixel_values, or with mm_encoder_outputs for features you have already"
            )
        table = self.family.base.get_input_embeddings()
        ids = torch.tensor(self.family.placeholder_ids, device=embeds.device)
        visual = (embeds[:, :, None] == table(ids)).all(-1).any(-1)
        return visual if bool(visual.any()) else None

    # -- checks and numbers

    def _expanded(self, batch: int) -> int:
        """Rows per request: more than one under beam search or several returned sequences."""
        requests = self._local.requests
        return batch // requests if requests and batch % requests == 0 else 1

    def _request(self, batch: int) -> Callable[[int], int]:
        expanded = self._expanded(batch)
        return lambda row: row // expanded

    def _check_requests(self, batch: int) -> None:
        rows = batch // self._expanded(batch)
        for keep in self.plan.per_request:
            if len(keep.values) != rows:
                raise BudgetError(
                    f"per_request has {len(keep.values)} entries, but the batch has {rows} rows; "
                    "give one for each row, "
                    "also for rows without an image"
                )

    def _check_slice(self) -> None:
        if self.plan.llm or self.plan.per_request:
            names = ", ".join(m.slug for m in self.plan.methods)
            raise InputError(
                f"chunked prefill cannot be used with {names}: each chunk would choose tokens by "
                "its own last token, or "
                "without knowing its row; use prefill_chunk_size=None, or a pre_llm method with "
                "one keep for all"
            )

    def _describe(self, turn: Turn, cache: Cache | None) -> Record:
        encoded = self._local.encoded
        sliced = features.is_slice(encoded)
        images = []
        members = {
            image: (group, n) for group in turn.groups for n, image in enumerate(group.images)
        }
        for image in [] if sliced else sorted(members):
            group, n = members[image]
            grid = self.family.grid(group.total)
            encoder = encoded.signals.kept_of(encoded.pooler_output[image])
            kept = {**encoder, **turn.kept[image]}
            images.append(ImageRecord(group.rows[n], group.total, grid, kept))
        before = [turn.prompt_tokens] * self.plan.first_layer
        return Record(
            rows=turn.prompt.batch,
            prompt_tokens=turn.prompt_tokens,
            images=images,
            layer_tokens=before + turn.layer_tokens,
            cache_slots=[] if cache is None else [_slots(layer) for layer in cache.layers],
            pixels=None if sliced or encoded is None else encoded.signals.pixels,
            encoder_tokens=[] if self.vision is None else self.vision.tokens,
            notes=["chunked prefill: kept tokens are not reported"] if sliced else [],
        )

    def _keep_record(self, record: Record) -> None:
        self._local.record = self._last = record


def check_kernel(family: Family) -> None:
    """Refuse attention kernels that cannot be served.

    Raises:
        UnsupportedModelError: continuous batching, or flex attention.
    """
    kernel = family.text.config._attn_implementation
    if "paged" in kernel:
        raise UnsupportedModelError(
            "continuous batching pages its cache by full sequence length and cannot hold pruned "
            "layers; "
            "use model.generate"
        )
    if kernel == "flex_attention":
        raise UnsupportedModelError(
            "flex_attention is not supported; call model.set_attn_implementation('sdpa') first"
        )


def _takes_2d_masks(kernel: str) -> bool:
    return ALL_MASK_ATTENTION_FUNCTIONS.get(kernel) is flash_attention_mask


def _slots(layer: Any) -> int:
    if isinstance(layer, PrunedLayer) and layer.slots is not None:
        return layer.slots.index.shape[1]
    return int(layer.get_seq_length())


def _real_positions(mask: Any, total: int) -> Tensor | None:
    """(B, total) positions that are no padding, or `None` if all are; from whatever mask the
    text model is given.
    """
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    if mask is None:
        return None
    if mask.dim() == 4:  # built beforehand, for static caches: the last query sees all that is real
        mask = mask[:, 0, -1]
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    real = mask[:, :total].bool()
    return None if bool(real.all()) else real
