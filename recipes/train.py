"""Train the tiny VLM from scratch on a CPU: `python -m recipes.train --out runs/tiny`.

The phases share one budget. First the vision tower alone learns what every patch shows. Then
questions are answered from a reduced set of visual tokens, which is cheap. Then from all of
them, in conversations of several turns. Last on photo backgrounds, and with two more layers below
the others, which are kept from looking at the image, so that the answer is read out of the
visual tokens later. A run that is interrupted goes on where its last checkpoint was written.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from foveate.io.writing import check_folder, filling, replacing
from foveate.tiny.build import EARLY, build_config, build_model, build_processor
from foveate.tiny.words import VOCABULARY
from recipes import losses
from recipes.data import (
    GROUPS,
    HARDEST,
    MULTI,
    SINGLE,
    Batch,
    Packing,
    load_photos,
    make_batch,
    photo_paths,
    stream,
)
from recipes.precision import mixed

_SAVE_EVERY_S = 180.0
_CHECK_SCENES = 48
_LOOK_WEIGHT = 0.5  # of the attention that the early layers pay to the image


@dataclass(frozen=True)
class Phase:
    """One part of the schedule.

    Args:
        until: share of the budget at which it ends.
        packing: layout of the questions.
        keep: visual tokens per image; None keeps all.
        photo_share: share of scenes on photos, if there are any.
        reads: whether the language model is trained.
        dense: weight of the vision losses.
        rate: multiplies the learning rates.
        skip: layers left out at the bottom of the language model.
    """

    until: float
    packing: Packing
    keep: int | None
    photo_share: float
    reads: bool
    dense: float
    rate: float
    skip: int = 0


SCHEDULE = (
    Phase(0.10, SINGLE, None, 0.0, reads=False, dense=1.0, rate=2.0),
    Phase(0.34, SINGLE, 112, 0.0, reads=True, dense=0.15, rate=1.0, skip=EARLY),
    Phase(0.45, replace(SINGLE, hard=3.0), 112, 0.0, reads=True, dense=0.1, rate=2.0, skip=EARLY),
    Phase(0.56, replace(MULTI, hard=3.0), None, 0.2, reads=True, dense=0.1, rate=2.0, skip=EARLY),
    Phase(0.72, replace(MULTI, hard=2.0), None, 0.7, reads=True, dense=0.1, rate=2.0),
    Phase(
        1.00, replace(MULTI, hard=4.0, often=HARDEST), None, 0.7, reads=True, dense=0.1, rate=2.0
    ),
)


@dataclass(frozen=True)
class Settings:
    """What a run can be told.

    Args:
        out: folder for checkpoints and the final model.
        photos: folder of background photos, or None.
        minutes: budget of training time, over all interruptions; ignored if `steps` is given.
        steps: budget in optimizer steps.
        seed: seed of the initial weights and of the scenes.
        batch: images per step.
        muon: learning rate of matrices, before the schedule's factors.
        adam: learning rate of everything else, likewise.
        layers: layers of the language model.
        tower: layers of the vision tower.
    """

    out: Path
    photos: Path | None
    minutes: float
    steps: int | None
    seed: int
    batch: int = 12
    muon: float = 2e-3
    adam: float = 2e-3
    layers: int = 12
    tower: int = 6


class Trainer:
    """Everything a run changes while it goes on.

    Args:
        settings: what to do.
    """

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        shape = build_config(layers=settings.layers, tower=settings.tower)
        self.model = build_model(shape)
        vision: Any = self.model.config.vision_config
        self.probes = losses.Probes(vision.hidden_size)
        self.average = build_model(shape)
        self.average.load_state_dict(self.model.state_dict())
        self.average.eval()
        self.optimizers = _optimizers(self.model, self.probes, settings)
        self.step = self.images = self.questions = 0
        self.seconds = 0.0
        checkpoint = settings.out / "checkpoint.pt"
        if checkpoint.exists():
            self._resume(torch.load(checkpoint))

    def _parts(self) -> dict[str, Any]:
        first, second = self.optimizers
        return {
            "model": self.model,
            "probes": self.probes,
            "average": self.average,
            "muon": first,
            "adam": second,
        }

    def _resume(self, saved: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        self.step, self.images, self.questions, self.seconds = saved["counts"]

    def save(self) -> None:
        """Write a checkpoint to go on from, and the averaged weights as a loadable folder."""
        out = self.settings.out
        out.mkdir(parents=True, exist_ok=True)
        saved: dict[str, Any] = {n: part.state_dict() for n, part in self._parts().items()}
        saved["counts"] = (self.step, self.images, self.questions, self.seconds)
        with replacing(out / "checkpoint.pt") as part:
            torch.save(saved, part)
        export(self.average, out / "model")

    def done(self) -> float:
        """Share of the budget that is used up."""
        if self.settings.steps is not None:
            return min(1.0, self.step / self.settings.steps)
        return min(1.0, self.seconds / 60 / self.settings.minutes)

    def set_rates(self, phase: Phase, warm: float) -> None:
        """Linear decay to zero once questions are read, times the factor of the phase."""
        first = SCHEDULE[0].until
        scale = phase.rate * min(1.0, (1 - self.done()) / (1 - first))
        for optimizer, rate in zip(
            self.optimizers, (self.settings.muon, self.settings.adam), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale * warm

    def update(self, batch: Batch, phase: Phase) -> dict[str, float]:
        """Take one step; returns what to log."""
        with mixed():
            seen = losses.look(self.model, batch)
            loss, stats = losses.vision_loss(self.model, self.probes, seen, batch)
            stats["vision"] = loss.item()
            loss = loss * phase.dense
            if phase.reads:
                logits, look = losses.answer_logits(self.model, seen, batch, phase.keep, phase.skip)
                answer = losses.answer_loss(logits, batch)
                stats["answer"] = answer.item()
                right, asked = losses.tally(logits.detach(), batch).sum(1).tolist()
                stats["accuracy"] = right / max(1, asked)
                self.questions += asked
                stats["look"] = look.item()
                loss = loss + answer + _LOOK_WEIGHT * look
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.images += len(batch.pixels)
        self._average()
        return stats

    @torch.no_grad()
    def _average(self) -> None:
        rate = max(0.01, 1 / (1 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), rate)

    @torch.no_grad()
    def check(self, photo_share: float) -> dict[str, float]:
        """Accuracy of the averaged weights on held-out scenes, by kind of question."""
        photos = load_photos(photo_paths(self.settings.photos, held_out=True))
        total = torch.zeros(2, len(GROUPS), dtype=torch.long)
        for first in range(0, _CHECK_SCENES, 12):
            batch = make_batch(range(first, first + 12), SINGLE, photos, photo_share)
            with mixed():
                seen = losses.look(self.average, batch)
                logits, _ = losses.answer_logits(self.average, seen, batch)
            total += losses.tally(logits, batch)
        return shares(total)


def shares(total: Tensor) -> dict[str, float]:
    """Accuracy over all, and for every group that was asked about, of `losses.tally`'s counts."""
    overall = (total[0].sum() / total[1].sum()).item()
    asked = {g: (r / n).item() for g, r, n in zip(GROUPS, *total, strict=True) if n}
    return {"all": overall, **asked}


