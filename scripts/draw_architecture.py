"""Draw docs/architecture.svg, the stream of tokens: `python scripts/draw_architecture.py`."""

from pathlib import Path

OUT = Path(__file__).parent.parent / "docs" / "architecture.svg"
WIDTH, HEIGHT = 960, 500
SIDE, GAP = 13, 3  # of a token's square
TOP = 172  # of the columns of tokens
VISUAL, TEXT = 12, 4
TEAL, INK, GREY, PALE = "#0f766e", "#1f2937", "#6b7280", "#cbd5e1"
COLUMNS = (  # x, visual tokens left, text tokens
    (60, 12, 0), (84, 12, 0), (136, 10, 0), (160, 10, 0),
    (246, 10, 0), (298, 7, 0),
    (394, 7, 4), (418, 7, 4), (442, 7, 4), (494, 4, 4), (518, 4, 4), (542, 4, 4), (594, 2, 4),
    (618, 2, 4), (642, 2, 4),
)  # fmt: skip
SITES = ((116, "vision:8"), (278, "pre_llm"), (474, "llm:8"), (574, "llm:16"))
STAGES = (  # left, right, what it is, the file that acts there
    (50, 184, "vision encoder", "engine/vision/"),
    (232, 324, "projector", "engine/reduce_features.py"),
    (384, 666, "decoder layers", "engine/forward.py"),
    (778, 914, "hidden states, logits", "engine/forward.py"),
)


def text(x: float, y: float, words: str, size: int = 13, **more: str) -> str:
    """A line of text, centred unless `anchor` says otherwise."""
    anchor, fill = more.get("anchor", "middle"), more.get("fill", INK)
    family = "ui-monospace, Menlo, monospace" if "code" in more else "Helvetica, Arial, sans-serif"
    weight = more.get("weight", "normal")
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" font-family="{family}" fill="{fill}" '
        f'font-weight="{weight}" text-anchor="{anchor}">{words}</text>'
    )


def square(x: float, row: int, fill: str, stroke: str) -> str:
    """A token."""
    y = TOP + row * (SIDE + GAP)
    return (
        f'<rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" rx="2" fill="{fill}" '
        f'stroke="{stroke}"/>'
    )


def survivors() -> list[list[int]]:
    """Visual tokens of each column: spread over those of the column before."""
    kept = [*range(VISUAL)]
    found = []
    for _, count, _ in COLUMNS:
        kept = [kept[i * len(kept) // count] for i in range(count)]
        found.append(kept)
    return found


def column(x: float, kept: list[int], words: int) -> list[str]:
    """The tokens that one layer sees; removed ones are hollow."""
    out = []
    for row in range(VISUAL):
        out.append(square(x, row, *((TEAL, TEAL) if row in kept else ("none", PALE))))
    return out + [square(x, VISUAL + i, INK, INK) for i in range(words)]


def arrow(x: float, start: float, end: float) -> str:
    """An arrow downwards."""
    return (
        f'<line x1="{x}" y1="{start}" x2="{x}" y2="{end}" stroke="{INK}" marker-end="url(#tip)"/>'
    )


def method() -> list[str]:
    """The method above the stream, with an arrow to each of its sites."""
    out = [
        '<rect x="50" y="18" width="616" height="62" rx="6" fill="#ecfdf5" stroke="#0f766e"/>',
        text(358, 42, "method", 15, weight="bold"),
        text(358, 66, "steps(model): the sites &#160;&#8226;&#160; scores(tokens) or "
             "reduce(tokens, count): a Reduction", 12, code="yes"),
    ]  # fmt: skip
    for x, name in SITES:
        out += [
            arrow(x, 80, 112),
            text(x, 130, name, 13, code="yes", weight="bold"),
            f'<line x1="{x}" y1="140" x2="{x}" y2="428" stroke="{TEAL}" stroke-dasharray="4 4"/>',
        ]
    return out


def stages() -> list[str]:
    """What the stages are, below the stream, and which file acts there."""
    out = []
    for left, right, what, file in STAGES:
        middle = (left + right) / 2
        out += [
            f'<path d="M{left} 440 v6 H{right} v-6" fill="none" stroke="{GREY}"/>',
            text(middle, 464, what),
            text(middle, 483, file, 12, code="yes", fill=TEAL),
        ]
    return out


def output() -> list[str]:
    """What comes out: logical length again, each removed token with its predecessor's state."""
    out = [square(840, i, TEAL if i in survivors()[-1] else "#99d5cf", TEAL) for i in range(VISUAL)]
    out += [square(840, VISUAL + i, INK, INK) for i in range(TEXT)]
    for y, line in ((204, "removed:"), (219, "as the kept"), (234, "token before")):
        out.append(text(862, y, line, 11, anchor="start", fill=GREY))
    return [*out, *(text(846, y, t, 12) for y, t in ((142, "logical length"), (158, "again")))]


def cache() -> list[str]:
    """The note on the cache beside the decoder layers."""
    lines = ("KV cache: each layer", "holds what it saw,", "reports full length")
    out = [text(674, 300 + 16 * i, t, 11, anchor="start", fill=GREY) for i, t in enumerate(lines)]
    return [*out, text(674, 352, "engine/cache.py", 12, anchor="start", code="yes", fill=TEAL)]


def legend() -> list[str]:
    """What the squares are."""
    out = []
    for i, (fill, stroke, what) in enumerate(
        ((TEAL, TEAL, "visual token"), ("none", PALE, "removed"), (INK, INK, "text token"))
    ):
        y = 26 + 19 * i
        out.append(
            f'<rect x="728" y="{y}" width="{SIDE}" height="{SIDE}" rx="2" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )
        out.append(text(750, y + 11, what, 12, anchor="start"))
    return out


def main() -> None:
    """Write the image."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">',
        "<title>The stream of visual tokens, and where methods remove them</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *method(),
        *(
            square
            for (x, _, words), kept in zip(COLUMNS, survivors(), strict=True)
            for square in column(x, kept, words)
        ),
        *stages(),
        *cache(),
        *output(),
        *legend(),
        "</svg>\n",
    ]
    OUT.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
