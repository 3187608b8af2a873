"""The pieces of the convergence study: packed questions, a vision tower, an optimizer, a test.

Shapes: `B` images, `T` tokens, `V` = 256 visual tokens.
"""

from __future__ import annotations

import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.tiny import losses
from foveate.tiny.build import BOS, EOS, IMAGE, PAD, build_config, build_model
from foveate.tiny.data import (
    IGNORE,
    SINGLE,
    TRAIN_SEEDS,
    WORD_ID,
    make_batch,
    normalise,
)
from foveate.tiny.questions import Question
from foveate.tiny.scenes import Scene, draw_scene
from foveate.tiny.words import DIGITS, NUMBERS

LAYERS = 8
VISUAL = 256
KINDS = ("color", "shape", "where", "place-color", "place-object", "exists", "count")
OBJECTS, FEW = (3, 6), (1, 3)
EASY = 0.3
TURNS = 16
ROPE = 1e6
WRITTEN = {*DIGITS, *NUMBERS}


def build(seed: int) -> LlavaForConditionalGeneration:
    """An untrained tiny VLM of eight decoder layers, all of which start useful."""
    torch.manual_seed(seed)
    config = build_config(layers=LAYERS)
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": ROPE}
    return build_model(config, idle=0)


def scene_of(seed: int, objects: tuple[int, int] = OBJECTS) -> Scene:
    """The scene of a seed; seeds below `TRAIN_SEEDS` are held out."""
    return draw_scene(seed, objects=objects, per_kind=4)


def questions_of(scene: Scene, rng: Random, most: int) -> list[Question]:
    """Up to `most` questions of the chosen kinds, each kind equally likely where it can be asked.

    Numbers stand in the pictures, but are not asked for: reading them takes longer to learn than
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


def prompt(question: Question) -> list[int]:
    """Ids of a question behind the picture."""
    return [WORD_ID[word] for word in question.text.split()]


class Packed(torch.utils.data.Dataset):
    """Scenes with up to `TURNS` single questions, drawn when asked for.

    The first `EASY` of the scenes hold few objects.

    Args:
        first: seed of the first scene.
        count: how many scenes.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        easy = index < EASY * self.count
        scene = scene_of(self.first + index, FEW if easy else OBJECTS)
        return {
            "questions": questions_of(scene, Random(scene.seed + 1), TURNS),
            "pixels": np.array(scene.image),
        }


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One row per picture: its questions stand behind one another, and none sees another.

    Every question begins at the position behind the picture. Answers and their ends are supervised.
    """
    prefix = [BOS] + [IMAGE] * VISUAL
    built = []
    for row in rows:
        ids, labels, places = list(prefix), [IGNORE] * len(prefix), list(range(len(prefix)))
        slots = [0] * len(prefix)
        for number, question in enumerate(row["questions"]):
            asked, said = prompt(question), [WORD_ID[question.answer], EOS]
            ids += asked + said
            labels += [IGNORE] * len(asked) + said
            places += range(len(prefix), len(prefix) + len(asked) + 2)
            slots += [number + 1] * (len(asked) + 2)
        built.append((ids, labels, places, slots))
    width = max(len(row[0]) for row in built)

    def padded(column: int, fill: int) -> Tensor:
        return torch.tensor([row[column] + [fill] * (width - len(row[column])) for row in built])

    slots = padded(3, -1)
    alike = slots[:, None] == slots[:, :, None]
    sees = (alike | (slots == 0)[:, None]) & torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    pixels = torch.from_numpy(np.stack([row["pixels"] for row in rows]))
    return {
        "input_ids": padded(0, PAD),
        "labels": padded(1, IGNORE),
        "position_ids": padded(2, 0),
        "attention_mask": mask[:, None],
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


def start(seed: int, trained: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """A model that sees, with an untrained language model of its own.

    Args:
        seed: of the decoder layers.
        trained: state of a model whose vision tower, projector and words are trained.
    """
    model = build(seed)
    seeing = {k: v for k, v in trained.items() if "language_model.layers" not in k}
    model.load_state_dict({**model.state_dict(), **seeing})
    return model


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
        rows = [[BOS] + [IMAGE] * VISUAL + prompt(question) for _, question in part]
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
