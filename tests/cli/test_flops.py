"""`foveate flops` counts from configs alone."""

import importlib.util
import json
import re

import pytest
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
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


def test_the_embedded_model_for_videos_is_not_counted_for_images():
    result = run("small-video", "-m", "vidcom2")
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "`small-video` takes videos and no images; `small` is the same model" in result.stderr


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


VISION = importlib.util.find_spec("torchvision") is not None
NEEDING = ("moonshotai/Kimi-K2.6", "LiquidAI/LFM2-VL-1.6B")  # torchvision, for their processors


@pytest.mark.parametrize(
    "name",
    [n for n, c in checkpoints().items() if c.model_type != "vit" and (VISION or n not in NEEDING)],
)
def test_every_bundled_checkpoint_is_counted(tmp_path, name):
    found = numbers(tmp_path, name, "-m", "pyramiddrop", "--image-size", "448x336")
    assert found["flops"]["after"]["total"] < found["flops"]["before"]["total"]
    assert found["kv_bytes"]["after"] < found["kv_bytes"]["before"]


@pytest.mark.parametrize("name", NEEDING)
def test_a_processor_that_needs_torchvision_says_so(monkeypatch, name):
    """As where it is not installed."""
    kinds = IMAGE_PROCESSOR_MAPPING_NAMES[checkpoints()[name].model_type]

    def refuse(**_):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr(transformers, kinds["torchvision"], refuse, raising=False)
    done = run(name, "-m", "pyramiddrop")
    assert done.exit_code == 2
    assert f"processor of {name} needs torchvision" in " ".join(done.output.split())


def test_layers_that_share_keys_promise_no_saving(tmp_path):
    """The last 18 of 42 layers of Gemma 4 E4B compute the last token of a prompt alone."""
    name = "google/gemma-4-E4B-it"
    found = numbers(tmp_path, name, "-m", "fastv", "--set", "keep=0.25")
    assert found["visual_tokens"] == [256] * 6 + [64] * 18 + [0] * 18
    before, after = (found["flops"][when]["layers"] for when in ("before", "after"))
    for layer in range(24, 42):  # one query fewer keys of its donor, of 8 heads
        head = 512 if layer % 6 == 5 else 256
        assert before[layer] - after[layer] == 4 * 8 * head * (256 - 64)
        assert before[layer] < before[layer % 6 + 6] / 100
    slots = [(2 if layer % 6 == 5 else 1) * 2 * 2 * 256 * 2 for layer in range(24)]
    assert found["kv_bytes"]["before"] == sum(slots) * (256 + 64)
    assert found["kv_bytes"]["after"] == sum(slots[:6]) * (256 + 64) + sum(slots[6:]) * (64 + 64)
    shown = " ".join(run(name, "-m", "fastv", "--set", "keep=0.25").output.split())
    assert re.search(r"24-41 last token 181\.93 MFLOPs to 203\.95 MFLOPs", shown)
    assert "layers from 24 on read the keys of earlier layers" in shown
    assert "nothing was downloaded; its audio encoder is left out" in shown


def test_a_running_state_is_as_large_with_fewer_tokens(tmp_path):
    """Three of four layers of Qwen3.5 hold no slots, but 48 matrices of 128 by 128 in 32 bits, and
    four tokens of a convolution in 16.
    """
    name = "Qwen/Qwen3.5-27B"
    found = numbers(tmp_path, name, "-m", "fastv", "--set", "keep=0.25")
    slots = sum(n + 64 for n in found["visual_tokens"][3::4])
    assert found["kv_bytes"]["after"] == slots * 2 * 4 * 256 * 2
    assert found["kv_bytes"]["before"] == 16 * (found["visual_tokens"][0] + 64) * 2 * 4 * 256 * 2
    channels = 2 * 16 * 128 + 48 * 128
    assert found["state_bytes"] == 48 * (48 * 128 * 128 * 4 + channels * 4 * 2)
    assert numbers(tmp_path, LLAVA, "-m", "fastv")["state_bytes"] == 0
    shown = run(name, "-m", "fastv").output
    assert re.search(r"state of recurrent layers +147\.75 MiB +147\.75 MiB +100\.0%", shown)


def test_layers_that_see_as_many_tokens_share_a_line():
    shown = run("Qwen/Qwen3.5-27B", "-m", "fastv", "--set", "keep=0.25").output
    assert re.search(r"4-63 +110 +24\.9% +129\.92 GFLOPs to 134\.39 GFLOPs", shown)


def test_formulas_of_papers_are_refused_where_layers_have_no_attention():
    done = run("Qwen/Qwen3.5-35B-A3B", "-m", "pyramiddrop", "--convention", "fastv")
    assert done.exit_code == 2
    assert "layers of GatedDeltaNet" in " ".join(done.output.split())