def export(
    model: LlavaForConditionalGeneration, folder: Path, vocabulary: tuple[str, ...] = VOCABULARY
) -> None:
    """Write an fp16 model folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

    Args:
        model: the model; its own weights stay as they are.
        folder: created if missing.
        vocabulary: its words.
    """
    half = build_model(model.config)
    half.load_state_dict(model.state_dict())
    with filling(folder) as stage:
        half.half().save_pretrained(stage)
        build_processor(vocabulary).save_pretrained(stage)


def _optimizers(
    model: LlavaForConditionalGeneration, probes: nn.Module, settings: Settings
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices of both towers and the projector, AdamW for the rest."""
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"Training needs torch.optim.Muon (torch 2.9+), found {torch.__version__}"
        )
    table = model.get_input_embeddings().weight
    place = model.model.vision_tower.embeddings.position_embedding.weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not table and p is not place]
    taken = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *probes.parameters()) if id(p) not in taken]
    muon = torch.optim.Muon(matrices, lr=settings.muon, weight_decay=0.05)
    adam = torch.optim.AdamW(rest, lr=settings.adam, betas=(0.9, 0.98), weight_decay=0.0)
    return muon, adam


def _phases(trainer: Trainer) -> Iterator[tuple[Phase, Iterator[Batch]]]:
    """Yield the current phase and its stream of batches until the budget is used up."""
    settings = trainer.settings
    photos = photo_paths(settings.photos, held_out=False)
    for phase in SCHEDULE:
        if trainer.done() < phase.until:
            first = settings.seed * 10**9 + trainer.images
            share = phase.photo_share
            yield phase, stream(first, settings.batch, phase.packing, photos, share)


def train(settings: Settings) -> None:
    """Run the whole schedule, or what is left of it.

    Args:
        settings: what to do.
    """
    check_folder(settings.out)
    trainer = Trainer(settings)
    settings.out.mkdir(parents=True, exist_ok=True)
    saved = trainer.seconds
    with _progress() as bar, (settings.out / "log.jsonl").open("a") as log:
        task = bar.add_task("training", total=1.0, note="")
        for phase, batches in _phases(trainer):
            entered = trainer.step
            while trainer.done() < phase.until:
                begun = time.monotonic()
                trainer.set_rates(phase, min(1.0, (trainer.step - entered + 1) / 40))
                stats = trainer.update(next(batches), phase)
                trainer.seconds += time.monotonic() - begun
                bar.update(task, completed=trainer.done(), note=_note(trainer, stats))
                if trainer.step % 10 == 0:
                    _write(log, trainer, stats)
                if trainer.seconds - saved > _SAVE_EVERY_S:
                    saved = trainer.seconds
                    _write(log, trainer, trainer.check(phase.photo_share) if phase.reads else {})
                    trainer.save()
        _write(log, trainer, trainer.check(SCHEDULE[-1].photo_share))
        trainer.save()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )


def _note(trainer: Trainer, stats: dict[str, float]) -> str:
    shown = ("answer", "accuracy") if "answer" in stats else ("vision", "patch_kind")
    return f"step {trainer.step} " + " ".join(f"{name} {stats[name]:.3f}" for name in shown)


def _write(log: Any, trainer: Trainer, stats: dict[str, float]) -> None:
    counts = {"step": trainer.step, "s": round(trainer.seconds), "questions": trainer.questions}
    log.write(json.dumps(counts | {k: round(v, 4) for k, v in stats.items()}) + "\n")
    log.flush()


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEG backgrounds.")] = None,
    minutes: Annotated[float, typer.Option(help="Training time, interruptions excluded.")] = 84.0,
    steps: Annotated[int | None, typer.Option(help="Steps instead of minutes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and scenes.")] = 0,
) -> None:
    """Train the tiny VLM; run it again to go on after an interruption."""
    train(Settings(out, photos, minutes, steps, seed))


if __name__ == "__main__":
    typer.run(main)
