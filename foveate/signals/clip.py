"""CLIP's text tower and projections, for methods that compare patches with a question.

Vision-language models carry CLIP's vision tower without the rest of it, so the rest is a model of
its own that the user hands over.
Shapes: `G` images, `V` patches of each, `C` width of the vision tower, `E` of CLIP's shared space,
`M` segments of a question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from foveate.errors import InputError, UnsupportedModelError
from foveate.ops.diversity import normalize


class ClipText:
    """CLIP without its vision layers. Call it with questions, and hand the result to `use`.

    Args:
        model: the CLIP whose vision tower the vision-language model has.
        tokenizer: its tokenizer.

    Examples:
        >>> clip = foveate.ClipText.from_pretrained("openai/clip-vit-large-patch14-336")
        ... # doctest: +SKIP
        >>> method = foveate.methods.CDPruner(relevance="clip")
        >>> with foveate.use(model, method, clip=clip("What does the sign say?")) as run:
        ...     out = model.generate(**inputs)  # doctest: +SKIP
    """

    def __init__(self, model: transformers.CLIPModel, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.visual_projection = model.visual_projection
        self.post_layernorm = model.vision_model.post_layernorm

    @classmethod
    def from_pretrained(cls, name: str, **options: Any) -> ClipText:
        """Load a checkpoint and its tokenizer.

        Args:
            name: a folder, or a name on the Hugging Face hub.
            **options: handed to `CLIPModel.from_pretrained`, such as `dtype` and `device_map`.
        """
        model = transformers.CLIPModel.from_pretrained(name, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        return cls(model.eval().requires_grad_(False), tokenizer)

    @torch.no_grad()
    def __call__(self, questions: str | Sequence[str]) -> ClipQuestions:
        """Embed questions.

        A text too long for CLIP is cut into segments, each with its own begin and end.

        Args:
            questions: one for each row of the batch, also for rows without an image; a single one
                stands for all rows.

        Raises:
            InputError: there is no question.
        """
        texts = [questions] if isinstance(questions, str) else list(questions)
        if not texts:
            raise InputError("clip needs at least one question, got none")
        return ClipQuestions(
            tuple(self._embed(text) for text in texts), self.visual_projection, self.post_layernorm
        )

    def _embed(self, text: str) -> Tensor:
        """(M, E) embeddings of a text's segments."""
        special = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        room = self.text_model.config.max_position_embeddings - len(special)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        segments = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
        embeddings = []
        for segment in segments:
            row = torch.tensor([[special[0], *segment, special[1]]], device=self._device)
            embeddings.append(self.text_projection(self.text_model(row).pooler_output))
        return torch.cat(embeddings)

    @property
    def _device(self) -> torch.device:
        return next(self.text_model.parameters()).device


@dataclass(frozen=True, eq=False)
class ClipQuestions:
    """The question of each row of a batch in CLIP's space, and how patches are mapped there.

    Args:
        embeddings: (M, E) for each row, or one for all rows.
        visual_projection: maps (..., C) to (..., E).
        post_layernorm: what CLIP applies to the vision tower's output before that.
    """

    embeddings: tuple[Tensor, ...]
    visual_projection: nn.Linear
    post_layernorm: nn.Module

    def check(self, rows: int) -> None:
        """Check the number of questions.

        Raises:
            InputError: it is neither one nor that of the rows.
        """
        if len(self.embeddings) not in (1, rows):
            raise InputError(
                f"clip was given {len(self.embeddings)} questions, but the batch has {rows} rows; "
                "give one for each row, also for rows without an image, or one for all"
            )

    def of(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(G, M, E) questions of some rows, and (G, M) which of their segments are no padding."""
        chosen = [self.embeddings[row if len(self.embeddings) > 1 else 0] for row in rows]
        text = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        counts = torch.tensor([len(segments) for segments in chosen], device=text.device)
        return text, torch.arange(text.shape[1], device=text.device) < counts[:, None]

    @torch.no_grad()
    def patches(self, states: Tensor, normed: bool) -> Tensor:
        """Bring patches into the space of the questions.

        Args:
            states: (..., C) of the vision tower.
            normed: apply CLIP's last norm first.

        Returns:
            (..., E) of length one, float32.

        Raises:
            UnsupportedModelError: the vision tower is not this CLIP's.
        """
        norm: Any = self.post_layernorm.weight  # a quantised projection shows no weight
        if states.shape[-1] != len(norm):
            raise UnsupportedModelError(
                f"clip projects patches of width {len(norm)}, but this model's vision tower "
                f"has width {states.shape[-1]}; load the CLIP whose tower the model has"
            )
        x = states.to(norm)
        x = self.post_layernorm(x) if normed else x
        return normalize(self.visual_projection(x)).to(states.device)
