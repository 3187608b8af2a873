"""Methods that read the encoder after steps within it: signals are those of the full tower, in
which nobody attends to what was removed, and merged tokens count as often as they have sources.
"""

from dataclasses import dataclass

import pytest
import torch

import foveate
from foveate.core import Keep, Method, Need, Reduction, Scorer, Step
from foveate.families import find_family
from foveate.signals import SIGNALS
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.vision.test_towers import CASES, TOWERS, WITH_CLASS, images_of, known, seen
from tests.vision.towers import Full

NAMES = (
    "cls_attention", "received_attention", "given_attention", "global_attention", "encoder_keys",
    "encoder_features",
)  # fmt: skip
ABOVE = 1.0


@dataclass(frozen=True)
class Reader(Scorer):
    """Reads all that the encoder gives, at every layer."""

    keep: Keep = 1.0
    positions: str | None = None
    slug, stage, needs, paper = "reader", "pre_llm", (), ""

    def steps(self, model):
        layers = tuple(range(model.vision_layers))
        tower = model.encoder
        known = [
            name
            for name in NAMES
            if (tower.class_token or not SIGNALS[name].class_token)
            and (tower.packed is None or SIGNALS[name].varlen)
        ]
        return (Step("pre_llm", needs=tuple(Need(name, layers, ABOVE) for name in known)),)

    def scores(self, tokens):
        return -tokens.index.float()


class Watched(Full):
    """The tower at full length, whose attention is noted with what was alive."""

    def __init__(self, *args):
        super().__init__(*args)
        self.maps, self.keys, self.then = [], [], []

    def attend(self, number):
        weights, keys, output = super().attend(number)
        self.maps.append(weights)
        self.keys.append(keys)
        self.then.append([[list(group) for group in groups] for groups in self.groups])
        return weights, keys, output

    def cells(self, number, picture):
        """Row that stands for a token in a layer -> all rows that went into it."""
        return {
            cell[0]: list(cell)
            for group in self.then[number][picture]
            for cell in zip(*(self.tokens[picture][token] for token in group), strict=True)
        }

    def from_global(self, number, asking, everything, cells):
        """Attention from global rows of the same segment: of the same image, frame or window."""
        mean, (allowed, _), found = self.maps[number].mean(0), self.seen(number), {}
        for row, cell in cells.items():
            here = [other for other in asking if allowed[row, other]]
            total = {
                other: mean[here][:, of].sum().item()
                for other, of in everything.items()
                if allowed[row, other]
            }
            bound = ABOVE * sum(total.values()) / len(here)
            asks = [other for other in here if total[other] > bound] or here
            found[row] = (mean[asks].sum(0) / len(asks))[cell].sum()[None]
        return found

    def signal(self, name, number, picture):
        """(rows of the image's tokens in a layer) -> a signal of each, as (C)."""
        cells, width = self.cells(number, picture), self.number // self.batch
        patches = [row for token in self.tokens[picture] for row in token]
        first, shown = picture * width, self.visible(number)
        special = [first] if self.special else []
        if name == "encoder_features":
            return {row: self.states[number][row] for row in cells}
        if name == "encoder_keys":
            return {row: self.keys[number][row].flatten() for row in cells}
        maps = self.maps[number]
        if name == "cls_attention":
            return {row: maps[:, first, cell].sum(-1) for row, cell in cells.items()}
        mean = maps.mean(0)
        if name == "given_attention":
            return {row: mean[row, patches].sum()[None] for row in cells}
        # A merged token asks once, padding never; what it receives is what its sources do.
        asking = special + [row for row, cell in cells.items() if shown[cell].any()]
        everything = {row: [row] for row in special} | cells
        if name == "global_attention":
            return self.from_global(number, asking, everything, cells)
        received = mean[asking].sum(0) / len(asking)
        return {row: received[cell].sum()[None] for row, cell in cells.items()}


