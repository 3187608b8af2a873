"""What a fine-tuning run is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from foveate.core import Method
from foveate.core.fields import Natural, Positive, check_fields
from foveate.errors import InputError
from foveate.training.finetune.data import Conversations, Example, Scenes
from foveate.training.prepare import Train

DTYPES = ("auto", "float32", "bfloat16")
TRAINED: tuple[str, ...] = get_args(Train)


@dataclass(frozen=True)
class Data:
    """Where conversations come from: a file, or drawn scenes.

    Args:
        file: a jsonl file, or None.
        scenes: how many scenes to draw, where there is no file.
        turns: most questions about one scene.
        seed: data of another seed shows other scenes.
        max_pixels: most pixels of an image of the file; None for Pillow's limit.
    """

    file: Path | None = None
    scenes: Natural = 0
    turns: Positive = 4
    seed: Natural = 0
    max_pixels: Positive | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InputError: a number is none, or out of range.
        """
        check_fields(self, "data", error_of=lambda field: InputError)

    def load(self) -> Sequence[Example]:
        """Read the file, or prepare to draw.

        Raises:
            InputError: the file, a line or an image is not as it must be.
        """
        if self.file is not None:
            return Conversations(self.file, self.max_pixels)
        return Scenes(self.scenes, self.turns, self.seed)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run.

    Args:
        model: `tiny`, a folder, or a hub id.
        out: folder for checkpoints and the outcome.
        data: what it learns from.
        method: what removes visual tokens while it learns, several in stream order; None trains
            with all of them.
        train: `all` trains the model; `method` only what the method itself learns.
        freeze: parameters whose name holds one of these texts are not trained.
        lora: arguments of `peft.LoraConfig`; None trains the model's own weights.
        dtype: of the weights; `auto` is float32 on a CPU and bfloat16 elsewhere.
        trainer: arguments of `transformers.TrainingArguments`.
    """

    model: str
    out: Path
    data: Data
    method: Method | tuple[Method, ...] | None = None
    train: Train = "all"
    freeze: tuple[str, ...] = ()
    lora: Mapping[str, Any] | None = None
    dtype: str = "auto"
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InputError: a text, a path or a list of texts is none, or what is trained is not clear.
        """
        check_fields(self, "a recipe", error_of=lambda field: InputError)
        if self.train == "method":
            if self.method is None:
                raise InputError("train: method needs a method that learns; add one, or train all")
            if self.freeze or self.lora is not None:
                other = "freeze" if self.freeze else "lora"
                raise InputError(f"train: method freezes the whole model, so leave {other} out")

    def to_dict(self) -> dict[str, Any]:
        """What the outcome depends on, as JSON values; `out` is left out."""
        data = self.data
        return {
            "model": self.model,
            "data": {
                "file": str(data.file) if data.file else None,
                "scenes": data.scenes,
                "turns": data.turns,
                "seed": data.seed,
            },
            "method": _described(self.method),
            "train": self.train,
            "freeze": list(self.freeze),
            "lora": dict(self.lora) if self.lora is not None else None,
            "dtype": self.dtype,
            "trainer": dict(self.trainer),
        }


def _described(method: Method | tuple[Method, ...] | None) -> Any:
    if isinstance(method, tuple):
        return [one.to_dict() for one in method]
    return None if method is None else method.to_dict()
