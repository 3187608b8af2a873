"""Scenes are deterministic, their boxes tight, and their answers true."""

import numpy as np
import pytest
from PIL import Image

from foveate.tiny import Scene, SceneObject, draw_scene
from foveate.tiny.questions import ANSWERS, KINDS_OF_QUESTION, PER_KIND
from foveate.tiny.words import COLOURS, KINDS, RELATIONS, SHAPES, VOCABULARY

SEEDS = range(500, 620)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_same_seed_same_scene(photo: Image.Image) -> None:
    for background in ("texture", photo):
        one, two = draw_scene(3, background=background), draw_scene(3, background=background)
        assert one.image.tobytes() == two.image.tobytes()
        assert one.objects == two.objects
        assert one.questions == two.questions
    assert draw_scene(3).image.tobytes() != draw_scene(4).image.tobytes()


def test_the_background_does_not_move_the_objects(photo: Image.Image) -> None:
    """Different pixels behind the same cast are still a fair image of the listed objects."""
    scene = draw_scene(5, background=photo)
    assert 6 <= len(scene.objects) <= 14
    assert scene.image.size == (128, 128)


@pytest.mark.parametrize("size", [96, 160])
def test_size_and_number_of_objects_can_be_chosen(size: int) -> None:
    scene = draw_scene(1, objects=(2, 3), size=size)
    assert scene.image.size == (size, size)
    assert 2 <= len(scene.objects) <= 3
    assert scene.owner.shape == (size, size)


def test_impossible_numbers_of_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="fewest"):
        draw_scene(1, objects=(5, 2))


def test_boxes_are_exactly_the_pixels_drawn() -> None:
    """Inside the canvas, around all ink, and clear of every other object."""
    for seed in range(20):
        scene = draw_scene(seed)
        for index, o in enumerate(scene.objects):
            left, top, right, bottom = o.box
            assert 0 <= left < right <= 128
            assert 0 <= top < bottom <= 128
            rows, columns = np.nonzero(scene.owner == index)
            assert top <= rows.min() <= top + 2
            assert bottom - 3 <= rows.max() < bottom
            assert left <= columns.min() <= left + 2
            assert right - 3 <= columns.max() < right


def test_pixels_show_the_colour_that_is_listed() -> None:
    for seed in range(20):
        scene = draw_scene(seed)
        pixels = np.asarray(scene.image, float)
        for index, o in enumerate(scene.objects):
            ink = pixels[scene.owner == index]
            brightest = ink[np.abs(ink - COLOURS[o.colour]).sum(1).argmin()]
            assert np.abs(brightest - COLOURS[o.colour]).max() <= 20


