"""Two processes train as one does: DDP and FSDP2 on gloo, with unlike image counts per rank."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import foveate

if not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

TWO = {"per_device_train_batch_size": 1, "use_cpu": True, "ddp_backend": "gloo"}
SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def train(path, processes=1):
    """Run `foveate train`, in one process or under torchrun."""
    root = str(Path(foveate.__path__[0]).parent)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", "foveate", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return torch.tensor([row["loss"] for row in state["log_history"] if "loss" in row])


def weights(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Output folders by method of one process, made when first asked for."""
    return {"root": tmp_path_factory.mktemp("alone")}


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_learn_what_one_learns(sharded, alone, recipe_file, tmp_path):
    """Each rank sees another number of visual tokens; losses and weights are those of one."""
    one, two = alone["root"] / "one", tmp_path / "two"
    if not one.exists():
        train(recipe_file("one.yaml", out=str(one)))
    more = {**TWO, **(SHARDED if sharded else {})}
    train(recipe_file("two.yaml", out=str(two), trainer=more), processes=2)
    assert len(losses(one)) == 3
    torch.testing.assert_close(losses(two), losses(one), rtol=0, atol=1e-6)
    got, want = weights(two), weights(one)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)
    again = foveate.load(two)
    torch.testing.assert_close(again.state_dict(), got)
    assert json.loads((two / "foveate.json").read_text())["methods"][0]["method"] == "pyramiddrop"


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ({"name": "visionselector", "inner": 8}, "method"),
        ({"name": "m3", "scales": [256, 64, 16, 4, 1]}, "all"),
    ],
    ids=["visionselector", "m3"],
)
def test_two_processes_teach_a_method_what_one_does(method, trained, recipe_file, tmp_path):
    """Losses of methods and steps of several forwards are those of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    what = {"method": method, "train": trained}
    train(recipe_file("one.yaml", out=str(one), **what))
    train(recipe_file("two.yaml", out=str(two), trainer=TWO, **what), processes=2)
    torch.testing.assert_close(losses(two), losses(one), rtol=0, atol=1e-6)
    got, want = (foveate.load(folder).state_dict() for folder in (two, one))
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)


def test_a_sharded_run_goes_on_where_it_was_cut_off(recipe_file, tmp_path):
    """What is left of a run after a checkpoint ends with the weights of the whole run."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trainer = {**TWO, **SHARDED, "save_steps": 2}
    train(recipe_file("whole.yaml", out=str(whole), trainer=trainer), processes=2)
    cut.mkdir()
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    written = (cut / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns
    shutil.copy(whole / "recipe.json", cut)
    train(recipe_file("cut.yaml", out=str(cut), trainer=trainer), processes=2)
    assert (cut / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == written
    torch.testing.assert_close(losses(cut), losses(whole), rtol=0, atol=1e-6)
    got, want = weights(cut), weights(whole)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=2e-6, msg=name)
