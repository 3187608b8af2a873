"""Real photographs go the same way as drawn scenes; right answers are not expected."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveate.cli.commands import app

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "coco-cc" / "images"
PHOTOGRAPHS = sorted(FOLDER.glob("*.jpg"))[::13]


@pytest.mark.skipif(not PHOTOGRAPHS, reason="no folder of photographs beside the repository")
@pytest.mark.parametrize("method", ["pyramiddrop", "fastervlm", "downsample"])
def test_photographs_are_answered_reported_and_drawn(tmp_path, method):
    photographs = [str(path) for path in PHOTOGRAPHS]
    picture, report = tmp_path / "kept.png", tmp_path / "report.json"
    result = CliRunner().invoke(
        app,
        ["run", "tiny", *photographs, "what color is the star ?", "--method", method,
         "--show", str(picture), "--json", str(report)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said = json.loads(report.read_text())
    assert said["answer"]
    assert [image["tokens"] for image in said["images"]] == [256] * len(photographs)
    for image in said["images"]:
        assert 0 < min(len(kept) for kept in image["kept"].values()) < 256
    with Image.open(picture) as drawn:
        assert drawn.height > 300 * len(photographs)
