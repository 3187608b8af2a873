"""Report: what happened to each image of a forward, and what it saved.

FLOPs count a multiply-add as 2 and causal attention exactly. They cover one prefill with the head
at one position of each row: the tokens of this forward; attention to turns that were cached before
it is left out on both sides.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console, Group, RenderableType
from rich.text import Text

from foveate.core import Method, ModelFacts
from foveate.core.step import site_of
from foveate.core.video import VideoMethod
from foveate.io.quoting import shown
from foveate.io.writing import write_text
from foveate.measure import flops
from foveate.measure.account import account, unpruned, visual_tokens
from foveate.measure.selection import acted
from foveate.record.record import ImageRecord, Record
from foveate.report.tables import cost_table, image_table, layer_table, title

_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")  # a list of numbers, in JSON with line breaks


class _Family(ModelFacts, Protocol):
    """What a report asks of a model family."""

    @property
    def config(self) -> Any:
        """The model's config."""

    @property
    def model_type(self) -> str:
        """The config's model type."""


class Report(dict[str, Any]):
    """A dict of plain JSON values; `str()` of it is a table.

    Keys: `model`, `methods`, `dtype`, `rows`, `prompt_tokens` (of each row), `keep_total` (the
    `limit` of each row, its `visual_tokens` and those `of_earlier_turns` among them; empty without
    such a limit), `images` (row, grid, frames, whether it is audio, tokens, tokens after each step,
    and what `kept` shows), `layers` (tokens and visual tokens of each row in each decoder layer),
    `flops`, `kv_bytes`, `state_bytes`, `index` and `notes`. `index` is `None`, but where a model
    makes an embedding of each token, it holds their `width`, `before` and `after` in bytes, their
    `ratio`, and the embeddings of each row, padding left out, in `rows_before` and `rows_after`.
    `flops` and `kv_bytes` hold `before` (all tokens), `after` and their `ratio`; `state_bytes` is
    what recurrent layers keep of all rows, before as after. `flops` also shows apart what it
    includes: `vision` (tower and projector with all tokens; `None` where features were handed in,
    which a note says), `vision_after` (as they were) and `selection` (the signals that methods
    asked for; a method's own arithmetic is not counted). `tower`, `projector`, `prefill` (the
    language model), `layers` (each decoder layer) and `decode` (one new token of each row, or one
    step of an expert that reads the prompt; it is not in the sum) hold `before` and `after`. Of an
    encoder without a language model, `rows` counts images, and `prompt_tokens` and `layers` are
    empty.
    """

    @classmethod
    def of(
        cls, record: Record, family: _Family, methods: Sequence[Method], dtype: torch.dtype
    ) -> Report:
        """The report of one forward.

        Args:
            record: what the engine wrote.
            family: the model's family adapter.
            methods: the methods that ran.
            dtype: what the key-value cache holds.
        """
        report = cls.empty(family, methods)
        if not record.layer_tokens:  # nothing acted, so every layer saw the whole prompt
            prompt = [list(record.prompt_tokens)] * family.text_layers
            record = dataclasses.replace(record, layer_tokens=prompt)
        visual = visual_tokens(record) if family.text_layers else []
        report.update(
            dtype=str(dtype).removeprefix("torch."),
            rows=record.rows,
            prompt_tokens=list(record.prompt_tokens),
            keep_total=_totals(record),
            images=[_image(image) for image in record.images],
            layers=[
                {"tokens": list(tokens), "visual_tokens": seen}
                for tokens, seen in zip(record.layer_tokens, visual, strict=True)
            ],
            flops=_flops(record, family, methods),
            kv_bytes=_kv_bytes(record, family, dtype),
            state_bytes=_state_bytes(record, family, dtype),
            index=_index(record),
            notes=[
                *record.notes,
                *idle_notes(record, family, methods),
                *_frame_notes(record, family, methods),
                *_total_notes(record),
            ],
        )
        report["notes"] += _method_notes(family, methods)
        if report["flops"]["vision"] is None:
            report["notes"].append(
                "FLOPs are of the language model: tower and projector are not counted, because "
                "image features were handed in"
            )
        return report

    @classmethod
    def empty(cls, family: _Family, methods: Sequence[Method]) -> Report:
        """The report of a session in which no forward has happened yet."""
        return cls(
            model=family.model_type,
            methods=[_described(method, family) for method in methods],
            dtype="",
            rows=0,
            prompt_tokens=[],
            keep_total=[],
            images=[],
            layers=[],
            flops={},
            kv_bytes={},
            state_bytes=0,
            index=None,
            notes=["no forward has run yet: call the model or generate inside the session"],
        )

    @property
    def kept(self) -> list[dict[str, list[dict[str, Any]]]]:
        """For each image, step -> the tokens that survive it, each with its box in the image.

        A token is a dict of `index`, its raster position; `box`, its left, top, right and bottom
        edge in [0, 1], or `None` if it shows no pixels; and in a video `frame`. Boxes are shares of
        what the processor showed the model: of the image, after it was cropped or padded; of the
        frame in a video. Where an image was cut into tiles, each has its own entry: `tile` says
        which of how many it is, and `boxes_in` whether boxes are of the whole `image`, or of the
        `tile` because it is not known how tiles are arranged.

        In the report itself an image holds the indices in `kept`, and in `boxes` and `frame` those
        of all its tokens.
        """
        return [
            {site: [_token(image, n) for n in index] for site, index in image["kept"].items()}
            for image in self["images"]
        ]

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if given.

        Raises:
            InputError: it cannot be written; an earlier file is as it was.
        """
        text = _NUMBERS.sub(lambda list_: " ".join(list_[0].split()), json.dumps(self, indent=2))
        if path is not None:
            write_text(path, text + "\n")
        return text

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [Text(title(self), style="bold")]
        if self["rows"]:
            tables = [image_table(self)] if self["images"] else []
            if self["layers"]:
                tables.append(layer_table(self))
            parts += [*tables, cost_table(self)]
        parts += [Text(f"note: {note}", style="yellow") for note in self["notes"]]
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _described(method: Method, family: ModelFacts) -> dict[str, Any]:
    """A method's hyper-parameters, with the positions that it resolves to on this model."""
    return _plain({**method.to_dict(), "positions": method.positions_on(family)})


