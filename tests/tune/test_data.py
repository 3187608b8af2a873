"""Files of questions: read whole or refused, and parted so that no image is on both sides."""

import json

import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.tune.data import Split, read_rows


def write(folder, lines):
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    path = folder / "questions.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return path


def test_rows_are_read(tmp_path):
    path = write(tmp_path, [{"image": "a.png", "question": "q", "answer": "x", "choices": ["x"]}])
    (row,) = read_rows(path)
    assert row.images == (tmp_path / "a.png",)
    assert (row.question, row.answer, row.choices) == ("q", "x", ("x",))
    assert row.sample(3).seed == 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no question"),
        (["{"], ":1 is not JSON"),
        ([{"image": "a.png"}], "no question with an image"),
        ([{"image": "b.png", "question": "q"}], ":1: no such image"),
        ([{"image": "a.png", "question": "q", "answer": 3}], "no question with an image"),
        (
            [
                {"image": "a.png", "question": "q", "answer": "x"},
                {"image": "a.png", "question": "q"},
            ],
            "1 of 2 questions have no `answer`",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, lines, said):
    with pytest.raises(InputError, match=said):
        read_rows(write(tmp_path, lines))


def test_questions_about_one_image_stay_together(tmp_path):
    for n in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    lines = [{"image": f"{n % 20}.png", "question": str(n)} for n in range(60)]
    rows = read_rows(write(tmp_path, lines))
    split = Split.of(rows, 0.4, seed=1)
    sides = [{rows[n].images for n in side} for side in (split.search, split.held_out)]
    assert not sides[0] & sides[1]
    assert sorted((*split.search, *split.held_out)) == list(range(60))
    assert 20 <= len(split.held_out) <= 28
    assert Split.of(rows, 0.4, seed=1) == split
    assert Split.of(rows, 0.4, seed=2) != split


def test_too_few_questions_are_refused(tmp_path):
    rows = read_rows(write(tmp_path, [{"image": "a.png", "question": str(n)} for n in range(60)]))
    with pytest.raises(InputError, match="60 questions leave 0 to search"):
        Split.of(rows, 0.4, seed=0)
