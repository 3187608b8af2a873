"""`make real`: accuracy through lmms-eval and speed of a real model, in one table."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from foveate import tiny
from foveate.errors import FoveateError, InputError

ROOT = Path(__file__).parents[1]
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
TASK = """
task: scenes
dataset_path: {data}
test_split: train
output_type: generate_until
doc_to_visual: !function scenes.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "answer"
generation_kwargs:
  max_new_tokens: 3
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def real(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("real")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("_real_table")


@pytest.fixture
def folder(tmp_path):
    """Drawn scenes in the form of a local task of lmms-eval."""
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for seed in range(40, 52):
        scene = tiny.draw_scene(seed)
        question = next(q for q in scene.questions if q.answer.isalpha())
        scene.image.save(data / f"{seed}.png")
        rows.append(
            {"file_name": f"{seed}.png", "question": question.text, "answer": question.answer}
        )
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scenes.py").write_text(
        "def visual(document):\n    return [document['image'].convert('RGB')]\n"
    )
    (tmp_path / "scenes.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_data_are_names_or_a_folder_of_tasks(real, folder):
    assert real.tasks_of("pope, gqa") == (["pope", "gqa"], [])
    assert real.tasks_of(str(folder)) == (["scenes"], ["--include_path", str(folder)])
    with pytest.raises(InputError, match="holds no task files"):
        real.tasks_of(str(folder / "data"))
    with pytest.raises(InputError, match="there is no folder"):
        real.tasks_of("/no/such/folder")
    with pytest.raises(InputError, match="takes names"):
        real.tasks_of("")


def test_scores_are_percent_of_what_was_asked(real):
    assert real.score("pope", {"pope_f1_score,none": 0.5, "pope_accuracy,none": 0.25}, 0) == 25
    assert real.score("mine", {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1}, 0) == 50
    whole = real.score("ocrbench", {"ocrbench_accuracy,none": 0.3}, 0)
    part = real.score("ocrbench", {"ocrbench_accuracy,none": 0.3}, 500)
    assert (whole, part) == (pytest.approx(30), pytest.approx(60))  # lmms-eval divides by 1,000
    with pytest.raises(FoveateError, match="no score of gqa; it gave alias"):
        real.score("gqa", {"alias": "gqa"}, 0)


def test_the_reason_of_a_failure_is_its_error(real):
    said = "Traceback\n  x\nfoveate.errors.InputError: evs compares frames\nsome warning\n"
    assert real.reason(said) == "evs compares frames"
    assert real.reason("killed\n") == "killed"
    assert real.reason("") == "lmms-eval said nothing"


def test_finished_cells_are_not_measured_again_and_failed_ones_are(real, monkeypatch, tmp_path):
    given = real.arguments([
        "--model", "m", "--data", "pope", "--methods", "random,evs", "--budgets", "64",
        "--device", "cpu", "--out", str(tmp_path / "real.json"),
    ])  # fmt: skip
    asked = []

    def evaluate(given, arguments):
        asked.append(arguments)
        if "evs" in arguments:
            raise FoveateError("evs compares frames")
        return {"pope": 80.0}

    monkeypatch.setattr(real, "evaluate", evaluate)
    result = real.begin(given)
    real.accuracy(given, result)
    assert asked == [
        "pretrained=m", "pretrained=m,method=random,keep=64", "pretrained=m,method=evs,keep=64",
    ]  # fmt: skip
    assert result["cells"]["evs at 64"] == {"error": "evs compares frames"}
    asked.clear()
    again = real.begin(given)
    assert again == json.loads(json.dumps(result))
    real.accuracy(given, again)
    assert asked == ["pretrained=m,method=evs,keep=64"]
    with pytest.raises(InputError, match="other limit"):
        real.begin(SimpleNamespace(**{**vars(given), "limit": 7}))


RESULT = {
    "model": "llava-hf/llava-1.5-7b-hf", "tasks": ["pope", "gqa"], "limit": 500,
    "machine": {"cpu": "c", "gpu": "a card", "torch": "2", "transformers": "5"},
    "cells": {
        "all tokens": {"scores": {"pope": 80.0, "gqa": 60.0}},
        "visionzip at 64": {"scores": {"pope": 40.0, "gqa": 60.0}},
        "evs at 64": {"error": "evs compares frames"},
    },
    "speed": {"64": {"visionzip": {"median": 3.0, "q25": 2.9, "q75": 3.1}}},
}  # fmt: skip


def test_the_table_has_scores_average_speed_and_what_was_published(table):
    page = table.section([RESULT])
    assert "a card" in page
    assert "| 64 | `visionzip` | 40.0 | 60.0 | 75.0 % | 3.00x | GQA 55.1, POPE 77.0," in page
    assert "| 64 | `evs` | evs compares frames |" in page
    assert "| all | all tokens | 80.0 | 60.0 | 100.0 % |  | GQA 61.9" in page
    assert page.count("Nobody has run it yet") == 1  # of Qwen2.5-VL


def test_an_average_needs_every_task(table):
    assert table.average({"a": 1.0}, {"a": 2.0, "b": 2.0}) is None
    assert table.average({"a": 1.0}, {"a": 0.0}) is None
    assert table.average({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 3.0}) == 75


def test_pages_of_results_are_up_to_date_and_say_that_nobody_has_run_it(table):
    quality = importlib.import_module("quality")
    for path, made in ((quality.PAGE, quality.page()), (quality.REAL_PAGE, quality.real_page())):
        assert path.read_text(encoding="utf-8") == made, "run python benchmarks/quality.py"
    if not quality.measured():
        assert quality.real_page().count("**Nobody has run it yet.**") == 2


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval: see scripts/lmms_eval.sh")
@pytest.mark.lmms_eval
def test_a_local_model_and_task_go_through(folder):
    out = folder / "real.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "real.py"), "--model", str(tiny.PATH), "--data",
        str(folder), "--methods", "random,nosuch", "--budgets", "16", "--limit", "8", "--tokens",
        "256", "--repeats", "3", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    full = result["cells"]["all tokens"]["scores"]["scenes"]
    assert full > result["cells"]["random at 16"]["scores"]["scenes"]
    assert "unknown method 'nosuch'" in result["cells"]["nosuch at 16"]["error"]
    assert result["speed"]["16"]["random"]["median"] > 1
    assert f"| all | all tokens | {full:.1f} | 100.0 % |" in done.stdout
