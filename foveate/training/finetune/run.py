"""A fine-tuning run: the stock Trainer around a prepared model, from where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.core.saving import read_json
from foveate.errors import FoveateError, InputError
from foveate.io.quoting import quoted, shown
from foveate.io.writing import check_folder, explained, filling, write_json
from foveate.training.finetune.collator import Collator
from foveate.training.finetune.recipe import Recipe
from foveate.training.prepare import prepare

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

RECIPE = "recipe.json"
DEFAULTS: dict[str, Any] = {"report_to": [], "logging_steps": 10, "save_total_limit": 2}
"""What a recipe's `trainer` starts from, where it differs from `TrainingArguments`."""

_FREE = ("trainer",)  # may change when a run goes on


def finetune(
    recipe: Recipe, model: Any, processor: Any, shown_by: TrainerCallback | None = None
) -> Trainer:
    """Train, or go on from the last whole checkpoint, and save the outcome in `recipe.out`.

    The folder then holds the model (or the adapters), the processor and, with a method,
    foveate.json: transformers, PEFT and `foveate.load` all open it.

    Args:
        recipe: what to do.
        model: the model that the recipe names; it is trained in place.
        processor: its processor.
        shown_by: what shows the progress, in place of the Trainer's own bar and log.

    Returns:
        The Trainer, for its log and its state.

    Raises:
        FoveateError: accelerate or peft is missing, an argument of the Trainer does not fit, data
            is not as it must be, `out` holds a run of another recipe or cannot be written to, or
            the disk is full; what `out` holds is then as it was, but for an unfinished checkpoint,
            from which no run goes on.
    """
    from transformers import PrinterCallback, ProgressCallback

    trainer = make_trainer(recipe, model, processor)
    if shown_by is not None:
        for own in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(own)
        trainer.add_callback(shown_by)
    last = last_checkpoint(recipe.out)
    with explained(recipe.out, only_full=True):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    with filling(recipe.out) as stage:
        trainer.save_model(str(stage), _internal_call=True)
        if trainer.is_world_process_zero():
            processor.save_pretrained(stage)
            trainer.state.save_to_json(str(stage / "trainer_state.json"))
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
    return trainer


def make_trainer(recipe: Recipe, model: Any, processor: Any) -> Trainer:
    """Prepare the model and build the Trainer; nothing is trained yet.

    Args:
        recipe: what to do.
        model: the model that the recipe names.
        processor: its processor.

    Raises:
        FoveateError: as in `finetune`.
    """
    arguments = _arguments(recipe)
    from foveate.training.finetune.resume import ResumingTrainer

    data = recipe.data.load()
    with arguments.main_process_first(local=False, desc="checking the output folder"):
        _claim(recipe, write=arguments.process_index == 0)
    freeze(model, recipe.freeze)
    if recipe.lora is not None:
        model = _adapt(model, recipe.lora)
    if recipe.method is not None:
        model = prepare(model, recipe.method, train=recipe.train)
    return ResumingTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=Collator(processor),
    )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end; None if there is none."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in folder.glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and _whole(path)
    }
    return found[max(found)] if found else None


def freeze(model: Any, names: tuple[str, ...]) -> None:
    """Do not train parameters whose name holds one of some texts.

    Args:
        model: the model.
        names: parts of names, such as `vision_tower`.

    Raises:
        InputError: a text is in no name, or nothing is left to train.
    """
    known = [name for name, _ in model.named_parameters()]
    for part in names:
        if not any(part in name for name in known):
            tops = sorted({".".join(name.split(".")[:2]) for name in known})
            raise InputError(
                f"freeze: no parameter's name holds {part!r}; they begin with {', '.join(tops)}"
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in names))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"freeze {', '.join(names)} leaves nothing to train")


def _whole(checkpoint: Path) -> bool:
    """Whether the file that the Trainer writes last is there and can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _arguments(recipe: Recipe) -> Any:
    """The Trainer's arguments."""
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise FoveateError(
            "training needs accelerate, which is not installed; run `pip install 'foveate[train]'`"
        ) from None
    from transformers import TrainingArguments

    given = {**DEFAULTS, **recipe.trainer}
    given.update(output_dir=str(recipe.out), remove_unused_columns=False)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        given.setdefault("use_cpu", True)
        given.setdefault("dataloader_pin_memory", False)
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise InputError(f"trainer: {shown(error, 200)}") from error


def _claim(recipe: Recipe, write: bool) -> None:
    """Write the recipe beside its checkpoints, or compare with the one that is there."""
    check_folder(recipe.out)
    path = recipe.out / RECIPE
    now = recipe.to_dict()
    if last_checkpoint(recipe.out) is not None and path.is_file():
        before: Any = read_json(path)
        if not isinstance(before, Mapping):
            raise InputError(f"{shown(path)} contains no recipe; remove it to start over")
        changed = [k for k in now if k not in _FREE and before.get(k) != _plain(now[k])]
        if changed:
            key = changed[0]
            raise InputError(
                f"{shown(recipe.out)} holds a run with {key} {quoted(before.get(key))}, and the "
                f"recipe says {quoted(now[key])}; choose another `out`, or remove that folder to "
                "start over"
            )
    if write:
        recipe.out.mkdir(parents=True, exist_ok=True)
        write_json(path, now)


def _plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _adapt(model: Any, lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    try:
        return get_peft_model(model, LoraConfig(**lora))
    except ValueError as error:
        raise InputError(f"lora: {shown(error, 200)}") from error
