"""Engine: one thread owns the model and answers questions in batches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from foveate.core.budget import per_request
from foveate.core.resolve import MethodLike, methods_of
from foveate.integrations.chat import ChatModel
from foveate.methods import Uniform
from foveate.run import use
from foveate.serve.batch import Batch, Ticket, told
from foveate.serve.choices import Choices, changed
from foveate.serve.errors import busy, too_late
from foveate.serve.placeholders import Placeholders
from foveate.serve.request import Delta, End, Question
from foveate.tune.policy import Policy


class Engine:
    """A model that answers questions, several at a time where they go together.

    Those go together that have images or have none, and that differ in `keep` and `keep_total`
    alone.
    Rows of a batch end independently; who comes meanwhile waits for the batch to end.

    Args:
        model: a supported vision-language model.
        processor: its processor.
        method: what removes visual tokens where a question names nothing; `None` for all tokens.
        policy: what chooses methods for such questions instead, see `foveate.adaptive`.
        max_batch: most questions that are answered together.
        max_wait: milliseconds for which a question waits for others.
        max_tokens: longest answer.
        keep_total: most visual tokens of a question with all that was said before it, also where
            it asks for all tokens; see `foveate.use`. A question may ask for fewer. `None` for any
            number.

    Raises:
        FoveateError: the method, or one of the policy's, does not work on the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        method: MethodLike | None = None,
        *,
        policy: Policy | None = None,
        max_batch: int = 8,
        max_wait: float = 10.0,
        max_tokens: int = 1024,
        keep_total: int | None = None,
    ) -> None:
        self._chat = ChatModel(model, processor)
        self.max_batch, self.max_wait, self.max_tokens = max_batch, max_wait, max_tokens
        self._placeholders = Placeholders(model, processor)
        own = () if method is None else methods_of(method)
        self._choices = Choices(model, own, policy, keep_total)
        use(model, Uniform(keep=1.0), keep_total=keep_total)  # with which all tokens are counted
        self._changed = threading.Condition()
        self._queue: list[Ticket] = []
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="foveate-engine", daemon=True)
        self._thread.start()

    # -- what the HTTP side asks

    async def submit(self, question: Question) -> AsyncIterator[Delta | End]:
        """Answer a question: text as it comes, then the end. Closing the iterator cancels it.

        Raises:
            FoveateError: the question cannot be served, or was not in time.
        """
        asked = await asyncio.to_thread(self._choices.resolve, question)
        self._placeholders.check(question)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Delta | End | Exception] = asyncio.Queue()

        def emit(event: Delta | End | Exception) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed: nobody waits
                ticket.cancelled.set()

        ticket = Ticket(question, asked, self._choices.key(question, asked), emit)
        self._put(ticket)
        try:
            while True:
                left = ticket.arrived + question.seconds - time.monotonic()
                try:
                    event = await asyncio.wait_for(events.get(), left)
                except asyncio.TimeoutError:
                    raise too_late() from None
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, End):
                    return
        finally:
            ticket.cancelled.set()
            self._forget(ticket)

    async def methods(self) -> list[dict[str, Any]]:
        """All methods, and whether they work on the model; see `Choices.listing`."""
        return await asyncio.to_thread(self._choices.listing)

    @property
    def waiting(self) -> int:
        """Questions that no batch has begun to answer."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether questions are answered."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Answer what was asked, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    # -- the thread of the model

    def _put(self, ticket: Ticket) -> None:
        with self._changed:
            if self._closing:
                raise busy("the engine has stopped, or is about to")
            self._queue.append(ticket)
            self._changed.notify_all()

    def _forget(self, ticket: Ticket) -> None:
        """Let go of a ticket that nobody waits for, with its images, if no batch has begun it."""
        with self._changed:
            self._queue = [one for one in self._queue if one is not ticket]

    def _work(self) -> None:
        while tickets := self._next():
            try:
                self._answer(tickets)
            except Exception as error:
                self._give_up(tickets, told(error))
                return

    def _give_up(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Refuse all that is held, and stop, so that `alive` says so and somebody starts anew."""
        with self._changed:
            self._closing = True
            left, self._queue = [*tickets, *self._queue], []
        for ticket in left:
            ticket.close(error)

    def _next(self) -> list[Ticket]:
        """The tickets to answer next, oldest first; none when there will be no more."""
        with self._changed:
            while True:
                self._queue = [ticket for ticket in self._queue if not ticket.over]
                if not self._queue:
                    if self._closing:
                        return []
                    self._changed.wait()
                    continue
                first = self._queue[0]
                found = [t for t in self._queue if t.key == first.key][: self.max_batch]
                left = first.arrived + self.max_wait / 1000 - time.monotonic()
                if len(found) == self.max_batch or left <= 0 or self._closing:
                    self._queue = [t for t in self._queue if t not in found]
                    return found
                self._changed.wait(left)

    def _answer(self, tickets: Sequence[Ticket]) -> None:
        """Answer tickets together, or each alone where one of them stands in the way.

        Raises:
            AcceleratorError: the process can compute nothing more.
        """
        try:
            Batch(self._chat, tickets, self._session(tickets), self.max_tokens).run()
        except Exception as error:
            if type(error).__name__ == "AcceleratorError":
                raise
            if len(tickets) == 1:
                tickets[0].close(told(error))
                return
            for ticket in tickets:
                if ticket.begun:
                    ticket.close(told(error))
                elif not ticket.over:
                    self._answer([ticket])

    def _session(self, tickets: Sequence[Ticket]) -> Any:
        """What the model runs within, for tickets of equal keys."""
        first, model = tickets[0], self._chat.model
        if not first.question.images:
            return use(model, Uniform(keep=1.0))
        total = _common([ticket.asked.keep_total for ticket in tickets])
        if first.asked.everything:
            return use(model, Uniform(keep=1.0), keep_total=total)
        methods = [ticket.asked.methods for ticket in tickets]
        if all(one == methods[0] for one in methods):
            return use(model, methods[0], keep_total=total)
        keeps = per_request([cast(Any, one[0].keep) for one in methods])
        return use(model, changed(methods[0][0], {"keep": keeps}), keep_total=total)


def _common(totals: Sequence[int | None]) -> int | list[int] | None:
    """The total of each row of a batch, of whose tickets all have one or none; one for all, where
    they are equal.
    """
    return totals[0] if len({*totals}) == 1 else cast("list[int]", list(totals))
