"""Methods that learn, on the embedded model: trained through the stock Trainer, then asked.

`python benchmarks/learning.py ARM --seed 0` trains one arm, and asks held-out questions of
FoveaBench; `base` asks the embedded model as it is, with methods that need no training. Each writes
its row into `results/learning.json`. The test split is never trained on, and all arms are asked the
same questions.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from _bench import RESULTS, machine, warm_heap

TASKS = (
    "attribute", "existence", "counting", "position", "relation", "digits", "small-object",
    "large-image", "multi-turn",
)  # fmt: skip
TURNS = 8
SCALES = (256, 64, 16, 4, 1)
KEEPS = (0.25, 0.125, 0.0625)
SIZES = (128, 128, 128, 160, 192, 224)  # pixels of drawn images, which are shrunk to 128
ARMS = (
    "base", "m3", "tokenflex", "ordered-queries", "visionselector", "covipal", "atp-llava",
)  # fmt: skip
ALONE = ("visionselector", "covipal", "atp-llava")  # trained with the model frozen
TRAINING_FREE = (
    "random", "uniform", "divprune", "cdpruner", "fastervlm", "vtc-cls", "visionzip", "dart",
    "hiprune", "scope", "idpruner", "vispruner", "holov", "prunesid",
)  # fmt: skip


def method(arm: str) -> Any:
    """The method of an arm as it is trained."""
    from foveate import methods

    return {
        "m3": methods.M3(scales=SCALES),
        "tokenflex": methods.TokenFLEX(counts=(16, 64, 256), chances=(0.3, 0.3, 0.4)),
        "ordered-queries": methods.OrderedQueries(queries=64, keep=64),
        "visionselector": methods.VisionSelector(keep=0.2, inner=256, ramp=200),
        "covipal": methods.CoViPAL(keep=0.2),
        "atp-llava": methods.ATPLLaVA(pull=5.0),
    }[arm]


def modes(arm: str) -> dict[str, Any]:
    """What an arm is asked with: names, and fields of its method; `None` for all tokens."""
    if arm == "m3":
        return {f"{n} tokens": {"keep": n} for n in SCALES}
    if arm == "tokenflex":
        return {f"{n} tokens": {"keep": n} for n in (256, 64, 36, 16)}
    if arm == "ordered-queries":
        return {f"{n} tokens": {"keep": n} for n in (64, 32, 16, 4, 1)}
    if arm == "atp-llava":
        return {"learned thresholds": {}}
    return {f"keep {keep:g}": {"keep": keep} for keep in KEEPS}


class Conversations:
    """Drawn scenes, each with a conversation of up to `TURNS` questions of any kind.

    Args:
        seed: of the run.
        count: how many scenes.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np
        from _convergence import conversation
        from PIL import Image

        from foveate.tiny.scenes import draw_scene
        from recipes.data import TRAIN_SEEDS

        number = TRAIN_SEEDS + (100 + self.seed) * 10**9 + index
        rng = Random(number)
        scene = draw_scene(number, per_kind=6, size=rng.choice(SIZES))
        by_kind: dict[str, list[Any]] = {}
        for question in scene.questions:
            by_kind.setdefault(question.kind, []).append(question)
        asked = [rng.choice(by_kind[rng.choice(list(by_kind))]) for _ in range(TURNS)]
        image = scene.image.resize((128, 128), Image.Resampling.BILINEAR)
        ids, labels = conversation(list(dict.fromkeys(asked)))
        return {"input_ids": ids, "labels": labels, "pixels": np.array(image)}


