"""A run of `foveate train`: it learns, goes on after a kill, and its outcome loads."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from typer.testing import CliRunner

import foveate
from foveate.cli import app
from foveate.cli.recipe import read_recipe
from foveate.errors import InputError
from foveate.loading import load_model
from foveate.training.finetune.run import finetune, freeze, last_checkpoint
from tests.disks import fill, mounted


def train(path):
    recipe = read_recipe(path)
    return recipe.out, finetune(recipe, *load_model(recipe.model))


def weights(folder):
    return LlavaForConditionalGeneration.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where an uninterrupted run is kept for the tests that compare with it."""
    return {"out": tmp_path_factory.mktemp("whole") / "out"}


@pytest.fixture
def uninterrupted(whole, recipe_file):
    if not whole["out"].exists():
        train(recipe_file("whole.yaml", out=str(whole["out"])))
    return whole["out"]


def test_the_outcome_loads_with_and_without_foveate(uninterrupted, model_folder):
    plain, ours = weights(uninterrupted), foveate.load(uninterrupted)
    torch.testing.assert_close(ours.state_dict(), plain)
    changed = [
        name for name, value in weights(model_folder).items() if (value != plain[name]).any()
    ]
    assert any("language_model" in name for name in changed)
    assert any("vision_tower" in name for name in changed)
    assert AutoProcessor.from_pretrained(uninterrupted).chat_template
    assert (
        json.loads((uninterrupted / "recipe.json").read_text())["method"]["method"] == "pyramiddrop"
    )


def test_a_killed_run_goes_on_to_the_same_weights(uninterrupted, recipe_file, tmp_path):
    """The process is killed after its first checkpoint, without a chance to clean up."""
    path = recipe_file(trainer={"save_steps": 1, "logging_steps": 1})
    root = Path(foveate.__path__[0]).parent
    run = subprocess.Popen(
        [sys.executable, "-m", "foveate", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 1800
    while last_checkpoint(tmp_path / "out") is None and run.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    begun = last_checkpoint(tmp_path / "out")
    assert begun is not None
    said = CliRunner().invoke(app, ["train", str(path)])
    assert said.exit_code == 0, said.output
    assert "resuming from" in said.output
    steps = [line for line in said.stderr.splitlines() if line.startswith("step ")]
    assert steps[-1].startswith("step 3 of 3: loss ")
    assert "{" not in said.output  # the Trainer's own log
    got = weights(tmp_path / "out")
    for name, value in weights(uninterrupted).items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-7, msg=name)


def test_a_terminal_gets_one_bar_and_none_of_other_libraries(recipe_file):
    path = recipe_file(trainer={"save_steps": 1, "logging_steps": 1})
    command = [sys.executable, "-m", "foveate", "train", str(path)]
    seen, child = b"", pty.fork()
    if child[0] == 0:
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    with contextlib.suppress(OSError):  # the end of a terminal
        while part := os.read(child[1], 1 << 16):
            seen += part
    assert os.waitpid(child[0], 0)[1] == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert re.search(r"training, loss \d\.\d{3} .*0:00 left", text)
    assert "it/s" not in text
    assert "{" not in text


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path):
    for step, state in ((9, "{}"), (10, '{"global'), (100, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert last_checkpoint(tmp_path / "none") is None


def test_a_full_disk_leaves_the_outcome_of_an_earlier_run(recipe_file, tmp_path):
    with mounted(tmp_path / "disk", 4096) as disk:
        recipe = recipe_file(out=str(disk / "out"), trainer={"max_steps": 1})
        out, _ = train(recipe)
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        fill(disk, 40)
        said = CliRunner().invoke(app, ["train", str(recipe)])
        assert said.exit_code == 2, said.exception
        assert said.stderr.strip().splitlines()[-1].startswith("error: cannot save")
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
        foveate.load(out)


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line_and_a_run_goes_on(recipe_file, tmp_path):
    with mounted(tmp_path / "disk", 4096) as disk:
        fill(disk, 40)
        recipe = recipe_file(out=str(disk / "out"), trainer={"max_steps": 1})
        said = CliRunner().invoke(app, ["train", str(recipe)])
        assert said.exit_code == 2, said.exception
        assert said.stderr.strip().splitlines()[-1].startswith("error: cannot save")
        assert last_checkpoint(disk / "out") is None
        (disk / "filler").unlink()
        out, trainer = train(recipe)
        assert trainer.state.global_step == 1
        foveate.load(out)


def test_a_folder_of_another_run_is_refused(uninterrupted, recipe_file):
    path = recipe_file(out=str(uninterrupted), method={"keep": [0.6, 0.3, 0.1]})
    with pytest.raises(InputError, match="holds a run with method"):
        train(path)


def test_frozen_parts_and_training_with_all_tokens(recipe_file, model_folder):
    frozen = {"freeze": ["vision_tower", "projector"], "method": None}
    out, trainer = train(recipe_file(trainer={"max_steps": 1}, **frozen))
    before, after = weights(model_folder), weights(out)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert {n for n in before if "vision_tower" in n or "projector" in n} <= set(still)
    assert len(still) < len(before)
    assert not (out / "foveate.json").exists()
    assert trainer.state.global_step == 1


def test_adapters_are_trained_and_saved(recipe_file, model_folder):
    pytest.importorskip("peft")
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    out, _ = train(recipe_file(lora=lora, trainer={"max_steps": 2}))
    assert (out / "adapter_config.json").is_file()
    model = foveate.load(out)
    named = model.state_dict().items()
    trained = [v for name, v in named if "language_model" in name and "lora_B" in name]
    assert len(trained) == 8
    assert all(value.abs().sum() > 0 for value in trained)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [(("visoin",), "no parameter's name holds 'visoin'"), (("model",), "leaves nothing to train")],
)
def test_freezing_what_is_not_there_or_all_is_refused(parts, reason, model_folder):
    model = LlavaForConditionalGeneration.from_pretrained(model_folder)
    with pytest.raises(InputError, match=reason):
        freeze(model, parts)


def test_arguments_that_the_trainer_refuses_are_its_words(recipe_file):
    with pytest.raises(InputError, match=r"trainer: .*sometimes"):
        train(recipe_file(trainer={"save_strategy": "sometimes"}))
