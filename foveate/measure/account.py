"""Account: the FLOPs of a forward, split into what did them.

It is made from a record, of a forward that ran or of one that is only planned, and from a config.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from foveate.core import Method, ModelFacts, PartialCompute
from foveate.engine.extensions.partial.window import Grid
from foveate.errors import UnsupportedModelError
from foveate.measure import flops
from foveate.measure.changes import check_counted
from foveate.measure.conventions import CONVENTIONS, Convention
from foveate.measure.mixers import Attention, visible_keys
from foveate.measure.selection import (
    Acted,
    acted,
    attending_flops,
    decoder_flops,
    encoder_flops,
    learned_flops,
)
from foveate.measure.shapes import TextShape
from foveate.measure.trace import Traced, skeleton, trace
from foveate.record.record import Record

FOVEATE = CONVENTIONS["foveate"]


class Counted(ModelFacts, Protocol):
    """What an account asks of a model family."""

    @property
    def config(self) -> Any:
        """The model's config."""


@dataclass(frozen=True)
class Account:
    """FLOPs of one forward over a prompt, and of one decoding step after it.

    Args:
        tower: the vision tower, and that of audio where methods act on audio; `None` where features
            were handed in.
        projector: what is between the tower and the language model, mergers included; of an
            encoder alone, what pools its rows.
        selection: signals that methods asked for, and what they have learned.
        entry: what the language model computes of each token before its first layer; most compute
            nothing there. A step at its input does not shorten it.
        layers: each decoder layer; with the last, what joins several streams of states after it.
        head: the language-model head at one position of each row, or the projection of all tokens
            where the model makes an embedding of each; 0 where an expert reads the prompt.
        decode: one new token of each row, head included, or one step of the expert that reads the
            prompt; 0 where there is neither.
    """

    tower: int | None
    projector: int | None
    selection: int
    entry: int
    layers: tuple[int, ...]
    head: int
    decode: int

    @property
    def vision(self) -> int | None:
        """Tower and projector."""
        return None if self.tower is None else self.tower + (self.projector or 0)

    @property
    def prefill(self) -> int:
        """The language model on the prompt."""
        return self.entry + sum(self.layers) + self.head

    @property
    def total(self) -> int:
        """All but the decoding step."""
        return (self.vision or 0) + self.selection + self.prefill


def account(
    record: Record,
    family: Counted,
    methods: Sequence[Method] = (),
    convention: Convention = FOVEATE,
) -> Account:
    """The FLOPs of a forward, as it was.

    Args:
        record: the forward; see `unpruned` for the same with all tokens.
        family: the model.
        methods: those that ran.
        convention: what counts.
    """
    shapes = _shapes(family)
    layers = _layers(record, family, methods, shapes, convention)
    if convention.visual_only:
        return Account(None, None, 0, 0, layers, 0, 0)
    steps = acted(methods, family)
    traced = encoder(record, family)
    selection = decoder_flops(record, shapes, steps) if shapes else 0
    if traced:
        selection += encoder_flops(record, traced[-1], steps)
    selection += learned_flops(record, family, steps)
    slots = record.cache_slots or [max(tokens) for tokens in record.layer_tokens]
    found = Account(
        tower=_tower(record, family, traced, steps) if traced or not record.images else None,
        projector=_projector(record, family, traced) if traced or not record.images else None,
        selection=selection,
        entry=flops.entry_flops(shapes, sum(record.prompt_tokens)),
        layers=layers,
        head=_head(record, family, shapes[0]) if shapes else 0,
        decode=_decode(record, family, slots) if shapes else 0,
    )
    return found if convention.multiply_add == 2 else _halved(found)


def _shapes(family: Any) -> tuple[TextShape, ...]:
    """The sizes of all decoder layers.

    Raises:
        UnsupportedModelError: they are not as the config says, nor can they be read.
    """
    if not family.text_layers:
        return ()
    shapes = TextShape.all(family)
    if hasattr(family, "layers"):
        check_counted(family, functools.cache(lambda: skeleton(family)), shapes)
    return shapes


def _decode(record: Record, family: Any, slots: Sequence[int]) -> int:
    """One step after the prompt, of all rows."""
    if record.embedding is not None:
        return 0
    if (expert := _expert(family)) is not None:
        return record.rows * flops.expert_flops(expert, slots)
    return record.rows * flops.decode_flops(family, [n + 1 for n in slots])


