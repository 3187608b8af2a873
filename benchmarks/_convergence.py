"""The pieces of the convergence study: conversations, a vision tower, an optimizer, a test.

Shapes: `B` images, `T` tokens, `V` = 256 visual tokens.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.tiny.build import BOS, EOS, IMAGE, PAD, build_config, build_model
from foveate.tiny.questions import Question
from foveate.tiny.scenes import Scene, draw_scene
from foveate.tiny.words import DIGITS, NUMBERS
from recipes import losses
from recipes.data import (
    GROUPS,
    IGNORE,
    SINGLE,
    TRAIN_SEEDS,
    WORD_ID,
    Batch,
    make_batch,
    normalise,
)

LAYERS = 8
VISUAL = 256
KINDS = ("color", "shape", "where", "place-color", "place-object", "exists", "count")
OBJECTS = (6, 12)
TURNS = 16
SLOT = 11
ROPE = 1e6
WRITTEN = {*DIGITS, *NUMBERS}


def build(seed: int) -> LlavaForConditionalGeneration:
    """An untrained tiny VLM of eight decoder layers, all of which start useful."""
    torch.manual_seed(seed)
    config = build_config(layers=LAYERS)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE}
    return build_model(config, idle=0)


def scene_of(seed: int) -> Scene:
    """The scene of a seed; seeds below `TRAIN_SEEDS` are held out."""
    return draw_scene(seed, objects=OBJECTS, per_kind=4)


def questions_of(scene: Scene, rng: Random, most: int) -> list[Question]:
    """Up to `most` questions of the chosen kinds, each kind equally likely where it can be asked.

    Numbers stand in the images, but are not asked for: reading them takes longer to learn than
    the study lasts.
    """
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for question in scene.questions:
        words = {*question.text.split(), question.answer if question.kind != "count" else ""}
        if question.kind in KINDS and not words & WRITTEN:
            by_kind[question.kind].append(question)
    for found in by_kind.values():
        rng.shuffle(found)
    chosen: list[Question] = []
    while len(chosen) < most and any(by_kind.values()):
        kinds = [kind for kind, found in by_kind.items() if found]
        rng.shuffle(kinds)
        chosen += [by_kind[kind].pop() for kind in kinds]
    chosen = chosen[:most]
    rng.shuffle(chosen)
    return chosen


def conversation(questions: list[Question]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation of several turns; answers and their end are supervised."""
    ids = [BOS] + [IMAGE] * VISUAL
    labels = [IGNORE] * len(ids)
    for question in questions:
        asked = [WORD_ID[word] for word in question.text.split()]
        said = [WORD_ID[question.answer], EOS]
        ids += asked + said
        labels += [IGNORE] * len(asked) + said
    return ids, labels


class Conversations(torch.utils.data.Dataset):
    """Scenes with conversations of up to `TURNS` turns, drawn when asked for.

    Args:
        first: seed of the first scene.
        count: how many scenes.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene = scene_of(self.first + index)
        questions = questions_of(scene, Random(scene.seed + 1), TURNS)
        ids, labels = conversation(questions)
        return {"input_ids": ids, "labels": labels, "pixels": np.array(scene.image)}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad on the right to the longest row."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    ids = padded("input_ids", PAD)
    pixels = torch.from_numpy(np.stack([row["pixels"] for row in rows]))
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": padded("labels", IGNORE),
        "pixel_values": normalise(pixels),
    }


class MuonAdam(torch.optim.Optimizer):
    """Muon for the matrices and AdamW for the rest, as one optimizer.

    Args:
        model: what is trained; frozen parameters are left out.
        rate: learning rate of both.
        extra: further parameters for AdamW.
    """

    def __init__(self, model: Any, rate: float, extra: Any = ()) -> None:
        table = model.get_input_embeddings().weight
        place = model.model.vision_tower.embeddings.position_embedding.weight
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and p is not table and p is not place]
        taken = {id(p) for p in matrices}
        rest = [p for p in (*trained, *extra) if id(p) not in taken]
        self.parts = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step of both."""
        for part in self.parts:
            part.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the states of both."""
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def train_vision(seed: int, folder: Path, steps: int, size: int = 12, rate: float = 4e-3) -> None:
    """Train the vision tower, the projector and the words on what every patch shows.

    Both arms of a seed start from the outcome, `vision.pt`; the language model is not run.
    """
    if (folder / "vision.pt").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model = build(seed)
    probes = losses.Probes(model.config.vision_config.hidden_size)
    optimizer = MuonAdam(model, rate, probes.parameters())
    begun = time.process_time()
    for step in range(steps):
        first = TRAIN_SEEDS * 3 + seed * 10**9 + step * size
        batch = make_batch(range(first, first + size), SINGLE, [], 0.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 40, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss, stats = losses.vision_loss(model, probes, losses.look(model, batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 2)
        optimizer.step()
        optimizer.zero_grad()
        if step % 25 == 0 or step == steps - 1:
            told = {name: round(value, 3) for name, value in stats.items()}
            spent = round(time.process_time() - begun)
            print(f"vision {seed} step {step} {spent} s loss {loss.item():.3f} {told}", flush=True)
    saved = {"model": model.state_dict(), "seconds": time.process_time() - begun, "stats": stats}
    torch.save(saved, folder / "vision.tmp")
    (folder / "vision.tmp").replace(folder / "vision.pt")


def warm_batch(seeds: range) -> Batch:
    """Single questions of the study's kinds in slots of their own, with what every patch shows."""
    plain = make_batch(seeds, SINGLE, [], 0.0)
    words = torch.full((len(seeds), TURNS, SLOT), PAD)
    labels = torch.full((len(seeds), TURNS, SLOT), IGNORE)
    groups = torch.full((len(seeds), TURNS, SLOT), -1)
    for row, seed in enumerate(seeds):
        scene = draw_scene(seed, per_kind=6)
        for slot, question in enumerate(questions_of(scene, Random(seed + 2), TURNS)):
            ids = [WORD_ID[word] for word in question.text.split()]
            answer = WORD_ID[question.answer]
            end = len(ids)
            words[row, slot, : end + 1] = torch.tensor([*ids, answer])
            labels[row, slot, end - 1 : end + 1] = torch.tensor([answer, EOS])
            groups[row, slot, end - 1] = GROUPS.index(question.kind)
    return replace(plain, words=words, labels=labels, groups=groups)


