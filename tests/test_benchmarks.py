"""The page of measurements says what the result files say."""

import importlib.util
import json
import re
import sys
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch

from foveate.families import FAMILIES
from foveate.families.pi0 import Pi0
from foveate.families.plain import PlainEncoder
from foveate.families.retrieval import Retriever
from foveate.io.labels import meet

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def table():
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_made_from_the_results(table):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page == table.page(), "run python benchmarks/table.py"


def test_the_page_on_segmentation_is_made_from_the_results():
    script = _script("dtop_figure")
    result = json.loads(script.RESULT.read_text())
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(page, result), "run python benchmarks/dtop_figure.py"
    assert script.FIGURE.read_text() == script.figure(result)
    for of in result["results"]:
        rows = of["rows"]
        assert rows[0]["threshold"] == 1.0
        assert rows[0]["left"] == [0.0, 0.0]
        assert all(one["gflops"] >= two["gflops"] for one, two in pairwise(rows))


def test_the_page_on_tuning_is_made_from_the_results():
    script = _script("tune_page")
    page = script.PAGE.read_text(encoding="utf-8")
    made = script.page(page, json.loads(script.RESULT.read_text()))
    assert page == made, "run python benchmarks/tune_page.py"


def test_the_figures_on_policies_are_made_from_the_results():
    script = _script("adaptive_page")
    page = script.PAGE.read_text(encoding="utf-8")
    made = script.page(page, json.loads(script.RESULT.read_text()))
    assert page == made, "run python benchmarks/adaptive_page.py"


def test_the_figures_on_learning_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = _script("learning_page")
    result = json.loads(script.RESULT.read_text())
    page = script.PAGE.read_text(encoding="utf-8")
    assert page == script.page(page, result), "run python benchmarks/learning_page.py"
    assert script.FIGURE.read_text() == script.figure(result)


