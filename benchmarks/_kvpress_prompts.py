"""What `beside_kvpress.py` hands to both sides, and the process of the other side.

Shapes: B rows, N entries of a prompt, D width.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveate

KEEP = 0.25
METHODS = ("fastv", "divprune", "random")
WINDOW = 16
PRESSES = ("SnapKV", "ExpectedAttention", "Knorm", "Random")


class Other:
    """The process in which kvpress runs."""

    def __init__(self, python: str) -> None:
        side = Path(__file__).with_name("_kvpress_side.py")
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [python, str(side)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, do: str, **given: Any) -> Any:
        """What the other side answers to a command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **given}) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        if "error" in told:
            raise RuntimeError(f"{do}: {told['error']}")
        return told["done"]

    def send(self, do: str, what: Any) -> Any:
        """Hand tensors over in a file."""
        path = Path(self.folder.name) / "sent.pt"
        torch.save(what, path)
        return self.ask(do, path=str(path))

    def fetch(self, do: str, **given: Any) -> Any:
        """Tensors that the other side makes."""
        path = Path(self.folder.name) / "made.pt"
        self.ask(do, path=str(path), **given)
        return torch.load(path)

    def load(self, model: Any) -> Any:
        """Give it the Llama inside a LLaVA; answers with its versions."""
        weights = {f"model.{n}": t for n, t in model.model.language_model.state_dict().items()}
        weights["lm_head.weight"] = model.lm_head.weight.data
        return self.send("load", {"weights": weights, "config": model.config.text_config.to_dict()})

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.folder.cleanup()


@dataclass(frozen=True)
class Prompt:
    """What both sides are given.

    Args:
        inputs: of the LLaVA.
        embeds: (B, N, D), what the Llama inside it is given.
        visual: (B, N), where the image lies.
        mask: (B, N), 0 at padding; `None` where there is none.
        answer: to a question about a scene.
    """

    inputs: dict[str, Any]
    embeds: Tensor
    visual: Tensor
    mask: Tensor | None = None
    answer: str = ""

    @property
    def entries(self) -> int:
        """What is kept: all text, and `KEEP` of the image's tokens, of the longest row."""
        return self.visual.shape[1] - self._seen + round(KEEP * self._seen)

    @property
    def after(self) -> int:
        """Text tokens after the image, of the first row."""
        return int(self.visual[0].flip(0).int().argmax())

    @property
    def _seen(self) -> int:
        return int(self.visual[0].sum())

    def press(self, name: str) -> dict[str, Any]:
        """A press that keeps as many entries; SnapKV looks from the text after the image."""
        options = {"SnapKV": {"window_size": self.after}, "Random": {"seed": 0}}.get(name, {})
        return {"kind": f"{name}Press", "entries": self.entries, "of": self.visual.shape[1],
                "options": options}  # fmt: skip

    def blind(self, name: str | None) -> dict[str, Any]:
        """A press that sees the prompt up to its image and keeps as much of that; none for `None`.

        SnapKV looks from the image's last tokens, `WINDOW` of them.
        """
        seen = {"of": self.visual.shape[1] - self.after}
        if name is None:
            return seen
        options = {"window_size": WINDOW} if name == "SnapKV" else self.press(name)["options"]
        return {**self.press(name), **seen, "entries": self.entries - self.after,
                "options": options}  # fmt: skip


def prompt_of(model: Any, inputs: dict[str, Any], answer: str = "") -> Prompt:
    """A prompt with the embeddings that its Llama sees."""
    seen: dict[str, Any] = {}

    def look(_: Any, args: Any, given: dict[str, Any]) -> None:
        seen.update(given)

    handle = model.model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    model(**inputs)
    handle.remove()
    mask = inputs.get("attention_mask")
    if mask is not None and bool(mask.all()):
        mask = None
    visual = inputs["input_ids"] == model.config.image_token_id
    return Prompt(dict(inputs), seen["inputs_embeds"], visual, mask, answer)


def method(name: str) -> Any:
    """A method of foveate at its published settings, which keeps `KEEP`."""
    return foveate.get_method(name)(keep=KEEP)
