"""A Trainer that finds the weights of its own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer


class ResumingTrainer(Trainer):
    """The stock Trainer, but for how it reads a checkpoint's weights.

    `save_pretrained` writes some families (LLaVA among them) under older parameter names. The
    Trainer of transformers 5.23 looks for the newer names, finds none, warns, and goes on from the
    weights that the run began with. Here `from_pretrained` reads them, which knows both.
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        inner: Any = self.model if model is None else model
        whole = list(Path(resume_from_checkpoint).glob("model*.safetensors"))
        if not whole or self.is_fsdp_enabled or not isinstance(inner, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(inner).from_pretrained(resume_from_checkpoint, dtype=inner.dtype)
        inner.load_state_dict(saved.state_dict())
