"""Running cells: a method at a budget on a task, in one process.

Samples go through `generate` in batches, inside a session. Further questions of a sample are asked
after the cache that the first one left, pruned as it is.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.bench.judge import is_right, kl
from foveate.bench.levels import ALL, method_at
from foveate.bench.outcome import Answer, Outcome, Survival, Totals
from foveate.bench.prompt import Prompt, Prompter, prompts
from foveate.bench.recall import Seen, evidence_recall, seen_images
from foveate.bench.sample import Sample, Task
from foveate.bench.settings import Cell, Settings, fingerprint, key
from foveate.core import Learning, Method
from foveate.core.video import VideoMethod
from foveate.engine.cache_argument import CACHE
from foveate.errors import FoveateError, InputError
from foveate.families import find_family
from foveate.methods.uniform import Uniform
from foveate.run import use

_REMEMBERED = 2  # tasks whose samples and unpruned answers a process holds


@dataclass
class _Reference:
    """The samples of a task, and what the unpruned model says of them."""

    samples: list[Sample]
    answers: list[Answer] = field(default_factory=list)
    words: list[Tensor] = field(default_factory=list)
    outcome: Outcome | None = None


class Runner:
    """Runs cells on a loaded model.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        settings: what is asked.
        find_task: task of a name.
    """

    def __init__(
        self, model: Any, processor: Any, settings: Settings, find_task: Callable[[str], Task]
    ) -> None:
        self.model, self.settings = model, settings
        self.family = find_family(model)
        self.prompter = Prompter(processor, settings.hint)
        self.fingerprint = fingerprint(model)
        self._find_task = find_task
        self._references: dict[str, _Reference] = {}

    def method(self, cell: Cell) -> Method | None:
        """The method of a cell at its budget, or `None` for the unpruned model.

        Raises:
            FoveateError: it does not take that budget.
        """
        return None if cell.method == ALL else method_at(cell.method, cell.keep, self.family)

    def key(self, cell: Cell) -> str:
        """The name under which a cell is remembered."""
        try:
            method = self.method(cell)
        except FoveateError:
            method = None
        return key(
            cell, self.settings, self.fingerprint, None if method is None else method.to_dict()
        )

    def run(self, cell: Cell) -> Outcome:
        """Run a cell. What a method cannot do is an outcome, not an error."""
        start = time.perf_counter()
        try:
            outcome = self._run(cell)
        except FoveateError as error:
            outcome = Outcome(status="refused", error=str(error))
        except Exception as error:  # a method may fail in any way; the other cells go on
            where = traceback.extract_tb(error.__traceback__)[-1]
            location = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
            text = f"{type(error).__name__}: {error} ({location})"
            outcome = Outcome(status="failed", error=text)
        outcome.seconds = time.perf_counter() - start
        return outcome

    def samples(self, task: str) -> list[Sample]:
        """The samples of a task."""
        return self._remember(task).samples

    def _run(self, cell: Cell) -> Outcome:
        reference = self._remember(cell.task)
        method = self.method(cell)
        if reference.outcome is None:
            reference.outcome = self._ask(reference, None)
        if method is None:
            return reference.outcome
        self._check(method, reference.samples)
        return self._ask(reference, method)

    def _remember(self, name: str) -> _Reference:
        if name not in self._references:
            task, s = self._find_task(name), self.settings
            drawn = [
                task.sample(s.seed + n, split=s.split, difficulty=s.difficulty, clutter=s.clutter)
                for n in range(s.samples)
            ]
            while len(self._references) >= _REMEMBERED:
                del self._references[next(iter(self._references))]
            self._references[name] = _Reference(drawn)
        return self._references[name]

    def _check(self, method: Method, samples: Sequence[Sample]) -> None:
        """Refuse a method that would do nothing, or choose by parameters that nobody trained."""
        if method.learned(self.family) is not None:
            raise InputError(
                f"{method.slug} learns parameters, which would be untrained here; train them with "
                "foveate.prepare or `foveate train`"
            )
        if isinstance(method, Learning) and method.keep is None and not method.adaptive:
            raise InputError(
                f"{method.slug} removes nothing unless keep says to how many tokens, and takes no "
                "share, as is set here; measure it with foveate.use on a model trained with it"
            )
        if not isinstance(method, VideoMethod):
            return
        films = any(p.frames > 1 for p in self._prompts(samples[0])[0].images)
        if not films:
            raise InputError(
                f"{method.slug} compares the frames of a video, and {self.settings.model} is given "
                "no video here: it would remove nothing"
            )

    def _prompts(self, sample: Sample) -> list[Prompt]:
        return prompts(sample, self.prompter.videos)

    def _ask(self, reference: _Reference, method: Method | None) -> Outcome:
        """All questions of a task, with a method or without."""
        answers: list[Answer] = []
        words: list[Tensor] = []
        totals, survival = Totals(), Survival()
        notes: list[str] = []
        for first in range(0, len(reference.samples), self.settings.batch):
            part = reference.samples[first : first + self.settings.batch]
            for group in _by_length([self._prompts(sample) for sample in part]):
                chosen = [part[n] for n in group]
                batch = _Batch(self, chosen, [self._prompts(sample) for sample in chosen])
                said, logs = batch.ask(method)
                answers += said
                words += logs
                if batch.report is not None:
                    totals.add(batch.report)
                    if method is not None:  # else the session keeps everything, and says so
                        notes += batch.report["notes"]
                for row in batch.seen:
                    for look in row:
                        survival.add(look)
        outcome = Outcome(
            answers=answers, totals=totals, survival=survival, notes=sorted(set(notes)),
            method={} if method is None else method.to_dict(),
        )  # fmt: skip
        if method is None:
            reference.answers, reference.words = answers, words
        pairs = zip(reference.words, words, strict=True)
        outcome.compare(reference.answers, [float(kl(a, b)) for a, b in pairs])
        return outcome


def _by_length(rows: Sequence[Sequence[Prompt]]) -> list[list[int]]:
    """Samples with equally many questions, which can go through the model together."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(len(row), []).append(number)
    return list(groups.values())


