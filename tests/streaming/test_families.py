"""Streams in each family: the whole video at once, where each head is shown what it held then."""

import functools
import itertools
import math

import pytest
import torch

import foveate
from foveate.streaming import Stream
from foveate.streaming.supported import TESTED
from tests.conformance.test_pixels import model_of as pixels_model
from tests.conformance.test_pixels_grids import GRIDS, VIDEO
from tests.conformance.test_pixels_grids import model_of as grids_model
from tests.conformance.tolerance import TOLERANCE
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

FRAMES, STEPS = 6, 4
QUESTION = [20, 31, 8, 9]
CELLS = [
    *((name, "image") for name in sorted(TESTED)),
    *(
        (f"{name}-video", "image")
        for name in ("llava_next_video", "llava_onevision", "video_llava")
    ),
    *((name, "video") for name in sorted(TESTED) if name in VIDEO),
]


def model_of(name, attention="sdpa"):
    return (grids_model if name in GRIDS else pixels_model)(name, attention)


@functools.cache
def chunks_of(name, what):
    """Ids and pixels of chunks, of one image or one clip each, with text before and after some."""
    member, chunks = MEMBERS[name](), []
    for number in range(FRAMES):
        pixels = member.clip(number) if what == "video" else member.pixels(1, number)
        token = member.video_id if what == "video" else member.image_id
        modality = "video" if what == "video" else member.modality
        with torch.no_grad():
            features = member.encode(model_of(name), pixels, modality)
        before = [5, 7, 11] if not number else [12]  # M-RoPE asks for text between images
        count = sum(feature.shape[:-1].numel() for feature in features)
        shown = [token] * count
        if what == "video" and member.timestamps:  # text between frames
            shown = ([14] + [token] * (count // 3)) * 3
        ids = [*before, *shown, *([13] if number % 3 else [])]
        chunks.append((torch.tensor([ids]), pixels))
    return chunks


def joined(parts):
    return torch.cat(parts) if isinstance(parts[0], torch.Tensor) else [*itertools.chain(*parts)]


def extras(name, what, ids):
    member = MEMBERS[name]()
    types = member.extras(ids, 0)
    if what == "video":
        types["mm_token_type_ids"] = 2 * (ids == member.video_id).int()
    return types


def held_at_each_forward(stream, model, member):
    """What the stream's cache held when each forward began."""
    seen = []
    hook = member.text(model).register_forward_pre_hook(
        lambda module, args: seen.append([table.clone() for table in stream._held.tables])
    )
    return seen, hook


@torch.no_grad()
def whole(name, what, ids, masks):
    """Logits of everything at once, each layer with its mask; the model places the tokens."""
    member, model = MEMBERS[name](), model_of(name, "eager")
    parts = [fresh(pixels) for _, pixels in chunks_of(name, what)]
    pixels = {key: joined([part[key] for part in parts]) for key in parts[0]}
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask}),
            with_kwargs=True,
        )
        for layer, mask in zip(member.text(model).layers, masks, strict=True)
    ]
    logits = model(input_ids=ids, **pixels, **extras(name, what, ids), use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def masks_of(seen, blocks, entries, groups, evicted=True):
    """(1, H, T, T) for each layer: what each head sees.

    Args:
        seen: for each block, the tables of the cache when it began.
        blocks: tokens of each forward.
        entries: (frame, cell) of visual tokens and (position) of text -> token.
        groups: query heads of a key-value head.
        evicted: whether what is evicted is hidden.
    """
    total, masks = sum(blocks), []
    for layer in range(len(seen[-1])):
        heads = len(seen[-1][layer][0])
        mask, start = torch.full((heads, total, total), torch.finfo(torch.float32).min), 0
        for tables, size in zip(seen, blocks, strict=True):
            rows = slice(start, start + size)
            for head in range(heads if tables else 0):
                table = tables[layer][:, head].T.tolist()
                held = [entries[(f, c)] if c >= 0 else entries[p] for f, c, p in table]
                mask[head, rows, held if evicted else slice(0, start)] = 0
            mask[:, rows, rows].triu_(1)
            start += size
        masks.append(mask.repeat_interleave(groups, 0)[None])
    return masks


@pytest.mark.parametrize(("name", "what"), CELLS)
def test_stream_equals_everything_at_once(name, what):
    member, model = MEMBERS[name](), model_of(name)
    chunks = chunks_of(name, what)
    sizes = [ids.shape[1] for ids, _ in chunks]
    with foveate.use(model, "uniform", keep=1.0) as run:
        stream = Stream(run, 3 * max(sizes) + 12, reserve=10)
        seen, hook = held_at_each_forward(stream, model, member)
        for ids, pixels in chunks:
            stream.add(input_ids=ids, **fresh(pixels), **extras(name, what, ids))
        shape = stream.frames // FRAMES, math.prod(stream._shape[0])
        tables = [table.clone() for table in stream._held.tables]
        out = stream.ask(
            torch.tensor([QUESTION]), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    hook.remove()
    said = out.sequences[:, :-1]
    ids = torch.cat([*(ids for ids, _ in chunks), said], 1)
    blocks = [*sizes, said.shape[1]]
    heads = model.config.get_text_config().num_attention_heads
    known = entries_of(name, what, ids, *shape)
    assert all(bool((table[1] >= 0).any()) for table in tables)
    groups = heads // len(tables[0][0])
    seen = [*seen[: len(sizes)], tables]
    want, plain = (
        whole(name, what, ids, masks_of(seen, blocks, known, groups, evicted))[-STEPS:]
        for evicted in (True, False)
    )
    got = torch.cat(out.logits)
    distance, bite = ((of - got).abs().max().item() for of in (want, plain))
    print(f"{name} {what}: {distance:.1e}, bite {bite:.2f}")
    assert distance <= TOLERANCE
    assert bite > 0.02, "the test does not bite"


def entries_of(name, what, ids, frames, cells):
    """(frame, cell) of each visual token, and position of each text token -> its number."""
    member, model = MEMBERS[name](), model_of(name)
    token = member.video_id if what == "video" else member.image_id
    visual = (ids[0] == token).tolist()
    each = sum(visual) // FRAMES  # tokens may follow the last frame, such as a newline
    places = range(len(visual))
    if hasattr(model.model, "get_rope_index"):
        parts = [fresh(pixels) for _, pixels in chunks_of(name, what)]
        grids = {k: torch.cat([p[k] for p in parts]) for k in parts[0] if "grid" in k}
        where = model.model.get_rope_index(ids, **extras(name, what, ids), **grids)[0]
        places = where[:, 0].amax(0).tolist()
    entries, seen = {}, 0
    for number, (shows, place) in enumerate(zip(visual, places, strict=True)):
        part, rest = divmod(seen, each)
        seen += shows
        if shows and rest < frames * cells:
            entries[(part * frames + rest // cells, rest % cells)] = number
        else:
            entries[place] = number
    return entries
