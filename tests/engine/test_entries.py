"""Every step has an entry of its own in records, reports and drawings, in stream order."""

import json
import pickle
from dataclasses import dataclass

import numpy
import pytest
import torch
from PIL import Image

import foveate
from foveate.bench.prompt import Shown
from foveate.bench.recall import first_layer, seen_images
from foveate.core import Keep, Need, Scorer, Step
from foveate.core import Step as AnyStep
from foveate.core.step import entries, site_of
from foveate.engine.planning import make_plan
from foveate.families import find_family
from foveate.measure.planned import planned
from foveate.methods import CDPruner, DivPrune, FastV, PyramidDrop, ToMe, Uniform
from foveate.record.record import site_name
from tests.methods_for_tests import Listed
from tests.tinies import PATCHES, prompts, tiny_llava


@dataclass(frozen=True)
class Twice(Scorer):
    """Two steps of one method before one layer: by position, then by attention."""

    layer: int = 3
    keep: Keep = (0.5, 0.25)
    positions: str = "original"
    slug, stage, needs, paper = "twice", "llm", ("text_attention",), ""
    step_count = 2

    def steps(self, model):
        need = Need("text_attention", (self.layer,))
        return Step("llm", self.layer), Step("llm", self.layer, (need,))

    def scores(self, tokens):
        if not tokens.number:
            return -tokens.index.float()
        return tokens.signal("text_attention")[:, 0].mean(1)


def pyramid(layer, keep):
    return PyramidDrop(layers=(layer,), keep=(keep,), positions="original")


