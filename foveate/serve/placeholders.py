"""Placeholders: texts that stand for an image in a prompt must not come from a client."""

from __future__ import annotations

from typing import Any

from foveate.errors import InputError
from foveate.families import find_family
from foveate.serve.request import Question


class Placeholders:
    """The texts that a processor replaces by images.

    In a batch, images are handed to placeholders in order, so that one too many in a client's text
    would shift the images of others.

    Args:
        model: a supported vision-language model.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        ids = [
            number for number in find_family(model).placeholder_ids.values() if number is not None
        ]
        named = {v for k, v in vars(processor).items() if k.endswith("_token") and v}
        tokens = processor.tokenizer.convert_ids_to_tokens(ids)
        self._texts = sorted(text for text in {*named, *tokens} if isinstance(text, str))

    def check(self, question: Question) -> None:
        """Refuse a question whose text holds a placeholder.

        Raises:
            InputError: so it is.
        """
        for message in question.messages:
            said = [part["text"] for part in message["content"] if part["type"] == "text"]
            joined = ("".join(said), "".join(part.strip() for part in said))  # as templates do
            for text in self._texts:
                if any(text in one for one in (*said, *joined)):
                    raise InputError(
                        f"the text holds {text!r}, which stands for an image or another medium in "
                        "this model's prompts; send images as parts of the message"
                    )
