"""What the README shows runs, and its table is the registry's."""

import re
from pathlib import Path

from PIL import Image

import foveate
from foveate.core import registry

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _ = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "?" in printed.splitlines()[0]
    assert "pyramiddrop" in printed
    assert Image.open(tmp_path / "kept.png").width > 1000


def test_method_example_passes_its_checks(monkeypatch, capsys):
    foveate.list_methods()  # loads them all
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    _, code = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    exec(compile(code, str(README), "exec"), {"__name__": __name__})
    printed = capsys.readouterr().out
    assert "llava: oracle" in printed
    assert "skipped" not in printed


def test_table_lists_every_method_and_nothing_else():
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)$", TEXT, flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == foveate.list_methods()
    for name, row in rows:
        cls = foveate.get_method(name)
        assert ("before the LLM" in row) == (cls.stage == "pre_llm")
        for number in re.findall(r"\d{4}\.\d{5}", cls.paper):
            assert f"https://arxiv.org/abs/{number}" in row


def test_every_family_is_listed_and_no_other():
    (line,) = re.findall(
        r"^- Vision-language models.*?(?=^- )", TEXT, flags=re.DOTALL | re.MULTILINE
    )
    listed = re.findall(r"`([\w-]+)`", line.replace("`foveate list --families`", ""))
    assert sorted(listed) == foveate.list_families()
    (page,) = re.findall(r"\]\((docs/.*?)\)", line)
    assert (README.parent / page).is_file()


def test_images_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (README.parent / path).is_file()


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = [line.split()[1] for line in blocks("sh")[0].splitlines()]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
