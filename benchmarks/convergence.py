"""Does training with fewer tokens reach the accuracy of training with all?

`python benchmarks/convergence.py train --seed 0 --arm full` (or `pyramiddrop`) trains one arm
through the stock Trainer, goes on where it stopped, and asks held-out questions; `collect` writes
`results/convergence.json`. All arms share the vision tower; those of a seed share the untrained
language model, its first steps, and the data and their order.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from _bench import machine, save, warm_heap

ARMS = ("full", "pyramiddrop", "steep")
HELD_OUT = 3 * 10**6
CURVE_STEPS, CURVE_QUESTIONS = 50, 240
VISION_STEPS, WARM_STEPS = 800, 450
RATE = 2e-3
TASKS = ("attribute", "existence", "counting", "position")  # of FoveaBench, which arms are taught
SHARE = 7 / 24  # what PyramidDrop's schedule as published keeps after its first cut, on average


def method(arm: str) -> Any:
    """PyramidDrop as published, half of the tokens going at each quarter of the depth; or steeper.

    The steep schedule keeps 18 % of the tokens on average, and decides early.
    """
    from foveate.methods import PyramidDrop

    if arm == "steep":
        return PyramidDrop(layers=(1, 2, 4), keep=(0.25, 0.0625, 0.016))
    return PyramidDrop()


def start(seed: int, out: Path) -> None:
    """Make what the arms of a seed start from, unless it is there."""
    import torch
    from _convergence import train_vision, warm_up

    torch.set_num_threads(1)
    train_vision(0, out / "start", VISION_STEPS)
    warm_up(seed, out / "start", WARM_STEPS)


def train(seed: int, arm: str, out: Path, images: int, batch: int) -> None:
    """Train one arm through the stock Trainer, or what is left of it."""
    import torch
    from _convergence import Conversations, MuonAdam, build, collate
    from transformers import Trainer, TrainingArguments

    import foveate
    from foveate.training.finetune.run import last_checkpoint
    from recipes.data import TRAIN_SEEDS

    folder = out / f"{arm}-{seed}"
    if (folder / "model.pt").exists():
        return
    model = build(0)
    model.load_state_dict(torch.load(out / "start" / f"warm-{seed}.pt")["model"])
    model.set_attn_implementation("eager")  # faster than SDPA on a CPU
    model.model.vision_tower.requires_grad_(False)
    if arm != "full":
        model = foveate.prepare(model, method(arm))
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            warmup_steps=10,
            max_grad_norm=2.0,
            bf16=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            save_steps=50,
            save_total_limit=1,
            logging_steps=10,
            report_to=[],
            seed=seed,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        train_dataset=Conversations(TRAIN_SEEDS + (1 + seed) * 10**9, images),
        data_collator=collate,
        optimizers=(MuonAdam(model, RATE), None),
        callbacks=[_curve(folder)],
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    torch.save(model.state_dict(), folder / "model.pt")


def _curve(folder: Path) -> Any:
    """A callback that notes CPU seconds and held-out accuracy; asking is not timed."""
    from _convergence import answer_alone
    from transformers import TrainerCallback

    class Curve(TrainerCallback):
        def __init__(self) -> None:
            self.points: list[dict[str, float]] = []
            self.mark = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            path = folder / "curve.json"
            if state.global_step and path.exists():
                points = json.loads(path.read_text())
                self.points = [p for p in points if p["step"] <= state.global_step]
            else:
                self.note(0, 0.0, rest["model"])
            self.mark = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            if state.global_step % CURVE_STEPS == 0 or state.global_step == state.max_steps:
                spent = time.process_time() - self.mark
                self.note(state.global_step, self.points[-1]["seconds"] + spent, rest["model"])
                self.mark = time.process_time()

        def note(self, step: int, seconds: float, model: Any) -> None:
            right, asked = answer_alone(model, HELD_OUT - 10**5, CURVE_QUESTIONS)["all"]
            self.points.append(
                {"step": step, "seconds": round(seconds, 1), "accuracy": right / asked}
            )
            print(folder.name, self.points[-1], flush=True)
            (folder / "curve.json").write_text(json.dumps(self.points))

    return Curve()


def evaluate(seed: int, arm: str, out: Path, questions: int) -> None:
    """Ask an arm held-out questions with all tokens and with the method."""
    import torch
    from _convergence import answer_alone, build

    import foveate

    path = out / f"{arm}-{seed}" / "answers.json"
    counts = json.loads(path.read_text()) if path.exists() else {}
    model = build(0).eval()
    model.load_state_dict(torch.load(out / f"{arm}-{seed}" / "model.pt"))
    model.set_attn_implementation("eager")
    modes = {"all tokens": None, "pruned": method("pyramiddrop"), "steep": method("steep")}
    for mode, chosen in modes.items():
        if mode not in counts and (mode != "pruned" or arm != "steep"):
            with foveate.use(model, chosen) if chosen else nullcontext():
                counts[mode] = answer_alone(model, HELD_OUT, questions)
    path.write_text(json.dumps(counts))
    print(arm, seed, {mode: c["all"] for mode, c in counts.items()}, flush=True)


def score(seed: int, arm: str, out: Path, samples: int) -> None:
    """FoveaBench's accuracy of an arm, on the tasks whose questions it was taught."""
    import torch
    from _convergence import build

    from foveate.bench.levels import ALL
    from foveate.bench.runner import Runner
    from foveate.bench.settings import Cell, Settings
    from foveate.bench.tasks import get_task
    from foveate.tiny.build import build_processor

    path = out / f"{arm}-{seed}" / "foveabench.json"
    if path.exists():
        return
    model = build(0).eval()
    model.load_state_dict(torch.load(out / f"{arm}-{seed}" / "model.pt"))
    settings = Settings("study", ("pyramiddrop",), (SHARE,), TASKS, samples=samples, clutter=0.25)
    runner = Runner(model, build_processor(), settings, get_task)
    counts: dict[str, dict[str, list[int]]] = {"all tokens": {}, "pruned": {}}
    for task in TASKS:
        for mode, cell in (
            ("all tokens", Cell(ALL, None, task)),
            ("pruned", Cell("pyramiddrop", SHARE, task)),
        ):
            outcome = runner.run(cell)
            if outcome.status != "done":
                raise RuntimeError(f"{cell}: {outcome.error}")
            answers = outcome.answers
            counts[mode][task] = [sum(a.right for a in answers), len(answers)]
    path.write_text(json.dumps(counts))
    print(arm, seed, counts, flush=True)


