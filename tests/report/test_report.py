"""A report says what the record says, in a dict, in JSON and as a table."""

import dataclasses
import json
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core.budget import per_request
from foveate.measure import flops
from foveate.measure.shapes import TextShape
from foveate.measure.units import human_bytes, human_flops
from foveate.methods import FastV, PyramidDrop
from foveate.record.record import ImageRecord, Record
from foveate.report.report import Report
from foveate.report.tables import layer_ranges
from tests.records import CONFIG, FakeFamily, image, pyramid_record, text_record
from tests.tinies import prompts, tiny_llava

F32 = torch.float32


@pytest.fixture
def report() -> Report:
    return Report.of(pyramid_record(), FakeFamily(), [PyramidDrop()], F32)


def test_counts_of_images_and_layers(report):
    assert report["methods"] == [
        {
            "method": "pyramiddrop",
            "layers": None,
            "keep": [0.5, 0.25, 0.125],
            "positions": "renumbered",
        }
    ]
    after = {"llm:1": 8, "llm:2": 4, "llm:3": 2}
    assert report["images"][1].items() >= {
        "row": 1, "grid": [4, 4], "tokens": 16, "after": after
    }.items()  # fmt: skip
    assert [layer["visual_tokens"] for layer in report["layers"]] == [
        [16, 16],
        [8, 8],
        [4, 4],
        [2, 2],
    ]
    assert report["layers"][3]["tokens"] == [11, 7]


def test_kept_tokens_are_listed_with_their_boxes(report):
    assert report.kept[1]["llm:3"] == [
        {"index": 2, "box": [0.5, 0.0, 0.75, 0.25]},
        {"index": 7, "box": [0.75, 0.25, 1.0, 0.5]},
    ]
    assert Report(json.loads(report.to_json())).kept == report.kept
    assert len(report.to_json().splitlines()) < 250, "a box is one line"


def test_tokens_of_a_video_have_a_frame_and_newlines_no_box():
    """Two frames of two tokens and a newline."""
    video = ImageRecord(0, 5, (1, 2), {"pre_llm": torch.tensor([1, 2, 4])}, frames=2)
    report = Report.of(
        Record(1, [9], [video], [[7]] * 4, [7] * 4), FakeFamily(), [PyramidDrop()], F32
    )
    assert report.kept[0]["pre_llm"] == [
        {"index": 1, "box": [0.5, 0.0, 1.0, 1.0], "frame": 0},
        {"index": 2, "box": [0.0, 0.0, 0.5, 1.0], "frame": 1},
        {"index": 4, "box": None, "frame": 1},
    ]
    assert (report["images"][0]["grid"], report["images"][0]["frames"]) == ([1, 2], 2)
    assert re.search(r"0 +0 +2x1x2 +5 ", str(report)), "frames, height and width"
    assert json.loads(report.to_json()) == report


def test_flops_are_the_parts_added_up(report):
    selection = sum(flops.text_attention_flops(CONFIG, n) for n in (25, 21, 17, 13, 13, 9))
    work = report["flops"]
    assert work["vision"] is None
    assert "not counted" in report["notes"][-1]
    assert work["selection"] == selection
    assert work["before"] == flops.prefill_flops(CONFIG, [[25, 21]] * 4)
    now = flops.prefill_flops(CONFIG, pyramid_record().layer_tokens)
    assert work["after"] == selection + now
    assert work["ratio"] == work["after"] / work["before"]
    assert work["prefill"] == {"before": work["before"], "after": now}
    assert sum(work["layers"]["after"]) == now - flops.head_flops(TextShape.of(CONFIG), 2)
    one = 2 * flops.decode_flops(CONFIG, [26, 18, 14, 12])
    assert work["decode"]["after"] == one


def test_kv_bytes_are_slots_times_width(report):
    # 2 rows x (keys and values) x 2 heads x 12 wide x 4 bytes
    per_slot = 2 * 2 * 2 * 12 * 4
    assert report["kv_bytes"]["after"] == (25 + 17 + 13 + 11) * per_slot
    assert report["kv_bytes"]["before"] == 4 * 25 * per_slot


