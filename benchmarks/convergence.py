"""Does training with fewer tokens reach the accuracy of training with all? From scratch, three seeds.

`python benchmarks/convergence.py train --seed 0 --arm full` (or `pyramiddrop`) trains one arm
through the stock Trainer and goes on where it stopped; `evaluate` asks held-out questions; `collect`
writes `results/convergence.json`. Both arms of a seed share the vision tower, the initial weights,
the data and their order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _bench import machine, save, warm_heap

ARMS = ("full", "pyramiddrop")
HELD_OUT = 3 * 10**6
CURVE_SCENES = 24


def method() -> Any:
    """PyramidDrop as published: half of the tokens go at each quarter of the depth."""
    from foveate.methods import PyramidDrop

    return PyramidDrop()


def train(seed: int, arm: str, out: Path, images: int, vision_steps: int, batch: int) -> None:
    """Train one arm, or what is left of it."""
    import torch
    from _convergence import Conversations, MuonAdam, build, collate, train_vision
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from foveate.tiny.data import TRAIN_SEEDS

    torch.set_num_threads(1)
    train_vision(seed, out / f"vision-{seed}", vision_steps)
    folder = out / f"{arm}-{seed}"
    if (folder / "done.json").exists():
        return
    model = build(seed)
    model.load_state_dict(torch.load(out / f"vision-{seed}" / "vision.pt")["model"])
    model.set_attn_implementation("eager")  # faster than SDPA on a CPU
    model.model.vision_tower.requires_grad_(False)
    if arm != "full":
        import foveate

        model = foveate.prepare(model, method())
    curve = _curve(folder, seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=2e-3,
            lr_scheduler_type="linear",
            warmup_steps=40,
            max_grad_norm=2.0,
            bf16=True,
            use_cpu=True,
            save_steps=50,
            save_total_limit=1,
            logging_steps=10,
            report_to=[],
            seed=seed,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=Conversations(TRAIN_SEEDS + seed * 10**9, images),
        data_collator=collate,
        optimizers=(MuonAdam(model, 2e-3), None),
        callbacks=[curve],
    )
    last = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=last)
    torch.save(trainer.accelerator.unwrap_model(model).state_dict(), folder / "model.pt")
    (folder / "done.json").write_text(json.dumps({"points": curve.points, "batch": batch}))


def _curve(folder: Path, seed: int) -> Any:
    """A callback that notes loss, CPU seconds and held-out accuracy; evaluation is not timed."""
    import torch
    from _convergence import collate, Conversations
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.seconds, self.mark = 0.0, 0.0
            self.held = Conversations(HELD_OUT - 1000, CURVE_SCENES)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step and (folder / "curve.json").exists():
                points = json.loads((folder / "curve.json").read_text())
                self.points = [p for p in points if p["step"] <= state.global_step]
                self.seconds = self.points[-1]["seconds"] if self.points else 0.0
            self.mark = time.process_time()

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            if state.global_step % 25 and state.global_step != state.max_steps:
                return
            self.seconds += time.process_time() - self.mark
            accuracy = self.accuracy(model)
            self.points.append(
                {
                    "step": state.global_step,
                    "seconds": round(self.seconds, 1),
                    "accuracy": accuracy,
                }
            )
            print(folder.name, self.points[-1], flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "curve.json").write_text(json.dumps(self.points))
            self.mark = time.process_time()

        @torch.no_grad()
        def accuracy(self, model: Any) -> float:
            """Share of answers that are right, turns about one scene in one sequence."""
            model.eval()
            right = asked = 0
            for first in range(0, CURVE_SCENES, 12):
                batch = collate([self.held[first + i] for i in range(12)])
                labels = batch.pop("labels")[:, 1:]
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(**batch, use_cache=False).logits[:, :-1]
                answers = (labels > 4) & (labels != -100)
                right += int((logits.argmax(-1) == labels)[answers].sum())
                asked += int(answers.sum())
            model.train()
            return right / asked

    return Curve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "evaluate", "collect"))
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", choices=ARMS, default="full")
    parser.add_argument("--images", type=int, default=7200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--vision-steps", type=int, default=800)
    given = parser.parse_args()
    if given.what == "train":
        train(given.seed, given.arm, given.out, given.images, given.vision_steps, given.batch)


if __name__ == "__main__":
    warm_heap()
    main()