class _Batch:
    """Some samples on their way through the model."""

    def __init__(
        self, runner: Runner, samples: Sequence[Sample], rows: Sequence[Sequence[Prompt]]
    ) -> None:
        self.runner, self.samples, self.rows = runner, samples, rows
        self.seen: list[list[Seen]] = [[] for _ in samples]
        self.report: Any = None

    @torch.inference_mode()
    def ask(self, method: Method | None) -> tuple[list[Answer], list[Tensor]]:
        """Ask all questions; answers sample by sample, and (W) log-probabilities of each's first
        word.
        """
        prompter = self.runner.prompter
        # One that keeps everything changes nothing, and counts what the unpruned model costs.
        session = use(self.runner.model, method or Uniform(keep=1.0))
        said: list[list[Answer]] = [[] for _ in self.samples]
        words: list[list[Tensor]] = [[] for _ in self.samples]
        with session as run:
            state: dict[str, Any] = {}
            for turn in range(len(self.rows[0])):
                asked = [row[turn] for row in self.rows]
                inputs = prompter.first(asked) if turn == 0 else prompter.further(asked)
                texts, logs, state = self._generate(inputs, state)
                self._look(run, asked, first=turn == 0)
                for n, prompt in enumerate(asked):
                    said[n].append(self._answer(n, prompt, texts[n]))
                    words[n].append(logs[n])
        return [a for row in said for a in row], [w for row in words for w in row]

    def _generate(
        self, inputs: Any, state: Mapping[str, Any]
    ) -> tuple[list[str], Tensor, dict[str, Any]]:
        """Answers of one turn, (B, W) log-probabilities of their first words, and what the next
        turn goes on from.
        """
        model = self.runner.model
        fresh = inputs.to(model.device)
        given = {
            name: value.to(model.dtype) if torch.is_floating_point(value) else value
            for name, value in fresh.items() if isinstance(value, Tensor)
        }  # fmt: skip
        if state:
            for name in ("input_ids", "attention_mask"):
                given[name] = torch.cat((state[name], given[name]), 1)
        prompt = given["input_ids"].shape[1]
        out = model.generate(
            **{k: v for k, v in given.items() if k != "token_type_ids" or not state},
            **({CACHE: state["cache"]} if state else {}),
            max_new_tokens=self.runner.settings.max_new_tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        new = out.sequences[:, prompt:]
        real = _until_end(new, model.generation_config.eos_token_id)
        following = {
            "input_ids": out.sequences,
            "attention_mask": torch.cat((given["attention_mask"], real), 1),
            "cache": out[CACHE],
        }
        texts = self.runner.prompter.decode(new)
        return texts, out.logits[0].float().log_softmax(-1).cpu(), following

    def _look(self, run: Any, asked: Sequence[Prompt], first: bool) -> None:
        """Take down what was left of the images of this turn."""
        if first:
            self.report = run.report()
        if run.record is None or not any(prompt.images for prompt in asked):
            return
        rows = seen_images(
            run.record, [prompt.images for prompt in asked], self.runner.family.text_layers
        )
        for before, now in zip(self.seen, rows, strict=True):
            before += now

    def _answer(self, row: int, prompt: Prompt, text: str) -> Answer:
        turn = prompt.asked
        by_site, recall, hit = evidence_recall(self.seen[row], turn.evidence)
        return Answer(
            seed=self.samples[row].seed, turn=prompt.number, question=turn.question,
            answer=turn.answer, said=text, right=is_right(text, turn.answer, turn.choices),
            recall=recall, hit=hit, recall_by_site=by_site,
        )  # fmt: skip


def _until_end(new: Tensor, ends: int | Sequence[int] | None) -> Tensor:
    """(B, T) ones up to and including the first end token of each row."""
    known = torch.tensor([] if ends is None else ends, device=new.device).flatten()
    over = torch.isin(new, known.to(new.dtype)).long().cumsum(1)
    return torch.cat((torch.zeros_like(over[:, :1]), over[:, :-1]), 1).eq(0).long()
