"""Every block of Python of the pages runs as printed, on small models under large ones' names, and
every command parses.
"""

import copy
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
import typer

import foveate
from foveate import large, tiny
from foveate.cli import app
from foveate.methods import DivPrune
from foveate.serve import Engine
from foveate.training.finetune import Collator, Scenes
from foveate.tune.policy import SIGNALS, Option, Policy
from tests.serve.running import running
from tests.tinies import prompts, tiny_clip, tiny_llava
from tests.vision.dense import depth_anything

ROOT = Path(__file__).parent.parent
ELSEWHERE = {
    "README.md": "test_readme.py",
    "add-a-method.md": "test_docs.py",
    "audio.md": "families/test_audio_page.py",
    "combine.md": "test_docs.py",
    "conversations.md": "test_docs.py",
    "retrieval.md": "test_docs.py",
    "robots.md": "test_docs.py",
    "segmentation.md": "test_docs.py",
    "streaming.md": "streaming/test_page.py",
    "voxels.md": "voxels/test_page.py",
}
HERE = (
    "choose.md", "dense.md", "how-it-works.md", "index.md", "large-images.md",
    "serving.md", "training.md", "tune.md",
)  # fmt: skip
NOT_HERE = {  # in a block -> where that is run
    "past_key_values=said": "conformance/test_new_images.py",
    "mm_processor_kwargs": "integrations/vllm",
}


def page(name):
    return (ROOT / name if name == "README.md" else ROOT / "docs" / name).read_text("utf-8")


def blocks(name):
    found = re.findall(r"^```(?:python|py)\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)
    return [code for code in found if not any(mark in code for mark in NOT_HERE)]


PAGES = ["README.md", *sorted(path.name for path in (ROOT / "docs").glob("*.md"))]


def commands():
    """Commands of the pages, without comments and what takes their output."""
    found = [re.findall(r"^```(?:sh)?\n(.*?)^```$", page(name), re.DOTALL | re.M) for name in PAGES]
    lines = [line for blocks in found for block in blocks for line in block.splitlines()]
    told = (re.split("#| > ", line)[0].strip() for line in lines if line.startswith("foveate "))
    return sorted(set(told))


@pytest.mark.parametrize("line", commands())
def test_a_command_parses(line, tmp_path, monkeypatch):
    """Names, options and argument counts are right; nothing is run."""
    monkeypatch.chdir(tmp_path)
    Path("campaign.yaml").write_text("methods: [fastv]\n")  # of `bench --config`
    group = typer.main.get_command(app)
    name, command, arguments = group.resolve_command(typer.Context(group), shlex.split(line)[1:])
    given = command.make_context(name, list(arguments)).params
    if name == "run" and given["method"]:
        fields = foveate.get_method(given["method"]).__dataclass_fields__
        assert all(setting.split("=")[0] in fields for setting in given["setting"] or ())


def test_no_page_is_left_out():
    shown = {name for name in PAGES if re.search(r"^```(python|py)$", page(name), re.MULTILINE)}
    assert shown == {*HERE, *ELSEWHERE}
    for name, test in ELSEWHERE.items():
        assert name.removesuffix(".md") in (ROOT / "tests" / test).read_text("utf-8")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Hub ids lead to small models, the folder is empty, and models answer briefly."""
    monkeypatch.chdir(tmp_path)
    model, processor = tiny.load()
    model.generation_config.max_new_tokens = 4

    def opens(cls, found):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: copy.deepcopy(found))

    opens(transformers.AutoModelForDepthEstimation, depth_anything())
    config = transformers.VideoMAEConfig(
        image_size=16, patch_size=8, num_frames=16, hidden_size=32, num_hidden_layers=6,
        num_attention_heads=4, intermediate_size=48, num_labels=2,
    )  # fmt: skip
    opens(
        transformers.VideoMAEForVideoClassification,
        transformers.VideoMAEForVideoClassification(config),
    )
    opens(foveate.ClipText, foveate.ClipText(*tiny_clip()))
    real = transformers.AutoModelForImageTextToText.from_pretrained

    def from_pretrained(name, **options):
        return real(name, **options) if Path(name).exists() else copy.deepcopy(model)

    monkeypatch.setattr(
        transformers.AutoModelForImageTextToText, "from_pretrained", from_pretrained
    )
    return model, processor


@pytest.fixture
def served(small):
    """A server, as `foveate serve tiny --method pyramiddrop` starts it."""
    with running(Engine(*tiny.load(), "pyramiddrop")) as address:
        yield address


def given(name, model, processor):
    """What a page takes for granted: names, and files."""
    image = tiny.draw_scene(12).image
    inputs = processor(images=image, text="<image> what number is red ?", return_tensors="pt")
    known = {"foveate": foveate, "model": model, "processor": processor, "inputs": inputs}
    args = transformers.TrainingArguments("out", use_cpu=True, remove_unused_columns=False)
    if name == "dense.md":
        videos = [
            {"pixel_values": torch.rand(16, 3, 16, 16), "labels": label} for label in (0, 1, 0, 1)
        ]
        return {"pixel_values": torch.rand(1, 3, 112, 112), "args": args, "data": videos}
    if name == "how-it-works.md":
        return known | {
            "model": tiny_llava(),
            "inputs": prompts([(3, 5)]) | {"max_new_tokens": 2},
            "others": prompts([(2, 4)], seed=1) | {"max_new_tokens": 2},
        }
    if name == "large-images.md":
        tiny.draw_scene(12, size=512).image.save("scene.tif")
        large.RegionFocus.of(model).save("runs/large/focus")
    if name == "serving.md":
        image.save("scene.png")
    if name == "training.md":
        known = {"args": args, "data": Scenes(4), "collator": Collator(processor)}
        return known | {"processor": processor}
    if name == "tune.md":
        option = Option((DivPrune(keep=0.25),), 0.5, 0.5, (0.0,) * len(SIGNALS))
        numbers = (0.0,) * len(SIGNALS), (1.0,) * len(SIGNALS)
        Path("tuned").mkdir()
        Policy((option,), 0.0, (), *numbers).write("tuned/policy.json")
        return known | {"image": image}
    return {} if name == "index.md" else known


@pytest.mark.parametrize("name", HERE)
def test_a_page_runs_as_printed(name, small, request, capsys):
    codes, names = blocks(name), given(name, *small)
    assert codes
    for code in codes:
        code = code.replace("bf16=True", "use_cpu=True")  # a GPU is not given
        if "127.0.0.1:8000" in code:
            address = request.getfixturevalue("served")
            code = code.replace("http://127.0.0.1:8000", address)
        exec(compile(code, name, "exec"), names)
    if name == "serving.md":
        assert capsys.readouterr().out.split()[1:] == ["{'before':", "256,", "'after':", "128}"]
