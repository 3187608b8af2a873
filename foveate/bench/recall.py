"""Evidence recall: how much of what one must see to answer is left.

It needs no trained weights: any model, and any photograph with boxes. A token stands for its cell
of the image; tokens that were merged into another count as dropped, and the one they went
into stands for its own cell only.

Shapes: `V` visual tokens of an image, boxes in shares of the image as the model saw it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from foveate.bench.prompt import Shown
from foveate.bench.sample import Evidence
from foveate.core.step import site_of
from foveate.record.boxes import plain_grid
from foveate.record.record import ImageRecord, Record, by_image, joined
from foveate.report.geometry import match_geometry, place_grid

Edges = tuple[float, float, float, float]


def token_hit(boxes: Tensor, kept: Tensor, evidence: Sequence[Edges]) -> float | None:
    """Share of the pieces of evidence of which at least one token survives."""
    touched = [_overlap(boxes, box) > 0 for box in evidence]
    touched = [tokens for tokens in touched if bool(tokens.any())]
    if not touched:
        return None
    return sum(bool((tokens & kept).any()) for tokens in touched) / len(touched)


def _overlap(boxes: Tensor, box: Edges) -> Tensor:
    """(V,) area that each token's cell shares with a box."""
    corner = torch.tensor(box, dtype=torch.float64)
    cells = boxes.double()
    low = torch.maximum(cells[:, :2], corner[:2])
    high = torch.minimum(cells[:, 2:], corner[2:])
    return (high - low).clamp(min=0).prod(1).nan_to_num()


