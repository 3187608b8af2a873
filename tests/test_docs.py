"""The pages on methods say what is so."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import foveate
from foveate.core import registry
from foveate.errors import FoveateError
from foveate.signals import SIGNALS
from foveate.testing import check_method

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")


def test_page_of_methods_is_up_to_date():
    done = subprocess.run(
        [sys.executable, "scripts/methods_page.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_page_names_every_method_with_its_paper():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[`([\w-]+)`\]\(#[\w-]+\) \|(.*)$", text, flags=re.MULTILINE))
    assert sorted(rows) == foveate.list_methods()
    for name, row in rows.items():
        for number in re.findall(r"\d{4}\.\d{5}", foveate.get_method(name).paper):
            assert f"https://arxiv.org/abs/{number}" in row


def test_guide_lists_every_signal_in_its_words():
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", GUIDE, flags=re.MULTILINE))
    assert rows == {name: signal.doc for name, signal in SIGNALS.items()}


@pytest.fixture
def guide_method(tmp_path, monkeypatch):
    """The guide's method, in a file of its own; forgotten afterwards."""
    (code,) = re.findall(
        r"^```python\n(# my_method\.py\n.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE
    )
    (tmp_path / "my_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    foveate.list_methods()  # loads them all
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    yield tmp_path / "my_method.py"
    sys.modules.pop("my_method", None)


def test_method_of_the_guide_passes_its_checks(guide_method):
    cls = runpy.run_path(str(guide_method))["LargeFeatures"]
    checks = check_method(cls)
    assert not checks.skipped
    assert "large-features" in foveate.list_methods()
    assert foveate.get_method("large-features") is cls


class Point:
    """An entry point of an installed package."""

    name, dist = "large-features", None

    def __init__(self, value):
        self.value = value

    def load(self):
        module, _, name = self.value.partition(":")
        return getattr(__import__(module), name)


@pytest.fixture
def offered(monkeypatch):
    """Make a package offer something, and forget what was loaded."""

    def offer(value):
        monkeypatch.setattr(registry, "entry_points", lambda group: [Point(value)])
        registry._load.cache_clear()

    yield offer
    registry._load.cache_clear()


def test_methods_of_other_packages_are_found(guide_method, offered):
    offered("my_method:LargeFeatures")
    assert "large-features" in foveate.list_methods()


def test_broken_method_of_another_package_is_named(offered):
    offered("no_such_module:Method")
    with pytest.raises(FoveateError, match=r"large-features.*no_such_module"):
        foveate.list_methods()


def test_page_on_retrieval_runs_and_prints_what_it_shows(capsys):
    page = (ROOT / "docs" / "retrieval.md").read_text(encoding="utf-8")
    code, shown = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    exec(compile(code, "retrieval.md", "exec"), {})
    printed = capsys.readouterr().out
    number = r"0\.\d\d$"  # a correlation, which rounding may move
    for got, want in zip(printed.splitlines(), shown.splitlines(), strict=True):
        assert re.sub(number, "", got) == re.sub(number, "", want)
        assert float(got[-4:]) == pytest.approx(float(want[-4:]), abs=0.05)


def test_page_on_robots_runs_and_prints_what_it_shows(capsys):
    page = (ROOT / "docs" / "robots.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(?:python|text)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {}
    for code, shown in zip(found[::2], found[1::2], strict=True):
        exec(compile(code, "robots.md", "exec"), names)
        assert capsys.readouterr().out == shown


def test_figures_on_robots_are_those_of_the_result():
    page = (ROOT / "docs" / "robots.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "robots.json").read_text())
    whole = result["seconds with all tokens"]["median"]
    assert f"| all tokens | {whole:.2f} | 1 | 1 |" in page
    for name, row in result["rows"].items():
        speed = row["speed-up"]
        ratio = f"{speed['median']:.2f}x ({speed['q25']:.2f} to {speed['q75']:.2f})"
        cells = name, f"{row['seconds']['median']:.2f}", ratio, f"{row['by FLOPs']:.2f}x"
        assert f"| {' | '.join(cells)} |" in page
    for name, row in result["reuse"]["rows"].items():
        speed, error = row["speed-up"], row.get("error")
        parts = ("images not encoded", "prompts not read", "keys and values taken over")
        cells = (
            name,
            *(f"{row[part]:.0%}" for part in parts),
            f"{speed['median']:.2f}x ({speed['q25']:.2f} to {speed['q75']:.2f})",
            f"{row['by FLOPs']:.2f}x",
            f"{error['median']:.1%}" if error else "exact",
        )
        assert f"| {' | '.join(cells)} |" in page


def test_page_on_segmentation_runs(monkeypatch, tmp_path, capsys):
    page = (ROOT / "docs" / "segmentation.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "segmentation.md", "exec"), names)
    assert "of 256" in capsys.readouterr().out
    assert (tmp_path / "out" / "foveate.safetensors").is_file()
    assert names["faster"].heads[0] is names["heads"][0]


def test_page_on_conversations_runs_and_prints_what_it_shows(capsys):
    page = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
    names = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        exec(compile(code, "conversations.md", "exec"), names)
    shown = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert capsys.readouterr().out == "".join(shown)


@pytest.mark.torchao
def test_page_on_smaller_weights_runs_and_prints_what_it_shows(capsys):
    page = (ROOT / "docs" / "combine.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    shown = re.findall(r"^```text\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    names = {}
    for part in code:
        exec(compile(part, "combine.md", "exec"), names)
    assert capsys.readouterr().out == "".join(shown)


def test_figures_on_smaller_weights_are_those_of_the_result():
    page = (ROOT / "docs" / "combine.md").read_text(encoding="utf-8")
    text = (ROOT / "benchmarks" / "results" / "combine.json").read_text(encoding="utf-8")
    rows = json.loads(text)["results"]["rows"]
    for row in rows:
        alone, shrunk, both = (
            f"{row[f'speed-up by {what}']['median']:.2f}x" for what in ("tokens", "weights", "both")
        )
        share = f"{row['both / product']:.3f}"
        cells = row["tokens"], row["weights"], alone, shrunk, both, share
        assert f"| {' | '.join(cells)} |" in page
