"""Asking: questions go through the model in batches, with methods or with all tokens.

Shapes: `B` rows, `D` hidden, `W` words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from foveate.bench.judge import is_right, kl, normalise
from foveate.bench.prompt import Prompter, prompts
from foveate.calibration.search import last_state
from foveate.core import Method
from foveate.families import find_family
from foveate.methods.uniform import Uniform
from foveate.run import use
from foveate.tune.data import Row
from foveate.tune.replies import Replies


class Said(NamedTuple):
    """What was said to one question.

    Args:
        text: the answer.
        words: (W) log-probabilities of its first word.
        state: (D) final state of the last prompt token; `None` where states are not compared.
    """

    text: str
    words: Tensor
    state: Tensor | None


class Asker:
    """A model that answers rows of a file.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        rows: all questions.
        batch: questions that go through the model together.
        max_new_tokens: longest answer.
        hint: put after every question.
        max_pixels: most pixels of an image.
        states: compare final states too, which takes another forward pass of each prompt.
        seen: told the numbers of questions each time some are asked.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: Sequence[Row],
        *,
        batch: int = 16,
        max_new_tokens: int = 8,
        hint: str = "",
        max_pixels: int | None = None,
        states: bool = False,
        seen: Callable[[Sequence[int]], object] = lambda numbers: None,
    ) -> None:
        self.model, self.rows, self.batch = model, rows, batch
        self._prompter = Prompter(processor, hint)
        self._longest, self._max_pixels, self._seen = max_new_tokens, max_pixels, seen
        self._family, self._states = find_family(model), states
        self._unpruned: dict[int, Said] = {}
        self._plain: dict[tuple[int, ...], Replies] = {}  # of the unpruned model, by batch

    def ask(self, methods: tuple[Method, ...], numbers: Sequence[int]) -> Replies:
        """Ask some questions.

        Args:
            methods: in stream order; none for the unpruned model.
            numbers: which questions.

        Raises:
            FoveateError: a method does not work, or an image cannot be read.
        """
        found = Replies()
        for first in range(0, len(numbers), self.batch):
            found = found + self._ask(methods, tuple(numbers[first : first + self.batch]))
        return found

    def inputs(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Model inputs of some questions, padded on the left."""
        samples = [self.rows[n].sample(n, self._max_pixels) for n in numbers]
        asked = [prompts(sample, self._prompter.videos)[0] for sample in samples]
        model = self.model
        return {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in self._prompter.first(asked).items()
            if isinstance(value, Tensor)
        }

    def _ask(self, methods: tuple[Method, ...], numbers: tuple[int, ...]) -> Replies:
        if not methods and numbers in self._plain:
            return self._plain[numbers]
        inputs = self.inputs(numbers)
        if not methods or any(number not in self._unpruned for number in numbers):
            all_tokens = (Uniform(keep=1.0),)
            said, before, _ = self._generate(all_tokens, inputs, numbers)
            self._unpruned |= dict(zip(numbers, said, strict=True))
            self._plain[numbers] = self._judge(said, numbers, before, before)
        if not methods:
            return self._plain[numbers]
        said, before, after = self._generate(methods, inputs, numbers)
        return self._judge(said, numbers, before, after)

    @torch.inference_mode()
    def _generate(
        self, methods: tuple[Method, ...], inputs: dict[str, Tensor], numbers: Sequence[int]
    ) -> tuple[list[Said], tuple[int, int], tuple[int, int]]:
        """Answers, and FLOPs and cache bytes of the prompts before and after."""
        self._seen(numbers)
        with use(self.model, methods) as session:
            out = self.model.generate(
                **inputs, max_new_tokens=self._longest, do_sample=False,
                return_dict_in_generate=True, output_logits=True,
            )  # fmt: skip
            report = session.report()
            states: Sequence[Tensor | None] = [None] * len(numbers)
            if self._states:
                states = list(last_state(self._family, inputs).cpu())
        texts = self._prompter.decode(out.sequences[:, inputs["input_ids"].shape[1] :])
        words = out.logits[0].float().log_softmax(-1).cpu()
        before, after = (
            (report["flops"][when], report["kv_bytes"][when]) for when in ("before", "after")
        )
        said = [Said(*one) for one in zip(texts, words, states, strict=True)]
        return said, before, after

    def _judge(
        self,
        said: Sequence[Said],
        numbers: Sequence[int],
        before: tuple[int, int],
        after: tuple[int, int],
    ) -> Replies:
        rows = [self.rows[n] for n in numbers]
        pairs = [(self._unpruned[n], one) for n, one in zip(numbers, said, strict=True)]
        answered = all(row.answer is not None for row in rows)
        right = (
            is_right(one.text, row.answer or "", row.choices)
            for one, row in zip(said, rows, strict=True)
        )
        return Replies(
            tuple(right) if answered else (),
            tuple(normalise(other.text) == normalise(one.text) for other, one in pairs),
            tuple(float(kl(other.words, one.words)) for other, one in pairs),
            tuple(
                float(cosine_similarity(other.state, one.state, dim=0))
                for other, one in pairs
                if other.state is not None and one.state is not None
            ),
            before,
            after,
        )
