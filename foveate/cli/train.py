"""`foveate train`: a recipe, a model, the stock Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from foveate.cli.console import progress
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
    with keeping(lambda: _kept(recipe.out)):
        trainer = finetune(recipe, model.train(), processor)
    if first:
        console.print(_summary(recipe, trainer), soft_wrap=True)


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
