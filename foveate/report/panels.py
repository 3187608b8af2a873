"""Panels: an image on which kept tokens are in colour with an outline, and dropped ones pale."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

GAP = 14
CAPTION = 46
PAPER = (255, 255, 255)
INK = (33, 37, 41)
FAINT = (108, 117, 125)
EDGE = (240, 101, 0)


def grid_panel(
    canvas: Image.Image, columns: list[int], rows: list[int], kept: set[int] | None
) -> Image.Image:
    """The canvas, dropped cells pale, off the grid dark; `kept=None` leaves all plain."""
    width = len(columns) - 1
    mask = Image.new("L", canvas.size, 0)
    cells = ImageDraw.Draw(mask)
    for cell in range(width * (len(rows) - 1)) if kept is None else kept:
        row, column = divmod(cell, width)
        left, top = columns[column], rows[row]
        right, bottom = max(columns[column + 1] - 1, left), max(rows[row + 1] - 1, top)
        cells.rectangle((left, top, right, bottom), fill=255)
    off_grid = Image.blend(canvas, Image.new("RGB", canvas.size, (0, 0, 0)), 0.75)
    pale = _pale(canvas)
    panel = off_grid
    panel.paste(pale.crop((columns[0], rows[0], columns[-1], rows[-1])), (columns[0], rows[0]))
    panel.paste(canvas, mask=mask)
    if kept is not None:
        _borders(panel, columns, rows, kept)
    return panel


def box_panel(
    canvas: Image.Image,
    corners: Sequence[Sequence[int]],
    layers: Sequence[Sequence[int]],
    kept: set[int],
) -> Image.Image:
    """The canvas in pale grey, with the kept boxes of each layer in turn."""
    panel = _pale(canvas)
    for depth, layer in enumerate(layers):
        finest = depth == len(layers) - 1
        mask = Image.new("L", canvas.size, 0)
        pen = ImageDraw.Draw(mask)
        for left, top, right, bottom in (corners[token] for token in layer if token in kept):
            pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), fill=255)
        panel.paste(canvas if finest else Image.blend(_pale(canvas), canvas, 0.5), mask=mask)
        edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5 if finest else 3)))
        panel.paste(EDGE, mask=edge)
    overlay = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for left, top, right, bottom in (corners[token] for token in layers[-1] if token not in kept):
        pen.rectangle((left, top, right, bottom), outline=(*PAPER, 60))
    panel.paste(overlay, mask=overlay.getchannel("A"))
    return panel


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """Panels side by side with a two-line caption below each."""
    bold, plain = ImageFont.load_default(size=17), ImageFont.load_default(size=15)
    needed = [max(bold.getlength(a), plain.getlength(b)) for a, b in captions]
    widths = [max(p.width, int(n) + 1) for p, n in zip(panels, needed, strict=True)]
    size = (sum(widths) + GAP * (len(panels) + 1), panels[0].height + 2 * GAP + CAPTION)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    left = GAP
    for panel, width, (where, count) in zip(panels, widths, captions, strict=True):
        sheet.paste(panel, (left, GAP))
        text_top = GAP + panel.height + 6
        pen.text((left, text_top), where, fill=INK, font=bold)
        pen.text((left, text_top + 22), count, fill=FAINT, font=plain)
        left += width + GAP
    return sheet


def stack(strips: Sequence[Image.Image], headings: Sequence[str] = ()) -> Image.Image:
    """Put strips below each other, each under its heading if headings are given."""
    font = ImageFont.load_default(size=20)
    room = 34 if headings else 0
    wide = [strip.width for strip in strips]
    wide += [int(font.getlength(heading)) + 2 * GAP for heading in headings]
    height = sum(strip.height + room for strip in strips)
    sheet = Image.new("RGB", (max(wide), height), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = 0
    for number, strip in enumerate(strips):
        if headings:
            pen.text((GAP, top + 10), headings[number], fill=INK, font=font)
        sheet.paste(strip, (0, top + room))
        top += room + strip.height
    return sheet


def _pale(canvas: Image.Image) -> Image.Image:
    """The canvas as dropped tokens show it."""
    grey = canvas.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", canvas.size, (236, 238, 241)), 0.62)


def _borders(panel: Image.Image, columns: list[int], rows: list[int], kept: set[int]) -> None:
    """Faint lines between cells, and an outline around kept regions."""
    overlay = Image.new("RGBA", panel.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(overlay)
    for x in columns[1:-1]:
        pen.line((x, rows[0], x, rows[-1] - 1), fill=(*PAPER, 70))
    for y in rows[1:-1]:
        pen.line((columns[0], y, columns[-1] - 1, y), fill=(*PAPER, 70))
    width, height = len(columns) - 1, len(rows) - 1
    for cell in kept:
        row, column = divmod(cell, width)
        left, right = columns[column], min(columns[column + 1], panel.width - 1)
        top, bottom = rows[row], min(rows[row + 1], panel.height - 1)
        sides = (
            (row > 0 and cell - width not in kept, (left, top, right, top)),
            (row < height - 1 and cell + width not in kept, (left, bottom, right, bottom)),
            (column > 0 and cell - 1 not in kept, (left, top, left, bottom)),
            (column < width - 1 and cell + 1 not in kept, (right, top, right, bottom)),
        )
        for is_edge, line in sides:
            if is_edge:
                pen.line(line, fill=(*EDGE, 255), width=2)
    panel.paste(overlay, mask=overlay.getchannel("A"))
