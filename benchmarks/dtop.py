"""DToP on a small segmentation ViT trained here: mIoU against FLOPs over thresholds.

    python benchmarks/dtop.py [--head linear] [--steps 240] [--scenes 200]

A ViT learns to label the patches of drawn scenes: background and the eight shapes of foveate.tiny.
It begins as the first five layers of the packaged model's vision tower, which has been trained on
such scenes, and gets a head at each of two exits and a last one. In training all tokens stay
(threshold 1.0), as the paper trains its base models. Then the same weights label scenes that they
have not seen, at thresholds from 1.0 down, without any further training. Labels are of
patches: the kind of shape that covers at least a quarter of a patch. FLOPs are those of images
alone, heads included; times are of batches of 16, in which images are padded to the one with most
tokens. Heads of masks (`--head queries`) learn next to nothing in so few steps, and are not part of
the committed result.
"""

from __future__ import annotations

import argparse
import json
import time

from _bench import RESULTS, ratios, save, turns, warm_heap

warm_heap()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: E402

import foveate  # noqa: E402
from foveate import tiny  # noqa: E402
from foveate.families import find_family  # noqa: E402
from foveate.measure.account import account  # noqa: E402
from foveate.methods import DToP  # noqa: E402
from foveate.methods.dtop import canvas_of, probabilities  # noqa: E402
from foveate.ops.token_heads import LinearHead, QueryHead  # noqa: E402
from foveate.tiny.scenes import draw_scene  # noqa: E402
from foveate.tiny.words import SHAPES  # noqa: E402
from foveate.training.prepare import session_of  # noqa: E402

PACKAGED, PROCESSOR = tiny.load()
LAYERS, EXITS = 5, (1, 3)
SIZE, PATCH, WIDTH = 128, 8, 128  # as the packaged model has them
CLASSES = 1 + len(SHAPES)
RATE, BATCH = 5e-4, 16
COVERED = 0.25  # of a patch, by the shape that labels it
THRESHOLDS = (1.0, 0.9999, 0.9995, 0.999, 0.995, 0.99, 0.95, 0.9, 0.8, 0.6)
HELD_OUT = 10**6  # seeds from here on are not trained on


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(3, SIZE, SIZE) pixels of a scene in [0, 255], and (V) labels of its patches."""
    scene = draw_scene(seed, mix=(1, 0, 0, 0), per_kind=1)
    pixels = np.asarray(scene.image, np.float32).transpose(2, 0, 1)
    kinds = np.array([0, *(1 + SHAPES.index(one.kind) for one in scene.objects)])
    side = SIZE // PATCH
    cells = kinds[scene.owner + 1].reshape(side, PATCH, side, PATCH).swapaxes(1, 2)
    share = np.stack([(cells == c).mean((2, 3)) for c in range(CLASSES)])
    share[0] = COVERED - 1e-6  # or background
    return pixels, share.argmax(0).ravel()


def batch_of(seeds: range) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and labels of some scenes."""
    pixels, labels = zip(*map(drawn, seeds), strict=True)
    return normed(torch.tensor(np.stack(pixels))), torch.tensor(np.stack(labels))


