"""Pruning voxels by a sentence: accuracy and time with and without it, on drawn scenes.

    python benchmarks/voxels.py [--steps 150] [--seeds 1] [--rounds 7] [--out FILE]
    python benchmarks/voxels_page.py

A small network of `foveate.voxels` is trained twice from the same weights on the same scenes in the
same order: once with pruning and addition, once with every voxel kept. Both learn what to keep.
Scenes are smaller than those of the paper, so counts and regions are too; thresholds are those of
the release. Held-out scenes are answered one by one; times are of one scene, everything included,
and the contenders take turns. What was found is written after every seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _bench import RESULTS, machine, ratios, turns, warm_heap

warm_heap()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from foveate.voxels import (  # noqa: E402
    Backbone,
    BoxHead,
    ConvolutionAccount,
    Grounding,
    SparseVoxels,
    TwoLevelPruning,
    VoxelGrounder,
    VoxelScene,
    batch_of,
    draw_scene,
    grounding_loss,
    iou,
)
from foveate.voxels.scenes import VOCABULARY, VOXEL_SIZE, word_ids  # noqa: E402

CHANNELS, HEADS, HIDDEN, LAYERS = 24, 4, 48, 1
REGION, NEAREST = 1.25, 12
HELD_OUT = 10_000_000
"""The seeds of held-out scenes begin here."""


class Finder(nn.Module):
    """A small grounding network, and embeddings of words and of their places."""

    def __init__(self) -> None:
        super().__init__()
        loop = TwoLevelPruning(
            CHANNELS, heads=HEADS, hidden=HIDDEN, layers=LAYERS, dropout=0.0,
            voxel_size=VOXEL_SIZE, samples=200, train_samples=(200, 100),
            train_keep=((150, 300), (100, 100)),
        )  # fmt: skip
        self.network = VoxelGrounder(Backbone(3, CHANNELS), loop, BoxHead(CHANNELS, VOXEL_SIZE))
        self.word = nn.Embedding(len(VOCABULARY), CHANNELS)
        self.place = nn.Embedding(12, CHANNELS)

    def forward(self, voxels: SparseVoxels, ids: Tensor, mask: Tensor, prune: bool) -> Grounding:
        words = self.word(ids) + self.place(torch.arange(ids.shape[1]))
        return self.network(voxels, words, mask, prune=prune)


def train(model: Finder, scenes: Sequence[VoxelScene], prune: bool, args: Any) -> dict[str, Any]:
    """Train in place; returns CPU seconds and the losses on the way."""
    begun, generator = time.process_time(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    log = []
    for step in range(args.steps):
        chosen = torch.randint(len(scenes), (args.batch,), generator=generator).tolist()
        batch = [scenes[i] for i in chosen]
        voxels, target = batch_of(batch)
        found = model.train()(voxels, *word_ids([s.sentence for s in batch]), prune)
        losses = grounding_loss(found, target, VOXEL_SIZE, region=REGION, nearest=NEAREST)
        loss = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            entry = {"step": step + 1, **{k: round(v.item(), 4) for k, v in losses.items()}}
            log.append(entry)
            print(entry, round(time.process_time() - begun), flush=True)
    return {"cpu_s": time.process_time() - begun, "log": log}


@torch.no_grad()
def answers(model: Finder, scenes: Sequence[VoxelScene], prune: bool) -> dict[str, Any]:
    """Accuracy on scenes one by one, voxels of both steps, and FLOPs of the convolutions."""
    overlaps, right, counts, flops = [], [], [], []
    model.eval()
    for scene in scenes:
        voxels, target = batch_of([scene])
        with ConvolutionAccount(model) as account:
            found = model(voxels, *word_ids([scene.sentence]), prune)
        box, _ = found.best()
        overlaps.append(iou(box, target.boxes).item())
        apart = (scene.boxes[:, :3] - box[:, :3]).norm(dim=1)
        right.append(int(apart.argmin()) == scene.target)
        counts.append(found.refined.counts)
        flops.append(account.total)
    levels = []
    for step in zip(*counts, strict=True):
        names = ("scored", "kept", "generated", "added", "left")
        mean = {n: statistics.mean(getattr(count, n) for count in step) for n in names}
        levels.append({"stride": step[0].stride, **mean})
    return {
        "iou_25": statistics.mean(x > 0.25 for x in overlaps),
        "iou_50": statistics.mean(x > 0.5 for x in overlaps),
        "object": statistics.mean(right),
        "levels": levels,
        "convolution_flops": statistics.mean(flops),
    }


def without_addition(model: Finder) -> Finder:
    """A copy that never adds a voxel."""
    copied = copy.deepcopy(model)
    copied.network.loop.addition.threshold = 1.0
    return copied


def seed_of(seed: int, scenes: list[VoxelScene], held: list[VoxelScene], args: Any) -> Any:
    """Both arms of a seed, and the models."""
    torch.manual_seed(seed)
    start = Finder()
    models, result = {}, {}
    for name, prune in (("pruned", True), ("all voxels", False)):
        models[name] = copy.deepcopy(start)
        result[name] = {"training": train(models[name], scenes, prune, args)}
    pruned, whole = models["pruned"], models["all voxels"]
    result["pruned"]["answers"] = {
        "pruned": answers(pruned, held, True),
        "pruned, nothing added": answers(without_addition(pruned), held, True),
        "all voxels": answers(pruned, held, False),
    }
    result["all voxels"]["answers"] = {"all voxels": answers(whole, held, False)}
    return models, result


def clock(models: dict[str, Finder], held: list[VoxelScene], rounds: int) -> dict[str, Any]:
    """Times of both arms on the same scenes, in turns."""
    batches = [(batch_of([s])[0], *word_ids([s.sentence])) for s in held]

    def fresh(voxels: SparseVoxels) -> SparseVoxels:
        return SparseVoxels(voxels.coordinates, voxels.features)

    def run(model: Finder, prune: bool) -> Any:
        return lambda: [model(fresh(voxels), *words, prune) for voxels, *words in batches]

    contenders = {
        "pruned": run(models["pruned"].eval(), True),
        "all voxels": run(models["all voxels"].eval(), False),
    }
    with torch.inference_mode():
        times = turns(contenders, rounds)
    each = {n: 1e3 * statistics.median(t) / len(held) for n, t in times.items()}
    return {"speed-up": ratios(times["all voxels"], times["pruned"]), "scene_ms": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=900)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "voxels.json")
    args = parser.parse_args()
    begun = time.process_time()
    scenes = [draw_scene(seed) for seed in range(args.scenes)]
    held = [draw_scene(HELD_OUT + seed) for seed in range(args.held_out)]
    print(f"scenes drawn in {time.process_time() - begun:.0f} s", flush=True)
    about = {"held_out": len(held), "voxels": statistics.mean(len(s.voxels) for s in held)}
    given = {name: value for name, value in vars(args).items() if name != "out"}
    seeds: list[Any] = []
    for seed in range(args.seeds):
        models, result = seed_of(seed, scenes, held, args)
        seeds.append(result)
        print({n: {k: v["iou_25"] for k, v in r["answers"].items()} for n, r in result.items()})
        found = {"seeds": seeds, "time": clock(models, held[:10], args.rounds)}
        spent = {"cpu_seconds": time.process_time() - begun}
        whole = {"machine": machine(), "arguments": given, **about, **found, **spent}
        args.out.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
