"""Draw what every method keeps of one scene, for docs/gallery.md: `python scripts/gallery.py`.

Pictures go to docs/gallery/, one for each method whose choice means something without training.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gallery_scene import draw_photograph, draw_video
from PIL import Image

import foveate
from foveate import tiny
from foveate.core import Method
from foveate.record.record import ImageRecord
from foveate.report.panels import grid_panel

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURES = DOCS / "gallery.md", DOCS / "gallery"

KEEP, CELLS = 0.25, 16
SIDE, GAP = 360, 8  # pixels of a picture; white ones between the frames of a video
ROW = 3  # frames
QUESTION = "what color is the heart ?"
OWN: dict[str, dict[str, Any]] = {
    "dycoke": {},
    "m3": {"keep": 64},
    "pixelprune": {"threshold": 0.5},
    "prunevid": {},
    "recoverable-compression": {},
}
"""Fields of methods that take no share; the others get `keep=KEEP`."""

HEAD = f"""# Gallery

What every method keeps of one picture at `keep={KEEP}`, on the small model that comes with foveate.
The picture is a lake at dusk, drawn from noise, with objects that the model knows. The question is
*{QUESTION}* Tokens in colour survive, and pale ones are dropped. Where a method drops tokens at
several steps, a token is the paler the earlier it goes. A token that others are merged into stands
at its own place.

![The picture: a lake at dusk, with shapes and numbers](gallery/picture.webp)