def untrained(seed: int, trained: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """A model that sees, with an untrained language model of its own.

    Args:
        seed: of the decoder layers.
        trained: state of a model whose vision tower, projector and words are trained.
    """
    model = build(seed)
    seeing = {k: v for k, v in trained.items() if "language_model.layers" not in k}
    model.load_state_dict({**model.state_dict(), **seeing})
    return model


def warm_up(seed: int, folder: Path, steps: int, size: int = 12, rate: float = 2e-3) -> None:
    """Single questions over 112 tokens, until the language model begins to look at images."""
    path = folder / f"warm-{seed}.pt"
    if path.exists():
        return
    model = untrained(seed, torch.load(folder / "vision.pt")["model"])
    probes = losses.Probes(model.config.vision_config.hidden_size)
    optimizer = MuonAdam(model, rate, probes.parameters())
    begun = time.process_time()
    asked = 0
    for step in range(steps):
        first = TRAIN_SEEDS * 5 + seed * 10**9 + step * size
        batch = warm_batch(range(first, first + size))
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 40, 1)
        with torch.autocast("cpu", torch.bfloat16):
            seen = losses.look(model, batch)
            loss, _ = losses.vision_loss(model, probes, seen, batch)
            logits, _ = losses.answer_logits(model, seen, batch, keep=112)
            answer = losses.answer_loss(logits, batch)
        (0.15 * loss + answer).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 2)
        optimizer.step()
        optimizer.zero_grad()
        right, total = losses.tally(logits.detach(), batch).sum(1).tolist()
        asked += total
        if step % 10 == 0:
            spent = round(time.process_time() - begun)
            print(
                f"warm {seed} step {step} {asked} QA {spent} s vision {loss.item():.3f} "
                f"answer {answer.item():.3f} right {right / total:.3f}",
                flush=True,
            )
    saved = {
        "model": model.state_dict(),
        "seconds": time.process_time() - begun,
        "questions": asked,
        "right": right / total,
    }
    torch.save(saved, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


@torch.no_grad()
def answer_alone(model: Any, first: int, count: int, batch: int = 16) -> dict[str, list[int]]:
    """Ask held-out questions one by one, as a user would; right and asked by kind, and in all.

    Args:
        model: the model, with or without a method on it.
        first: seed of the first scene; three questions are asked about each.
        count: how many questions.
        batch: questions per forward pass, padded on the left.
    """
    was = model.training
    model.eval()
    items = []
    for seed in range(first, first + count // 3):
        scene = scene_of(seed)
        items += [(scene, question) for question in questions_of(scene, Random(seed), 3)]
    counts: dict[str, list[int]] = {}
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        rows = [conversation([question])[0][:-2] for _, question in part]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        pixels = torch.from_numpy(np.stack([np.array(scene.image) for scene, _ in part]))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                input_ids=ids,
                attention_mask=(ids != PAD).long(),
                pixel_values=normalise(pixels),
                logits_to_keep=1,
            ).logits
        said = logits[:, -1].argmax(-1).tolist()
        for (_, question), word in zip(part, said, strict=True):
            for kind in (question.kind, "all"):
                pair = counts.setdefault(kind, [0, 0])
                pair[0] += word == WORD_ID[question.answer]
                pair[1] += 1
    model.train(was)
    return counts
