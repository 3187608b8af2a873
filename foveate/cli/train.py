"""`foveate train`: a recipe, a model, the stock Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from foveate.cli.console import Steps, progress, stderr
from foveate.cli.interrupts import AGAIN, keeping
from foveate.cli.recipe import read_recipe
from foveate.io.quoting import shown
from foveate.io.writing import check_folder
from foveate.loading import load_model
from foveate.training.finetune.recipe import Recipe
from foveate.training.finetune.run import finetune, last_checkpoint


def run(path: Path, console: Console) -> None:
    """Train as a YAML file says.

    Args:
        path: the file.
        console: for what is said at the end.

    Raises:
        FoveateError: see `read_recipe` and `finetune`.
    """
    recipe = read_recipe(path)
    check_folder(recipe.out)
    first = int(os.environ.get("RANK", "0")) == 0
    with progress() as steps:
        steps.say(f"loading {recipe.model}")
        model, processor = load_model(recipe.model, "cpu", _dtype(recipe))
    last = last_checkpoint(recipe.out)
    if first and last is not None:
        console.print(f"resuming from {escape(str(last))}", soft_wrap=True)
    with progress(time_left=True, shown=first) as steps, keeping(lambda: _kept(recipe.out)):
        steps.say("preparing")
        trainer = finetune(recipe, model.train(), processor, Shown(steps))
    if first:
        console.print(_summary(recipe, trainer), soft_wrap=True)


class Shown(TrainerCallback):
    """The bar of a run with its last loss, or a line for each log where there is no terminal.

    Args:
        steps: the bar.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.lines = None if (console := stderr()).is_terminal else console

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Count the steps that are left to do."""
        self.steps.say("training", state.max_steps - state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """One step is done."""
        self.steps.tick()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Show the loss."""
        if "loss" not in (logs or {}) or not state.is_world_process_zero:
            return
        told = f"loss {float(logs['loss']):.3f}"
        self.steps.name(f"training, {told}")
        if self.lines is not None:
            self.lines.print(f"step {state.global_step} of {state.max_steps}: {told}")


def _kept(out: Path) -> str:
    """What an interrupted run leaves."""
    last = last_checkpoint(out)
    if last is None:
        return (
            "no checkpoint was saved yet, so the same command starts from the beginning; "
            "trainer.save_steps sets how often one is saved"
        )
    return f"the run is saved up to {shown(last, 120)}; {AGAIN}"


def _dtype(recipe: Recipe) -> str:
    """float32 on a CPU; elsewhere bfloat16, unless told otherwise."""
    if recipe.dtype != "auto":
        return recipe.dtype
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _summary(recipe: Recipe, trainer: Any) -> str:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    told = f", loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else ""
    return (
        f"[bold]{trainer.state.global_step} steps[/]{told}; saved in {escape(str(recipe.out))}\n"
        f"[dim]open it with foveate.load({str(recipe.out)!r})"
        f"{' (or transformers)' if recipe.method else ' or transformers'}[/]"
    )
