"""`foveate bench` ends with its table, takes a file of options, and fits any terminal."""

import csv
import io
import re

import pytest
from rich.console import Console

from foveate.bench.settings import Cell
from foveate.bench.summary import Summary
from foveate.cli import bench
from foveate.cli.bench_table import HEADINGS, show_refusals, show_table, write_table
from tests.cli.calling import call

GIVEN = ["--samples", "2", "--workers", "1", "--no-timing"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campaign")
    (folder / "campaign.yaml").write_text(
        "methods: [fastv, evs, dycoke]\nkeep: [0.5, 0.25]\ntasks: counting\nsamples: 9\n"
    )
    given = ["--config", str(folder / "campaign.yaml"), *GIVEN, "--out", str(folder / "out")]
    found = call("bench", *given, "--table", str(folder / "t.csv"), columns=80)
    assert found.exit_code == 0, found.output
    return folder, found


def test_the_command_line_comes_before_a_file_of_options(ran):
    assert "accuracy over 1 task, 2 questions" in ran[1].stdout  # of --samples 2, not of 9
    names = re.findall(r"^(\w+) +0\.25 ", ran[1].stdout, re.MULTILINE)
    assert sorted(names) == ["downsample", "fastv", "random", "uniform"]


def test_the_table_is_saved_as_it_is_printed(ran):
    folder, found = ran
    with (folder / "t.csv").open() as file:
        rows = list(csv.reader(file))
    assert tuple(rows[0]) == HEADINGS
    printed = [line.split() for line in found.stdout.splitlines()]
    for row in rows[1:]:
        assert " ".join(row).split() in printed


def test_refused_cells_are_one_line_for_each_reason(ran):
    lines = [line for line in ran[1].stdout.splitlines() if line.startswith("refused ")]
    assert len(lines) == 1
    assert lines[0].startswith("refused 3 cells, evs, dycoke: each compares the frames of a video")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("methodz: fastv", "did you mean 'methods'?"),
        ("- fastv", "must be a mapping"),
        ("keep: {a: 1}", "must be text, a number or a list"),
        ("samples: many", "--samples"),
        (": :", "as a campaign"),
    ],
)
def test_a_wrong_file_of_options_is_refused(text, words, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    found = call("bench", "--config", str(path), "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert words in " ".join(found.stderr.replace("│", " ").split())


def test_a_table_of_another_format_is_refused(tmp_path):
    found = call("bench", "--table", "t.xls", "--out", str(tmp_path / "out"))
    assert found.exit_code == 2
    assert "ends in .md, .csv or .json" in found.stderr


def rows(*answers):
    made = []
    for method, right in answers:
        answer = {"right": right}
        made.append(
            {
                "method": method, "keep": None if method == "none" else 0.25, "task": "counting",
                "status": "done", "error": "", "n": 1, "right": int(right), "accuracy": 1.0 * right,
                "majority": 0.5, "answers": [answer], "agreement": 1.0, "kl": 0.0, "recall": None,
                "hit": None, "tokens_ratio": 0.25, "flops_before": 4, "flops_after": 1,
                "kv_bytes_before": 4, "kv_bytes_after": 1,
            }
        )  # fmt: skip
    return made


def test_the_most_accurate_comes_first_and_markdown_has_every_row(tmp_path):
    summary = Summary(rows(("none", True), ("random", False), ("fastv", True)), {})
    write_table(tmp_path / "t.md", summary)
    told = (tmp_path / "t.md").read_text()
    lines = told.partition("\n\n")[0].splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| all tokens", "| fastv", "| random"]
    assert len({line.count("|") for line in lines}) == 1


def test_nothing_is_printed_where_nothing_ran():
    console = Console(record=True, width=80)
    show_table(Summary([], {}), console)
    show_refusals(Summary([], {}), console)
    assert console.export_text() == ""


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_the_bar_fits_the_terminal(width, monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(bench, "stderr", lambda: console)
    with bench._bar() as progress:
        progress.begin(40, 3)
        progress.done(Cell("recoverable-compression", 0.25, "counting"), {"status": "done"})
    lines = re.split(r"\x1b\[[?\d]*[a-zA-Z]|[\r\n]", file.getvalue())
    assert max(map(len, lines)) <= width
    assert sum(" 4/40" in line for line in lines) == 1  # drawn once


def test_a_pipe_gets_a_line_for_every_tenth(capsys):
    with bench._bar() as progress:
        progress.begin(20, 0)
        for _ in range(20):
            progress.done(Cell("fastv", 0.25, "counting"), {"status": "done"})
    assert capsys.readouterr().err.splitlines() == [f"{n} of 20 cells" for n in range(2, 21, 2)]