def covered_area(boxes: Tensor, kept: Tensor, box: Edges) -> tuple[float, float]:
    """Area of a box that all tokens cover, and that survivors cover; passes count once."""
    near = _overlap(boxes, box) > 0
    cells, survive = boxes[near].double(), kept[near]
    if not len(cells):
        return 0.0, 0.0
    corner = torch.tensor(box, dtype=torch.float64)
    cells = torch.cat((torch.maximum(cells[:, :2], corner[:2]),
                       torch.minimum(cells[:, 2:], corner[2:])), 1)  # fmt: skip
    x, y = cells[:, 0::2].unique(), cells[:, 1::2].unique()
    across, down = (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2
    inside_x = (cells[:, :1] < across) & (across < cells[:, 2:3])
    inside_y = (cells[:, 1:2] < down) & (down < cells[:, 3:4])
    area = (y[1:] - y[:-1])[:, None] * (x[1:] - x[:-1])
    hit = inside_y[:, :, None] & inside_x[:, None, :]
    return float(area[hit.any(0)].sum()), float(area[hit[survive].any(0)].sum())


@dataclass(frozen=True)
class Seen:
    """An image of a prompt, and what was left of it.

    Args:
        shown: the image.
        image: its tokens; tiles are joined.
        layers: decoder layers of the model.
        pixels: what the encoder saw of it, or `None`.
    """

    shown: Shown
    image: ImageRecord
    layers: int
    pixels: Tensor | None = None

    def surviving(self) -> dict[str, Tensor]:
        """Entry of a step -> (V,) which tokens survive it."""
        found = {}
        for entry, index in self.image.kept.items():
            found[entry] = torch.zeros(self.image.total, dtype=torch.bool)
            found[entry][index.cpu()] = True
        return found

    def lifetime(self) -> Tensor:
        """(V,) share of the decoder layers after the first cut that each token reaches."""
        survivors = self.surviving()
        starts = [first_layer(entry) for entry in survivors]
        if not starts:
            return torch.ones(self.image.total)
        ends = [*starts[1:], self.layers]
        lived = torch.zeros(self.image.total)
        for tokens, start, end in zip(survivors.values(), starts, ends, strict=True):
            lived += tokens * float(end - start)
        return lived / max(self.layers - starts[0], 1)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(height, width) where the tokens form one grid."""
        if self.image.frames > 1:
            return None
        return plain_grid(self.image.boxes)

    def locate(self, evidence: Evidence) -> tuple[Edges, Tensor]:
        """A piece of evidence as the model saw it, and (V,) which tokens belong to its frame."""
        film = not isinstance(self.shown.pixels, Image.Image)
        pixels = self.shown.pixels[evidence.frame] if film else self.shown.pixels  # type: ignore[index]
        assert isinstance(pixels, Image.Image)
        edges = seen_box(pixels, evidence.box, self._geometry(pixels), self._aspect())
        if not film or self.image.frames == 1:
            return edges, torch.ones(self.image.total, dtype=torch.bool)
        mine = evidence.frame * self.image.frames // self.shown.frames
        return edges, self.image.frame == mine

    def _aspect(self) -> float:
        return self.image.grid[1] / self.image.grid[0]

    def _geometry(self, image: Image.Image) -> str:
        if self.pixels is None or self.pixels.dim() < 3 or image.width == image.height:
            return "resize"
        seen = self.pixels if self.pixels.dim() == 3 else self.pixels[0]
        return match_geometry(image, seen)


def first_layer(entry: str) -> int:
    """The first decoder layer that a step has an effect on."""
    stage, layer, _ = site_of(entry)
    return layer if stage == "llm" else 0


def seen_box(image: Image.Image, box: Sequence[int], geometry: str, aspect: float) -> Edges:
    """A box of pixels in shares of what the processor showed the model; may reach outside."""
    canvas, grid = place_grid(image, geometry, aspect)
    right = (canvas.width - image.width) // 2 if geometry == "pad" else 0
    down = (canvas.height - image.height) // 2 if geometry == "pad" else 0
    width, height = grid[2] - grid[0], grid[3] - grid[1]
    x0, y0, x1, y1 = box
    return (
        (x0 + right - grid[0]) / width,
        (y0 + down - grid[1]) / height,
        (x1 + right - grid[0]) / width,
        (y1 + down - grid[1]) / height,
    )


def seen_images(record: Record, rows: Sequence[Sequence[Shown]], layers: int) -> list[list[Seen]]:
    """What was left of the images of each row of a batch.

    Args:
        record: of the forward.
        rows: the images of each row, in order of appearance.
        layers: decoder layers.
    """
    groups = by_image(record.images)
    wanted = [(row, shown) for row, images in enumerate(rows) for shown in images]
    if len(groups) != len(wanted):  # e.g. tiles that do not say which image they are of
        return [[] for _ in rows]
    pixels = record.pixels
    single = pixels is not None and len(pixels) == len(groups)
    found: list[list[Seen]] = [[] for _ in rows]
    for number, ((row, shown), group) in enumerate(zip(wanted, groups, strict=True)):
        own = pixels[number] if single and pixels is not None else None
        found[row].append(Seen(shown, joined(group), layers, own))
    return found


Piece = tuple[Seen, Edges, Tensor]


def evidence_recall(
    seen: Sequence[Seen], evidence: Sequence[Evidence]
) -> tuple[dict[str, float], float | None, float | None]:
    """Recall of a question.

    Args:
        seen: images that were shown up to the question.
        evidence: what one must see to answer.

    Returns:
        Area recall after each site; its mean over the decoder layers after the first cut; and
        the share of pieces of which a token survives the last step. `None` where none is known.
    """
    pieces = [(look, *look.locate(e)) for e in evidence for look in seen if _shows(look, e)]
    if not pieces:
        return {}, None, None
    entries = list(pieces[0][0].image.kept)
    if not entries:
        return {}, 1.0, 1.0
    by_site = {entry: _recall(pieces, entry) for entry in entries}
    known = {entry: share for entry, share in by_site.items() if share is not None}
    hits = [
        token_hit(look.image.boxes, look.surviving()[entries[-1]] & frame, [edges])
        for look, edges, frame in pieces
    ]
    counted = [hit for hit in hits if hit is not None]
    mean = _over_layers(known, pieces[0][0].layers)
    return known, mean, sum(counted) / len(counted) if counted else None


def _shows(look: Seen, evidence: Evidence) -> bool:
    if look.shown.image != evidence.image:
        return False
    return look.shown.frame is None or look.shown.frame == evidence.frame


def _recall(pieces: Sequence[Piece], entry: str) -> float | None:
    """Area recall of all pieces together after a step."""
    seen = covered = 0.0
    for look, edges, frame in pieces:
        all_tokens = torch.ones(look.image.total, dtype=torch.bool)
        kept = look.surviving().get(entry, all_tokens)[frame]
        everything, survivors = covered_area(look.image.boxes[frame], kept, edges)
        seen += everything
        covered += survivors
    return min(covered / seen, 1.0) if seen else None


def _over_layers(by_site: dict[str, float], layers: int) -> float | None:
    if not by_site:
        return None
    starts = [first_layer(entry) for entry in by_site]
    ends = [*starts[1:], layers]
    total = sum(r * (e - s) for r, s, e in zip(by_site.values(), starts, ends, strict=True))
    weight = layers - starts[0]
    return total / weight if weight and math.isfinite(total) else None