def _plain(value: Any) -> Any:
    """Turn tuples into lists, so that what goes into JSON comes out equal."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _method_notes(family: ModelFacts, methods: Sequence[Method]) -> list[str]:
    """What methods say about themselves in every report."""
    return [f"{m.slug}: {note}" for m in methods if (note := m.note_on(family))]


def idle_notes(record: Record, family: ModelFacts, methods: Sequence[Method]) -> list[str]:
    """Say of each method that was to remove tokens, and removed none of any image.

    Args:
        record: one forward.
        family: the model's facts.
        methods: the methods that ran.
    """
    removing = {entry for image in record.images for entry in _removing(image)}
    own: dict[str, tuple[Method, set[str]]] = {}  # first entry of a method -> it and its entries
    for step in acted(methods, family) if record.images else ():
        own.setdefault(step.begun, (step.method, set()))[1].add(step.entry)
    notes = []
    for method, its in own.values():
        if its & removing or all(site_of(entry)[0] == "decode" for entry in its):
            continue
        if isinstance(method, VideoMethod) and all(image.frames == 1 for image in record.images):
            why = "it compares the frames of a video, and there are images only"
        else:
            why = f"its keep={shown(str(method.keep))} leaves all tokens of these images"
        notes.append(f"{method.slug} removed nothing: {why}")
    return notes


def _frame_notes(record: Record, family: ModelFacts, methods: Sequence[Method]) -> Iterator[str]:
    """Say of each video that keeps more than its budget, as its first frame stays whole."""
    videos = [image for image in record.images if image.frames > 1]
    for of in acted(methods, family):
        if not (isinstance(of.method, VideoMethod) and of.method.first_whole):
            continue
        for number, video in enumerate(videos):
            total, first = video.total, math.prod(video.grid)
            budget = of.method.count(total, total, of.step, of.number, video.row)
            if budget < total - (video.frames - 1) * first:
                yield (
                    f"{of.method.slug} keeps {len(video.kept[of.entry])} tokens of video {number}, "
                    f"where its keep would leave {budget}: the {first} of the first frame always "
                    "stay"
                )


def _totals(record: Record) -> list[dict[str, int]]:
    """What each row may hold and holds, where there is a limit."""
    limits = enumerate(zip(record.keep_total, record.earlier_tokens, strict=True))
    return [
        {
            "limit": limit,
            "visual_tokens": record.entering(row) + earlier,
            "of_earlier_turns": earlier,
        }
        for row, (limit, earlier) in limits
    ]


def _total_notes(record: Record) -> list[str]:
    """What rows hold of what they may, where there is a limit."""
    return [
        f"keep_total: row {row} holds {held['visual_tokens']} of at most {held['limit']} visual "
        f"tokens, {held['of_earlier_turns']} of them of earlier turns"
        for row, held in enumerate(_totals(record))
    ]


def _removing(image: ImageRecord) -> list[str]:
    """Entries of steps after which fewer tokens of an image are left than before."""
    counts = [image.total, *(len(kept) for kept in image.kept.values())]
    return [entry for entry, (a, b) in zip(image.kept, pairwise(counts), strict=True) if b < a]


def _image(image: ImageRecord) -> dict[str, Any]:
    boxes = [
        None if math.isnan(box[0]) else [round(edge, 4) for edge in box]
        for box in image.boxes.tolist()
    ]
    return {
        "row": image.row,
        "grid": list(image.grid),
        "frames": image.frames,
        "audio": image.audio,
        "tokens": image.total,
        "after": {site: len(kept) for site, kept in image.kept.items()},
        "kept": {site: kept.tolist() for site, kept in image.kept.items()},
        "boxes": boxes,
        "frame": image.frame.tolist() if image.frames > 1 else None,
        "tile": list(image.tile),
        "boxes_in": "image" if image.whole else "tile",
    }


def _token(image: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A token of an image in a report, see `Report.kept`."""
    token = {"index": index, "box": image["boxes"][index]}
    return token if image["frame"] is None else {**token, "frame": image["frame"][index]}


