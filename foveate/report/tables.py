"""The tables of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from foveate.core.step import STAGES, site_of
from foveate.measure.units import human_bytes, human_flops
from foveate.record.record import site_name

_WIDE = 4  # rows of a batch that the table shows apart; beyond that it shows their range


def layer_ranges(rows: Sequence[Any]) -> list[tuple[str, int]]:
    """Runs of equal layers and their first: [5, 5, 3] gives [("0-1", 0), ("2", 2)]."""
    ranges = []
    for _, run in groupby(enumerate(rows), key=lambda item: item[1]):
        numbers = [number for number, _ in run]
        first, last = numbers[0], numbers[-1]
        ranges.append((str(first) if first == last else f"{first}-{last}", first))
    return ranges


def describe(method: Mapping[str, Any]) -> str:
    """A method of a report in one line: `pyramiddrop (keep=[0.5, 0.25])`."""
    shown = {key: value for key, value in method.items() if key != "method" and value is not None}
    fields = ", ".join(f"{key}={value}" for key, value in shown.items())
    return f"{method['method']} ({fields})"


def title(report: Mapping[str, Any]) -> str:
    """Methods and model."""
    methods = " + ".join(describe(method) for method in report["methods"]) or "no method"
    return f"{methods} on {report['model']}"


def _table(heading: str) -> Table:
    """A table whose first column is named for what the table shows."""
    return Table(heading, box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold cyan")


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _in_stream(site: str) -> tuple[int, int]:
    """Sorts sites as tokens pass them; those of one layer stay as they are."""
    stage, layer, _ = site_of(site)
    return (*STAGES, "decode").index(stage), layer


def _columns(sites: Sequence[str]) -> dict[str, str]:
    """Sites that the table shows, and their headings: of the encoder's layers only the last."""
    layers = [site for site in sites if site.startswith("vision:")]
    shown = {site: site_name(site) for site in sites if site not in layers[:-1]}
    if len(layers) > 1:
        first, last = (site_of(site)[1] for site in (layers[0], layers[-1]))
        if first < last:
            shown[layers[-1]] = f"in encoder layers {first} to {last}"
    return shown


def image_table(report: Mapping[str, Any]) -> Table:
    """What survives of each image."""
    found: list[str] = []
    for image in report["images"]:
        found += [site for site in image["after"] if site not in found]
    found.sort(key=_in_stream)  # audio may have others than images
    sites = _columns(found)
    table = _table("image")
    for heading in ("row", "grid", "visual tokens", *sites.values()):
        table.add_column(heading, justify="right")
    for number, image in enumerate(report["images"]):
        counts = [str(image["after"].get(site, "-")) for site in sites]
        frames = [image["frames"]] if image["frames"] > 1 else []
        grid = "audio" if image["audio"] else "x".join(map(str, frames + image["grid"]))
        table.add_row(str(number), str(image["row"]), grid, str(image["tokens"]), *counts)
    return table


def layer_table(report: Mapping[str, Any]) -> Table:
    """Tokens of each row at each decoder layer."""
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


def _work_name(report: Mapping[str, Any]) -> str:
    if not report["layers"]:
        return "encoder"
    counted = report["flops"]["vision"] is not None
    return "prefill, vision included" if counted else "prefill, language model only"


def cost_table(report: Mapping[str, Any]) -> Table:
    """FLOPs and bytes, with all tokens and now."""
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
        heard = any(image["audio"] for image in report["images"])
        towers = "vision and audio towers" if heard else "vision tower"
        table.add_row(f"  of which {towers}, projector", *vision, "")
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
