"""A batch: questions that one `generate` answers, each of which ends by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from foveate.errors import FoveateError, InputError
from foveate.integrations.chat import ChatModel
from foveate.io.quoting import shown
from foveate.run import Session
from foveate.serve.choices import Asked
from foveate.serve.errors import ServerError
from foveate.serve.request import Delta, End, Question
from foveate.serve.row_text import RowText
from foveate.serve.sampling import RowSampling, greedy_config
from foveate.serve.summary import draw, summarise

log = logging.getLogger("foveate.serve")


@dataclass(eq=False)
class Ticket:
    """A question in the engine.

    Args:
        question: what is asked.
        asked: what removes visual tokens.
        key: tickets with equal keys can be answered together.
        emit: hands an event to who waits for the answer; from any thread.
    """

    question: Question
    asked: Asked
    key: tuple[Any, ...]
    emit: Callable[[Delta | End | Exception], None]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: bool = False  # text was sent
    closed: bool = False  # its end, or an error, was sent

    @property
    def over(self) -> bool:
        """Whether nobody waits for the answer any more."""
        late = time.monotonic() - self.arrived > self.question.seconds
        return self.closed or late or self.cancelled.is_set()

    def close(self, event: End | Exception) -> None:
        """Send the last event; only the first call counts."""
        if not self.closed:
            self.closed = True
            self.emit(event)


def told(error: Exception) -> Exception:
    """An error as the client sees it; what is not the client's doing goes to the log."""
    if isinstance(error, FoveateError):
        return error
    log.error("the model failed", exc_info=error)
    return ServerError(f"the model failed on this request ({type(error).__name__})", 500)


class Batch(StoppingCriteria):
    """Tickets that are answered together: passes text on as it comes, and ends each row.

    `generate` asks after each token whether rows have ended, and this is where tokens are seen.

    Args:
        chat: the model and its processor.
        tickets: of equal keys.
        session: attached while `run` runs.
        most: longest answer of any row.
    """

    def __init__(
        self, chat: ChatModel, tickets: Sequence[Ticket], session: Session, most: int
    ) -> None:
        self._chat, self._tickets, self._session, self._most = chat, tickets, session, most
        self._rows: list[_Row] = []

    @torch.inference_mode()
    def run(self) -> None:
        """Answer all tickets.

        Raises:
            InputError: the processor refuses a conversation.
            Exception: whatever the model raises.
        """
        inputs = self._encode()
        prompt = inputs["attention_mask"].sum(1).tolist()
        width, config = inputs["input_ids"].shape[1], self._chat.model.generation_config
        ends = config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        for number, (ticket, tokens) in enumerate(zip(self._tickets, prompt, strict=True)):
            text = RowText(self._chat.processor.tokenizer, ticket.question.sampling.stop)
            limit = self._limit(ticket, tokens)
            self._rows.append(_Row(self, ticket, number, tokens, limit, ends, text))
        sampling = [ticket.question.sampling for ticket in self._tickets]
        draws = RowSampling(sampling, [width - tokens for tokens in prompt], config)
        with self._session:
            self._chat.model.generate(
                **inputs,
                generation_config=greedy_config(config, max(row.limit for row in self._rows)),
                stopping_criteria=StoppingCriteriaList([self]),
                logits_processor=LogitsProcessorList([draws]),
            )

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) whether each row has ended with its last token."""
        tokens = input_ids[:, -1].tolist()
        over = [_alone(row, token) for row, token in zip(self._rows, tokens, strict=True)]
        return torch.tensor(over, device=input_ids.device)

    def end(self, row: _Row, reason: str) -> None:
        """Send the end of a row's answer."""
        ticket = row.ticket
        first, total = row.first - ticket.arrived, time.monotonic() - ticket.arrived
        asked = {"method": ticket.asked.to_json(), "keep_total": ticket.asked.keep_total}
        summary = {**asked, **summarise(self._session, row.number, row.prompt_tokens)}
        summary["seconds"] = {"first_token": round(first, 4), "total": round(total, 4)}
        if ticket.question.show_kept:
            summary["images"] = draw(self._session, row.number, ticket.question.images)
        ticket.close(End(reason, row.prompt_tokens, row.tokens, len(self._rows), summary))

    def _encode(self) -> dict[str, Any]:
        try:
            return self._chat.encode([ticket.question.messages for ticket in self._tickets])
        except (ValueError, TypeError, LookupError, StopIteration, TemplateError) as error:
            raise InputError(
                f"the model's processor refuses this conversation: {shown(error, 300)}"
            ) from error

    def _limit(self, ticket: Ticket, prompt_tokens: int) -> int:
        """Longest answer of a ticket: what was asked for, the engine allows, and the model takes.

        Raises:
            InputError: the prompt alone is longer than the model takes, or has no tokens.
        """
        if not prompt_tokens:
            raise InputError("the prompt of this conversation has no tokens: send text or an image")
        wanted = min(ticket.question.sampling.max_tokens or self._most, self._most)
        config = self._chat.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        if not longest:
            return wanted
        if prompt_tokens >= longest:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens, but the model accepts only {longest}"
            )
        return min(wanted, longest - prompt_tokens)


def _alone(row: _Row, token: int) -> bool:
    """Give a row its next token; what fails there, as its drawings may, is no matter of others."""
    try:
        return row.take(token)
    except Exception as error:
        row.ticket.close(told(error))
        return True


@dataclass(eq=False)
class _Row:
    """One answer as it grows."""

    batch: Batch
    ticket: Ticket
    number: int
    prompt_tokens: int
    limit: int
    ends: set[int]
    text: RowText
    tokens: int = 0
    first: float = 0.0

    def take(self, token: int) -> bool:
        """Take the next token; returns whether the answer has ended."""
        if self.ticket.over:
            return True
        self.first = self.first or time.monotonic()
        if token in self.ends:
            return self._end("stop")
        self.tokens += 1
        self._send(self.text.add(token))
        if self.text.stopped:
            return self._end("stop")
        return self.tokens >= self.limit and self._end("length")

    def _end(self, reason: str) -> bool:
        self._send(self.text.end())
        self.batch.end(self, "stop" if self.text.stopped else reason)
        return True

    def _send(self, text: str) -> None:
        if text:
            self.ticket.begun = True
            self.ticket.emit(Delta(text))