def _flops(record: Record, family: _Family, methods: Sequence[Method]) -> dict[str, Any]:
    """FLOPs of the prefill with all tokens and as it was, vision included."""
    before, after = account(unpruned(record), family), account(record, family, methods)
    total = before.total
    return {
        "before": total,
        "after": after.total,
        "ratio": after.total / total if total else 1.0,
        "vision": before.vision,
        "vision_after": after.vision,
        "selection": after.selection,
        "tower": {"before": before.tower, "after": after.tower},
        "projector": {"before": before.projector, "after": after.projector},
        "prefill": {"before": before.prefill, "after": after.prefill},
        "layers": {"before": list(before.layers), "after": list(after.layers)},
        "decode": {"before": before.decode, "after": after.decode},
    }


def _kv_bytes(record: Record, family: _Family, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of the cache afterwards, and what it would hold had this forward removed nothing."""
    if not record.cache_slots:
        return {"before": 0, "after": 0, "ratio": 1.0}
    after = flops.kv_bytes(family, record.cache_slots, record.rows, dtype)
    before = flops.kv_bytes(family, unpruned(record).cache_slots, record.rows, dtype)
    return {"before": before, "after": after, "ratio": after / before if before else 1.0}


def _state_bytes(record: Record, family: _Family, dtype: torch.dtype) -> int:
    """Bytes of the running states in the cache."""
    return flops.state_bytes(family, record.rows, dtype) if record.cache_slots else 0


def _index(record: Record) -> dict[str, Any] | None:
    """What an index stores of all rows, and what it would store of all tokens."""
    if record.embedding is None:
        return None
    width, size = record.embedding
    before, after = list(record.prompt_tokens), list(record.layer_tokens[-1])
    total = sum(before)
    return {
        "width": width,
        "before": total * width * size,
        "after": sum(after) * width * size,
        "ratio": sum(after) / total if total else 1.0,
        "rows_before": before,
        "rows_after": after,
    }
