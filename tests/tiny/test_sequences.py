"""Several images: deterministic, with true answers and evidence in the image it is in."""

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from foveate.tiny.build import IMAGE, SIZE, build_config, build_model
from foveate.tiny.sequences import (
    SEQUENCE_KINDS,
    Sequence,
    draw_album,
    draw_events,
    draw_order,
    draw_rule,
)
from foveate.tiny.words import ORDINALS, VOCABULARY
from recipes.data import normalise
from recipes.sequence_data import LESSONS, answer_sequences, make_sequences
from recipes.sequences import adopt

DRAW = {
    "album": lambda seed: draw_album(seed, 3),
    "events": lambda seed: draw_events(seed, 4),
    "order": lambda seed: draw_order(seed, 4),
    "rule": lambda seed: draw_rule(seed, 3),
}


@pytest.mark.parametrize("name", DRAW)
def test_same_seed_same_images(name: str) -> None:
    one, two, other = (DRAW[name](seed) for seed in (3, 3, 4))
    assert [p.tobytes() for p in one.images] == [p.tobytes() for p in two.images]
    assert one.questions == two.questions
    assert one.images[0].tobytes() != other.images[0].tobytes()


def test_every_kind_of_question_occurs_in_known_words() -> None:
    asked = [q for draw in DRAW.values() for seed in range(20) for q in draw(seed).questions]
    assert {q.kind for q in asked} == set(SEQUENCE_KINDS)
    for q in asked:
        assert {*q.text.split(), q.answer} <= set(VOCABULARY)


@pytest.mark.parametrize("name", DRAW)
def test_evidence_holds_all_ink_of_an_object_in_its_image(name: str) -> None:
    for seed in range(8):
        drawn = DRAW[name](seed)
        for n, box in {sight for q in drawn.questions for sight in q.sights}:
            index = [o.box for o in drawn.objects[n]].index(box)
            left, top, right, bottom = box
            inside = drawn.owners[n][top:bottom, left:right] == index
            assert 0 < inside.sum() == (drawn.owners[n] == index).sum()


def _track(drawn: Sequence, kind: str) -> list[tuple[str, tuple] | None]:
    """Colour and box of the object in every frame."""
    found = []
    for frame in drawn.objects:
        there = [(o.colour, o.box) for o in frame if o.kind == kind]
        assert len(there) <= 1
        found.append(there[0] if there else None)
    return found


def test_events_are_what_the_frames_show() -> None:
    for seed in range(30):
        drawn = draw_events(seed, 4)
        for q in drawn.questions:
            if q.kind != "event":
                continue
            first, *_, last = track = _track(drawn, q.text.split()[-2])
            if q.answer in ("appears", "disappears"):
                assert (first is None) == (q.answer == "appears")
                assert (last is None) == (q.answer == "disappears")
            else:
                moved, turned = first[1] != last[1], first[0] != last[0]
                assert (moved, turned) == (q.answer == "moves", q.answer == "changes")
            assert [frame for frame, _ in q.sights] == [n for n, at in enumerate(track) if at]


def test_order_and_rule_and_album_follow_from_the_objects() -> None:
    for seed in range(20):
        drawn = draw_order(seed, 4)
        for q in drawn.questions:
            if q.kind == "ends":
                assert q.sights[0][0] == (0 if "first" in q.text else 3)
            else:
                assert q.sights[1][0] == q.sights[0][0] + 1
        for q in draw_rule(seed, 3).questions:
            assert len(q.sights) == 1
        album = draw_album(seed, 3)
        for q in album.questions:
            if q.kind == "which":
                assert {n for n, _ in q.sights} == {ORDINALS.index(q.answer)}


def test_rule_can_be_told_from_an_example() -> None:
    """In an example only objects of one kind have the answer's colour, and it is everywhere."""
    for seed in range(20):
        drawn = draw_rule(seed, 2)
        first = [o.kind for o in drawn.objects[0] if o.colour == drawn.questions[0].answer]
        assert len(first) == 1
        last = [o for o in drawn.objects[1] if o.kind == first[0]]
        assert [o.colour for o in last] == [drawn.questions[1].answer]


@torch.no_grad()
@pytest.mark.parametrize("name", LESSONS)
def test_packed_sequences_equal_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(build_config(layers=3)).eval()
    for layer in model.model.language_model.layers[:2]:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.05)
    batch = make_sequences(LESSONS[name], range(1))
    logits = answer_sequences(model, batch)[0].unflatten(1, batch.words.shape[1:])
    ids = [1]
    for n in range(batch.pixels.shape[1]):
        ids += [4] * 256
        ids += batch.between[0, n].tolist() if n < batch.between.shape[1] else []
    ids = torch.tensor([[*ids, *batch.words[0, 0].tolist()]])
    want = model(input_ids=ids, pixel_values=normalise(batch.pixels[0])).logits[0, -12:]
    torch.testing.assert_close(logits[0, 0], want, rtol=1e-4, atol=1e-5)


def test_batches_label_answers_and_show_every_object() -> None:
    for lesson in LESSONS.values():
        batch = make_sequences(lesson, range(2048, 2050))
        assert (batch.groups >= 0).sum() == 2 * lesson.slots
        assert (batch.labels[batch.groups >= 0] > 4).all()
        assert np.all(batch.ink.sum(-1).numpy() > 0)


def test_a_trained_model_is_adopted_and_other_vocabularies_are_refused(tmp_path) -> None:
    from recipes.train import export

    small = VOCABULARY[:152]
    torch.manual_seed(0)
    old = build_model(build_config(layers=2, words=len(small)))
    export(old, tmp_path / "old", small)
    new = build_model(build_config(layers=2))
    adopt(new, tmp_path / "old")
    rows = new.get_input_embeddings().weight
    torch.testing.assert_close(rows[:152], old.get_input_embeddings().weight.half().float())
    assert len(rows) == len(VOCABULARY)
    with pytest.raises(ValueError, match="vocabulary"):
        adopt(new, tmp_path / "old", ("<pad>", "other"))


def test_a_grown_model_says_what_the_trained_one_says(tmp_path) -> None:
    from recipes.train import export

    torch.manual_seed(0)
    old = build_model(build_config(layers=3), idle=0)
    export(old, tmp_path / "old")
    old = LlavaForConditionalGeneration.from_pretrained(tmp_path / "old", dtype=torch.float32)
    new = build_model(build_config(layers=5, tower=8)).eval()
    adopt(new, tmp_path / "old")
    asked = {
        "input_ids": torch.tensor([[1] + [IMAGE] * 256 + [7, 8, 9]]),
        "pixel_values": torch.randn(1, 3, SIZE, SIZE),
    }
    with torch.inference_mode():
        said, before = new(**asked).logits, old(**asked).logits
    torch.testing.assert_close(said, before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="has 3 layers where the new one has 2"):
        adopt(build_model(build_config(layers=2)), tmp_path / "old")
