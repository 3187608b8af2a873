"""One encoding for many methods: what they choose of it, and what a model answers from that.

A method after the projector reads the encoder and its features, which no choice of its own changes.
So a batch of images is encoded once, every method says what it keeps, and the language model is
asked again with each reduction; its answers are those of a session with the method itself. Methods
that cut elsewhere have such a session. Where they read the language model alone, they too are
given the one encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from _tower import Chooser, Name, Standin
from PIL import Image
from torch import Tensor

from foveate.bench.judge import is_right
from foveate.bench.prompt import Prompter, prompts
from foveate.bench.sample import Sample
from foveate.core import Method, ModelFacts, Reduction, Step, get_method
from foveate.core.tokens import VisualTokens
from foveate.errors import FoveateError
from foveate.families import find_family
from foveate.run import use

NEW_TOKENS, GREY = 6, (128, 128, 128)
ALL: Name = ("none", 1.0)
BLANK: Name = ("none, of a grey image", 1.0)


@dataclass(frozen=True)
class Replay(Standin):
    """Does what another method chose before.

    Args:
        made: members of the batch, and what becomes of them.
        step: where the other method chose.
    """

    made: tuple[tuple[Sequence[int], Reduction], ...] = ()
    step: Step | None = None

    @property
    def step_count(self) -> int | None:
        """One."""
        return 1

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """That of the other method, without what it read."""
        assert self.step is not None
        return (replace(self.step, needs=()),)

    def reduce_each(self, tokens: VisualTokens) -> Sequence[tuple[Sequence[int], Reduction]]:
        """What was chosen."""
        return self.made


@contextmanager
def remembered(tower: Any) -> Iterator[None]:
    """Encode what the tower is shown first, and give that back from then on."""
    seen: list[Any] = []
    forward = tower.forward

    def once(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(forward(*args, **kwargs))
        return seen[0]

    tower.forward = once
    try:
        yield
    finally:
        del tower.forward


def ask(
    model: Any, processor: Any, samples: Sequence[Sample], methods: Mapping[Name, Method]
) -> dict[Name, list[bool]]:
    """Whether each answer is right: with all tokens, of a grey image, and with each method.

    Args:
        model: a LLaVA.
        processor: its processor.
        samples: each with one question about one image.
        methods: each with one step, after the projector.
    """
    grey = [
        Sample(
            s.task, s.seed, tuple(Image.new("RGB", i.size, (128,) * 3) for i in s.images), s.turns
        )  # type: ignore[union-attr]
        for s in samples
    ]
    found = {BLANK: right(model, processor, grey, None)}
    family = find_family(model)
    chooser = Chooser(asked=tuple(methods.values()))
    found[ALL] = right(model, processor, samples, chooser)
    with remembered(model.model.vision_tower):
        for number, (name, method) in enumerate(methods.items()):
            made = tuple(chooser.found[number])
            positions = method.positions or type(method).published_positions
            (step,) = method.steps(family)
            replay = Replay(made=made, step=step, positions=positions)
            found[name] = right(model, processor, samples, replay)
    return found


def ask_each(
    model: Any, processor: Any, samples: Sequence[Sample], methods: Mapping[Name, Method]
) -> dict[Name, list[bool]]:
    """Whether each answer is right, each method in a session of its own.

    Args:
        model: a LLaVA.
        processor: its processor.
        samples: each with one question about one image.
        methods: wherever they cut. Those that refuse their budget here are left out.
    """
    found: dict[Name, list[bool]] = {}

    def answer(name: Name) -> None:
        try:
            found[name] = right(model, processor, samples, methods[name])
        except FoveateError as error:
            print(f"{name[0]} at {name[1]:g} is left out: {error}")

    within = [name for name, method in methods.items() if method.stage == "llm"]
    with remembered(model.model.vision_tower):
        for name in within:
            answer(name)
    for name in methods.keys() - set(within):
        answer(name)
    return found


@torch.inference_mode()
def right(
    model: Any, processor: Any, samples: Sequence[Sample], method: Method | None
) -> list[bool]:
    """Whether each answer is right; `None` keeps all tokens."""
    prompter = Prompter(processor)
    asked = [prompts(sample, prompter.videos)[0] for sample in samples]
    given = {
        name: value.to(model.dtype) if torch.is_floating_point(value) else value
        for name, value in prompter.first(asked).items() if isinstance(value, Tensor)
    }  # fmt: skip
    with use(model, method or get_method("uniform")(keep=1.0)):
        out = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
    said = prompter.decode(out[:, given["input_ids"].shape[1] :])
    return [
        is_right(text, prompt.asked.answer, prompt.asked.choices)
        for text, prompt in zip(said, asked, strict=True)
    ]
