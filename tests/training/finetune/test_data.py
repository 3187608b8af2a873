"""Files of conversations are read in both styles, and errors name the line."""

import json

import pytest
from PIL import Image

from foveate.errors import InputError
from foveate.training.finetune import Conversations, Scenes


@pytest.fixture
def read(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("L", (8, 8)).save(tmp_path / "b.png")

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        return Conversations(tmp_path / "data.jsonl")

    return write


def chat(content="what?", answer="this", **more):
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": answer},
        ],
        **more,
    }


def kinds(example):
    return [part["type"] for message in example.messages for part in message.parts]


def test_both_styles_read_the_same(read):
    llava = {
        "id": 3,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "this"},
        ],
    }
    inline = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "what?"},
    ]
    rows = read(
        llava, chat("<image>\nwhat?", images=["a.png"]), chat(images=["a.png"]), chat(inline)
    )
    assert len(rows) == 4
    for row in rows:
        assert row.messages == rows[0].messages
        assert row.images == rows[0].images
    assert kinds(rows[0]) == ["image", "text", "text"]


def test_images_stand_where_the_text_says(read):
    row = read(chat("left <image> right <image>", images=["a.png", "b.png"]))[0]
    assert kinds(row) == ["text", "image", "text", "image", "text"]
    assert [picture.mode for picture in row.open_images()] == ["RGB", "RGB"]


def test_blank_lines_are_passed_over_and_counted(read):
    assert len(read(chat(), "", chat())) == 2
    with pytest.raises(InputError, match="line 3 is not JSON"):
        read(chat(), "", "{")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("[1]", "line 2 must be an object"),
        ({"text": "a"}, "line 2 needs a list `messages` or `conversations`, got \\['text'\\]"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2 has no assistant message"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "message 1: the role must be one of"),
        (chat(images=["none.png"]), "line 2: no such image file: .*none.png"),
        (chat(images=["http://x/y.png"]), "is not a file; download"),
        (chat(images=3), "`images` must be a list of paths"),
        (chat("<image> <image>", images=["a.png"]), "has 1 images, but 2 placeholders"),
        (chat([{"type": "audio"}]), "a part must be text or an image"),
        (chat(7), "the content must be a string or a list of parts"),
        (chat(answer="<image>", images=["a.png"]), "an assistant's message cannot hold an image"),
    ],
)
def test_errors_name_the_line(read, row, reason):
    with pytest.raises(InputError, match=reason):
        read(chat(), row)


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such data file"):
        Conversations(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no conversations"):
        Conversations(tmp_path / "empty.jsonl")


def test_an_image_that_cannot_be_read_names_the_line(read, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(InputError, match=r"line 1: cannot read .*bad\.png"):
        read(chat(images=["bad.png"]))[0].open_images()


def test_scenes_are_the_same_each_time_and_differ_by_seed():
    first, again, other = Scenes(2, seed=0)[1], Scenes(5, seed=0)[1], Scenes(2, seed=1)[1]
    assert first.messages == again.messages
    assert first.images[0].tobytes() == again.images[0].tobytes() != other.images[0].tobytes()
    with pytest.raises(IndexError):
        Scenes(2)[2]