def _expert(family: Any) -> Any:
    """What reads the prompt in place of new tokens; `None` if nothing does."""
    return getattr(family, "expert", None)


def _head(record: Record, family: Any, shape: TextShape) -> int:
    """What is made of the last states."""
    if _expert(family) is not None:
        return 0
    if record.embedding is None:
        return flops.head_flops(shape, record.rows)
    return flops.embedding_flops(shape, record.embedding[0], sum(record.prompt_tokens))


def unpruned(record: Record) -> Record:
    """The same forward if nothing had been removed; where layers have windows, `cache_slots` are
    those without.
    """
    full, held = max(record.prompt_tokens, default=0), _held(record)
    slots, first = record.cache_slots, record.last_tokens_from
    return replace(
        record,
        layer_tokens=[
            list(record.prompt_tokens) if first is None or n < first else tokens
            for n, tokens in enumerate(record.layer_tokens)
        ],
        cache_slots=[
            count + full - max(tokens) if count else 0
            for count, tokens in zip(slots, held, strict=bool(slots))
        ],
        evicted_before=0,
        text_only_layers=(),
        encoder_tokens=[],
        encoder_bounds=[],
        projected={},
    )


def of_row(record: Record, row: int) -> Record:
    """What one row of a batch would have recorded alone, of the language model and its cache.

    What the encoder was fed is left out, for it is known of the whole batch only; `pixels` stay
    where there are those of each image.

    Args:
        record: a forward over a prompt, not over a later turn.
        row: row of the batch, 0-based.
    """
    held = _held(record) or [record.prompt_tokens] * len(record.cache_slots)
    own = [number for number, image in enumerate(record.images) if image.row == row]
    pixels = record.pixels
    return replace(
        record,
        rows=1,
        prompt_tokens=[record.prompt_tokens[row]],
        images=[replace(record.images[number], row=0) for number in own],
        layer_tokens=[[tokens[row]] for tokens in record.layer_tokens],
        cache_slots=[
            min(count, tokens[row]) for count, tokens in zip(record.cache_slots, held, strict=True)
        ],
        pixels=None if pixels is None or len(pixels) != len(record.images) else pixels[own],
        encoder_tokens=[],
        encoder_bounds=[],
        encoded={},
        projected={},
    )


def _held(record: Record) -> list[list[int]]:
    """Tokens of each row that the cache of each layer was given and still has: [layers][rows]."""
    held = record.layer_tokens
    if record.evicted_before:  # what was given to the caches before, and is still there
        held = [held[record.evicted_before]] * record.evicted_before + held[record.evicted_before :]
    if record.text_only_layers:  # caches of text alone
        text = list(record.prompt_tokens)
        for image in record.images:
            text[image.row] -= image.total
        held = [text if n in record.text_only_layers else tokens for n, tokens in enumerate(held)]
    return held


def encoder(record: Record, family: Any) -> list[Traced]:
    """What the encoder does with all tokens, one entry for each modality; empty where features were
    handed in.
    """
    return [trace(family, modality, fed) for modality, fed in record.encoded.items()]


def _tower(record: Record, family: Any, traced: Sequence[Traced], steps: Sequence[Acted]) -> int:
    total = sum(t.tower for t in traced)
    if traced and record.encoder_tokens:
        last, bounds = traced[-1], record.encoder_bounds
        for number, rows in enumerate(record.encoder_tokens):
            total += last.shortened(number, rows, bounds[number]) - last.layers[number]
        total += attending_flops(record, family, last, steps)
    return total


def _projector(record: Record, family: Any, traced: Sequence[Traced]) -> int:
    total = sum(t.projector for t in traced)
    for modality, rows in record.projected.items():
        plain = skeleton(family).projector(modality)  # weights of quantised layers say nothing
        matrices = (p.numel() for p in plain.parameters() if p.dim() == 2)
        total += 2 * rows * sum(matrices)
    return total


def _halved(counted: Account) -> Account:
    def half(value: Any) -> Any:
        return None if value is None else value // 2

    return Account(
        half(counted.tower), half(counted.projector), half(counted.selection),
        half(counted.entry), tuple(half(n) for n in counted.layers), half(counted.head),
        half(counted.decode),
    )  # fmt: skip