def normed(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels as the packaged model's processor makes them."""
    made = PROCESSOR.image_processor
    mean, std = (torch.tensor(of)[:, None, None] for of in (made.image_mean, made.image_std))
    return (pixels / 255 - mean) / std


def vit() -> CLIPVisionModel:
    """The packaged model's tower, without its last layer, which it does not read either."""
    torch.manual_seed(0)
    tower = PACKAGED.model.vision_tower
    sizes = {**tower.config.to_dict(), "num_hidden_layers": LAYERS}
    vit = CLIPVisionModel(CLIPVisionConfig(**sizes))
    weights = tower.state_dict()
    vit.load_state_dict({name: weights[name] for name in vit.state_dict()})
    return vit


def said(head: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, V, C) logits, and (B, C, 2) of classes, of the last head."""
    found = head(states)
    return (found[0].mT, found[1]) if isinstance(found, tuple) else (found, None)


def loss_of(
    logits: torch.Tensor, present: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of tokens; of masks, of each class alone, and of its presence."""
    if present is None:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted = F.one_hot(labels, CLASSES).to(logits)
    there = wanted.amax(1)
    masks = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(1)
    overlap = 2 * (logits.sigmoid() * wanted).sum(1) / (logits.sigmoid() + wanted).sum(1)
    of_masks = ((masks * 5 + 1 - overlap) * there).sum() / there.sum()
    of_absent = (masks * (1 - there)).mean()
    return of_masks + of_absent + F.cross_entropy(present.flatten(0, 1), 1 - there.long().flatten())


def train(head: str, steps: int) -> tuple[CLIPVisionModel, torch.nn.Module, dict]:
    """A ViT with heads, all tokens staying; heads at exits count 0.4 of the last."""
    model = vit()
    last = (LinearHead if head == "linear" else QueryHead)(WIDTH, CLASSES)
    method = DToP(exits=EXITS, threshold=1.0, classes=CLASSES, head=head)
    foveate.prepare(model.train(), method)
    parameters = [*model.parameters(), *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    start, batch, losses = time.process_time(), BATCH, []
    for step in range(steps):
        pixels, labels = batch_of(range(step * batch, (step + 1) * batch))
        states = model(pixels).last_hidden_state[:, 1:]
        loss = loss_of(*said(last, states), labels)
        canvas = canvas_of(session_of(model))
        for stage, present in zip(canvas.stages, canvas.present, strict=True):
            loss = loss + 0.4 * loss_of(stage, present, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 19:
            print(f"step {step + 1}: loss {np.mean(losses[-20:]):.3f}", flush=True)
    spent = time.process_time() - start
    facts = {"steps": steps, "batch": batch, "cpu_s": spent, "loss": float(np.mean(losses[-20:]))}
    return model.eval(), last.eval(), facts


def miou(labels: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over classes of intersection over union, of all patches of all scenes."""
    seen = torch.bincount(labels * CLASSES + found, minlength=CLASSES**2).view(CLASSES, CLASSES)
    hits = seen.diag().float()
    return float((hits / (seen.sum(0) + seen.sum(1) - hits).clamp(min=1)).mean())


def measure(
    model: CLIPVisionModel, last: torch.nn.Module, heads: torch.nn.ModuleList, scenes: int
) -> list[dict]:
    """A row for each threshold."""
    pixels, labels = batch_of(range(HELD_OUT, HELD_OUT + scenes))
    family, rows = find_family(model), []
    for threshold in THRESHOLDS:
        method = DToP(exits=EXITS, threshold=threshold, heads=heads)
        found, flops, left = [], [], []
        with foveate.use(model, method) as run:
            for image in pixels:
                states = model(image[None]).last_hidden_state[:, 1:]
                canvas = canvas_of(run)
                logits, present = said(last, states)
                found.append(probabilities(canvas.filled(logits), present).argmax(-1))
                flops.append(account(run.record, family, run.methods).total)
                left.append([(canvas.layer == exit).float().mean().item() for exit in EXITS])
        rows.append(
            {
                "threshold": threshold,
                "miou": miou(labels.flatten(), torch.cat(found).flatten()),
                "gflops": float(np.mean(flops)) / 1e9,
                "left": np.mean(left, 0).tolist(),
            }
        )
        print(rows[-1], flush=True)
    return rows


def timed(
    model: CLIPVisionModel, heads: torch.nn.ModuleList, rows: list[dict], rounds: int
) -> None:
    """Add to each row how many times faster batches of 16 pass the encoder and the exits' heads
    than all tokens do without heads.
    """
    pixels, _ = batch_of(range(HELD_OUT, HELD_OUT + 16))

    def run_at(threshold: float):
        def run() -> None:
            with foveate.use(model, DToP(exits=EXITS, threshold=threshold, heads=heads)):
                model(pixels)

        return run

    contenders = {str(row["threshold"]): run_at(row["threshold"]) for row in rows}
    times = turns({"plain": lambda: model(pixels)} | contenders, rounds)
    for row in rows:
        row["speed-up"] = ratios(times["plain"], times[str(row["threshold"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", nargs="+", default=["linear"], choices=["linear", "queries"])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    result = {
        "model": f"{LAYERS} layers of width {WIDTH}, {SIZE} px, {(SIZE // PATCH) ** 2} patches",
        "exits": EXITS,
        "scenes": arguments.scenes,
    }
    for head in arguments.head:
        model, last, facts = train(head, arguments.steps)
        session = session_of(model)
        heads = session.learned["0"]
        session.remove()
        with torch.inference_mode():
            rows = measure(model, last, heads, arguments.scenes)
            timed(model, heads, rows, arguments.rounds)
        found = {of["head"]: of for of in earlier()}
        found[head] = {"head": head, "training": facts, "rows": rows}
        save("dtop", result | {"results": [found[name] for name in sorted(found)]})


def earlier() -> list[dict]:
    """What was measured of other heads before."""
    path = RESULTS / "dtop.json"
    return json.loads(path.read_text())["results"] if path.exists() else []


if __name__ == "__main__":
    main()
