"""Many questions about an image in one forward of a language model that reads ChatML.

All questions share the image's keys and values, and none sees another: what is taught is a
conversation with one question. `B` images, `T` tokens, `V` visual tokens, `D` hidden, `A` places
where a token of an answer, or its end, is predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.real_cache import Asked

END = 0.1  # weight of the end after an answer
START, CLOSE = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
_PADDING = -2


@dataclass(frozen=True)
class Packed:
    """A batch of packed questions.

    Args:
        words: (B, T) token ids; the first are those of `START`.
        slots: (B, T) number of the question; -1 before the questions.
        places: (B, T) positions.
        labels: (B, T) the next token where it is part of an answer, else -100.
        start: tokens before the image.
    """

    words: Tensor
    slots: Tensor
    places: Tensor
    labels: Tensor
    start: int

    @property
    def mask(self) -> Tensor:
        """(B, 1, T, T) what each token may look at."""
        same = (self.slots[:, :, None] == self.slots[:, None]) | (self.slots[:, None] == -1)
        length = self.slots.shape[1]
        return (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


def pack(tokenizer: Any, asked: Sequence[Sequence[Asked]], visual: int, image: int) -> Packed:
    """Lay out questions about images.

    Args:
        tokenizer: the model's.
        asked: questions about each image.
        visual: visual tokens of an image.
        image: id of the token that stands for one.
    """
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = tokenizer(START, add_special_tokens=False)["input_ids"]
    prefix = [*first, *[image] * visual]
    rows = [_row(tokenizer, prefix, questions, ends) for questions in asked]
    longest = max(len(row[0]) for row in rows)
    words, slots, places, labels = (
        torch.tensor([row[n] + [fill] * (longest - len(row[n])) for row in rows])
        for n, fill in enumerate((ends, _PADDING, 0, -100))
    )
    return Packed(words, slots, places, labels, len(first))


def _row(
    tokenizer: Any, prefix: list[int], questions: Sequence[Asked], end: int
) -> tuple[list[int], ...]:
    """Words, slots, places and labels of one image."""
    words, slots = [*prefix], [-1] * len(prefix)
    places, labels = list(range(len(prefix))), [-100] * len(prefix)
    for number, (question, answer, _) in enumerate(questions):
        asks, says = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"\n{question}{CLOSE}", answer)
        )
        words += [*asks, *says]
        labels += [*[-100] * (len(asks) - 1), *says, end]
        size = len(asks) + len(says)
        slots += [number] * size
        places += range(len(prefix), len(prefix) + size)
    return words, slots, places, labels


def answer_loss(text: Any, head: Tensor, visual: Tensor, batch: Packed) -> tuple[Tensor, float]:
    """Cross entropy of answers, the end after them weighing less, and the share that is right.

    Args:
        text: a `LlamaModel`.
        head: (W, D) output embeddings.
        visual: (B, V, D) visual tokens.
        batch: the questions.
    """
    x = text.embed_tokens(batch.words).to(visual.dtype)
    x = torch.cat((x[:, : batch.start], visual, x[:, batch.start + visual.shape[1] :]), 1)
    states = text(
        inputs_embeds=x, attention_mask=batch.mask, position_ids=batch.places, use_cache=False
    ).last_hidden_state
    asked = batch.labels != -100
    labels = batch.labels[asked]
    logits = (states[asked].to(head.dtype) @ head.mT).float()
    ends = labels == text.config.eos_token_id
    weights = torch.where(ends, END, 1.0)
    losses = F.cross_entropy(logits, labels, reduction="none")
    right = (logits.argmax(-1) == labels)[~ends].float().mean()
    return (losses * weights).sum() / weights.sum(), right.item()
