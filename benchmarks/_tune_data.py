"""Questions of FoveaBench as files that `foveate tune` takes."""

from __future__ import annotations

import json
from pathlib import Path

from foveate.bench.tasks import get_task

TASKS = ("attribute", "existence", "counting", "position", "relation", "digits", "small-object")


def draw(folder: Path, each: int, seed: int) -> Path:
    """Write images and questions, the same number of each task.

    Args:
        folder: where to.
        each: questions of a task.
        seed: of the first.

    Returns:
        The file of questions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(seed, seed + each):
        for name in TASKS:
            sample = get_task(name).sample(number)
            (image,), (turn,) = sample.images, sample.turns
            file = f"{name}-{number}.png"
            image.save(folder / file)
            lines.append({"image": file, "question": turn.question, "answer": turn.answer,
                          "choices": list(turn.choices)})  # fmt: skip
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
