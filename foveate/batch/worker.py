"""Worker: answers shards with a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from foveate.batch.images import count, images_of
from foveate.batch.job import Job
from foveate.batch.output import Totals, write_shard
from foveate.batch.plan import Plan, Shard
from foveate.batch.shard import Rows, read
from foveate.errors import FoveateError
from foveate.integrations.chat import Answer, ChatModel
from foveate.io.quoting import shown
from foveate.loading import load_model
from foveate.methods.uniform import Uniform


@dataclass
class _Row:
    """A row on its way through the model."""

    question: str = ""
    images: list[Image.Image] = field(default_factory=list)
    answer: Answer | None = None
    error: str | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "image", "image": i} for i in self.images]
        content.append({"type": "text", "text": self.question})
        return [{"role": "user", "content": content}]


class Worker:
    """Answers shards; it loads its model when the first one comes.

    Args:
        job: what is asked.
        plan: its shards.
    """

    def __init__(self, job: Job, plan: Plan) -> None:
        self._job, self._plan = job, plan
        self._chat: ChatModel | None = None

    def load(self) -> ChatModel:
        """The model, with the methods.

        Raises:
            FoveateError: it cannot be loaded, or a method does not work on it.
        """
        if self._chat is None:
            job = self._job
            model, processor = load_model(job.model, job.device, job.dtype)
            methods = job.methods or (Uniform(keep=1.0),)  # removes nothing, and counts
            self._chat = ChatModel(
                model, processor, methods, max_pixels=job.max_pixels, keep_total=job.keep_total
            )
        return self._chat

    def run(self, shard: Shard, tick: Callable[[int], object] = lambda rows: None) -> Totals:
        """Answer a shard, and write its file whole.

        Args:
            shard: one of the plan's.
            tick: called with the number of rows that were answered since.

        Raises:
            FoveateError: the model cannot be loaded, the input cannot be read any more, or the
                output cannot be written. What is wrong with single rows stands in their `error`.
        """
        chat, rows = self.load(), read(shard, self._plan, self._job.question)
        done = [_Row() for _ in range(shard.rows)]
        batches = self._batches(rows)
        with ThreadPoolExecutor(1) as pool:  # opens the next images while the model is busy
            coming = [pool.submit(self._open, rows, batches[0])] if batches else []
            for number, members in enumerate(batches):
                opened = coming.pop().result()
                if number + 1 < len(batches):
                    coming.append(pool.submit(self._open, rows, batches[number + 1]))
                self._answer(chat, [row for row in opened if row.error is None])
                for n, row in zip(members, opened, strict=True):
                    row.images = []
                    done[n] = row
                tick(len(members))
        answered = [(row.answer, row.error) for row in done]
        return write_shard(self._job, shard, rows.table, answered)

    def _batches(self, rows: Rows) -> list[list[int]]:
        """Rows that are answered together: those of like length, so that little is padded."""

        def length(n: int) -> tuple[int, int]:
            return count(rows.images(n)), len(str(rows.question(n)))

        order = sorted(range(len(rows.faults)), key=length)
        size = self._job.batch
        return [order[first : first + size] for first in range(0, len(order), size)]

    def _open(self, rows: Rows, members: Sequence[int]) -> list[_Row]:
        """Rows with their images, or with what is wrong with them."""
        found = []
        for n in members:
            row, question = _Row(error=rows.faults[n]), rows.question(n)
            found.append(row)
            if row.error is not None:
                continue
            try:
                if not isinstance(question, str) or not question.strip():
                    raise FoveateError("the row has no question")
                row.question, row.images = question, images_of(rows.images(n), self._job)
            except Exception as error:  # whatever a row holds, the others are answered
                row.error = _told(error)
        return found

    def _answer(self, chat: ChatModel, rows: Sequence[_Row]) -> None:
        """Answer rows together, or each alone where one of them stands in the way."""
        if not rows:
            return
        try:
            conversations = [row.conversation for row in rows]
            answers = chat.ask(conversations, max_new_tokens=self._job.max_new_tokens)
        except Exception as error:
            if type(error).__name__ == "AcceleratorError":  # the process can compute nothing more
                raise
            if len(rows) == 1:
                rows[0].error = _told(error)
                return
            for row in rows:
                self._answer(chat, [row])
        else:
            for row, answer in zip(rows, answers, strict=True):
                row.answer = answer


def _told(error: Exception) -> str:
    """An error on one line."""
    if isinstance(error, FoveateError):
        return shown(error, 300)
    return shown(f"{type(error).__name__}: {error}", 300)