def test_nothing_is_drawn_outside_the_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted canvas and bare background differ only inside boxes."""
    from foveate.tiny import scenes as module

    bare: list[np.ndarray] = []
    texture = module.texture

    def spy(size: int, noise: np.random.Generator) -> np.ndarray:
        canvas = texture(size, noise)
        bare.append(canvas.copy())
        return canvas

    monkeypatch.setattr(module, "texture", spy)
    scene = draw_scene(11)
    before = bare[0].clip(0, 255).astype(np.uint8)
    changed = (np.asarray(scene.image) != before).any(-1)
    for left, top, right, bottom in (o.box for o in scene.objects):
        assert changed[top:bottom, left:right].any()
        changed[top:bottom, left:right] = False
    assert not changed.any()


def test_objects_cover_a_small_part_of_the_canvas(scenes: list[Scene]) -> None:
    assert np.mean([(scene.owner >= 0).mean() for scene in scenes]) < 0.1


def test_every_kind_of_question_occurs_within_its_limit(scenes: list[Scene]) -> None:
    seen = {q.kind for scene in scenes for q in scene.questions}
    assert seen == set(KINDS_OF_QUESTION) - {"word"}  # words are drawn only if asked for
    for scene in scenes:
        kinds = [q.kind for q in scene.questions]
        assert max(map(kinds.count, set(kinds))) <= PER_KIND


def test_questions_use_only_words_of_the_vocabulary(scenes: list[Scene]) -> None:
    for scene in scenes:
        for q in scene.questions:
            assert set(q.text.split()) <= set(VOCABULARY)
            assert q.answer in ANSWERS


def test_evidence_boxes_belong_to_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        boxes = {o.box for o in scene.objects}
        for q in scene.questions:
            assert set(q.boxes) <= boxes
            assert q.boxes or q.answer in ("no", "0")


def _only(found: list[SceneObject]) -> SceneObject:
    assert len(found) == 1
    return found[0]


def _cell(o: SceneObject) -> str:
    x, y = o.centre
    row = "top" if y < 128 / 3 else "bottom" if y > 256 / 3 else ""
    column = "left" if x < 128 / 3 else "right" if x > 256 / 3 else ""
    return "-".join(filter(None, (row, column))) or "center"


def _find(scene: Scene, words: list[str]) -> SceneObject:
    colour, kind = words
    return _only([o for o in scene.objects if (o.colour, o.kind) == (colour, kind)])


def _nearest(scene: Scene, phrase: str, anchor: SceneObject) -> SceneObject:
    """The object straight in a direction, found by sorting on one coordinate."""
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[phrase]
    near = [
        o
        for o in scene.objects
        if abs(o.centre[1 - axis] - anchor.centre[1 - axis]) <= 9
        and sign * (o.centre[axis] - anchor.centre[axis]) > 0
    ]
    return min(near, key=lambda o: abs(o.centre[axis] - anchor.centre[axis]))


def _compare(scene: Scene, rest: str) -> str:
    phrase = next(p for p in RELATIONS if f" {p} the " in rest)
    a, b = (_find(scene, part.split()) for part in rest.split(f" {phrase} the "))
    (ax, ay), (bx, by) = a.centre, b.centre
    true = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
    return "yes" if true[phrase] else "no"


def _solve(scene: Scene, text: str) -> str:
    """Answer from the objects alone, by another way than the generator's."""
    words = text.removesuffix(" ?").split()
    for phrase in RELATIONS:
        if text.startswith("is the "):
            return _compare(scene, " ".join(words[2:]))
        for start, wanted in (("what is", "kind"), ("what color is", "colour")):
            if text.startswith(f"{start} {phrase} the "):
                return getattr(_nearest(scene, phrase, _find(scene, words[-2:])), wanted)
    if words[:2] == ["is", "there"]:
        there = any([o.colour, o.kind] == words[-2:] for o in scene.objects)
        return "yes" if there else "no"
    if words[0] == "how":
        return str(sum(o.colour == words[2] for o in scene.objects))
    if words[0] == "where":
        return _cell(_find(scene, words[-2:]))
    if words[-3:-1] == ["at", "the"]:
        o = _only([o for o in scene.objects if _cell(o) == words[-1]])
        return o.colour if words[1] == "color" else o.kind
    if words[1] == "color":
        return _only([o for o in scene.objects if o.kind == words[-1]]).colour
    if words[1] == "number":
        numbers = [o for o in scene.objects if o.kind not in SHAPES]
        return _only([o for o in numbers if o.colour == words[-1]]).kind
    return _only([o for o in scene.objects if o.colour == words[-2]]).kind


def test_answers_follow_from_the_objects(scenes: list[Scene]) -> None:
    for scene in scenes:
        for q in scene.questions:
            assert _solve(scene, q.text) == q.answer, (scene.seed, q)


def test_no_answer_is_given_away_by_its_question() -> None:
    """Knowing only the kind of question, guessing the commonest answer is right at most 60 %."""
    answers: dict[str, list[str]] = {}
    for seed in range(2000, 2250):
        for q in draw_scene(seed).questions:
            answers.setdefault(q.kind, []).append(q.answer)
    for kind, given in answers.items():
        assert max(map(given.count, set(given))) / len(given) < 0.6, kind
    assert set(answers["number"]) <= set(KINDS)