STREAMS = {
    "llm": ([FastV(layer=3, keep=18), pyramid(3, 6)], {"llm:3#1": 18, "llm:3": 6}),
    "llm, three": (
        [pyramid(2, 30), FastV(layer=3, keep=18), pyramid(3, 6), pyramid(3, 2)],
        {"llm:2": 30, "llm:3#1": 18, "llm:3#2": 6, "llm:3": 2},
    ),
    "llm, the second removes nothing": (
        [pyramid(3, 6), FastV(layer=3, keep=18)],
        {"llm:3#1": 6, "llm:3": 6},
    ),
    "between steps of another": (
        [PyramidDrop((1, 3, 5), (24, 12, 2), "original"), FastV(layer=3, keep=8)],
        {"llm:1": 24, "llm:3#1": 12, "llm:3": 8, "llm:5": 2},
    ),
    "pre_llm": ([DivPrune(keep=20), CDPruner(keep=7)], {"pre_llm#1": 20, "pre_llm": 7}),
    "pre_llm, then llm": (
        [DivPrune(keep=20), Uniform(keep=20), CDPruner(keep=7), FastV(layer=1, keep=3)],
        {"pre_llm#1": 20, "pre_llm#2": 20, "pre_llm": 7, "llm:1": 3},
    ),
    "vision": ([Listed(1, 20), Listed(1, 9)], {"vision:1#1": 20, "vision:1": 9}),
    "vision, before a layer and within": (
        [Listed(1, 30), ToMe(r=(0, 4, 0)), DivPrune(keep=5)],
        {"vision:1#1": 30, "vision:1": 26, "pre_llm": 5},
    ),
    "one method": ([Twice()], {"llm:3#1": 18, "llm:3": 9}),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.mark.parametrize("name", STREAMS)
def test_every_step_has_an_entry_in_stream_order(model, name):
    """In a batch too: of two images in a row, and one in another."""
    methods, want = STREAMS[name]
    with torch.no_grad(), foveate.use(model, methods) as run:
        model(**prompts([[4, 5, 3], [6, 2]]))
    assert [{e: len(index) for e, index in kept.items()} for kept in run.kept] == [want] * 3
    for kept in run.kept:
        alive = torch.arange(PATCHES)
        for index in kept.values():
            assert torch.equal(index, index.unique())
            assert torch.isin(index, alive).all()
            alive = index
    report = run.report()
    assert [image["after"] for image in json.loads(report.to_json())["images"]] == [want] * 3
    assert [list(image) for image in report.kept] == [list(want)] * 3
    for image in report["images"]:
        assert {e: len(index) for e, index in image["kept"].items()} == want


@pytest.mark.parametrize("name", STREAMS)
def test_records_read_the_last_entry_at_a_layer(model, name):
    methods, want = STREAMS[name]
    with torch.no_grad(), foveate.use(model, methods) as run:
        cache = model(**prompts([[4, 5]]), use_cache=True).past_key_values
    image = pickle.loads(pickle.dumps(run.record.images[0]))
    text = run.record.prompt_tokens[0] - PATCHES
    seen = [layer["visual_tokens"] for layer in run.report()["layers"]]
    assert [image.surviving(n) for n in range(6)] == [row[0] for row in seen]
    assert [layer.keys.shape[2] - text for layer in cache.layers] == [row[0] for row in seen]
    assert [image.before(e) for e in want] == [PATCHES, *list(want.values())[:-1]]
    shown = Shown(0, None, 1, Image.new("RGB", (48, 48)))
    lived = seen_images(run.record, [[shown]], 6)[0][0].lifetime()
    first = first_layer(next(iter(want)))
    total = sum(image.surviving(n) for n in range(first, 6))
    assert float(lived.sum()) * (6 - first) == pytest.approx(total)


@pytest.mark.parametrize("name", STREAMS)
def test_plans_without_a_run_name_the_same_entries(model, name):
    methods, want = STREAMS[name]
    family = find_family(model)
    pixels = {"pixel_values": torch.empty(1, 3, 48, 48, device="meta")}
    record = planned(family, make_plan(family, methods), pixels)
    assert {e: len(index) for e, index in record.images[0].kept.items()} == want


def test_drawings_show_a_panel_for_every_step(model):
    picture = Image.new("RGB", (48, 48), "red")
    inputs = prompts([[4, 5]])
    with torch.no_grad(), foveate.use(model, [FastV(layer=3, keep=18), pyramid(3, 6)]) as run:
        model(**inputs)
        (both,) = run.show(picture)
    with torch.no_grad(), foveate.use(model, FastV(layer=3, keep=18)) as run:
        model(**inputs)
        (first,) = run.show(picture)
    panels = round(first.width / 2)
    assert panels * 2.5 < both.width
    height = first.height - 80  # without captions
    same = numpy.asarray(both)[:height, : first.width - 20]
    assert numpy.array_equal(same, numpy.asarray(first)[:height, : first.width - 20])


def test_reports_head_every_step(model):
    with torch.no_grad(), foveate.use(model, [FastV(layer=3, keep=18), pyramid(3, 6)]) as run:
        model(**prompts([[4, 5]]))
    text = str(run.report())
    assert "from layer 3 on, step 1" in " ".join(text.split())
    with torch.no_grad(), foveate.use(model, [Listed(1, 20), Listed(1, 9)]) as run:
        model(**prompts([[4, 5]]))
    assert "in encoder layer 1" in " ".join(str(run.report()).split())


def test_names_of_entries_say_where_they_are():
    steps = [AnyStep("vision", 1), AnyStep("vision", 1, inside=True), AnyStep("pre_llm")]
    steps += [AnyStep("llm", 8)] * 3
    names = entries(steps)
    assert names == ["vision:1#1", "vision:1", "pre_llm", "llm:8#1", "llm:8#2", "llm:8"]
    assert [site_of(name)[:2] for name in names] == [(s.stage, s.layer) for s in steps]
    assert [site_of(name)[2] for name in names] == [1, 0, 0, 1, 2, 0]
    assert site_name("llm:8#2") == "from layer 8 on, step 2"
    assert site_name("pre_llm#1") == "before the LLM, step 1"
    assert site_name("vision:4") == "in encoder layer 4"