Each name leads to what [methods.md](methods.md) says of the method. Pictures show what a method
chooses, and not how well the model answers: [results.md](results.md) has accuracies, and says which
methods fail on so small a model. `python scripts/gallery.py` makes this page.
"""
GROUPS = {
    "vision": (
        "Inside the encoder",
        "`pixelprune` is meant for pages and screens, where cells repeat exactly. None do here, so "
        "it is shown\nwith `threshold=0.5`: cells count as equal if no normalised pixel value "
        "differs by more.",
    ),
    "pre_llm": ("Before the language model", ""),
    "llm": (
        "Between decoder layers",
        "These can read the question first. The first layers of this model hardly look at the "
        "image, so attention there says little.",
    ),
    "video": (
        "Videos",
        "Six frames, in which the heart flies over the lake and nothing else moves.",
    ),
    "all": (
        "All tokens, less work",
        "These choose none of the tokens. They compute less of all of them, so there is nothing to "
        "draw.",
    ),
    "learned": (
        "What has to be trained",
        "These choose by what they have [learned](training.md#methods-that-learn), or by heads\n"
        "that are [trained](segmentation.md). Without training, a picture would show chance.",
    ),
}
DRAWN = ("vision", "pre_llm", "llm", "video")


def group_of(cls: type[Method]) -> str:
    """The group of the page that a method is shown in."""
    if not cls.removes or cls.does.startswith("keeps all tokens"):
        return "all"
    if cls.learned is not Method.learned or cls.encoders_alone:
        return "learned"
    return "video" if cls.does.startswith("video: ") else cls.stage


def groups() -> dict[str, list[str]]:
    """Group -> names of its methods."""
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    for name in foveate.list_methods():
        found[group_of(foveate.get_method(name))].append(name)
    return found


@dataclass(frozen=True)
class Subject:
    """What methods are shown on.

    Args:
        frames: one image, or those of a video, square.
        prefill: runs the model over them.
        model: which it is.
    """

    frames: Sequence[Image.Image]
    prefill: Callable[[], Any]
    model: Any


def photograph() -> Subject:
    """The drawn photograph."""
    model, processor = tiny.load()
    image = draw_photograph()
    inputs = processor(images=image, text=f"<image> {QUESTION}", return_tensors="pt")
    return Subject([image], lambda: model(**inputs), model)


def video() -> Subject:
    """The drawn video."""
    model, processor = tiny.load_video()
    frames = draw_video()
    inputs = processor(text=f"<video> {QUESTION}", videos=frames, return_tensors="pt")
    return Subject(frames, lambda: model(**inputs), model)


def record_of(name: str, subject: Subject) -> ImageRecord:
    """What a method keeps."""
    fields = OWN.get(name, {"keep": KEEP})
    with foveate.use(subject.model, name, **fields) as run:
        subject.prefill()
    assert run.record is not None
    return run.record.images[0]


def draw(subject: Subject, kept: Sequence[Sequence[int]]) -> Image.Image:
    """Each frame as the mean of what the sites leave of it; those of a video three in a row.

    Args:
        subject: the image or the video.
        kept: for each site the tokens that survive it.
    """
    panels = []
    for number, frame in enumerate(subject.frames):
        first = number * CELLS**2
        here = [{k - first for k in site if first <= k < first + CELLS**2} for site in kept]
        panels.append(_mean([_panel(frame, cells) for cells in here]))
    if len(panels) == 1:
        return panels[0].resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    side = SIDE // 2
    step, rows = side + GAP, -(-len(panels) // ROW)
    sheet = Image.new("RGB", (ROW * step - GAP, rows * step - GAP), "white")
    for number, panel in enumerate(panels):
        small = panel.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (number % ROW * step, number // ROW * step))
    return sheet


def _panel(frame: Image.Image, kept: set[int]) -> Image.Image:
    """A frame with some of its cells kept, in twice the size."""
    canvas = frame.resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
    edges = [2 * SIDE * n // CELLS for n in range(CELLS + 1)]
    return grid_panel(canvas, edges, edges, kept)


def _mean(panels: Sequence[Image.Image]) -> Image.Image:
    """The mean of pictures of one size."""
    total = np.mean([np.asarray(panel, np.float32) for panel in panels], 0)
    return Image.fromarray(total.round().astype(np.uint8), "RGB")


def words(kept: Sequence[int], total: int) -> str:
    """How many tokens survive each site, in a few words."""
    if len(kept) > 3:
        return f"{kept[0]:,} to {kept[-1]:,} of {total:,}, in {len(kept)} steps"
    kept = [count for count, _ in itertools.groupby(kept)]
    return f"{', then '.join(f'{count:,}' for count in kept)} of {total:,}"


def page(counts: dict[str, str]) -> str:
    """The text of the page.

    Args:
        counts: name -> how many tokens survive, of methods that are drawn.
    """
    parts = [HEAD.strip()]
    for group, names in groups().items():
        title, about = GROUPS[group]
        parts += [f"## {title}", about] if about else [f"## {title}"]
        if group in DRAWN:
            parts.append(_table(names, counts, 2 if group == "video" else 4))
        else:
            parts.append("\n".join(f"- {_link(n)}: {foveate.get_method(n).does}" for n in names))
    return "\n\n".join(parts) + "\n"


def _link(name: str) -> str:
    return f"[`{name}`](methods.md#{name})"


def _table(names: Sequence[str], counts: dict[str, str], columns: int) -> str:
    """Pictures in rows, each over its method's name, what it does, and how much it keeps."""
    cells = []
    for name in names:
        does = foveate.get_method(name).does.removeprefix("video: ")
        shown = f"![What {name} keeps](gallery/{name}.webp)"
        cells.append(f"{shown}<br>{_link(name)}<br>{does}<br>{counts[name]}")
    cells += [""] * (-len(cells) % columns)
    rows = [cells[n : n + columns] for n in range(0, len(cells), columns)]
    lines = ["| " * columns + "|", "|---" * columns + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def counts_of(text: str) -> dict[str, str]:
    """What a page says of how many tokens survive; see `page`."""
    return dict(re.findall(r"\(methods\.md#([\w-]+)\)<br>[^<|]*<br>([^|]*?) \|", text))


def main() -> None:
    """Draw everything, and write the page."""
    shutil.rmtree(PICTURES, ignore_errors=True)
    PICTURES.mkdir()
    image, clip, counts = photograph(), video(), {}
    _save(image.frames[0].resize((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS), "picture")
    for group, names in groups().items():
        for name in names if group in DRAWN else ():
            subject = clip if group == "video" else image
            seen = record_of(name, subject)
            kept = [index.tolist() for index in seen.kept.values()]
            counts[name] = words([len(index) for index in kept], seen.total)
            _save(draw(subject, kept), name)
    PAGE.write_text(page(counts), encoding="utf-8")
    size = sum(file.stat().st_size for file in PICTURES.iterdir())
    print(f"{PAGE}: {len(counts)} methods drawn, {size / 1000:.0f} kB of pictures")


def _save(picture: Image.Image, name: str) -> None:
    picture.save(PICTURES / f"{name}.webp", quality=82, method=6)


if __name__ == "__main__":
    main()
