"""Two methods on two tasks with the tiny model, and the report of it."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from foveate import tiny
from foveate.bench import campaign
from foveate.bench.examples import draw, time_first_tokens
from foveate.bench.levels import method_at
from foveate.bench.report import Facts, write
from foveate.bench.runner import Runner
from foveate.bench.settings import Cell, Settings, cells
from foveate.bench.store import Store
from foveate.bench.svg import halves
from foveate.cli.bench import summarise
from tests.bench.tasks_for_tests import TASKS
from tests.shares import mean_share


def make(loaded, **fields):
    known = {"methods": ("fastv", "evs"), "keeps": (0.25,), "tasks": ("color", "two-turns")}
    settings = Settings("tiny", **{**known, "samples": 4, "batch": 3, **fields})
    return Runner(*loaded, settings, TASKS.__getitem__)


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def finished(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results.parquet"
    runner = make(loaded)
    with Store(path).writing() as store:
        keys = campaign.execute(runner.settings, runner, store, load=None)
    return runner, Store(path), keys


def test_every_cell_has_a_row_and_baselines_are_in(finished):
    _, store, keys = finished
    assert len(store) == len(keys) == len(set(keys)) == 2 * (1 + 3 + 2)
    found = {(row["method"], row["status"]) for row in store.rows}
    done = ("none", "random", "uniform", "downsample", "fastv")
    assert found == {*((name, "done") for name in done), ("evs", "refused")}
    assert all("video" in r["error"] for r in store.rows if r["method"] == "evs")


def test_further_turns_are_asked_after_the_first(finished):
    _, store, _ = finished
    rows = [row for row in store.rows if row["task"] == "two-turns" and row["status"] == "done"]
    assert {row["n"] for row in rows} == {8}
    assert {a["turn"] for row in rows for a in row["answers"]} == {0, 1}
    whole = next(row for row in rows if row["method"] == "none")
    assert (whole["agreement"], whole["kl"], whole["recall"]) == (1, 0, 1)
    assert whole["right"] >= 6  # the tiny model is right on 98 % of later turns


def test_a_batch_says_what_its_samples_say_alone(loaded, finished):
    _, store, _ = finished
    alone = make(loaded, batch=1).run(Cell("fastv", 0.25, "two-turns"))
    together = next(r for r in store.rows if (r["method"], r["task"]) == ("fastv", "two-turns"))
    assert [a.said for a in alone.answers] == [a["said"] for a in together["answers"]]


def test_finished_cells_are_not_run_again(loaded, finished, monkeypatch):
    _, store, keys = finished
    runner = make(loaded)
    monkeypatch.setattr(runner, "run", lambda cell: pytest.fail(f"{cell} ran again"))
    assert campaign.execute(runner.settings, runner, store, load=None) == keys
    assert make(loaded, seed=1).key(Cell("fastv", 0.25, "color")) not in store


def test_a_method_that_breaks_is_a_failed_cell(loaded, monkeypatch):
    runner = make(loaded)
    monkeypatch.setattr(runner, "_ask", lambda *a: 1 / 0)
    outcome = runner.run(Cell("fastv", 0.25, "color"))
    assert outcome.status == "failed"
    assert "ZeroDivisionError" in outcome.error


@pytest.mark.parametrize("name", ["pyramiddrop", "sparsevlm", "transprune", "adatoken-3d", "catp"])
@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_schedules_keep_the_share_on_average(loaded, name, keep):
    family = make(loaded).family
    assert mean_share(method_at(name, keep, family), family) == pytest.approx(keep, abs=0.005)


@pytest.mark.parametrize("name", ["visionselector", "covipal", "atp-llava", "ordered-queries"])
def test_methods_that_nobody_trained_are_refused(loaded, name):
    """Not run, which would make them look bad, and not for a reason that is untrue."""
    keeps = [cell.keep for cell in cells(make(loaded, methods=(name,)).settings)]
    outcome = make(loaded).run(Cell(name, keeps[-1], "color"))
    assert outcome.status == "refused"
    assert outcome.error.startswith(f"{name} learns parameters, which would be untrained here")


def test_a_method_that_needs_a_number_of_tokens_is_refused(loaded):
    """Not run with all tokens, beside methods that remove some."""
    keeps = [cell.keep for cell in cells(make(loaded, methods=("m3",)).settings)]
    outcome = make(loaded).run(Cell("m3", keeps[-1], "color"))
    assert outcome.status == "refused"
    assert outcome.error.startswith("m3 removes nothing unless keep says to how many tokens")


def test_the_map_of_fastv_leans_to_one_half_and_that_of_a_grid_does_not(loaded):
    """A regular grid keeps as much above as below."""
    runner = make(loaded, samples=8, batch=8)
    balance = {}
    for name in ("fastv", "uniform"):
        found = runner.run(Cell(name, 0.25, "color")).survival.to_dict()
        assert sum(found["lifetimes"]) / 256 == pytest.approx(0.25, abs=0.01)
        upper, lower = halves(found["height"], found["width"], found["lifetimes"])
        balance[name] = abs(upper - lower) / 0.25
    assert balance["uniform"] < 0.05 < balance["fastv"]


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    runner, store, keys = finished
    summary = summarise(store.get(keys))
    path = tmp_path_factory.mktemp("page") / "report.html"
    shots = draw(runner, summary, 0.25, tasks=1)
    assert shots
    write(path, summary, Facts("tiny", "foveate bench", len(keys)), shots)
    return path


def test_the_report_is_one_file_and_well_formed(page):
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert all(link.startswith(("data:", "#")) for link in reader.links)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    for part in ("fastv", "evs", "all tokens", "most common answer", "foveate bench"):
        assert part in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs headless Chromium")
def test_a_browser_renders_the_report(page, tmp_path):
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
        f"--user-data-dir={tmp_path}", f"file://{page}",
    ]  # fmt: skip
    out = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True).stdout
    assert out.count("<circle") >= 4


def test_first_tokens_are_timed_beside_all_tokens(finished):
    runner = finished[0]
    times = time_first_tokens(runner, "color", [("fastv", 0.25)], repeats=1)
    assert all(ms > 0 for ms in times["fastv", 0.25])


def test_methods_without_a_budget_run_once(loaded):
    plan = list(cells(make(loaded, methods=("yopo", "fastv"), keeps=(0.5, 0.25)).settings))
    assert plan.count(Cell("yopo", None, "color")) == 1
    assert Cell("yopo", 0.5, "color") not in plan
