"""Teach a VLM of real parts to look: `python -m recipes.real_vlm --model DIR --out RUN`.

`scripts/real_parts.py vlm` makes the folder: CLIP's tower and SmolLM2, with a projector that is
random. First the projector alone learns to say what every patch shows, in the language model's own
words: the sum of the embeddings of colour, kind and place. Then it is trained on answers, together
with low-rank changes of the language model. The tower is frozen, so what it sees is kept in
`--cache`. The schedule follows the clock. A run goes on where its last checkpoint was written.

The outcome, `adapter.safetensors`, holds the projector and the changes; `recipes.real_adapter` puts
them into a model. `recipes/real_vlm.safetensors` is that of docs/results-real.md: 508 steps with
`--chunks 12 --minutes 64`, 39 of which were spent on a busy machine, and 866 with `--chunks 40
--minutes 64 --start` and what came of them. `--start` goes on from it.
"""

import json
import math
import time
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration

from foveate.io.writing import check_folder, replacing
from foveate.tiny.words import COLOURS, KINDS, PLACES
from recipes import real_adapter
from recipes.precision import mixed
from recipes.real_cache import Asked, Chunk, chunk
from recipes.real_packed import answer_loss, pack

IMAGES, SLOTS = 2, 24
ALIGN_STEPS, ALIGN_IMAGES, ALIGN_RATE = 500, 12, 2e-3
RATES = {"projector": 5e-4, "lora": 8e-4}
WARM_UP, LEAST = 0.04, 0.03  # share of the time, and of the rate at the end
OFTEN = {
    "color": 3.0, "shape": 3.0, "where": 3.0, "exists": 3.0, "place-color": 1.5,
    "place-object": 1.5, "word": 0.5, "relation-color": 0.5, "relation-object": 0.5,
    "compare": 0.1,
}  # fmt: skip
"""How much likelier a question of a kind is chosen."""
ALIGNED, BACKGROUND = 0.5, 0.1  # weights of what patches show, and of those that show nothing
LABELS = ("colours", "kinds")
Known = tuple[Tensor, Tensor, Tensor]
Row = tuple[Chunk, int]
_SAVE_EVERY_S = 180.0


class Trainee:
    """The parts that are trained, and what they hang on.

    Args:
        folder: of the untrained model.
        rank: of the changes of the language model's matrices.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
        self.model.requires_grad_(False)
        self.tokenizer = self.processor.tokenizer
        self.image = self.model.config.image_token_id
        self.text: Any = self.model.model.language_model.to(torch.bfloat16)
        self.projector: nn.Module = self.model.model.multi_modal_projector
        config = LoraConfig(
            r=rank, lora_alpha=real_adapter.SCALE * rank, target_modules=list(real_adapter.CHANGED)
        )
        inject_adapter_in_model(config, self.text)
        self.head: Tensor = self.text.embed_tokens.weight
        self.lora = {n: p for n, p in self.text.named_parameters() if "lora_" in n}
        for parameter in self.lora.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.projector.requires_grad_(True)
        self.known = meanings(self.tokenizer, self.head)
        self.mean = self.deviation = torch.zeros(())

    def standardise(self, features: Tensor) -> None:
        """Take means and deviations of the tower's channels; the outcome has them folded in."""
        flat = features.float().flatten(0, -2)
        self.mean, self.deviation = flat.mean(0), flat.std(0)

    def project(self, features: Tensor) -> Tensor:
        """(B, V, D) of the tower as visual tokens."""
        visual: Tensor = self.projector((features.float() - self.mean) / self.deviation)
        return visual

    def parameters(self) -> list[nn.Parameter]:
        """Everything that is trained."""
        return [*self.projector.parameters(), *self.lora.values()]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the model."""
        return {
            "projector": self.projector.state_dict(), "lora": dict(self.lora),
            "mean": self.mean, "deviation": self.deviation,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Undo what was trained since a checkpoint."""
        self.projector.load_state_dict(state["projector"])
        for name, parameter in self.lora.items():
            parameter.data.copy_(state["lora"][name])
        self.mean, self.deviation = state["mean"], state["deviation"]