def collect(out: Path, images: int, batch: int) -> None:
    """Write the result file from the arms that are done."""
    import torch

    folders = [(arm, seed, out / f"{arm}-{seed}") for arm in ARMS for seed in range(20)]
    arms = [
        {
            "arm": arm,
            "seed": seed,
            "curve": json.loads((folder / "curve.json").read_text()),
            "answers": json.loads((folder / "answers.json").read_text()),
            "foveabench": json.loads((folder / "foveabench.json").read_text()),
        }
        for arm, seed, folder in folders
        if (folder / "foveabench.json").exists()
    ]
    vision = torch.load(out / "start" / "vision.pt")
    first = [torch.load(out / "start" / f"warm-{seed}.pt") for seed in {a["seed"] for a in arms}]
    shared = {
        "vision seconds": round(vision["seconds"]),
        "first questions seconds": [round(warm["seconds"]) for warm in first],
        "first questions": [warm["questions"] for warm in first],
        "right at their end": [round(warm["right"], 3) for warm in first],
    }
    setting = {"images per arm": images, "images per step": batch, "rate": RATE}
    on = {
        **machine(),
        "dtype": "bfloat16 autocast over float32 weights",
        "attention": "eager",
        "time": "process CPU seconds of training, evaluation left out; machine shared",
    }
    save("convergence", {"machine": on, "start": shared, "setting": setting, "arms": arms})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("start", "train", "evaluate", "collect"))
    parser.add_argument("--out", type=Path, default=Path("runs/convergence"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arm", choices=ARMS, default="full")
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--questions", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=240, help="of each task of FoveaBench")
    given = parser.parse_args()
    if given.what in ("start", "train"):
        start(given.seed, given.out)
    if given.what == "train":
        train(given.seed, given.arm, given.out, given.images, given.batch)
    if given.what in ("train", "evaluate"):
        evaluate(given.seed, given.arm, given.out, given.questions)
        score(given.seed, given.arm, given.out, given.samples)
    if given.what == "collect":
        collect(given.out, given.images, given.batch)


if __name__ == "__main__":
    warm_heap()
    main()