def read(model, methods, run):
    """(signal, layer) -> what was collected while something runs, and passes of the encoder."""
    session = foveate.use(model, [*methods, Reader()])
    found, tags = [], session.text.tags
    tag = tags.tag

    def noted(modality, output, arguments, rows, passes, *rest):
        found.append((rows, passes))
        return tag(modality, output, arguments, rows, passes, *rest)

    tags.tag = noted
    with torch.no_grad(), session:
        run()
    return found[0]


CHOSEN = ("before", "inside", "twice", "tome", "tome-unweighted", "cls-drop")
PAIRS = [(n, c) for n in TOWERS for c in CHOSEN if c != "cls-drop" or n in WITH_CLASS]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_signals_after_a_step_are_those_of_the_masked_tower(name, case):
    methods, steps = CASES[case]
    tower, _, calls, tokens, counts = known(name)
    full = Watched(tower, calls, images_of(name, calls, tokens, counts)).run(steps)
    model, (inputs, _) = model_of(name), seen(name)
    methods = methods if isinstance(methods, list) else [methods]
    found, _ = read(model, methods, lambda: model.model(**fresh(inputs)))
    packed = find_family(model).encoder.packed is not None
    assert {signal for signal, _ in found} >= set(NAMES[1:2] + NAMES[4:])
    width = full.number // full.batch
    for (signal, number), got in found.items():
        for picture in range(len(full.tokens)):
            want = full.signal(signal, number, picture)
            for token in full.kept(picture):
                rows = full.tokens[picture][token]
                if packed:  # the mean of a token's rows; there are only patches
                    given = signal == "given_attention"
                    theirs = torch.stack([torch.ones(1) if given else want[r] for r in rows])
                    pairs = [(got[picture][:, token], theirs.mean(0))]
                else:
                    start = picture * width + full.special
                    seen_rows = [row for row in rows if full.visible(number)[row]]
                    pairs = [(got[picture][:, row - start], want[row]) for row in seen_rows]
                for mine, theirs in pairs:
                    distance = (mine - theirs).abs().max().item()
                    assert distance <= 1e-4 * max(1.0, theirs.abs().max().item()), (signal, number)


@dataclass(frozen=True)
class Ragged(Method):
    """Before layer 0, keep more of an image the brighter it is; before layer 1, few of all."""

    keep: Keep = 3
    positions: str | None = None
    slug, stage, needs, paper = "ragged", "vision", (), ""

    def steps(self, model):
        return Step("vision", 0, effects=("ragged",)), Step("vision", 1)

    def check_budget(self, steps):
        pass

    def reduce(self, tokens, count):
        if tokens.valid is not None:
            return Reduction(torch.arange(count).expand(len(tokens.index), -1))
        left = (tokens.x[..., 0].mean(1) * 1e3).long() % (tokens.count - count) + count
        order = torch.arange(int(left.max())).expand(len(left), -1)
        return Reduction(order, valid=order < left[:, None])


@pytest.mark.parametrize("name", ["llava", "llava-siglip", "internvl", "idefics3"])
def test_images_of_different_counts_do_not_see_each_others_filling(name):
    """Rows that fill up an image neither receive attention nor give any."""
    model, member = model_of(name), MEMBERS[name]()
    pixels = member.pixels(3)
    pixels = {k: v.view(-1, 1, *v.shape[2:]) if v.dim() == 5 else v for k, v in pixels.items()}
    pixels = {"pixel_values": pixels["pixel_values"]}
    together, (encoding,) = read(
        model, [Ragged()], lambda: model.model.get_image_features(**pixels, return_dict=True)
    )
    left = [len(next(iter(kept.values()))) for _, kept in encoding.survivors()]
    assert len(set(left)) > 1, "the test does not bite"
    for number in range(len(left)):
        one = pixels["pixel_values"][number : number + 1]
        alone, _ = read(
            model, [Ragged()],
            lambda one=one: model.model.get_image_features(pixel_values=one, return_dict=True),
        )  # fmt: skip
        for name, got in together.items():
            mine, theirs = got[number][..., :3], alone[name][0][..., :3]
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=str(name))
