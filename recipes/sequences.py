"""Teach a trained tiny VLM words, small objects, and several images per conversation.

`python -m recipes.sequences --start MODEL --out RUN --photos DIR` goes on from a trained model,
whose vocabulary may be smaller and which may have fewer layers. Steps on single scenes, as in the
last phase of the training from scratch but varied, take turns with steps on albums, videos and
examples; there the vision tower is left as it is, and for most of the run only some visual tokens
are shown, which is cheaper.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from foveate.io.writing import check_folder
from foveate.tiny import PATH
from foveate.tiny.words import VOCABULARY
from recipes import losses
from recipes.data import (
    GROUPS,
    HARDEST,
    MULTI,
    SINGLE,
    TRAIN_SEEDS,
    load_photos,
    make_batch,
    photo_paths,
)
from recipes.precision import mixed
from recipes.sequence_data import LESSONS, answer_sequences, make_sequences
from recipes.train import Phase, Settings, Trainer, shares

TURNS = {"scenes": 40, "album": 14, "events": 24, "order": 7, "rule": 15}
"""How often a step is on what."""

_MIX = ",".join(f"{sort}={share}" for sort, share in TURNS.items())

_WHOLE_FROM = 0.75  # share of the run from which on all visual tokens are shown
_SAVE_EVERY_S = 150.0
_OFTEN = (*HARDEST, "word")
_SCENES = Phase(
    1.0, replace(MULTI, hard=3.0, often=_OFTEN), None, 0.6, reads=True, dense=0.3, rate=1.0
)
_CHECK_SEED = 5_000_000


def vocabulary_of(start: Path) -> tuple[str, ...]:
    """The words of a trained model's folder, in the order of their ids."""
    known = AutoTokenizer.from_pretrained(start).get_vocab()
    return tuple(sorted(known, key=known.__getitem__))


def adopt(
    model: LlavaForConditionalGeneration, start: Path, vocabulary: tuple[str, ...] = VOCABULARY
) -> None:
    """Copy a trained model's weights into one that may be deeper and know more words.

    New layers stand between the old ones and begin as the identity, so that the deeper model says
    what the trained one says. Words that it did not know start as random rows.

    Args:
        model: what is to be trained; its vocabulary must begin with the trained model's.
        start: folder of the trained model.
        vocabulary: the words of the model that is to be trained.

    Raises:
        ValueError: if the vocabularies do not agree, or the trained model is the deeper one.
    """
    words = vocabulary_of(start)
    if words != vocabulary[: len(words)]:
        raise ValueError(f"the vocabulary of {start} is not the beginning of the present one")
    old: Any = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    rows = old.get_input_embeddings().weight.detach()
    fresh = torch.randn(len(vocabulary) - len(rows), rows.shape[1]) * rows.std()
    weights = old.state_dict()
    for name, tensor in weights.items():
        if tensor.shape == rows.shape:
            weights[name] = torch.cat([tensor, fresh])
    new: Any = model
    for stack in ("language_model.layers", "vision_tower.encoder.layers"):
        small, large = (part.model.get_submodule(stack) for part in (old, new))
        weights = _spread(weights, f"model.{stack}.", len(small), large)
    model.load_state_dict(model.state_dict() | weights)


