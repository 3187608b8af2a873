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
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.core import Method, ModelFacts
from foveate.core.step import site_of
from foveate.core.video import VideoMethod
from foveate.io.quoting import shown
from foveate.io.writing import write_text
from foveate.measure import flops
from foveate.measure.account import account, unpruned, visual_tokens
from foveate.measure.selection import acted
from foveate.measure.units import human_bytes, human_flops
from foveate.record.record import ImageRecord, Record, site_name

_NUMBERS = re.compile(r"\[\n[^\[\]{}\"]*\]")  # a list of numbers, in JSON with line breaks
_WIDE = 4  # rows of a batch that the table shows apart; beyond that it shows their range


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

    Keys: `model`, `methods`, `dtype`, `rows`, `prompt_tokens` (of each row), `images` (row, grid,
    frames, tokens, tokens after each step, and what `kept` shows), `layers` (tokens and visual
    tokens of each row in each decoder layer), `flops`, `kv_bytes`, `state_bytes`, `index` and
    `notes`. `index` is `None`, but where a model makes an embedding of each token, it holds their
    `width`, `before` and `after` in bytes, their `ratio`, and the embeddings of each row, padding
    left out, in `rows_before` and `rows_after`.
    `flops` and `kv_bytes` hold `before` (all tokens), `after` and their `ratio`; `state_bytes` is
    what recurrent layers keep of all rows, before as after. `flops` also shows apart what it
    includes: `vision` (tower and projector with all tokens; `None` where features were handed in,
    which a note says), `vision_after` (as they were) and `selection` (the signals that methods
    asked for; a method's own arithmetic is not counted). `tower`, `projector`, `prefill` (the
    language model), `layers` (each decoder layer) and `decode` (one new token of each row, which is
    not in the sum) hold `before` and `after`. Of an encoder without a language model, `rows` counts
    images, and `prompt_tokens` and `layers` are empty.
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
            images=[_image(image) for image in record.images],
            layers=[
                {"tokens": list(tokens), "visual_tokens": seen}
                for tokens, seen in zip(record.layer_tokens, visual, strict=True)
            ],
            flops=_flops(record, family, methods),
            kv_bytes=_kv_bytes(record, family.config, dtype),
            state_bytes=_state_bytes(record, family.config, dtype),
            index=_index(record),
            notes=[*record.notes, *idle_notes(record, family, methods)],
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
        parts: list[RenderableType] = [Text(_title(self), style="bold")]
        if self["rows"]:
            tables = [_image_table(self)] if self["images"] else []
            if self["layers"]:
                tables.append(_layer_table(self))
            parts += [*tables, _cost_table(self)]
        parts += [Text(f"note: {note}", style="yellow") for note in self["notes"]]
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(width=100, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def layer_ranges(rows: Sequence[Any]) -> list[tuple[str, int]]:
    """Runs of equal layers and their first: [5, 5, 3] gives [("0-1", 0), ("2", 2)]."""
    ranges = []
    for _, run in groupby(enumerate(rows), key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        first, last = numbers[0], numbers[-1]
        ranges.append((str(first) if first == last else f"{first}-{last}", first))
    return ranges


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


def _kv_bytes(record: Record, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of the cache afterwards, and what it would hold had this forward removed nothing."""
    if not record.cache_slots:
        return {"before": 0, "after": 0, "ratio": 1.0}
    after = flops.kv_bytes(config, record.cache_slots, record.rows, dtype)
    before = flops.kv_bytes(config, unpruned(record).cache_slots, record.rows, dtype)
    return {"before": before, "after": after, "ratio": after / before if before else 1.0}


def _state_bytes(record: Record, config: Any, dtype: torch.dtype) -> int:
    """Bytes of the running states in the cache."""
    return flops.state_bytes(config, record.rows, dtype) if record.cache_slots else 0


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


def describe(method: Mapping[str, Any]) -> str:
    """A method of a report in one line: `pyramiddrop (keep=[0.5, 0.25])`."""
    shown = {key: value for key, value in method.items() if key != "method" and value is not None}
    fields = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"{method['method']} ({fields})"


def _title(report: Report) -> str:
    methods = " + ".join(describe(method) for method in report["methods"]) or "no method"
    return f"{methods} on {report['model']}"


def _table(heading: str) -> Table:
    """A table whose first column is named for what the table shows."""
    return Table(heading, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _columns(sites: Sequence[str]) -> dict[str, str]:
    """Sites that the table shows, and their headings: of the encoder's layers only the last."""
    layers = [site for site in sites if site.startswith("vision:")]
    shown = {site: site_name(site) for site in sites if site not in layers[:-1]}
    if len(layers) > 1:
        first, last = (site_of(site)[1] for site in (layers[0], layers[-1]))
        if first < last:
            shown[layers[-1]] = f"in encoder layers {first} to {last}"
    return shown


def _image_table(report: Report) -> Table:
    found: list[str] = []
    for image in report["images"]:
        found += [site for site in image["after"] if site not in found]
    sites = _columns(found)
    table = _table("image")
    for heading in ("row", "grid", "visual tokens", *sites.values()):
        table.add_column(heading, justify="right")
    for number, image in enumerate(report["images"]):
        counts = [str(image["after"].get(site, "-")) for site in sites]
        frames = [image["frames"]] if image["frames"] > 1 else []
        grid = "x".join(map(str, frames + image["grid"]))
        table.add_row(str(number), str(image["row"]), grid, str(image["tokens"]), *counts)
    return table


def _layer_table(report: Report) -> Table:
    table = _table("decoder layer")
    rows = range(report["rows"])
    for row in rows if len(rows) <= _WIDE else (None,):
        name = "" if len(rows) == 1 else "all rows: " if row is None else f"row {row}: "
        table.add_column(f"{name}visual tokens", justify="right")
        table.add_column("text tokens", justify="right")
    for name, first in layer_ranges(report["layers"]):
        layer = report["layers"][first]
        visual = layer["visual_tokens"]
        text = [t - v for t, v in zip(layer["tokens"], visual, strict=True)]
        if len(rows) <= _WIDE:
            cells = [str(n) for pair in zip(visual, text, strict=True) for n in pair]
        else:
            cells = [_span(visual), _span(text)]
        table.add_row(name, *cells)
    return table


def _work_name(report: Report) -> str:
    if not report["layers"]:
        return "encoder"
    counted = report["flops"]["vision"] is not None
    return "prefill, vision included" if counted else "prefill, language model only"


def _cost_table(report: Report) -> Table:
    table = _table("cost of the prompt")
    for heading in ("all tokens", "now", "now / all"):
        table.add_column(heading, justify="right")
    work, memory = report["flops"], report["kv_bytes"]
    table.add_row(
        _work_name(report),
        human_flops(work["before"]),
        human_flops(work["after"], work["before"]),
        f"{work['ratio']:.1%}",
    )
    if report["layers"] and work["vision"] is not None:
        counts = work["vision"], work["vision_after"]
        vision = (human_flops(count, work["before"]) for count in counts)
        table.add_row("  of which vision tower, projector", *vision, "")
    table.add_row("  of which selection", "", human_flops(work["selection"]), "")
    if memory["before"]:
        table.add_row(
            f"KV cache, {report['dtype']}",
            human_bytes(memory["before"]),
            human_bytes(memory["after"], memory["before"]),
            f"{memory['ratio']:.1%}",
        )
    if (index := report["index"]) is not None:
        table.add_row(
            f"index, {index['width']} numbers an embedding",
            human_bytes(index["before"]),
            human_bytes(index["after"], index["before"]),
            f"{index['ratio']:.1%}",
        )
        embeddings = (str(sum(index[key])) for key in ("rows_before", "rows_after"))
        table.add_row("  embeddings", *embeddings, "")
    if report["state_bytes"]:
        held = human_bytes(report["state_bytes"])
        table.add_row("state of recurrent layers", held, held, "100.0%")
    return table
