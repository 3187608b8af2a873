"""The tables on embeddings of a pruned tower, and on a linear probe of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from textwrap import fill as wrapped
from typing import Any

from _tower_tables import KEEPS, name, points, share, table

SHOWN = 0.25
Row = Mapping[str, Any]

EMBEDDED = """### Embeddings of the pruned tower

Methods inside the tower change its image embedding. Here they run on the tower alone, on the same
photographs.

- *Cosine* is that of the pruned with the unpruned embedding of the same photograph.
- *Same nearest* is the share of photographs whose nearest other photograph stays the same when the
  query alone is pruned. *Of the five nearest* is the share of those that stay. *All pruned* is the
  share whose nearest stays the same when the other photographs are pruned too.
- `random, layer k` drops as many patches as `cls-drop, layer k` at the same place, {draws} draws
  for each photograph.
- *smaller image* shows the tower a smaller image, of as many patches as `downsample` makes tokens;
  the tower's positions are interpolated.
- `biformer`, `fastvggt` and `toc3d` remove nothing. They compute less of all patches, here with
  their defaults, so no budget is theirs.
"""

PROBE = """### A linear probe of the pruned tower

What an encoder's own task loses: {photographs} test photographs of clothes of {classes} kinds
([CC0](https://github.com/alexeygrigorev/clothing-dataset-small)), of which the tower has seen the
square in the middle. A logistic regression on the tower's embeddings of {trained} other photographs
learns the kinds with all tokens; it is not trained anew for any method, so that only the tower is
pruned. *over all* is the difference to all tokens on the same photographs, in points. Retrieval is
as above, among the test photographs; `random` is one draw for each. `pixelprune`'s thresholds are
set on photographs of the training part. The tower computes in bfloat16 here.

{compared}
"""

LEARNT = """### What the tower itself loses

- **Early, the class token is a worse guide than chance.** Within layer 3, to a quarter, `cls-drop`
  leaves an accuracy of {accuracy[cls-drop_3 0.25]}. That is {chance[cls-drop_3 0.25]} points
  against a random drop at the same place, and of the five nearest COCO photographs
  {five[cls-drop_3 0.25]} points, although it keeps more of the objects there. Within layer 1, its
  default, it is {chance[cls-drop_1 0.25]} points of accuracy; to a half, {chance[cls-drop_1 0.5]}.
  What is dropped early is missing in every layer after it, so kept area is not all.
- **Late, a quarter is enough.** Within layer 9 the accuracy is {accuracy[cls-drop_9 0.25]}, as at
  random ({chance[cls-drop_9 0.25]} points), and {five[cls-drop_9 0.25]} points more of the five
  nearest COCO photographs stay. On layer 6 the two sets disagree. A late drop saves less.
- **Methods that cut a little in many layers lose least.** At a quarter, the accuracy of `flowcut`,
  `tome` and `gtp-vit` differs from that of all tokens by {whole[flowcut 0.25]},
  {whole[tome 0.25]} and {whole[gtp-vit 0.25]} points. At a sixteenth, `gtp-vit` still has
  {accuracy[gtp-vit 0.0625]}, and `tome` {accuracy[tome 0.0625]}, although `tome` loses the fewest
  objects there.
- **A smaller image is no substitute**: {accuracy[smaller_image 0.25]} at a quarter of the patches,
  and less than a sixth below that. This tower's positions were not trained for such grids.
- **What removes nothing is not harmless.** With their defaults, `biformer`, `fastvggt` and `toc3d`
  have {accuracy[biformer 1.0]}, {accuracy[fastvggt 1.0]} and {accuracy[toc3d 1.0]}. They are
  published for models that were trained with them, or for another kind of model.

An interval of no width says that no photograph changed, not that none would; with {photographs}
photographs, changes of up to three in a hundred can be missed. The head is trained on all tokens.
One that is trained on a method's own embeddings, or a tower that
is, may lose less.
"""


class Figures:
    """Lets a template ask for a figure: `[tome 0.25]`; `_3` is layer 3.

    Args:
        rows: of a table.
        show: writes a row's figure.
    """

    def __init__(self, rows: Sequence[Row], show: Callable[[Row], str]) -> None:
        self.rows = {(row["method"], row["keep"]): row for row in rows}
        self.show = show

    def __getitem__(self, words: str) -> str:
        method, keep = words.split()
        name = re.sub(r"_(\d+)$", r", layer \1", method).replace("_", " ")
        return self.show(self.rows[name, float(keep)])


def sorted_at(rows: Sequence[Row], keep: float, key: str) -> list[Row]:
    """The rows of a budget, and those that remove nothing, the best first."""
    found = [row for row in rows if row["keep"] in (keep, 1.0) and row["method"] != "all tokens"]
    return sorted(found, key=lambda row: -row[key]["mean"])


def called(row: Row) -> str:
    """A method, and whether it removes nothing."""
    return name(row["method"]) + (", removes nothing" if row["keep"] == 1.0 else "")


def cosine(of: Mapping[str, float]) -> str:
    """A cosine with its interval."""
    return "{mean:.3f} ({low:.3f} to {high:.3f})".format(**of)


def agreeing(rows: Sequence[Row]) -> str:
    """Cosine and neighbours at one budget."""
    head = ["method", "cosine", "same nearest", "of the five nearest", "all pruned"]
    return table(head, [
        [called(r), cosine(r["cosine"]), *(share(r[k], 0) for k in ("nearest", "five", "indexed"))]
        for r in sorted_at(rows, SHOWN, "five")
    ])  # fmt: skip


def at_budgets(rows: Sequence[Row], keys: tuple[str, str]) -> str:
    """Two measures at each budget, in per cent."""
    cells = {(row["method"], row["keep"]): row for row in rows}

    def cell(row: Row | None) -> str:
        return " / ".join(f"{100 * row[key]['mean']:.0f}" for key in keys) if row else ""

    order = [row["method"] for row in sorted_at(rows, SHOWN, keys[0]) if row["keep"] < 1]
    return table(["method", *(f"keep {keep:g}" for keep in KEEPS)], [
        [name(method), *(cell(cells.get((method, keep))) for keep in KEEPS)] for method in order
    ])  # fmt: skip


def probed(rows: Sequence[Row]) -> str:
    """Accuracy and neighbours at one budget."""
    head = ["method", "accuracy", "over all", "same nearest", "of the five nearest", "all pruned"]
    (whole,) = (row for row in rows if row["method"] == "all tokens")
    return table(head, [
        ["all tokens", share(whole["accuracy"]), *[""] * 4],
        *(
            [called(r), share(r["accuracy"]), points(r["over all"]),
             *(share(r[key], 0) for key in ("nearest", "five", "indexed"))]
            for r in sorted_at(rows, SHOWN, "accuracy")
        ),
    ])  # fmt: skip


def over_chance(rows: Sequence[Row], key: str) -> str:
    """What `cls-drop` gains over a random drop at the same place, in points."""
    found = {(r["method"], r["keep"]): r["over random"] for r in rows if "over random" in r}
    methods = list(dict.fromkeys(method for method, _ in found))
    return table(["", *(f"keep {keep:g}" for keep in KEEPS)], [
        [name(m), *(points(found[m, k][key]) if (m, k) in found else "" for k in KEEPS)]
        for m in methods
    ])  # fmt: skip


def embedded(result: Mapping[str, Any]) -> list[str]:
    """The sections, as far as they were measured."""
    parts = []
    if rows := result["embeddings"]:
        parts += [
            EMBEDDED.format(draws=result["sizes"]["draws"]), f"At keep = {SHOWN}:\n",
            agreeing(rows),
            "Of the five nearest / same nearest, in per cent, at each budget:\n",
            at_budgets(rows, ("five", "nearest")),
            "`cls-drop` minus `random` at the same place, of the five nearest, in points:\n",
            over_chance(rows, "five"),
        ]  # fmt: skip
    if probe := result["probe"]:
        cosines = ", ".join(
            f"{name(method)} {of['mean']:.4f} ({of['least']:.4f})"
            for method, of in probe["bfloat16"]["cosine"].items()
        )
        cut = f" Of {probe['of']} test photographs, these were done in time."
        compared = (
            f"At keep = {SHOWN}, embeddings of {probe['bfloat16']['images']} photographs have "
            f"these cosines with those in float32, mean (least): {cosines}. Rounding makes "
            "`tome` merge other patches of some images."
            f"{cut if probe['photographs'] < probe['of'] else ''}"
        )
        rows = probe["rows"]
        parts += [
            PROBE.format(
                photographs=probe["photographs"], classes=probe["classes"],
                trained=probe["trained on"], compared=wrapped(compared, 100),
            ),
            f"At keep = {SHOWN}:\n", probed(rows),
            "Accuracy / same nearest, in per cent, at each budget:\n",
            at_budgets(rows, ("accuracy", "nearest")),
            "`cls-drop` minus `random` at the same place, accuracy, in points:\n",
            over_chance(rows, "accuracy"),
            LEARNT.format(
                photographs=probe["photographs"],
                accuracy=Figures(rows, lambda row: f"{100 * row['accuracy']['mean']:.0f} %"),
                chance=Figures(rows, lambda row: points(row["over random"]["accuracy"], 0)),
                whole=Figures(rows, lambda row: points(row["over all"], 0)),
                five=Figures(
                    result["embeddings"], lambda row: points(row["over random"]["five"], 0)
                ),
            ),
        ]  # fmt: skip
    return parts