def _spread(
    weights: dict[str, Tensor], prefix: str, count: int, layers: nn.ModuleList
) -> dict[str, Tensor]:
    """Name the weights of `count` layers as those of a deeper stack; the rest becomes idle."""
    if count > len(layers):
        raise ValueError(
            f"the trained model has {count} layers where the new one has {len(layers)}"
        )
    places = [index * (len(layers) - 1) // max(count - 1, 1) for index in range(count)]
    for index, layer in enumerate(layers):
        if index not in places:
            _idle(layer)
    named = {}
    for name, tensor in weights.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{places[int(number)]}.{rest}"
        named[name] = tensor
    return named


def _idle(layer: Any) -> None:
    """Make a decoder's or a tower's layer add nothing; its inner weights stay as they are."""
    ends = (
        (layer.self_attn.o_proj, layer.mlp.down_proj)
        if hasattr(layer.self_attn, "o_proj")
        else (layer.self_attn.out_proj, layer.mlp.fc2)
    )
    for end in ends:
        for tensor in end.parameters():
            nn.init.zeros_(tensor)


class Tuner(Trainer):
    """A trainer that begins with a trained model.

    Args:
        settings: what to do; the budget is in steps.
        start: folder of the trained model.
        turns: how often a step is on what.
    """

    def __init__(self, settings: Settings, start: Path, turns: dict[str, int] = TURNS) -> None:
        super().__init__(settings)
        self.turns = turns
        self.photos = load_photos(photo_paths(settings.photos, held_out=False))
        if self.step == 0:
            adopt(self.model, start)
            self.average.load_state_dict(self.model.state_dict())
            self._warm_probes()

    def _warm_probes(self) -> None:
        """Fit the new read-outs to the trained vision tower, before they teach it anything."""
        adam = torch.optim.AdamW(self.probes.parameters(), lr=1e-2, weight_decay=0.0)
        batches = [
            make_batch(range(first, first + 12), SINGLE, [], 0.0, True)
            for first in range(TRAIN_SEEDS, TRAIN_SEEDS + 72, 12)
        ]
        with torch.no_grad():
            views = [losses.look(self.model, batch) for batch in batches]
        for _ in range(25):
            for view, batch in zip(views, batches, strict=True):
                losses.vision_loss(self.model, self.probes, view, batch)[0].backward()
                adam.step()
                adam.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)

    def go(self) -> tuple[str, dict[str, float]]:
        """Take one step, on what its number says; returns what it was on, and what to log."""
        rng = Random(f"{self.settings.seed} {self.step}")
        torch.manual_seed(rng.getrandbits(31))
        sort = rng.choices(list(self.turns), list(self.turns.values()))[0]
        first = TRAIN_SEEDS + rng.getrandbits(39) * 1024
        self._set_rates()
        if sort == "scenes":
            seeds = range(first, first + self.settings.batch)
            batch = make_batch(seeds, _SCENES.packing, self.photos, _SCENES.photo_share, True)
            return sort, self.update(batch, _SCENES)
        return sort, self._read(sort, first)

    def _set_rates(self) -> None:
        scale = min(1.0, (self.step + 1) / 40) * (1 - self.done())
        rates = (self.settings.muon, self.settings.adam)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    def _read(self, sort: str, first: int) -> dict[str, float]:
        lesson = LESSONS[sort]
        keep = lesson.keep if self.done() < _WHOLE_FROM else None
        size = lesson.size if keep else lesson.size // 2
        batch = make_sequences(lesson, range(first, first + size))
        with mixed():
            logits, look = answer_sequences(self.model, batch, keep)
            loss = losses.answer_loss(logits, batch)
        (loss + 0.5 * look).backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        counts = losses.tally(logits.detach(), batch)
        self.step += 1
        self.images += batch.pixels.shape[0] * batch.pixels.shape[1]
        self.questions += int(counts[1].sum())
        self._average()
        return {"answer": loss.item(), "look": look.item(), **shares(counts)}

    @torch.no_grad()
    def check_all(self) -> dict[str, float]:
        """Accuracy of the averaged weights on held-out scenes and sequences, all tokens shown."""
        total = torch.zeros(2, len(GROUPS), dtype=torch.long)
        with mixed():
            for first in (0, 12):
                seeds = range(_CHECK_SEED + first, _CHECK_SEED + first + 12)
                batch = make_batch(seeds, SINGLE, [], 0.0, True)
                seen = losses.look(self.average, batch)
                total += losses.tally(losses.answer_logits(self.average, seen, batch)[0], batch)
            for lesson in LESSONS.values():
                for first in (0, 1024, 2048):
                    seeds = range(_CHECK_SEED + first, _CHECK_SEED + first + lesson.size)
                    sequences = make_sequences(lesson, seeds)
                    total += losses.tally(answer_sequences(self.average, sequences)[0], sequences)
        return shares(total)


def finetune(settings: Settings, start: Path, turns: dict[str, int] = TURNS) -> None:
    """Run the schedule, or what is left of it.

    Args:
        settings: what to do; `steps` must be given.
        start: folder of the trained model.
        turns: how often a step is on what.
    """
    check_folder(settings.out)
    tuner = Tuner(settings, start, turns)
    settings.out.mkdir(parents=True, exist_ok=True)
    saved = tuner.seconds
    with (settings.out / "log.jsonl").open("a") as log:
        while tuner.done() < 1:
            begun = time.process_time()
            sort, stats = tuner.go()
            tuner.seconds += time.process_time() - begun
            _write(log, tuner, sort, stats)
            if tuner.seconds - saved > _SAVE_EVERY_S or tuner.done() == 1:
                saved = tuner.seconds
                _write(log, tuner, "check", tuner.check_all())
                tuner.save()


def _write(log: Any, tuner: Tuner, sort: str, stats: dict[str, float]) -> None:
    counts = {"step": tuner.step, "cpu_s": round(tuner.seconds), "on": sort}
    log.write(json.dumps(counts | {k: round(v, 4) for k, v in stats.items()}) + "\n")
    log.flush()


def mix_of(turns: str) -> dict[str, int]:
    """What `--turns` says, as in "scenes=60,album=22".

    Raises:
        typer.BadParameter: it is of another form, or names what is not taught.
    """
    try:
        mix = {sort: int(share) for sort, share in (part.split("=") for part in turns.split(","))}
    except ValueError:
        raise typer.BadParameter(f"--turns is of the form {_MIX}, got {turns}") from None
    if unknown := mix.keys() - TURNS.keys():
        raise typer.BadParameter(f"--turns knows {', '.join(TURNS)}, not {', '.join(unknown)}")
    return mix


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the model.")],
    start: Annotated[Path, typer.Option(help="Folder of the trained model.")] = PATH,
    photos: Annotated[Path | None, typer.Option(help="Folder of JPEG backgrounds.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 3100,
    seed: Annotated[int, typer.Option(help="Seed of scenes and new words.")] = 0,
    turns: Annotated[
        str, typer.Option(help="How often a step is on what, as scenes=42,album=28.")
    ] = _MIX,
    layers: Annotated[int, typer.Option(help="Layers of the language model, 12 or more.")] = 18,
    tower: Annotated[int, typer.Option(help="Layers of the vision tower, 6 or more.")] = 8,
) -> None:
    """Grow the tiny VLM and teach it more; run it again to go on after an interruption."""
    torch.set_num_threads(1)
    settings = Settings(
        out, photos, 0.0, steps, seed, batch=8, muon=3e-3, layers=layers, tower=tower
    )
    finetune(settings, start, mix_of(turns))


if __name__ == "__main__":
    typer.run(main)
