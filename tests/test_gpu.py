"""What `make gpu` runs, as far as a CPU allows: every part at tiny sizes, and the targets."""

import importlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from foveate.methods import DivPrune, FastV

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SPREAD = {"median": 1.7, "q25": 1.6, "q75": 1.8}


@pytest.fixture
def script(monkeypatch):
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def checks(script, monkeypatch):
    """The checks, on one small model and two methods."""
    module = script("_gpu_checks")
    monkeypatch.setattr(module, "MODELS", {"small": module.small_qwen})
    monkeypatch.setattr(
        module, "READING", {"qwen3_vl": (DivPrune(keep=0.5), FastV(layer=3, keep=0.5))}
    )
    return module


def run(*options, **variables):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# -- parts


def test_every_stage_and_kernel_is_compared(checks, monkeypatch):
    rows = checks.correctness(CPU)["rows"]
    ran = [row for row in rows if "skipped" not in row]
    assert {row["kernel"] for row in ran} == {"sdpa, float32", "sdpa flash, bfloat16"}
    assert {"fixed, vision", "fixed, pre_llm", "fixed, llm", "divprune", "fastv"} == {
        row["method"] for row in ran
    }
    assert all(row["ok"] for row in ran), ran
    assert any("skipped" in row for row in rows)  # flash_attention_2 runs on CUDA alone


def test_answers_that_differ_are_seen(checks, monkeypatch):
    """Wrong after the first decoding step of a pruned cache, and by little."""
    right = checks.answer

    def wrong(model, inputs, method):
        logits, kept = right(model, inputs, method)
        if method is not None and model.config.get_text_config()._attn_implementation != "eager":
            logits = torch.cat((logits[:, :2], logits[:, 2:] * 1.1), 1)
        return logits, kept

    monkeypatch.setattr(checks, "answer", wrong)
    rows = [row for row in checks.correctness(CPU)["rows"] if "skipped" not in row]
    assert sum(row["distance"] is not None for row in rows) >= 8
    assert not any(row["ok"] for row in rows if row["distance"] is not None)


def test_a_kernel_that_cannot_serve_is_a_failure(checks, monkeypatch):
    kernel = checks.Kernel("cudnn", "sdpa", torch.float32, (checks.SDPBackend.CUDNN_ATTENTION,))
    monkeypatch.setattr(checks, "KERNELS", (kernel,))
    monkeypatch.setattr(checks, "answer", _refusing(checks.answer))
    (row,) = checks.correctness(CPU)["rows"]
    assert row["ok"] is False
    assert row["error"] == "No available kernel."


def _refusing(answer):
    def refuses(model, inputs, method):
        if model.config.get_text_config()._attn_implementation == "sdpa":
            raise RuntimeError("No available kernel. Aborting execution.".replace(" Ab", "\nAb"))
        return answer(model, inputs, method)

    return refuses


def test_other_tokens_than_the_references_are_seen(checks):
    same = [{"llm:2": torch.tensor([1, 4, 5])}]
    assert checks.shared(same, same) == 1.0
    assert checks.shared([{"llm:2": torch.tensor([1, 4, 6])}], same) == pytest.approx(2 / 3)