# -- decoder layers


def visual_tokens(record: Record) -> list[list[int]]:
    """Visual tokens in each layer and row: what the layer saw, less the row's text tokens."""
    text = list(record.prompt_tokens)
    for image in record.images:
        text[image.row] -= image.total
    return [[max(t - x, 0) for t, x in zip(row, text, strict=True)] for row in record.layer_tokens]


def _layers(
    record: Record,
    family: Counted,
    methods: Sequence[Method],
    shapes: Sequence[TextShape],
    convention: Convention,
) -> tuple[int, ...]:
    if not shapes:
        return ()
    if convention.visual_only:
        _check_papers(shapes, family, convention)
        rows = zip(shapes, visual_tokens(record), strict=True)
        return tuple(sum(paper_layer(shape, n, convention) for n in row) for shape, row in rows)
    visual = visual_tokens(record)
    found = list(flops.layers_flops(shapes, record.layer_tokens, visual, causal=convention.causal))
    for method in methods:
        for work in method.partial_compute(family):
            found[work.layer] = _parts(record, shapes[work.layer], work, convention.causal)
    return tuple(found)


def _check_papers(shapes: Sequence[TextShape], family: Counted, convention: Convention) -> None:
    """Refuse a formula of attention where layers do something else.

    Raises:
        UnsupportedModelError: some layers are recurrent or compress their keys.
    """
    kinds = {type(shape.mixer).__name__ for shape in shapes} - {Attention.__name__}
    if kinds:
        raise UnsupportedModelError(
            f"the convention {convention.name!r} is a formula of layers with attention, and this "
            f"{family.model_type} has layers of {', '.join(sorted(kinds))}; count by 'foveate' or "
            "'dense'"
        )


def paper_layer(shape: TextShape, tokens: int, convention: Convention) -> int:
    """4 n d^2 + 2 n^2 d + 2 or 3 n d m, as papers count a decoder layer."""
    width = shape.hidden
    mlp = convention.mlp * tokens * shape.mlp.read * shape.mlp.of_visual
    return 4 * tokens * width**2 + 2 * tokens**2 * width + mlp


def _parts(record: Record, shape: TextShape, work: PartialCompute, causal: bool) -> int:
    """A decoder layer that computes less of visual tokens: what the engine computes of it.

    Text before an image is seen by the image and text after it sees the image, so each pair of a
    text and a visual token counts once. If all attention counts, text sees all in every head, and
    tiles of an image all around them and all text before the last image.
    """
    mixer = shape.mixer
    assert isinstance(mixer, Attention)  # the plan has checked it
    active = mixer.heads if work.heads is None else sum(work.heads)
    given = work.heads or (True,) * mixer.heads
    group = mixer.heads // mixer.kv_heads
    groups = len({n // group for n, on in enumerate(given) if on})
    keys = groups if work.renormalize else mixer.kv_heads
    values = groups if work.reads_visual else 0
    projected = 2 * shape.hidden * mixer.head_dim * (2 * active + keys + values)
    neurons = int(shape.mlp.of_visual / work.mlp_divisor)
    total = 0
    for row, count in enumerate(record.layer_tokens[work.layer]):
        images = [image for image in record.images if image.row == row]
        text = record.prompt_tokens[row] - sum(image.total for image in images)
        visual = count - text
        total += mixer.projections(text) + shape.mlp_flops(text)
        total += visual * (projected + 6 * shape.hidden * neurons)
        if causal:
            near = sum(_neighbours(*i.grid, work.window) * i.frames for i in images)
            pairs = mixer.heads * visible_keys(text)
            pairs += active * (text * visual + min(near, visual**2))
        else:
            seen = [image for image in images if image.surviving(work.layer)]
            grids = [Grid(image.frames, *image.grid, work.window) for image in seen]
            pairs = mixer.heads * text * count
            pairs += active * sum(grid.pairs(record.common_tokens) for grid in grids)
        total += 4 * mixer.head_dim * pairs
    return total


def _neighbours(height: int, width: int, window: int) -> int:
    """Pairs of cells of a grid that lie in each other's window."""
    reach = window // 2

    def along(side: int) -> int:
        return sum(min(i + reach, side - 1) - max(i - reach, 0) + 1 for i in range(side))

    return along(height) * along(width)