def trained(
    arm: str, seed: int, out: Path, options: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """The embedded model with an arm's method, trained; the CPU seconds and losses of that."""
    import torch
    from _convergence import collate
    from transformers import Trainer, TrainingArguments

    import foveate
    from foveate.tiny import load

    model, _ = load()
    alone = arm in ALONE
    model.model.vision_tower.requires_grad_(False)
    model = foveate.prepare(model, method(arm), train="method" if alone else "all")
    folder = out / f"{arm}-{seed}"
    rate = 2e-3 if alone else 4e-4
    learning = [weights for weights in model.parameters() if weights.requires_grad]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=options.batch, max_steps=options.steps,
        learning_rate=rate, lr_scheduler_type="linear", warmup_steps=20, max_grad_norm=2.0,
        bf16=options.bf16, use_cpu=True, dataloader_pin_memory=False, save_strategy="no",
        logging_steps=10, report_to=[], seed=seed, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Conversations(seed, options.steps * options.batch),
        data_collator=collate,
        optimizers=(torch.optim.AdamW(learning, lr=rate, weight_decay=0.0), None),
    )
    begun = time.process_time()
    trainer.train()
    seconds = round(time.process_time() - begun)
    logged = [
        (log["step"], round(float(log["loss"]), 4))
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return model.eval(), {"cpu_seconds": seconds, "loss": logged}


def ask(model: Any, samples: int) -> tuple[dict[str, list[bool]], list[float]]:
    """Whether the model is right about the first question of each sample, task by task, with what
    is attached to it; and the mean share of visual tokens of each batch, over decoder layers.
    """
    import torch

    from foveate.bench.judge import is_right
    from foveate.bench.prompt import Prompter, prompts
    from foveate.bench.tasks import get_task
    from foveate.tiny.build import build_processor

    prompter, found = Prompter(build_processor(), ""), {}
    shares: list[float] = []
    for name in TASKS:
        task = get_task(name)
        drawn = [task.sample(n, split="test", difficulty=0.5, clutter=0.5) for n in range(samples)]
        right: list[bool] = []
        for first in range(0, len(drawn), 16):
            asked = [prompts(sample, prompter.videos)[0] for sample in drawn[first : first + 16]]
            inputs = prompter.first(asked)
            with torch.inference_mode():
                out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            said = prompter.decode(out[:, inputs["input_ids"].shape[1] :])
            right += [
                is_right(text, p.asked.answer, p.asked.choices)
                for text, p in zip(said, asked, strict=True)
            ]
            shares.append(_share(model))
        found[name] = right
    return found, shares


def _share(model: Any) -> float:
    """Mean share of visual tokens of the last forward, over decoder layers."""
    from foveate.engine.attachment import MARK

    for module in model.modules():
        attachment = vars(module).get(MARK)
        if attachment is not None and attachment.session.record is not None:
            record, layers = attachment.session.record, attachment.session.family.text_layers
            kept = [sum(image.surviving(n) for n in range(layers)) for image in record.images]
            return sum(kept) / (layers * sum(image.total for image in record.images))
    return 1.0


def _with_gates(model: Any, inputs: Any, firsts: Any) -> list[int]:
    """The likeliest first words with the gates of training, which wants labels: the right ones."""
    import torch

    more = {
        "input_ids": torch.cat((inputs["input_ids"], firsts[:, None]), 1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    labels = torch.full_like(more["input_ids"], -100)
    labels[:, -1] = firsts
    logits = model.train()(**{**inputs, **more}, labels=labels).logits
    return logits[:, -2].detach().argmax(-1).tolist()


def gap(model: Any, samples: int) -> dict[str, float]:
    """Share of first words of answers that are right with the gates of training, and with exact
    removal at the same budget; and share of both that are the same.
    """
    import torch

    from foveate.bench.prompt import Prompter, prompts
    from foveate.bench.tasks import get_task
    from foveate.tiny.build import build_processor
    from foveate.training.prepare import session_of

    prompter, session = Prompter(build_processor(), ""), session_of(model)
    learned = copy.deepcopy(session.learned.state_dict())  # it counts training forwards
    said: dict[bool, list[int]] = {True: [], False: []}
    truth: list[int] = []
    for name in TASKS:
        task = get_task(name)
        drawn = [task.sample(n, split="test", difficulty=0.5, clutter=0.5) for n in range(samples)]
        asked = [prompts(sample, prompter.videos)[0] for sample in drawn]
        words = prompter.processor.tokenizer(
            [prompt.asked.answer for prompt in asked], add_special_tokens=False
        )["input_ids"]
        firsts = torch.tensor([ids[0] for ids in words])
        for batch in torch.arange(len(asked)).split(8):
            inputs = prompter.first([asked[n] for n in batch])
            with torch.no_grad():
                logits = model.eval()(**inputs).logits[:, -1]
            said[False] += logits.argmax(-1).tolist()
            said[True] += _with_gates(model, inputs, firsts[batch])
        truth += firsts.tolist()
    session.learned.load_state_dict(learned)
    model.eval()
    with_gates, removed = said[True], said[False]
    right = [sum(map(int.__eq__, found, truth)) / len(truth) for found in (with_gates, removed)]
    same = sum(map(int.__eq__, with_gates, removed)) / len(truth)
    return {"gated": right[0], "removed": right[1], "same": same}


def answers(arm: str, model: Any, samples: int) -> dict[str, Any]:
    """The answers of an arm in each of its modes."""
    import foveate
    from foveate.training.prepare import session_of

    session, found = session_of(model), {}
    learned, trained_as = session.learned.state_dict(), session.methods[0].to_dict()
    session.remove()
    for name, fields in modes(arm).items():
        with foveate.use(model, {**trained_as, **fields}) as run:
            run.learned.load_state_dict(learned)
            found[name] = told(*ask(model, samples))
        print(arm, name, found[name]["accuracy"], round(found[name]["share"], 4), flush=True)
    return found


def told(right: dict[str, list[bool]], shares: list[float]) -> dict[str, Any]:
    """Accuracy over all tasks, and the answers: `1` for a right one."""
    every = [answer for of in right.values() for answer in of]
    return {
        "accuracy": round(100 * sum(every) / len(every), 2),
        "share": sum(shares) / len(shares),
        "right": {name: "".join("01"[answer] for answer in of) for name, of in right.items()},
    }


def base(samples: int) -> dict[str, Any]:
    """The embedded model as it is, with all tokens, pooled, and with methods as published."""
    import foveate
    from foveate.tiny import load

    model = load()[0].eval()
    found = {}
    asked = [("all tokens", None, {})]
    asked += [(f"m3 {n} tokens", "m3", {"keep": n}) for n in SCALES[1:]]
    asked += [
        (f"{name} {keep:g}", name, {"keep": keep}) for name in TRAINING_FREE for keep in KEEPS[1:2]
    ]
    for name, chosen, fields in asked:
        with foveate.use(model, chosen, **fields) if chosen else nullcontext():
            found[name] = told(*ask(model, samples))
        print("base", name, found[name]["accuracy"], flush=True)
    return found


def write(key: str, row: dict[str, Any], setting: dict[str, Any]) -> None:
    """Put a row into the result file, which has a line for each."""
    path = RESULTS / "learning.json"
    known = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rows = dict(sorted({**known["rows"], key: {**row, "machine": machine()}}.items()))
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in rows.items())
    path.write_text(f'{{\n "setting": {json.dumps(setting)},\n "rows": {{\n{lines}\n }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=12, help="images of a step")
    parser.add_argument("--bf16", action="store_true", help="on processors that have it")
    parser.add_argument("--samples", type=int, default=60, help="of each task")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    setting = {"tasks": TASKS, "samples": options.samples, "turns": TURNS}
    if options.arm == "base":
        write("base", {"answers": base(options.samples)}, setting)
        return
    model, course = trained(options.arm, options.seed, options.out, options)
    if options.arm in ALONE:
        course["gap"] = gap(model, options.samples)
        print(options.arm, course["gap"], flush=True)
    row = {
        "arm": options.arm, "seed": options.seed, "steps": options.steps, "batch": options.batch,
        **course, "answers": answers(options.arm, model, options.samples),
    }  # fmt: skip
    write(f"{options.arm}/{options.seed}", row, setting)


if __name__ == "__main__":
    warm_heap()
    main()
