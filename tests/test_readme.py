"""What the README shows runs, and its figures are the registry's."""

import re
from pathlib import Path

from PIL import Image

import foveate

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 90


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "?" in printed.splitlines()[0]
    assert "pyramiddrop" in printed
    assert Image.open(tmp_path / "kept.png").width > 1000


def test_counts_are_the_registrys():
    assert f"has {len(foveate.list_methods())} methods" in TEXT
    assert f"supports {len(foveate.list_families())} model" in TEXT


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (README.parent / target).is_file()


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in blocks("sh")[0].splitlines()]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
