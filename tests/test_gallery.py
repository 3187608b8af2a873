"""docs/gallery.md shows every method, in the words of its class."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import foveate

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "gallery.md").read_text(encoding="utf-8")
PICTURES = DOCS / "gallery"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield runpy.run_path(str(ROOT / "scripts" / "gallery.py"))
    sys.modules.pop("gallery_scene", None)


def test_page_is_what_the_script_writes_of_todays_methods(script):
    assert script["page"](script["counts_of"](PAGE)) == PAGE


def test_every_method_is_named_once():
    assert sorted(re.findall(r"\(methods\.md#([\w-]+)\)", PAGE)) == foveate.list_methods()


def test_every_picture_is_there_and_shown_and_all_are_small():
    files = sorted(PICTURES.iterdir())
    shown = re.findall(r"\(gallery/([\w.-]+)\)", PAGE)
    assert [file.name for file in files] == sorted(shown)
    assert sum(file.stat().st_size for file in files) < 1e6
    assert all(Image.open(file).width >= 300 for file in files)


@pytest.mark.parametrize("name", ["fastervlm", "pyramiddrop"])
def test_pictures_show_what_a_method_keeps_today(script, name):
    subject = script["photograph"]()
    kept = [index.tolist() for index in script["record_of"](name, subject).kept.values()]
    drawn = script["draw"](subject, kept).resize((16, 16), Image.Resampling.BOX)
    with Image.open(PICTURES / f"{name}.webp") as file:
        saved = file.convert("RGB").resize((16, 16), Image.Resampling.BOX)
    far = [
        max(abs(a - b) for a, b in zip(one, other, strict=True))
        for one, other in zip(pixels(drawn), pixels(saved), strict=True)
    ]
    assert sum(d > 24 for d in far) <= 4, "cells that differ by more than compression"


def pixels(image):
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]
