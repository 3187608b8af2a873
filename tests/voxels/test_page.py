"""The page about voxels runs as it stands, and its figures are those of the result."""

import json
import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "voxels.md").read_text(encoding="utf-8")


def test_page_runs_and_prints_what_it_shows(capsys):
    code, shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    exec(compile(code, "voxels.md", "exec"), {})
    assert capsys.readouterr().out == shown


def test_figures_are_those_of_the_result():
    script = runpy.run_path(str(ROOT / "benchmarks" / "voxels_page.py"))
    short, result = (
        json.loads(script[name].read_text(encoding="utf-8")) for name in ("SHORT", "RESULT")
    )
    assert script["page"](PAGE, short, result) == PAGE, "run python benchmarks/voxels_page.py"
    for seed in short["seeds"] + result["seeds"]:
        ways = seed["pruned"]["answers"]
        assert ways["pruned"]["convolution_flops"] < ways["all voxels"]["convolution_flops"]
        assert ways["pruned, nothing added"]["levels"][1]["added"] == 0
