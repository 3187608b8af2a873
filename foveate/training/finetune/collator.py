"""Conversations into batches with labels on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from foveate.errors import InputError
from foveate.training.finetune.data import Example
from foveate.training.finetune.labels import IGNORE, label_ids, render


class Collator:
    """Turn conversations into the inputs of any family, through its own processor.

    Rows are padded on the right. Labels are set on the assistant's answers and the token that ends
    each; everything else, images included, is `-100`.

    Args:
        processor: the model's processor; it needs a chat template and a fast tokenizer.

    Examples:
        >>> from foveate import tiny
        >>> from foveate.training.finetune import Collator, Scenes
        >>> batch = Collator(tiny.load()[1])([Scenes(1)[0]])
        >>> batch["labels"].shape == batch["input_ids"].shape
        True
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            examples: the conversations.

        Returns:
            The processor's tensors and `labels` (B, T).

        Raises:
            InputError: an image cannot be read, or answers cannot be found.
        """
        rendered = [render(self.processor, example) for example in examples]
        images = [example.open_images() for example in examples]
        bos: str = getattr(self.processor.tokenizer, "bos_token", None) or ""
        begun = bos != "" and rendered[0].text.startswith(bos)
        try:
            batch = dict(
                self.processor(
                    images=images if any(images) else None,
                    text=[row.text for row in rendered],
                    padding=True,
                    padding_side="right",
                    add_special_tokens=not begun,
                    return_tensors="pt",
                )
            )
        except (ValueError, TypeError, IndexError) as error:
            where = ", ".join(example.where for example in examples)
            raise InputError(f"the processor refuses {where}: {error}") from error
        labels = torch.full_like(batch["input_ids"], IGNORE)
        for row, (text, example) in enumerate(zip(rendered, examples, strict=True)):
            real = batch["attention_mask"][row].nonzero()[:, 0]
            ids = batch["input_ids"][row, real].tolist()
            found = label_ids(self.processor.tokenizer, text, ids, example)
            labels[row, real] = torch.tensor(found)
        return batch | {"labels": labels}