def meanings(tokenizer: Any, head: Tensor) -> Known:
    """Embeddings of colours, kinds and places: (8, D), (K, D), (9, D)."""

    def embedding(word: str) -> Tensor:
        forms = []
        for form in (word, f" {word}"):
            ids = tokenizer(form.replace("-", " "), add_special_tokens=False)["input_ids"]
            forms.append(head[ids].float().sum(0))
        return torch.stack(forms).mean(0)

    colours, kinds, places = (
        torch.stack([embedding(word) for word in words]) for words in (COLOURS, KINDS, PLACES)
    )
    return colours, kinds, places


def targets(known: Known, colours: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
    """What visual tokens should be like, (N, V, D), and how much each counts, (N, V)."""
    side = math.isqrt(colours.shape[1])
    third = torch.arange(side) * 3 // side
    places = known[2][(third[:, None] * 3 + third).flatten()]
    objects = known[0][colours.clamp(min=0)] + known[1][kinds.clamp(min=0)]
    weights = torch.where(colours >= 0, 1.0, BACKGROUND) * (colours != -100)
    return places + objects * (colours >= 0)[..., None], weights


def misalignment(known: Known, visual: Tensor, rows: list[Row]) -> Tensor:
    """Squared distance of visual tokens from what they should be like, as a share."""
    some = [torch.stack([getattr(part, name)[n] for part, n in rows]) for name in LABELS]
    wanted, weights = targets(known, *some)
    off = (visual.float() - wanted).square().mean(-1) * weights
    return off.sum() / (wanted.square().mean(-1) * weights).sum().clamp(min=1e-6)


def align(trainee: Trainee, parts: list[Chunk], steps: int, log: Any) -> None:
    """Teach the projector to say what every patch shows."""
    optimizer = torch.optim.AdamW(trainee.projector.parameters(), lr=ALIGN_RATE, weight_decay=0.01)
    rng = Random(0)
    for step in range(steps):
        part = rng.choice(parts)
        drawn = [n for n in range(len(part.asked)) if bool((part.colours[n] != -100).any())]
        rows = [(part, n) for n in rng.sample(drawn, min(ALIGN_IMAGES, len(drawn)))]
        for group in optimizer.param_groups:
            group["lr"] = ALIGN_RATE * min(1.0, (step + 1) / 20) * (1 - step / steps)
        with mixed():
            visual = trainee.project(torch.stack([part.features[n] for part, n in rows]))
        loss = misalignment(trainee.known, visual, rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 19:
            log({"aligned": step + 1, "loss": round(loss.item(), 4)})


def choose(asked: list[Asked], rng: Random) -> list[Asked]:
    """Some questions about an image, those of some kinds more often."""
    return sorted(asked, key=lambda q: -(rng.random() ** (1 / OFTEN.get(q[2], 1.0))))[:SLOTS]


def rate(progress: float) -> float:
    """What rates are multiplied by: a warm-up, then a cosine."""
    if progress < WARM_UP:
        return (progress + 0.002) / (WARM_UP + 0.002)
    return LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def answer(trainee: Trainee, parts: list[Chunk], step: int) -> tuple[Tensor, float]:
    """The loss of a step, and the share of answers' tokens that are right."""
    rng = Random(step)
    picked = [(part, rng.randrange(len(part.asked))) for part in rng.choices(parts, k=IMAGES)]
    asked = [choose(part.asked[n], rng) for part, n in picked]
    with mixed():
        visual = trainee.project(torch.stack([part.features[n] for part, n in picked]))
    batch = pack(trainee.tokenizer, asked, visual.shape[1], trainee.image)
    with mixed():
        loss, right = answer_loss(trainee.text, trainee.head, visual.bfloat16(), batch)
    return loss + ALIGNED * misalignment(trainee.known, visual, picked), right


class Course:
    """A run: how far it is, its log and its checkpoint.

    Args:
        trainee: what is trained.
        out: the run's folder.
    """

    def __init__(self, trainee: Trainee, out: Path) -> None:
        self.trainee, self.path = trainee, out / "checkpoint.pt"
        self.lines = (out / "log.jsonl").open("a")
        self.optimizer = torch.optim.AdamW(
            [{"params": list(trainee.projector.parameters()), "name": "projector"},
             {"params": list(trainee.lora.values()), "name": "lora"}],
            weight_decay=0.0, betas=(0.9, 0.98),
        )  # fmt: skip
        self.step, self._before, self._cpu_before = 0, 0.0, 0.0
        self.go()

    def go(self) -> None:
        """Let time count from now on."""
        self._begun, self._used = time.monotonic(), time.process_time()

    @property
    def seconds(self) -> float:
        """Time spent on answers, that of earlier runs included."""
        return self._before + time.monotonic() - self._begun

    @property
    def cpu(self) -> float:
        """The same in seconds of a core."""
        return self._cpu_before + time.process_time() - self._used

    def log(self, row: dict[str, Any]) -> None:
        """Add a line."""
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()

    def save(self) -> None:
        """Write a checkpoint."""
        kept = {
            "model": self.trainee.state(), "optimizer": self.optimizer.state_dict(),
            "step": self.step, "seconds": self.seconds, "cpu": self.cpu,
        }  # fmt: skip
        with replacing(self.path) as part:
            torch.save(kept, part)

    def resume(self) -> bool:
        """Go on from the last checkpoint, if there is one."""
        if not self.path.is_file():
            return False
        kept = torch.load(self.path)
        self.trainee.restore(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step, self._before, self._cpu_before = kept["step"], kept["seconds"], kept["cpu"]
        return True

    def follow(self, start: Path) -> None:
        """Begin where an adapter's training ended, with a schedule of its own."""
        self.step = real_adapter.read(self.trainee, start)
        self._cpu_before = float(real_adapter.told(start)["cpu_s"])

    def take(self, parts: list[Chunk], speed: float) -> None:
        """A step, at a share of the full rates."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATES[group["name"]] * speed
        loss, right = answer(self.trainee, parts, self.step)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.log({
            "step": self.step, "s": round(self.seconds), "cpu_s": round(self.cpu),
            "loss": round(loss.item(), 4), "right": round(right, 3),
        })  # fmt: skip


def train(
    trainee: Trainee, parts: list[Chunk], out: Path, minutes: float, start: Path | None = None
) -> None:
    """Align, then train on answers until the time is over, with checkpoints on the way.

    Args:
        trainee: what is trained.
        parts: what it learns from.
        out: for checkpoints, the log and the outcome.
        minutes: of training on answers, those of earlier runs included.
        start: an adapter to begin with, in place of the alignment.
    """
    course = Course(trainee, out)
    if not course.resume():
        trainee.standardise(torch.cat([part.features for part in parts[:4]]))
        if start is None:
            align(trainee, parts, ALIGN_STEPS, course.log)
        else:
            course.follow(start)
    course.go()
    saved = course.seconds
    while (spent := course.seconds) < 60 * minutes:
        course.take(parts, rate(spent / (60 * minutes)))
        if spent - saved > _SAVE_EVERY_S:
            course.save()
            saved = spent
    course.save()
    course.lines.close()
    real_adapter.write(
        trainee, out / "adapter.safetensors", steps=course.step, cpu_s=round(course.cpu)
    )


def main(
    model: Annotated[Path, typer.Option(help="Folder of the untrained model.")],
    out: Annotated[Path, typer.Option(help="Folder for the run.")],
    cache: Annotated[Path, typer.Option(help="Folder for what the tower sees.")],
    data: Annotated[Path | None, typer.Option(help="Folder that holds easy-vqa/.")] = None,
    chunks: Annotated[int, typer.Option(help="Chunks of 64 images to learn from.")] = 12,
    minutes: Annotated[float, typer.Option(help="Training on answers, in all.")] = 60,
    rank: Annotated[int, typer.Option(help="Rank of the changes.")] = 16,
    start: Annotated[Path | None, typer.Option(help="An adapter to begin with.")] = None,
    encode_only: Annotated[bool, typer.Option(help="Only fill the cache.")] = False,
) -> None:
    """Train, or go on from the last checkpoint."""
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    trainee = Trainee(model, rank)
    parts = [chunk(cache, n, trainee.model, trainee.processor, data) for n in range(chunks)]
    if not encode_only:
        train(trainee, parts, out, minutes, start)


if __name__ == "__main__":
    typer.run(main)
