"""Two small tasks on drawn scenes: one question, and two in a row."""

from dataclasses import dataclass

from foveate import tiny
from foveate.bench.sample import Evidence, Sample, Turn


@dataclass(frozen=True)
class SceneTask:
    """Colours, or colours and then places."""

    name: str = "color"
    turns: int = 1
    summary: str = "drawn scenes"

    def sample(self, seed: int, *, split="test", difficulty=0.5, clutter=0.5) -> Sample:
        offset = {"train": 2**41, "test": 10**6, "hidden": 10**7}[split]
        scene = tiny.draw_scene(offset + seed)
        kinds = ("color", "where")[: self.turns]
        asked = [
            next((q for q in scene.questions if q.kind == kind), scene.questions[0])
            for kind in kinds
        ]
        turns = tuple(
            Turn(q.text, q.answer, (0,) if n == 0 else (), tuple(Evidence(b) for b in q.boxes))
            for n, q in enumerate(asked)
        )
        return Sample(self.name, seed, (scene.image,), turns)


TASKS = {"color": SceneTask(), "two-turns": SceneTask("two-turns", 2)}