def test_half_precision_halves_the_cache(report):
    half = Report.of(pyramid_record(), FakeFamily(), [PyramidDrop()], torch.float16)
    assert 2 * half["kv_bytes"]["after"] == report["kv_bytes"]["after"]
    assert half["dtype"] == "float16"


def test_earlier_turns_count_on_both_sides():
    record = pyramid_record()
    record.cache_slots[:] = [n + 30 for n in record.cache_slots]
    bytes_ = Report.of(record, FakeFamily(), [PyramidDrop()], F32)["kv_bytes"]
    assert bytes_["before"] == 4 * 55 * 384
    assert bytes_["after"] == (55 + 47 + 43 + 41) * 384


def test_without_a_cache_there_are_no_bytes():
    record = pyramid_record()
    record.cache_slots.clear()
    report = Report.of(record, FakeFamily(), [PyramidDrop()], F32)
    assert report["kv_bytes"] == {"before": 0, "after": 0, "ratio": 1.0}
    assert "KV cache" not in str(report)


@pytest.mark.parametrize(
    "method", [PyramidDrop(), FastV(layer=1), FastV(keep=per_request([0.5, 3]))], ids=str
)
def test_json_round_trips(method, tmp_path):
    report = Report.of(pyramid_record(), FakeFamily(), [method], F32)
    path = tmp_path / "report.json"
    text = report.to_json(path)
    assert json.loads(text) == report
    assert json.loads(path.read_text()) == dict(report)


def test_table_shows_every_number_once(report):
    text = str(report)
    assert "pyramiddrop" in text
    assert "keep=[0.5, 0.25, 0.125]" in text
    assert "renumbered" in text
    work, memory = report["flops"], report["kv_bytes"]
    assert text.count(human_flops(work["after"], work["before"])) == 1
    assert text.count(human_bytes(memory["after"], memory["before"])) == 1
    assert "from layer 2 on" in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_table_of_a_large_batch_stays_narrow():
    record = Record(
        rows=40,
        prompt_tokens=list(range(30, 70)),
        images=[image(row, ("llm:2", [0])) for row in range(40)],
        layer_tokens=[list(range(30, 70))] * 2 + [list(range(15, 55))] * 2,
        cache_slots=[69, 69, 54, 54],
    )
    text = str(Report.of(record, FakeFamily(), [FastV()], F32))
    assert max(map(len, text.splitlines())) <= 100
    assert "14-53" in text


def test_image_free_prompt_says_so_and_saves_nothing():
    report = Report.of(text_record(), FakeFamily(), [PyramidDrop()], F32)
    assert report["flops"]["ratio"] == 1.0
    assert report["flops"]["selection"] == 0
    assert report["kv_bytes"]["ratio"] == 1.0
    assert "note: no image in the prompt: nothing was removed" in str(report)


def test_record_in_which_nothing_acted_needs_no_layers():
    whole = Report.of(text_record(), FakeFamily(), [PyramidDrop()], F32)
    bare = dataclasses.replace(text_record(), layer_tokens=[], cache_slots=[])
    report = Report.of(bare, FakeFamily(), [PyramidDrop()], F32)
    assert report["layers"] == whole["layers"]
    assert report["flops"] == whole["flops"]


def test_method_may_add_a_note():
    @dataclasses.dataclass(frozen=True)
    class Noted(FastV):
        note = "what it did"

    assert "note: fastv: what it did" in str(Report.of(text_record(), FakeFamily(), [Noted()], F32))


def test_empty_report_says_that_nothing_ran():
    report = Report.empty(FakeFamily(), [FastV(layer=2)])
    assert "no forward has run yet" in str(report)
    assert "fastv (layer=2, keep=0.5, positions=original) on llava" in str(report)
    assert json.loads(report.to_json()) == report


