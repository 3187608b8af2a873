"""Which tokens of a rendered conversation are answers, for any chat template.

The conversation is rendered twice, once with marks in place of the answers. The text around the
marks must also surround the answers, which tells where each answer begins and ends. A fast
tokenizer's offsets say which tokens lie there. The processor expands image placeholders, so those
tokens are then found again in its token ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from foveate.errors import InputError
from foveate.training.finetune.data import Example, Message

IGNORE = -100
_MARK = "ANSWER{}HERE"
_MARKS = re.compile(r"ANSWER\d+HERE")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Args:
        text: what the chat template made of it.
        spans: where in it each answer lies, (begin, end) with the token that ends a turn included.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def render(processor: Any, example: Example) -> Rendered:
    """Apply the chat template and find the answers.

    Args:
        processor: a processor with a chat template and a fast tokenizer.
        example: the conversation.

    Returns:
        Its text. If the template ends the last answer with no special token, the tokenizer's
        end-of-sequence token is added, so that the model learns to stop.

    Raises:
        InputError: there is no template, or it changes answers so that they cannot be found.
    """
    answers = [m.text for m in example.messages if m.role == "assistant"]
    text = _apply(processor, example, list(example.messages))
    marked = _apply(processor, example, _mark(example.messages))
    pieces = _MARKS.split(marked)
    if _MARKS.findall(marked) != [_MARK.format(i) for i in range(len(answers))]:
        raise _lost(example, "it does not render every answer once, in order")
    spans, at = [], 0
    for number, answer in enumerate(answers):
        at += len(pieces[number])
        length = _match(text, at, answer, pieces[number + 1])
        if length is None or not text.startswith(pieces[number], at - len(pieces[number])):
            raise _lost(example, f"it renders answer {number + 1}, {answer[:40]!r}, as other text")
        spans.append((at, at + length))
        at += length
    return _close(processor, text, spans)


def label_ids(
    tokenizer: Any, rendered: Rendered, ids: Sequence[int], example: Example
) -> list[int]:
    """Labels of a row.

    Args:
        tokenizer: a fast tokenizer.
        rendered: the row's text and where its answers are.
        ids: token ids of the row without padding, with image placeholders expanded.
        example: the conversation, for errors.

    Returns:
        One label per id: the id itself in answers, else `IGNORE`.

    Raises:
        InputError: the tokenizer gives no offsets, or an answer's tokens are not in the row.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, which labels are made from; "
            f"load a fast tokenizer (tokenizer.json)"
        )
    plain = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    moved = _follow(plain["input_ids"], ids)
    labels = [IGNORE] * len(ids)
    for span in rendered.spans:
        found = [moved.get(index) for index in _inside(plain["offset_mapping"], span)]
        if None in found or not found or found[-1] != found[0] + len(found) - 1:  # type: ignore[operator]
            raise InputError(
                f"{example.where}: the tokens of {rendered.text[slice(*span)][:40]!r} are not in "
                "what the processor made of the conversation; was it truncated?"
            )
        for at in found:
            assert at is not None
            labels[at] = ids[at]
    return labels


def _inside(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> list[int]:
    """Tokens with at least one character in a span of the text."""
    begin, end = span
    return [
        index
        for index, (first, last) in enumerate(offsets)
        if first < end and last > begin and last > first
    ]


def _mark(messages: Sequence[Message]) -> list[Message]:
    marked, number = [], 0
    for message in messages:
        if message.role == "assistant":
            text = _MARK.format(number)
            message, number = Message("assistant", ({"type": "text", "text": text},)), number + 1
        marked.append(message)
    return marked


def _apply(processor: Any, example: Example, messages: list[Message]) -> str:
    if not getattr(processor, "chat_template", None):
        raise InputError(
            f"{type(processor).__name__} has no chat template; set `processor.chat_template`, or "
            f"train an instruction-tuned checkpoint"
        )
    try:
        return processor.apply_chat_template([m.to_dict() for m in messages], tokenize=False)
    except Exception as error:
        raise InputError(f"{example.where}: the chat template refuses it: {error}") from error


def _lost(example: Example, reason: str) -> InputError:
    return InputError(
        f"{example.where}: answers cannot be found in what the chat template makes of the "
        f"conversation: {reason}"
    )


def _match(text: str, at: int, answer: str, after: str) -> int | None:
    """Length of the answer at an offset, as it is or stripped, if the right text follows."""
    for form in dict.fromkeys((answer, answer.rstrip(), answer.lstrip(), answer.strip())):
        if text.startswith(form, at) and text.startswith(after, at + len(form)):
            return len(form)
    return None


def _close(processor: Any, text: str, spans: list[tuple[int, int]]) -> Rendered:
    """Stretch every answer over the special token that ends its turn."""
    tokenizer = processor.tokenizer
    special = {token for token in tokenizer.all_special_tokens if token}
    special |= {
        str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special
    }
    ends = re.compile(r"\s*(" + "|".join(map(re.escape, sorted(special, key=len)[::-1])) + ")")
    closed = []
    for begin, end in spans:
        mark = ends.match(text, end)
        closed.append((begin, mark.end() if mark else end))
    if closed[-1] == spans[-1]:
        text = text[: spans[-1][1]] + (tokenizer.eos_token or "")
        closed[-1] = (closed[-1][0], len(text))
    return Rendered(text, tuple(closed))


def _follow(plain: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
    """Where each token stands once placeholders are expanded: index in `plain` -> in `ids`."""
    matcher = SequenceMatcher(None, list(ids), list(plain), autojunk=False)
    return {
        block.b + step: block.a + step
        for block in matcher.get_matching_blocks()
        for step in range(block.size)
    }