def test_gains_of_learning_are_paired_by_question(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = _script("learning_page")
    assert script.gain([[1, 1, 0, 1], [1, 0, 0, 1]], [[0, 1, 0, 1]]).startswith("+12.5 (")
    assert script.gain([[1, 0, 1]], [[1, 0, 1]]) == "+0.0 (+0.0 to +0.0)"


def test_the_page_on_choosing_is_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = _script("choose")
    text = script.PAGE.read_text(encoding="utf-8")
    assert text == script.page(text), "run python benchmarks/choose.py"
    assert script.FIGURE.read_text() == script.figure()


def test_the_page_on_choosing_names_the_most_accurate_that_is_cheap_enough(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = _script("choose")
    found = [("a", 0.5, 0.9, 0.6), ("a", 0.25, 0.8, 0.4), ("b", 0.5, 0.85, 0.5), ("c", 0.5, 1, 0.4)]
    names = ("method", "keep", "accuracy", "flops")
    lines = [dict(zip(names, row, strict=True)) for row in found]
    for most, best in ((0.65, [("a", 0.5), ("b", 0.5)]), (0.5, [("b", 0.5), ("a", 0.25)])):
        chosen = script.fitting(lines, {"a", "b"}, most)
        assert [(x["method"], x["keep"]) for x in chosen] == best


def test_names_in_the_picture_do_not_overlap(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = _script("choose")
    texts = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" fill="[^"]+">(.*?)<', script.figure())
    shown = [x for x in script.load("quality")["lines"] if x["keep"] == script.SHOWN]
    assert len(texts) == len(shown) > 20
    boxes = [(float(x), float(y), float(x) + 5.5 * len(n), float(y) + 12) for x, y, n in texts]
    for one, two in combinations(boxes, 2):
        assert not meet(one, two)


def test_the_published_figures_are_those_of_the_script():
    published = _script("published")
    page = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    found = page.split(published.BEGIN)[1].split(published.END)[0]
    assert found == published.table(), "run python benchmarks/published.py --write"
    stages = {row.what: row for row in published.pyramiddrop()}
    for number, flops in ((3, 2.13), (4, 1.78), (5, 1.38)):
        row = stages[f"LLaVA-1.5-7B, {number} stages"]
        assert abs(row.ours - flops) < 0.02
    assert all(row.why for row in published.rows())


def test_what_was_chosen_with_a_figure_in_view_says_so():
    """And what something else would give; so do lengths of texts that nobody published."""
    published = _script("published")
    chosen = {(row.method, row.what.rpartition(", ")[2]) for row in published.rows() if row.chosen}
    assert {("PyramidDrop", "3 stages"), ("PyramidDrop", "5 stages")} <= chosen
    assert ("PyramidDrop", "4 stages") not in chosen
    assert {row.what for row in published.rows() if row.method == "GTP-ViT" and row.chosen} == {
        "DeiT-S, saved", "DeiT-B, saved",
    }  # fmt: skip
    for row in published.rows():
        assert bool(row.chosen) == ("**chosen**" in row.cells[-1])
        assert not row.chosen or "give" in row.chosen or "alone" in row.chosen
        assert "text tokens" not in row.why or "release" in row.why


def _script(name):
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Still to be measured, with `python benchmarks/families.py --family NAME`.
UNMEASURED = ("apertus1p5",)


def test_every_family_was_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    elsewhere = (PlainEncoder, Retriever, Pi0)  # the last in robots.json
    unread = {n for n, kind in FAMILIES.items() if issubclass(kind, elsewhere)}
    assert tuple(sorted(set(FAMILIES) - unread - set(result["rows"]))) == UNMEASURED


@pytest.mark.parametrize("name", ["dots3_note", "gemma4_unified", "unlimited_ocr"])
@torch.inference_mode()
def test_every_cache_layer_is_cut_as_short_as_a_session_leaves_it(monkeypatch, name):
    """And every layer gets a mask of as many columns."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("_bench.warm_heap", lambda: None)
    script, families = _script("families"), importlib.import_module("_families")
    model = families.random_model(name, 64, 7)
    inputs, token = families.prompt(model, 36), {"input_ids": torch.tensor([[7]])}
    cut = [0, 5, 5, 5, 5, 9, 20]
    assert script.gives_masks(model, inputs)
    run = script.Contender(inputs, cut=cut, masked=True)
    run.cache = script.DynamicCache(config=model.config.get_text_config())
    run.forwards(model, [inputs])
    run.shorten()
    run.forwards(model, [token, token])
    assert [script.slots_of(layer) for layer in run.cache.layers] == [102 - n for n in cut]


def test_a_row_measured_with_less_effort_says_so(table):
    result = {"runs": 3, "rounds": 3}
    assert table._label("llava", result, {}) == "`llava`"
    assert table._label("llava", result, {"runs": 1, "rounds": 1}) == "`llava` (1 x 1)"
    assert table._label("llava", result, {"machine": {"commit": "1", "cpu": "x"}}) == "`llava` (x)"


def test_a_row_measured_later_leaves_the_others(monkeypatch, tmp_path):
    """And says which effort and machine are not those of the file."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("_bench.warm_heap", lambda: None)
    script = _script("families")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    here = script.machine()
    old = {"machine": {**here, "cpu": "another"}, "runs": 3, "rounds": 3, "rows": {"b": {"x": 1}}}
    (tmp_path / "families.json").write_text(json.dumps(old))
    script.save_row("a", {"x": 2}, {"runs": 1, "rounds": 3})
    new = json.loads((tmp_path / "families.json").read_text())
    row = {"x": 2, "runs": 1, "machine": {"cpu": here["cpu"]}}
    assert new == {**old, "rows": {"a": row, "b": {"x": 1}}}


SPREAD = {"median": 2.0, "q25": 1.9, "q75": 2.1}
SLOW = {"median": 0.9, "q25": 0.8, "q75": 0.95}
SIZES = {"peak_bytes": 3 << 20, "kv_bytes": 1 << 20}
RATES = {"ttft_ms": SPREAD, "prefill_ms": SPREAD, "decode_tokens_per_s": SPREAD}


def speed_result():
    """What the benchmark of speed writes: a cell with a loss, and one that did not fit."""
    method = {
        **RATES, **SIZES, "speed_up": dict.fromkeys(("ttft", "prefill", "throughput"), SPREAD)
        | {"decode": SLOW}, "prefill_of_predicted": 0.97, "slower": ["decode"],
    }  # fmt: skip
    rows = {"all tokens": {**RATES, **SIZES, "tokens_per_s": SPREAD}, "fastv": method}
    cell = {"tokens": 576, "visual_tokens": 576, "batch": 2, "rows": rows, "cut": "3 of 20 repeats"}
    names = ("text", "repeats", "new_tokens", "dtype", "attention", "time", "heap", "memory")
    return {
        "machine": {"cpu": "a processor", "torch": "2", "transformers": "5"},
        "settings": {**dict.fromkeys(names, "x"), "new_tokens": 4},
        "cells": [cell, {"tokens": 576, "batch": 32, "error": "out of memory"}],
    }


def test_losses_of_speed_are_bold_and_listed(table):
    text = "\n".join(table._speed_part(speed_result()))
    assert "| 576 x 2 | fastv | 2.00x (1.90 to 2.10) |" in text
    assert "**0.90x (0.80 to 0.95)**" in text
    assert "Slower than with all tokens: fastv at 576 x 2 (decode)." in text
    assert "| 576 x 32 | out of memory |" in text
    assert "576 x 2: 3 of 20 repeats." in text


def test_what_was_not_measured_says_so(table, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = table.speed()
    assert text.count("**not measured**") == len(table.ON_CPU) + len(table.ON_GPU)
    assert "qwen3-vl-4b, 1920 visual tokens, GPU" in text


@torch.no_grad()
def test_methods_choose_what_the_transcriptions_that_time_them_choose():
    """What the benchmark of selection compares, at a small size."""
    selection = _script("selection")
    known = selection.cases()
    assert len(known) > 20
    for name, (transcription, inputs, make) in known.items():
        tensors = inputs(64, 2, torch.Generator().manual_seed(0))
        keep = selection._total(tensors) // 4
        plain = [transcription(image, keep) for image in selection.alone(tensors)]
        assert selection.agree(make(keep), tensors, keep, plain), name


def test_selection_says_which_rows_are_of_an_earlier_run():
    """Once measured anew, a method is of the last run."""
    script = _script("selection")
    first = {"machine": {"commit": "1", "torch": "2"}, "methods": {"a": [], "b": [], "c": []}}
    runs = script.earlier(first, {"c"})
    assert runs == [{"machine": first["machine"], "methods": ["a", "b"]}]
    second = {**first, "machine": {"commit": "3", "torch": "2"}, "earlier": runs}
    assert [run["methods"] for run in script.earlier(second, {"b"})] == [["a"], ["c"]]
    said = script.remarks(second)
    assert said[-2:] == ["Measured at commit 1: `a`, `b`.", "Measured at commit 3: `c`."]
    assert not any("commit" in line for line in script.remarks(first))
    assert script.earlier(second, {"a", "b", "c"}) == script.earlier({}, {"a"}) == []


def test_page_on_serving_shows_the_results():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    for row in json.loads((results / "vllm_serving.json").read_text())["rows"]:
        keep = "all" if row["keep"] == 1 else row["keep"]
        begin = f"| {row['images']} | {row['in_flight']} | {keep} |"
        assert f"{begin} {row['requests_per_s']:.2f} | {_times(row)}" in page
    for row in json.loads((results / "serving.json").read_text())["rows"]:
        figures = f"{row['requests_per_s']:.2f} | {row['first_token_s']:.2f} s"
        assert re.search(
            rf"^\| {row['in_flight']} \| [^|]* \| {re.escape(figures)} .*{_times(row)}",
            page,
            re.MULTILINE,
        )


def _times(row):
    """A speed-up as the page shows it; nothing for what others are compared with."""
    if row["speedup"]["least"] == row["speedup"]["most"] == 1:
        return ""
    return f"{row['speedup']['median']:.2f}x"