def test_equal_layers_are_named_as_ranges():
    assert layer_ranges([5, 5, 3, 2, 2, 2]) == [("0-1", 0), ("2", 2), ("3-5", 3)]


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (human_flops(1.25e9), "1.25 GFLOPs"),
        (human_flops(12), "12 FLOPs"),
        (human_bytes(2048), "2.00 KiB"),
        (human_flops(5e8, like=2e9), "0.50 GFLOPs"),
        (human_bytes(1000), "1000 B"),
        (human_bytes(3.5 * 2**20), "3.50 MiB"),
    ],
)
def test_units(got, want):
    assert got == want


@pytest.mark.parametrize("text", ["llama", "llama-gqa", "qwen2"])
@pytest.mark.parametrize(
    "method", [PyramidDrop(layers=(2, 3, 4)), FastV(layer=2, keep=0.25)], ids=lambda m: m.slug
)
def test_reported_flops_are_the_ones_torch_counts(method, text):
    """With the dense attention of the eager kernel; the causal share is left to the kernel."""
    model = tiny_llava(text, attention="eager")
    count = FlopCounterMode(display=False)
    with foveate.use(model, method) as run, torch.no_grad(), count:
        model(**prompts([(3, 4)]), logits_to_keep=1)
    work, tokens = run.report()["flops"], run.record.layer_tokens
    dense = flops.prefill_flops(model.config, tokens, causal=False)
    causal = flops.prefill_flops(model.config, tokens)
    assert count.get_total_flops() == work["after"] + dense - causal


@pytest.mark.parametrize("rows", [[(3, 4)], [(3, 4), (2, 2, 1), (5,)]], ids=["one", "ragged"])
def test_reported_bytes_are_those_of_the_cache(rows):
    model = tiny_llava("llama-gqa")
    inputs = prompts(rows)
    whole = model(**inputs).past_key_values
    with foveate.use(model, PyramidDrop(layers=(1, 3, 4))) as run:
        pruned = model(**inputs).past_key_values
    assert run.report()["kv_bytes"]["before"] == size(whole)
    assert run.report()["kv_bytes"]["after"] == size(pruned)


def size(cache) -> int:
    """Bytes of all keys and values."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def idle(llava, methods):
    with foveate.use(llava, methods) as run:
        llava(**prompts([[5, 7]]))
    return [note for note in run.report()["notes"] if "removed nothing" in note]


@pytest.mark.parametrize("name", ["evs", "dycoke", "fastvid", "holitom", "prunevid"])
def test_methods_for_videos_say_that_they_leave_images(llava, name):
    (note,) = idle(llava, name)
    assert note.startswith(f"{name} removed nothing: it compares the frames of a video")


@pytest.mark.parametrize("keep", [1.0, 36, 10**6])
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "divprune", "visionzip", "tome"])
def test_a_keep_that_removes_nothing_is_named(llava, name, keep):
    (note,) = idle(llava, {"method": name, "keep": keep})
    assert note == f"{name} removed nothing: its keep={keep} leaves all tokens of these images"
    assert not idle(llava, {"method": name, "keep": 0.6})


def test_only_the_idle_one_of_several_methods_is_named(llava):
    both = [foveate.methods.DivPrune(keep=9), foveate.methods.FastV(keep=9)]
    assert [note.split()[0] for note in idle(llava, both)] == ["fastv"]


@pytest.mark.parametrize(("keep", "budget"), [(0.2, 3), (4, 4), (5, None)])
def test_a_video_whose_first_frame_exceeds_its_budget_is_named(keep, budget):
    """Four frames of 2 x 2 tokens and a newline; a share of 17 tokens is truncated."""
    left = {"pre_llm": torch.tensor([0, 1, 2, 3, 16])}
    images = [image(0, ("pre_llm", [0, 1])), ImageRecord(0, 17, (2, 2), left, frames=4)]
    record = Record(1, [40], images, [[12]] * 4, [12] * 4)
    notes = Report.of(record, FakeFamily(), [foveate.methods.EVS(keep=keep)], F32)["notes"]
    said = (
        f"evs keeps 5 tokens of video 0, where its keep would leave {budget}: the 4 of the first "
        "frame always stay"
    )
    assert [note for note in notes if "keeps" in note] == ([said] if budget else [])
