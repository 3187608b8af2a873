"""`foveate run` asks about videos, takes compositions, and says what an answer is worth."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import BatchFeature

import foveate
from foveate import tiny
from foveate.cli.inputs import encode
from foveate.measure.checkpoints import checkpoints
from tests.cli.calling import call

ROOT = Path(foveate.__file__).parent.parent
FRAMES = [Image.new("RGB", (8, 8), (n, 0, 0)) for n in range(3)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in range(5):
        tiny.draw_scene(number).image.save(tmp_path / "clip" / f"{number}.png")
    return str(tmp_path / "clip")


def test_frames_are_images_where_a_model_takes_no_videos(folder, question, tmp_path):
    out, drawn = tmp_path / "out.json", tmp_path / "kept.png"
    found = call(
        "run", "tiny", folder, question, "-m", "divprune+fastv", "--frames", "3",
        "--json", str(out), "--show", str(drawn), "--max-new-tokens", "2",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    report = json.loads(out.read_text())
    assert [method["method"] for method in report["methods"]] == ["divprune", "fastv"]
    assert len(report["images"]) == 3
    assert "llava does not support videos; the 3 frames were passed as images" in found.stdout
    assert Image.open(drawn).height > 3 * 128


class Recorder:
    """A processor that takes videos, and remembers what it was given."""

    chat_template = "some"
    video_processor = object()
    tokenizer = SimpleNamespace(bos_token=None)

    def apply_chat_template(self, messages, **kwargs):
        self.messages = messages
        return "laid out"

    def __call__(self, **given):
        self.given = given
        return BatchFeature({"input_ids": torch.tensor([[1]])})


def test_a_model_that_takes_videos_gets_one_with_its_frames():
    processor, model = Recorder(), SimpleNamespace(device="cpu", dtype=torch.float32)
    image = Image.new("RGB", (8, 8))
    encode(processor, [image, FRAMES], "what happens?", model)
    (message,) = processor.messages
    assert [part["type"] for part in message["content"]] == ["image", "video", "text"]
    assert processor.given["images"] == [[image]]
    assert processor.given["videos"] == [FRAMES]


@pytest.mark.parametrize(
    ("asked", "size", "notes"),
    [
        ("what color is the star ?", 128, []),
        ("what color is my cat ?", 128, ["152 words, but not my, cat"]),
        ("what color is the star ?", 200, ["answers about other images are meaningless"]),
    ],
)
def test_the_embedded_model_is_asked_what_it_never_saw(asked, size, notes, tmp_path):
    path = tmp_path / "a.png"
    tiny.draw_scene(3).image.resize((size, size)).save(path)
    given = ["run", "tiny", str(path), asked, "-m", "fastv", "--max-new-tokens", "1"]
    told = " ".join(call(*given).stdout.split())
    assert told.count("note:") == len(notes)
    assert all(note in told for note in notes)


def test_examples_ask_what_the_embedded_model_knows():
    texts = [*ROOT.glob("foveate/cli/arguments/*.py"), ROOT / "docs/cli.md", ROOT / "README.md"]
    asked = [
        question
        for path in texts
        for question in re.findall(r'foveate run tiny [^"\n]*"([^"]*)"', path.read_text())
    ]
    assert len(asked) > 5
    known = tiny.load()[1].tokenizer
    for question in asked:
        assert known.unk_token_id not in known(question).input_ids, question


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("tniy", "did you mean `tiny`, an embedded model?"),
        ("llava-1.5-7b", "did you mean llava-hf/llava-1.5-7b-hf or"),
        ("zzzz", "`tiny`, `small` and `small-video` are the embedded models"),
    ],
)
@pytest.mark.parametrize("command", ["run", "list", "flops"])
def test_a_mistyped_model_is_answered_before_the_network_is_tried(
    command, name, near, scene, monkeypatch
):  # fmt: skip
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    given = {
        "run": [name, scene, "why ?", "-m", "fastv"],
        "list": ["--model", name],
        "flops": [name, "-m", "fastv"],
    }
    begun = time.monotonic()
    found = call(command, *given[command])
    assert time.monotonic() - begun < 2
    assert found.exit_code == 2
    assert near in found.stderr


def test_a_hub_id_is_asked_for_once(monkeypatch, scene):
    from huggingface_hub.errors import RepositoryNotFoundError

    asked = []

    def info(self, name, timeout):
        asked.append(name)
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", None)
    found = call("run", "llava-hf/llava-1.5-7b", scene, "why ?", "-m", "fastv")
    assert asked == ["llava-hf/llava-1.5-7b"]
    assert "the hub has no such model" in found.stderr
    assert next(iter(checkpoints())) in found.stderr


WARNS = """
import sys, warnings
sys.argv = ["foveate", *sys.argv[1:]]
from foveate.cli import main
import foveate.cli.listing as listing
def show(*args, **kwargs):
    warnings.warn("of another library")
    from transformers.utils import logging
    logging.get_logger("transformers.x").warning("of transformers")
listing.show_methods = show
main()
"""


@pytest.mark.parametrize("given", [["list"], ["list", "--verbose"], ["--verbose", "list"]])
def test_warnings_of_others_are_shown_on_request(given):
    env = {name: value for name, value in os.environ.items() if not name.endswith("VERBOSITY")}
    command = [sys.executable, "-c", WARNS, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    said = {"of another library", "of transformers"}
    found = set(re.findall("of another library|of transformers", done.stderr))
    assert found == (said if "--verbose" in given else set())