def test_on_cuda_torch_says_where_the_host_waits(script, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    there = script("_waits").machine(torch.device("cuda"))
    with there as machine, machine.waits() as found:
        for text in ("called a synchronizing CUDA operation (x)", "another"):
            warnings.warn_explicit(text, UserWarning, "/site/foveate/engine/masks.py", 34)
    assert modes == ["warn", 0]
    assert found["total"] == 1
    assert found["places"] == {"foveate/engine/masks.py:34": 1}
    assert set(found["profiler"]) > {"cudaStreamSynchronize"}


def test_synchronisations_are_those_beyond_the_bare_model(checks):
    bare, *rows = checks.synchronisations(CPU)["rows"]
    assert bare["method"] == "all tokens"
    assert {row["stage"] for row in rows} == {"pre_llm", "llm"}
    for row in rows:
        assert row["added"] == row["total"] - bare["total"]
        assert sum(row["places"].values()) == row["total"]


@pytest.mark.parametrize("part", ["decoding", "selection", "training"])
def test_parts_of_speed_run(script, part):
    result = getattr(script("_gpu_speed"), part)(CPU)
    assert json.loads(json.dumps(result)) == result
    if part == "selection":
        medians = result["prefill_ms"]
        assert set(medians) == {"all tokens", "dart", "spaced"}
    if part == "training":
        assert result["peak_bytes"]["pyramiddrop"] < result["peak_bytes"]["all tokens"]


def test_sweeps_have_the_published_prompt(script):
    job = script("_gpu_speed").SIZES["cuda"].sweeps["speed_gpu_qwen3_vl_4b"]
    assert int(job.tokens) + job.text == 1995
    assert job.batch == "1,2,4,8,16,32"


# -- the command


def test_without_cuda_one_line_says_so(tmp_path):
    done = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")  # on a machine with one too
    assert done.returncode == 1
    assert done.stderr == (
        "error: device 'cuda' was asked for, but torch sees no CUDA device here\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_was_cut_off_is_run_again_and_others_are_not(tmp_path, script, monkeypatch):
    gpu = script("gpu")
    gpu.begin("cpu", tmp_path, fresh=False)
    monkeypatch.setitem(gpu.LIMITS, "decoding", 0.001)
    gpu.supervise("decoding", "cpu", tmp_path)
    assert "ran past 0.001 minutes" in gpu.read(tmp_path)["parts"]["decoding"]["error"]
    gpu.keep(tmp_path, "selection", {"result": {"mark": 1}})
    done = run("--device", "cpu", "--out", str(tmp_path), "--only", "decoding,selection")
    assert done.returncode == 1  # the marked result is none
    assert "other versions" not in done.stderr
    parts = gpu.read(tmp_path)["parts"]
    assert parts["selection"] == {"result": {"mark": 1}}
    assert set(parts["decoding"]["result"]["rows"]) == {"fastv", "pyramiddrop"}
    assert "selection, at most" not in done.stdout


def test_results_of_another_machine_are_not_mixed(tmp_path, script):
    gpu = script("gpu")
    gpu.begin("cpu", tmp_path, fresh=False)
    path = tmp_path / gpu.FILE
    kept = json.loads(path.read_text())
    kept["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"with other versions \(torch\)"):
        gpu.begin("cpu", tmp_path, fresh=False)
    gpu.begin("cpu", tmp_path, fresh=True)


def test_a_part_that_breaks_leaves_its_reason(tmp_path, script, monkeypatch):
    gpu = script("gpu")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "work", full)
    gpu.run_part("training", "cpu", tmp_path)
    assert gpu.read(tmp_path)["parts"]["training"]["error"] == "out of memory"
    assert not gpu.show(tmp_path, "cpu")


def test_all_takes_at_most_25_minutes(script):
    assert sum(script("gpu").LIMITS.values()) <= 25


# -- targets

GOOD = {
    "correctness": {"rows": [{"kernel": "a", "ok": True}, {"kernel": "b", "skipped": "x"}]},
    "synchronisations": {"rows": [{"added": 2, "method": "m", "model": "n"}]},
    "decoding": {"rows": {"fastv": {"overhead_us": {**SPREAD, "median": 20.0}}}},
    "selection": {"speed_up": SPREAD, "prompt_tokens": 1995,
                  "selection_ms": {**SPREAD, "median": 2.0}},
    "training": {"speed_up": SPREAD, "peak_bytes": {"all tokens": 2, "pyramiddrop": 1}},
    "sweeps": {"a": {"cells": [
        {"visual_tokens": 9, "batch": 4, "rows": {"dart": {"slower": []}}},
    ]}},
}  # fmt: skip
BAD = {
    "correctness": {"rows": [{"kernel": "a", "ok": True}, {"kernel": "a", "ok": False}]},
    "synchronisations": {"rows": [{"added": 3, "method": "m", "model": "n"}]},
    "decoding": {"rows": {"fastv": {"overhead_us": {**SPREAD, "median": 20.1}}}},
    "selection": {"speed_up": {**SPREAD, "median": 1.69}, "prompt_tokens": 1995,
                  "selection_ms": {**SPREAD, "median": 2.01}},
    "training": {"speed_up": SPREAD, "peak_bytes": {"all tokens": 1, "pyramiddrop": 2}},
    "sweeps": {"a": {"cells": [
        {"visual_tokens": 9, "batch": 4, "rows": {"dart": {"slower": ["decode"]}}},
    ]}},
}  # fmt: skip


@pytest.mark.parametrize(("results", "met"), [(GOOD, True), (BAD, False), ({}, None)])
def test_targets_are_met_missed_or_unknown(script, results, met):
    verdicts = script("_gpu_targets").judged(results)
    assert [one.met for one in verdicts] == [met] * len(verdicts)
    assert all(bool(one.measured) == (met is not None) for one in verdicts)


def test_page_says_that_nobody_has_run_it_or_what_was_measured(script, monkeypatch, tmp_path):
    table, gpu = script("table"), script("gpu")
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    assert "Nobody has run it yet" in table.gpu()
    assert "|  |  |" in table.gpu()
    gpu.begin("cpu", tmp_path, fresh=False)
    gpu.keep(tmp_path, "selection", {"result": BAD["selection"]})
    gpu.keep(tmp_path, "training", {"error": "out of memory"})
    page = table.gpu()
    assert "Nobody" not in page
    assert "| at most 2 ms | 2.01 ms (1.60 to 1.80) | **no** |" in page
    assert "training: out of memory." in page
