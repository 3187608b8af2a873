"""`foveate flops` counts from configs alone."""

import json
import re

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.measure.checkpoints import checkpoints

LLAVA = "llava-hf/llava-1.5-7b-hf"


def run(*arguments):
    return CliRunner().invoke(app, ["flops", *arguments])


def numbers(tmp_path, *arguments):
    path = tmp_path / "flops.json"
    done = run(*arguments, "--json", str(path))
    assert done.exit_code == 0, done.output
    return json.loads(path.read_text())


def test_pyramiddrop_costs_what_its_paper_says(tmp_path):
    found = numbers(tmp_path, LLAVA, "-m", "pyramiddrop", "--convention", "pyramiddrop")
    assert found["visual_tokens"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert found["flops"]["before"]["total"] / 1e12 == pytest.approx(3.82, abs=0.005)
    assert found["flops"]["after"]["total"] / 1e12 == pytest.approx(1.78, abs=0.005)


def test_parts_add_up(tmp_path):
    work = numbers(tmp_path, LLAVA, "-m", "fastv", "--keep", "0.25")["flops"]["after"]
    parts = [work[name] for name in ("tower", "projector", "selection", "prefill")]
    assert work["total"] == sum(parts)
    assert min(parts) > 0
    assert work["prefill"] == sum(work["layers"]) + work["head"]


def test_multiply_adds_are_half_of_what_torch_counts(tmp_path):
    dense = numbers(tmp_path, LLAVA, "-m", "fastv", "--convention", "dense")["flops"]["after"]
    macs = numbers(tmp_path, LLAVA, "-m", "fastv", "--convention", "macs")["flops"]["after"]
    assert 2 * macs["total"] == dense["total"]


def test_the_embedded_model_is_counted_from_its_folder():
    done = run("tiny", "-m", "fastv", "--set", "layer=3", "--decode")
    assert done.exit_code == 0
    assert re.search(r"one decoding step", done.output)


def test_what_cannot_be_read_is_said():
    done = run(LLAVA, "-m", "fastv", "--image-size", "12")
    assert done.exit_code == 2
    done = run(LLAVA, "-m", "fastv", "--convention", "none")
    assert done.exit_code == 2


def test_caches_of_layers_with_windows_hold_no_more(tmp_path):
    """Five of six layers of Gemma 3 see 1,024 tokens of eight images and some text."""
    found = numbers(tmp_path, "google/gemma-3-4b-it", "-m", "pyramiddrop", "--images", "8")
    assert found["visual_tokens"][0] == 8 * 256
    slot, held = 2 * 4 * 256 * 2, 0
    for layer, visual in enumerate(found["visual_tokens"]):
        held += visual + 64 if layer % 6 == 5 else min(visual + 64, 1023)
    assert found["kv_bytes"]["after"] == slot * held
    assert found["kv_bytes"]["before"] == slot * (5 * (8 * 256 + 64) + 29 * 1023)


@pytest.mark.parametrize("name", [n for n, c in checkpoints().items() if c.model_type != "vit"])
def test_every_bundled_checkpoint_is_counted(tmp_path, name):
    found = numbers(tmp_path, name, "-m", "pyramiddrop", "--image-size", "448x336")
    assert found["flops"]["after"]["total"] < found["flops"]["before"]["total"]
    assert found["kv_bytes"]["after"] < found["kv_bytes"]["before"]
