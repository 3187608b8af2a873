"""Samples are reproducible, splits share none, evidence is where the answer is drawn."""

import json
import zipfile
from collections.abc import Sequence as Listed
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.bench.sample import SPLITS, Sample
from foveate.bench.tasks import TASKS, get_task, majority
from foveate.bench.tasks import scenes as scene_tasks
from foveate.bench.tasks.base import apart
from foveate.errors import BenchError
from foveate.tiny.scenes import Scene, draw_scene
from foveate.tiny.words import VOCABULARY

REAL = ("nlvr", "easy-vqa", "coco")
DRAWN = [name for name in TASKS if name not in REAL]
FAST = [name for name in DRAWN if name != "large-image"]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def _key(sample: Sample) -> tuple:
    pictures = []
    for picture in sample.images:
        frames = [picture] if isinstance(picture, Image.Image) else picture
        pictures.append(tuple(frame.tobytes() for frame in frames))
    return tuple(pictures), sample.turns


def test_all_promised_tasks_are_there() -> None:
    promised = (
        "attribute existence counting position relation digits words small-object in-context "
        "multi-turn video-event video-order large-image nlvr easy-vqa coco"
    )
    assert set(promised.split()) <= set(TASKS)
    assert all(name == task.name and task.summary for name, task in TASKS.items())


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_arguments_give_the_same_sample(name: str) -> None:
    one, two = (get_task(name).sample(5, difficulty=0.4, clutter=0.6) for _ in range(2))
    assert _key(one) == _key(two)
    assert one.task == name
    assert one.seed == 5


@pytest.mark.parametrize("name", FAST)
def test_no_sample_is_in_two_splits_or_twice_in_one(name: str) -> None:
    samples = [TASKS[name].sample(seed, split=split) for split in SPLITS for seed in range(12)]
    assert len({_key(sample)[0] for sample in samples}) == len(samples)


def test_splits_draw_from_ranges_that_do_not_meet() -> None:
    from foveate.bench.tasks.base import draws

    seeds = {s: [next(draws("attribute", s, n)) for n in range(200)] for s in SPLITS}
    spans = sorted((min(found), max(found)) for found in seeds.values())
    assert all(low[1] < high[0] for low, high in pairwise(spans))
    assert max(seeds["test"] + seeds["hidden"]) < 2**40 <= min(seeds["train"])


@pytest.mark.parametrize("name", FAST)
def test_guessing_scores_low_and_words_are_known(name: str) -> None:
    samples = [TASKS[name].sample(seed) for seed in range(60)]
    two = {"existence"}
    assert majority(samples) < (0.66 if name in two else 0.45)
    for sample in samples:
        for turn in sample.turns:
            assert set(turn.question.split()) <= set(VOCABULARY)
            assert turn.answer in turn.choices
            assert turn.evidence or turn.answer in ("no", "0")
            assert all(0 <= n < len(sample.images) for n in turn.images)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("knobs", [(0.0, 0.0), (1.0, 1.0)], ids=["easy", "hard"])
