"""Stream: frames one after another into a KV cache that never holds more than its cap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.tokens import frame_of
from foveate.engine.attachment import MARK
from foveate.engine.cache_argument import CACHE
from foveate.engine.session import BaseSession
from foveate.errors import AttachError, InputError
from foveate.record.record import ImageRecord
from foveate.streaming.held import CELL, FRAME, PINNED, POSITION, TEXT, Held
from foveate.streaming.infinipot import InfiniPotV
from foveate.streaming.positions import Positions, chunk_positions, most_positions, turner
from foveate.streaming.supported import check_session


class Stream:
    """A video without an end, on a model that carries a foveate session.

    The session's method shortens each frame as it comes; the stream evicts what the cache has no
    room for. Survivors stay where they were, in the order in which they came. Several streams may
    share a session.

    Args:
        run: the session, as `foveate.use` makes it; its methods act before the language model
            (`uniform` with `keep=1.0` keeps all of a frame).
        cap: most tokens that each layer of the cache ever holds, text included.
        rule: which tokens stay when it is full.
        reserve: how many of these are for questions and their answers, which frames never fill.
        positions: what happens when the next frame lies beyond `max_position_embeddings`:
            `original` refuses it; `renumbered` closes the gaps that evicted tokens have left, where
            positions are single numbers.

    Raises:
        UnsupportedModelError: the model cannot serve streams.
        InputError: a number is out of range, or a method acts between decoder layers.
    """

    def __init__(
        self,
        run: BaseSession,
        cap: int,
        rule: InfiniPotV | None = None,
        *,
        reserve: int = 256,
        positions: Positions = "original",
    ) -> None:
        self.rule = InfiniPotV() if rule is None else rule
        check_session(run, cap, reserve, self.rule, positions)
        self.cap, self.reserve, self.positions = cap, reserve, positions
        self.frames = 0
        self._run, self._family = run, run.family
        config = self._family.text.config
        self._held = Held(DynamicCache(config=config))
        self._limit = most_positions(config)
        self._next = 0
        self._whole = 0  # the first frame of which nothing was evicted
        self._shape: tuple[tuple[int, int], int] | None = None  # grid and most tokens of a frame

    @property
    def tokens(self) -> int:
        """Tokens that each layer of the cache holds now."""
        return self._held.count

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values of the cache, as they are allocated."""
        return self._held.bytes

    # -- frames

    @torch.no_grad()
    def add(self, **inputs: Any) -> None:
        """Take the next frames.

        Text before the first frame of the stream, such as a system prompt, stays for ever. Text
        beside later frames stays as long as its frame is recent.

        Args:
            **inputs: what the model is called with for these frames and the text around them alone:
                `input_ids` (1, n), pixels, and grids where the model needs them.

        Raises:
            InputError: there is no frame, or more than one row, or padding; frames differ in size;
                they do not fit beside the reserve; or positions are used up.
            AttachError: the session is not attached.
            CacheError: an eviction broke off half way.
        """
        ids, masked = inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
        if not _is_row(ids) or (masked is not None and not bool(masked.all())):
            raise InputError("a stream takes one row without padding at a time, under input_ids")
        visual = self._visual(ids)[0]
        if not bool(visual.any()):
            raise InputError("a stream is given frames; there is none in these inputs")
        if vars(self._family.text).get(MARK) is not self._run.text:
            raise AttachError("the session of this stream is not attached; stay in its block")
        count = ids.shape[1]
        self._held.check()
        self._make_room(count)
        self._make_positions(count + self.reserve)
        where = chunk_positions(self._family, ids, self._next, inputs)
        mask = ids.new_ones(1, self.tokens + count)
        record = self._run.record
        arguments = {"attention_mask": mask, CACHE: self._held.cache, **inputs}
        try:
            self._family.base(
                input_ids=ids, position_ids=where[..., :-1], use_cache=True, **arguments
            )
            seen = self._run.record
            if seen is None or seen is record or not seen.images:
                raise InputError("input_ids has placeholders of frames, but no pixels came with it")
            self._note(visual, where, seen.images)
        finally:
            self._held.crop()

    def _visual(self, ids: Tensor) -> Tensor:
        """(1, n) placeholders of visual tokens."""
        known = torch.tensor(list(self._family.placeholder_ids.values()), device=ids.device)
        return torch.isin(ids, known)

    def _note(self, visual: Tensor, where: Tensor, images: list[ImageRecord]) -> None:
        """Note what the last forward has added.

        Args:
            visual: (n) its placeholders.
            where: (1, n + 1) or (3, 1, n + 1) their positions, and that of text after them.
            images: what was kept of its frames.
        """
        frames, cells, first = [], [], self.frames
        for image in images:
            size, kept = image.grid[0] * image.grid[1], torch.arange(image.total)
            if image.kept:
                kept = list(image.kept.values())[-1].cpu()
            frame = frame_of(kept, image.grid, image.frames)
            cell = kept - frame * size
            frames.append(frame + first)
            cells.append(cell.masked_fill(cell >= size, TEXT))
            first += image.frames
        index = self._held.added()
        seen = visual.to(index.device)[index].cpu()
        entries = torch.full((3, len(index)), TEXT)
        entries[FRAME, seen], entries[CELL, seen] = torch.cat(frames), torch.cat(cells)
        self._place_text(entries, seen)
        places = where.reshape(-1, where.shape[-1]).amax(0).cpu()
        if self._run.plan.renumber_features:
            places = places[0] + torch.arange(len(index) + 1)
            index = torch.arange(len(index))
        entries[POSITION] = places[index.cpu()]
        self._check_size(images, entries)
        self._held.append(entries)
        self.frames, self._next = first, int(places[-1])

    def _place_text(self, entries: Tensor, seen: Tensor) -> None:
        """Give text to the frame before it, or to the next one; the first text stays for ever."""
        start = self.frames if self.frames else PINNED
        text = ~seen
        before = entries[FRAME].masked_fill(text, start).cummax(0).values
        entries[FRAME, text] = before[text]

    def _check_size(self, images: list[ImageRecord], entries: Tensor) -> None:
        """Refuse frames of another size; note the most tokens that a frame has.

        Raises:
            InputError: there are some.
        """
        grids = {image.grid for image in images}
        known, most = self._shape or (images[0].grid, 1)
        if grids != {known}:
            (other,) = list(grids - {known})[:1]
            raise InputError(
                f"frames of a stream have one size, but one of {other[0]} x {other[1]} tokens came "
                f"after {known[0]} x {known[1]}; resize them alike"
            )
        counts = torch.bincount(entries[FRAME, entries[CELL] >= 0])
        self._shape = known, max(most, int(counts.max()) if len(counts) else 1)

    # -- room

    def _make_room(self, count: int) -> None:
        """Evict so that some tokens fit beside the reserve.

        Raises:
            InputError: they do not, whatever is evicted.
        """
        if self.tokens + count <= self._most:
            return
        first, visual = self._survivors(count)

        def choose(table: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            heads, shows = len(keys), table[CELL] >= 0
            slots = shows.nonzero()[:, 1].view(heads, -1)
            wide = slots[..., None].expand(-1, -1, keys.shape[-1])
            frame, cell = (table[i].gather(1, slots) for i in (FRAME, CELL))
            deep = slots[..., None].expand(-1, -1, values.shape[-1])
            kept = self.rule.choose(
                keys.gather(1, wide), values.gather(1, deep), cell, frame >= first, visual
            )
            text = ~shows & ((table[FRAME] >= first) | (table[FRAME] == PINNED))
            stays = text.scatter(1, slots.gather(1, kept), True)
            return stays.nonzero()[:, 1].view(heads, -1)

        self._held.evict(choose)
        self._whole = max(self._whole, first)

    @property
    def _most(self) -> int:
        """Tokens that frames and the text beside them may fill."""
        return self.cap - self.reserve

    def _stays(self, first: int) -> tuple[int, int]:
        """Visual tokens of the frames from `first` on, and text that stays with them."""
        frame, cell, _ = self._held.tables[0][:, 0].cpu()  # text and whole frames are alike
        shows = cell >= 0
        text = ~shows & ((frame >= first) | (frame == PINNED))
        return int((shows & (frame >= first)).sum()), int(text.sum())

    def _survivors(self, count: int) -> tuple[int, int]:
        """The first recent frame, and how many visual tokens survive an eviction; those of the
        newest frame at least, also where they are more than the rule would leave.

        Args:
            count: tokens that are to come.

        Raises:
            InputError: the newest frame has no room beside them.
        """
        if self.frames:
            assert self._shape is not None  # as there were frames
            left = min(int(self.rule.keep * self._most), self._most - count)
            held = int((self._held.tables[0][CELL, 0] >= 0).sum())
            recent = self.rule.recent_frames(held, self._shape[1])
            for first in range(max(self.frames - recent, self._whole), self.frames):
                visual, text = self._stays(first)
                if visual + text <= left:
                    return first, min(left - text, held)
            visual, text = self._stays(self.frames - 1)
            if visual + text + count <= self._most:
                return self.frames - 1, visual
        held, said = self._stays(self.frames - 1) if self.frames else (0, 0)
        raise InputError(
            f"{count} more tokens (before methods remove any) do not fit into a cache of "
            f"{self.cap} with {self.reserve} for questions, of which the newest frame holds {held} "
            f"and text that stays {said}; give fewer frames at once, or begin a stream with a "
            "larger cap, a smaller reserve or less text that stays, such as questions asked with "
            "keep=True"
        )

    def _make_positions(self, count: int) -> None:
        """See that some tokens have positions that the model was made for.

        Raises:
            InputError: they have none.
        """
        if self._limit is None or self._next + count <= self._limit:
            return
        if self.positions == "renumbered" and self._held.count + count <= self._limit:
            self._held.renumber(turner(self._family))
            self._next = self._held.count
            return
        raise InputError(
            f"the next tokens of this stream would be at position {self._next + count}, and "
            f"{self._family.model_type} was made for {self._limit}; begin a new stream, keep fewer "
            "tokens of a frame, or set positions='renumbered' where positions are single numbers"
        )

    # -- questions

    def ask(
        self, input_ids: Tensor, *, max_new_tokens: int, keep: bool = False, **options: Any
    ) -> Any:
        """Ask about what the cache holds.

        Args:
            input_ids: (1, n) the question alone, with what the chat template puts around it.
            max_new_tokens: length of the answer at most; it and the question go into the reserve.
            keep: keep question and answer in the stream, as text beside the newest frame; else the
                stream goes on as if nothing was asked.
            **options: of `generate`.

        Returns:
            What `generate` returns; its sequences begin with the question.

        Raises:
            InputError: they do not fit, hold a frame, are several rows or beams, or the cache is
                not to be used.
        """
        self._check_question(input_ids, options)
        count = input_ids.shape[1] + max_new_tokens
        self._check_answer(count, keep)
        self._make_positions(count)
        # As the mask, positions reach over what is held, which a prefill in chunks cuts off.
        start, stop = self._next - self.tokens, self._next + input_ids.shape[1]
        positions = torch.arange(start, stop, device=input_ids.device)
        model: Any = self._family.model
        kept = False
        try:
            answer = model.generate(
                input_ids=input_ids,
                attention_mask=input_ids.new_ones(1, self.tokens + input_ids.shape[1]),
                position_ids=positions[None],
                max_new_tokens=max_new_tokens,
                **{CACHE: self._held.cache},
                **options,
            )
            kept = keep
        finally:
            if not kept:
                self._held.crop()
        if keep:
            self._keep_text()
        return answer

    def _keep_text(self) -> None:
        """Note the text that was added, and see that the reserve is free again."""
        index = self._held.added()
        entries = torch.full((3, len(index)), TEXT)
        entries[FRAME] = self.frames - 1
        entries[POSITION] = torch.arange(self._next, self._next + len(index))
        self._held.append(entries)
        self._next += len(index)
        self._make_room(0)

    def _check_question(self, ids: Any, options: dict[str, Any]) -> None:
        self._held.check()
        if not self.frames:
            raise InputError("nothing was added to this stream yet; add a frame, then ask")
        if not _is_row(ids) or bool(self._visual(ids).any()):
            raise InputError("a question is one row of text; give frames to add")
        given = options.get("generation_config") or self._family.model.generation_config
        for name in ("num_beams", "num_return_sequences"):
            if (options.get(name, getattr(given, name, None)) or 1) > 1:
                raise InputError(
                    f"{name} would hold the cache several times, and exceed its cap; leave it at 1"
                )
        if options.get("use_cache", given.use_cache) is False:
            raise InputError("a question is put to the stream's cache; leave use_cache on")

    def _check_answer(self, count: int, keep: bool) -> None:
        """Refuse a question and its answer of so many tokens.

        Raises:
            InputError: they do not fit, or would not when they are kept.
        """
        if self.tokens + count > self.cap:
            raise InputError(
                f"question and answer need {count} tokens, but the cache has room for "
                f"{self.cap - self.tokens}; ask for fewer new tokens, or begin the stream with a "
                "larger reserve"
            )
        room = self._most - sum(self._stays(self.frames - 1))
        if keep and count > room:
            raise InputError(
                f"question and answer may take {count} tokens, but {room} can be kept beside the "
                "newest frame and the text that stays; ask for fewer new tokens, leave keep out, "
                "or begin the stream with a larger cap"
            )


def _is_row(ids: Any) -> bool:
    """Whether something is (1, n) ids."""
    return isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1 and ids.numel() > 0
