"""docs/audio.md runs as printed, on a small thinker."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conformance.test_pixels import model_of
from tests.conformance.zoo.member import fresh
from tests.families.prompts_with_audio import NAMES, prompt

PAGE = Path(__file__).parents[2] / "docs" / "audio.md"


@pytest.mark.parametrize("name", NAMES)
def test_page_on_audio_runs_as_printed(name, capsys):
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    (inputs, _), whole = prompt(name, "within"), SimpleNamespace(thinker=model_of(name))
    for part in code:
        part = part.replace("layer=4", "layer=3")  # of the few that it has
        exec(compile(part, PAGE.name, "exec"), {"model": whole, "inputs": fresh(inputs)})
    shown = capsys.readouterr().out
    assert "vision and audio towers" in shown
    kept = {"qwen2_5_omni_thinker": "60 30", "qwen3_omni_moe_thinker": "12 6"}[name]
    assert shown.endswith(f"image or video 24 6\naudio {kept}\n")
