"""What becomes of a cell: agreed, refused, or a fault."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.errors import FoveateError
from tests.conformance.zoo.member import fresh
from tests.fuzz import oracle
from tests.fuzz.cell import Cell
from tests.fuzz.cuts import cuts_of
from tests.fuzz.models import model_of
from tests.fuzz.oracle import Cut, Disagreement
from tests.fuzz.play import play
from tests.fuzz.scene import Claim, Scene, Told, session

TOLERANCE = 1e-4
AGREED, REFUSED, DISAGREED, CRASHED, BARE = "agreed", "refused", "disagreed", "crashed", "bare"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        status: `agreed`; `refused` with a message of foveate's; `disagreed` with the oracle;
            `crashed` with another error; `bare` where the model without foveate does the same.
        detail: the message.
        distance: the largest from the oracle.
        bite: distance from the bare model's answer, which says that something was removed.
        ties: rankings that could have gone either way.
    """

    status: str
    detail: str = ""
    distance: float = 0.0
    bite: float = 0.0
    ties: int = 0


def judge(cell: Cell) -> Outcome:
    """Play a cell and compare it with the oracle."""
    with torch.no_grad():
        scene = Scene.of(cell)
        try:
            with session(scene) as attached:
                claims = play(attached)
                if cell.again:
                    claims += play(attached)
        except FoveateError as error:
            return Outcome(REFUSED, str(error))
        except Exception as error:
            why = bare(scene)
            if why:
                return Outcome(BARE, why)
            return Outcome(CRASHED, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        try:
            return _compared(attached, claims)
        except Disagreement as error:
            why = bare(scene)
            return Outcome(BARE, why) if why else Outcome(DISAGREED, str(error))
        except Exception as error:  # the oracle cannot follow
            return Outcome(CRASHED, f"oracle: {error}\n{traceback.format_exc()}")


def _compared(scene: Scene, claims: list[Claim]) -> Outcome:
    far = bite = 0.0
    ties, alive = 0, []
    for claim in claims:
        row = _row(scene, claim, cuts_of(scene.cell, claim))
        if claim.told and not bite:
            plain = _row(scene, claim, [])
            bite = (row.logits[-1] - plain.logits[-1]).abs().max().item()
        ties += row.ties
        distance = claim.check(row)
        if not distance <= TOLERANCE:
            raise Disagreement(f"row {claim.row}: {distance:.1e} from the oracle")
        far = max(far, distance)
        alive.append([int(a.sum()) for a in row.alive])
    _slots(scene, alive[-len(scene.prompt.rows) :])
    return Outcome(AGREED, distance=far, bite=bite, ties=ties)


def _row(scene: Scene, claim: Claim, cuts: list[Cut]) -> oracle.Row:
    """The oracle's row of a claim."""
    member, model = claim.prompt.member, model_of(scene.cell.shape, "eager")
    merged = _merged(scene, claim) if cuts else None
    inputs = fresh(claim.prompt.alone(claim.row, claim.more, merged))
    text = member.text(model)
    model.train(claim.training)
    try:
        return oracle.run(
            model, text, lambda h, p, layer: member.rotary(text, h, p, layer), inputs, cuts,
            claim.unseen,
        )  # fmt: skip
    finally:
        model.eval()


# -- merged features


def _merged(scene: Scene, claim: Claim) -> Any:
    """What a row's images look like to the language model where a method merges their tokens; what
    is removed holds zeros. `None` where none does.
    """
    cell, owned = scene.cell, claim.prompt.owned[claim.row]
    if not owned:
        return None
    if cell.methods[0].slug == "downsample":
        return _pooled(scene, claim, owned)
    merging = [chosen for chosen in cell.methods if chosen.kind.where == "encoder"]
    if not merging:
        return None
    with foveate.use(scene.model, [chosen.build() for chosen in merging]):
        output = _encoded(scene, claim, owned)
    return _changed(output, lambda feature: feature.nan_to_num(0.0))


def _pooled(scene: Scene, claim: Claim, owned: list[int]) -> Any:
    """Features of images whose grids were averaged in cells, which cells the engine says."""
    with foveate.use(scene.model, scene.cell.methods[0].build()):
        pooled = _encoded(scene, claim, owned)
    output = _encoded(scene, claim, owned)
    flat = all(told.grid[0] * told.grid[1] == told.total for told in claim.told)
    if not flat:  # newlines, frames: what a row alone gets
        return _changed(pooled, lambda feature: feature.nan_to_num(0.0))
    told = iter(claim.told * 9)  # as many times as there are planes

    def averaged(feature: Tensor) -> Tensor:
        """Of one image, or of several tiles after one another."""
        made: list[Tensor] = []
        while (done := sum(map(len, made))) < len(feature):
            tile = next(told)
            made.append(_averaged(feature[done : done + tile.total], tile))
        return torch.cat(made)

    return _changed(output, averaged)


def _averaged(feature: Tensor, told: Told) -> Tensor:
    """(V, D) features with the mean of a cell where the engine has kept a token."""
    kept, (height, width) = told.kept["pre_llm"], told.grid
    rows = len(set((kept // width).tolist()))
    grid = feature.view(1, height, width, -1).movedim(-1, 1)
    cells = F.adaptive_avg_pool2d(grid, (rows, len(kept) // rows)).flatten(2)[0].T
    return torch.zeros_like(feature).index_copy(0, kept, cells)


def _encoded(scene: Scene, claim: Claim, owned: list[int]) -> Any:
    images, member = claim.prompt.images, claim.prompt.member
    given = images.given(owned[0], owned[-1] + 1)
    if images.pixels is None:
        return given["mm_encoder_outputs"][member.modality]
    encode = getattr(scene.model.model, f"get_{member.modality}_features")
    return encode(**given, return_dict=True)


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same container with other features, in each of its planes."""
    output = fresh(output)
    for name in ("pooler_output", "deepstack_features"):
        if output.get(name) is not None:
            output[name] = _each(output[name], change)
    return output


def _each(features: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(features, Tensor) and features.dim() == 2:
        return change(features)
    made = [_each(one, change) for one in features]
    return torch.stack(made) if isinstance(features, Tensor) else made


def _slots(scene: Scene, alive: list[list[int]]) -> None:
    """The cache holds what is alive, and no more, in each layer.

    Raises:
        Disagreement: it does not.
    """
    if scene.slots is None or scene.cell.mode == "chunked":
        return
    held, more = scene.slots
    width = max(len(ids) for ids in scene.prompt.rows)
    lengths = [len(ids) for ids in scene.prompt.rows]
    for layer, slots in enumerate(held):
        now = [row[layer] for row in alive]
        nothing = all(n == length + more for n, length in zip(now, lengths, strict=True))
        want = width + more if nothing else max(now)
        if slots not in (-1, want):
            raise Disagreement(f"the cache of layer {layer} has {slots} slots, not {want}")


def bare(scene: Scene) -> str:
    """What is wrong with a cell without foveate; empty if nothing is."""
    plain = Scene(scene.cell, scene.model, scene.prompt)
    try:
        claims = play(plain)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    for claim in claims:
        distance = claim.check(_row(plain, claim.plain, []))
        if not distance <= TOLERANCE:
            return f"{distance:.1e} between the bare model and itself at full length"
    return ""