def test_knobs_reach_their_ends(name: str, knobs: tuple[float, float]) -> None:
    for seed in range(6):
        sample = TASKS[name].sample(seed, difficulty=knobs[0], clutter=knobs[1])
        for turn in sample.turns:
            for item in turn.evidence:
                picture = sample.images[item.image]
                frame = picture if isinstance(picture, Image.Image) else picture[item.frame]
                left, top, right, bottom = item.box
                assert 0 <= left < right <= frame.width
                assert 0 <= top < bottom <= frame.height


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Every scene that the tasks draw, with the map of who owns which pixel."""
    kept: list[Scene] = []

    def spy(*args, **kwargs) -> Scene:
        kept.append(draw_scene(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(scene_tasks, "draw_scene", spy)
    return kept


@pytest.mark.parametrize("name", [t.name for t in scene_tasks.SCENE_TASKS])
def test_evidence_boxes_hold_all_ink_of_what_is_asked_about(name: str, drawn: list[Scene]) -> None:
    for seed in range(2 if name == "large-image" else 10):
        sample = TASKS[name].sample(seed)
        owner = drawn[-1].owner
        boxes = [o.box for o in drawn[-1].objects]
        for turn in sample.turns:
            for item in turn.evidence:
                index = boxes.index(item.box)
                left, top, right, bottom = item.box
                inside = owner[top:bottom, left:right] == index
                assert inside.any()
                assert inside.sum() == (owner == index).sum()
                word = drawn[-1].objects[index]
                named = f"{turn.question} {turn.answer}".split()
                assert word.colour in named or word.kind in named


def test_second_turn_asks_about_what_the_first_does_not_show() -> None:
    for seed in range(30):
        first, second = TASKS["multi-turn"].sample(seed).turns
        a, b = first.evidence[0].box, second.evidence[0].box
        assert apart(a, b, 16)
        assert second.images == ()


def test_a_harder_image_is_larger_and_clutter_adds_objects(drawn: list[Scene]) -> None:
    task = TASKS["attribute"]
    easy, hard = (task.sample(0, difficulty=d).images[0] for d in (0.0, 1.0))
    assert (easy.width, hard.width) == (96, 160)
    counts = []
    for clutter in (0.0, 1.0):
        drawn.clear()
        for seed in range(10):
            task.sample(seed, clutter=clutter)
        counts.append(np.mean([len(scene.objects) for scene in drawn]))
    assert counts[0] + 5 < counts[1]
    assert get_task("small-object", scale=2).sample(0, difficulty=0).images[0].width == 256


def test_examples_in_context_are_given_and_only_the_last_is_asked() -> None:
    sample = TASKS["in-context"].sample(1)
    assert [turn.given for turn in sample.turns] == [True, True, False]
    assert [turn.images for turn in sample.turns] == [(0,), (1,), (2,)]
    assert [item.image for item in sample.turns[-1].evidence] == [0, 1, 2]


def test_videos_are_frames_and_order_needs_two_of_them() -> None:
    for seed in range(20):
        for name in ("video-event", "video-order"):
            (turn,), (video,) = (lambda s: (s.turns, s.images))(TASKS[name].sample(seed))
            assert isinstance(video, Listed)
            assert len(video) == 3
            frames = [item.frame for item in turn.evidence]
            assert frames == sorted(frames)
            if "after" in turn.question or "before" in turn.question:
                assert len(frames) == 2
            if turn.answer == "appears":
                assert 0 not in frames
                assert frames[-1] == 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"split": "dev"}, "split"), ({"difficulty": 2}, "difficulty"), ({"clutter": -1}, "clutter")],
)
def test_arguments_out_of_range_are_refused(wrong: dict, match: str) -> None:
    with pytest.raises(BenchError, match=match):
        TASKS["attribute"].sample(0, **wrong)


def test_unknown_tasks_are_told_with_near_matches() -> None:
    with pytest.raises(BenchError, match="did you mean counting"):
        get_task("countin")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few rows in the layout of the three data sets."""
    nlvr, easy, coco = (tmp_path / name for name in ("nlvr", "easy-vqa", "coco-cc"))
    for made in (nlvr, easy, coco / "images"):
        made.mkdir(parents=True)
    item = {"x_loc": 10, "y_loc": 20, "size": 30, "type": "square", "color": "Yellow"}
    rows = [
        {"sentence": f"s{n}", "label": "true", "identifier": f"{n}-0"}
        | {"structured_rep": [[], [item], []]}
        for n in range(3)
    ]
    Image.new("RGB", (400, 100)).save(tmp_path / "wide.png")
    for part in ("dev", "test", "hidden"):
        (nlvr / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with zipfile.ZipFile(nlvr / f"{part}-images.zip", "w") as archive:
            for n in range(3):
                archive.write(tmp_path / "wide.png", f"{part}-{n}-0-0.png")
    picture = Image.new("RGB", (64, 64), (230, 230, 240))
    picture.paste((255, 0, 0), (5, 10, 25, 40))
    picture.save(tmp_path / "shape.png")
    for part in ("train", "test"):
        (easy / f"{part}-questions.json").write_text(json.dumps([["what shape?", "circle", 0]]))
        with zipfile.ZipFile(easy / f"{part}-images.zip", "w") as archive:
            archive.write(tmp_path / "shape.png", "0.png")
    photos = [
        {"file": f"{n}.jpg", "width": 80, "height": 60, "segments": [segment]}
        for n, segment in enumerate(
            {"category": c, "isthing": 1, "bbox": [1, 2, 30, 40]}
            for c in ("dog", "cat", "owl", "dog", "apple", "bus")
        )
    ]
    for photo in photos:
        Image.new("RGB", (80, 60)).save(coco / "images" / photo["file"])
    (coco / "annotations.json").write_text(json.dumps(photos))
    return tmp_path


@pytest.mark.parametrize("name", REAL)
def test_data_sets_are_read_from_the_folder_named(name: str, folder: Path) -> None:
    for split in ("train", "test"):
        sample = get_task(name, data=folder).sample(4, split=split)
        assert sample.images[0].mode == "RGB"
        box = {"nlvr": (160, 20, 190, 50), "easy-vqa": (5, 10, 25, 40), "coco": (1, 2, 31, 42)}
        assert [item.box for item in sample.turns[0].evidence] in ([box[name]], [])
        assert sample.turns[0].evidence or sample.turns[0].answer == "no"


def test_coco_splits_share_no_photo(folder: Path) -> None:
    task = get_task("coco", data=folder)
    asked = {s: {task.sample(n, split=s).turns[0].evidence for n in range(9)} for s in SPLITS}
    assert all(asked.values())
    questions = {task.sample(n).turns[0].question for n in range(20)}
    assert questions & {"is there an apple ?", "is there an owl ?"}


@pytest.mark.parametrize("name", REAL)
def test_missing_and_damaged_files_are_named(name: str, folder: Path) -> None:
    with pytest.raises(BenchError, match="name its folder"):
        TASKS[name].sample(0)
    with pytest.raises(BenchError, match="missing"):
        get_task(name, data=folder / "nowhere").sample(0)
    for path in folder.glob("*/*.json*"):
        path.write_text('{"a": 1')
    from foveate.bench import data

    for read in (data.nlvr, data.easy_vqa, data.coco):
        read.cache_clear()
    with pytest.raises(BenchError, match="damaged"):
        get_task(name, data=folder).sample(0)


def test_easy_vqa_has_no_hidden_split(folder: Path) -> None:
    with pytest.raises(BenchError, match="no hidden split"):
        get_task("easy-vqa", data=folder).sample(0, split="hidden")


@pytest.mark.parametrize("name", REAL)
def test_the_published_files_are_read(name: str) -> None:
    if not SHARED.exists():
        pytest.skip(f"{SHARED} is not there")
    samples = [get_task(name, data=SHARED).sample(seed) for seed in range(40)]
    assert majority(samples) < 0.75
    assert len({_key(sample) for sample in samples}) > 30
