"""The Region Focus Module: a few decoder layers that tell which visual tokens a question is about.

Its layers are of the language model's own type and start as copies of some of its layers. All but
the last run on the embedded prompt; of the last only the attention of the last prompt token is
taken, restricted to the tokens of tiles. Distillation teaches it the attention of deeper layers.

Shapes: `B` prompts, `T` tokens, `D` hidden, `H` heads, `R` rows whose attention is taken, `V`
visual tokens, `N` of them from tiles.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from foveate.core.saving import read_json
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.families import Family, find_family
from foveate.io.quoting import shown
from foveate.io.writing import check_folder, replacing, write_json

PUBLISHED = (1, 5, 11, 14)
"""Layers of a 32-layer language model that the published module starts from."""
KINDS = ("llama", "mistral", "qwen2")
"""Text models whose layers can be copied: every layer alike, queries and keys only rotated."""


class RegionFocus(nn.Module):
    """Scores visual tokens by the attention that the last prompt token would pay to them.

    Make it with `of` or `load`.

    Args:
        layers: decoder layers; of the last one only norm, query and key projection are used.
        rotary: the text model's rotary embedding.
        sources: layers of the text model that they were copied from.
    """

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module, sources: tuple[int, ...]) -> None:
        super().__init__()
        self.layers, self.rotary, self.sources = layers, rotary, sources

    @classmethod
    def of(cls, model: PreTrainedModel, layers: Sequence[int] | None = None) -> RegionFocus:
        """A module that starts as copies of a model's own decoder layers.

        Args:
            model: a vision-language model around a Llama, Mistral or Qwen2.
            layers: 0-based, ascending; `None` takes 1, 5, 11 and 14 of 32, scaled to the model.

        Raises:
            UnsupportedModelError: another text model.
            LayerError: a layer is outside the text model, or sees only a window.
        """
        family = find_family(model)
        kind = family.text.config.model_type
        if kind not in KINDS or not family.one_dimensional:
            raise UnsupportedModelError(
                f"a Region Focus Module copies layers of {', '.join(KINDS)}, but the text model "
                f"of this {family.model_type} is {kind!r}; use a session with another method"
            )
        sources = _sources(family, layers)
        config = copy.deepcopy(family.text.config)
        config._attn_implementation = "sdpa"
        copies = nn.ModuleList(_clone(family.layers[i], config, i) for i in sources)
        rotary = type(family.text.rotary_emb)(config=config).to(model.device)
        return cls(copies, rotary, sources).requires_grad_(False).eval()

    def logits(
        self, hidden: Tensor, positions: Tensor, rows: Tensor, columns: slice, mask: Tensor | None
    ) -> Iterator[Tensor]:
        """Attention scores before the softmax, layer by layer.

        Args:
            hidden: (B, T, D) embedded prompts, visual tokens in place.
            positions: (B, T) their positions.
            rows: (R,) tokens that look.
            columns: tokens that are looked at, V of them.
            mask: (1 or B, 1, T, T) added to the scores; `None` is causal.

        Yields:
            (B, H, R, V) for each layer; a layer runs when the one after it is asked for.
        """
        rotary = self.rotary(hidden, position_ids=positions)
        for layer in self.layers[:-1]:
            yield attention_logits(layer, hidden, rotary, rows, columns)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        yield attention_logits(self.layers[-1], hidden, rotary, rows, columns)

    @torch.no_grad()
    def scores(self, hidden: Tensor, local: slice, positions: Tensor | None = None) -> Tensor:
        """(B, N) attention of the last token to those of `local`: softmax over them, head mean.

        Args:
            hidden: (B, T, D) embedded prompts without padding, visual tokens in place.
            local: the tokens of tiles.
            positions: (B, T); consecutive when left out.
        """
        length = hidden.shape[1]
        rotary = self.rotary(hidden, position_ids=_consecutive(hidden, positions))
        for layer in self.layers[:-1]:
            hidden = layer(hidden, position_embeddings=rotary)
        last = torch.tensor([length - 1], device=hidden.device)
        logits = attention_logits(self.layers[-1], hidden, rotary, last, local)
        return logits[:, :, 0].float().softmax(-1).mean(1)

    def save(self, folder: str | Path) -> None:
        """Write weights and what they were copied from; the folder is created if missing."""
        folder = Path(folder)
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in self.layers.state_dict().items()}
        with replacing(folder / "focus.safetensors") as part:
            save_file(weights, part)
        write_json(folder / "focus.json", {"layers": self.sources})

    @classmethod
    def load(cls, folder: str | Path, model: PreTrainedModel) -> RegionFocus:
        """Read what `save` wrote, for the model that it was trained for.

        Raises:
            FoveateError: the folder holds no module, or one of another model's sizes.
        """
        folder = Path(folder)
        if not (folder / "focus.json").exists():
            raise FoveateError(f"{folder} holds no Region Focus Module (no focus.json)")
        data = read_json(folder / "focus.json")
        sources = data.get("layers") if isinstance(data, dict) else None
        if not isinstance(sources, list) or not all(type(layer) is int for layer in sources):
            raise FoveateError(f"{shown(folder / 'focus.json')} names no `layers`")
        focus = cls.of(model, sources)
        try:
            focus.layers.load_state_dict(load_file(folder / "focus.safetensors"))
        except RuntimeError as error:
            raise FoveateError(
                f"the Region Focus Module in {folder} was made for another model: {error}"
            ) from None
        return focus


def attention_logits(
    layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], rows: Tensor, columns: slice
) -> Tensor:
    """(B, H, R, V) scaled products of a decoder layer's queries and keys, rotated.

    Args:
        layer: a decoder layer.
        hidden: (B, T, D) its input.
        rotary: cos and sin, (B, T, d) each.
        rows: (R,) tokens whose queries are taken.
        columns: tokens whose keys are taken.
    """
    attention = layer.self_attn

    def heads(project: nn.Module, at: Tensor | slice) -> Tensor:
        x = project(layer.input_layernorm(hidden[:, at]))
        x = x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        return apply_rotary_pos_emb(x, x, *(part[:, at] for part in rotary))[0]

    q, k = heads(attention.q_proj, rows), heads(attention.k_proj, columns)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return q @ k.transpose(-1, -2) * attention.scaling


@dataclass(frozen=True)
class Distillation:
    """What the module learns: the teacher's attention over all visual tokens, and over tiles.

    The paper does not say over what the softmax of each term runs; here it is the tokens that the
    term speaks of.

    Args:
        kl: weight of both Kullback-Leibler terms.
        tiles: weight of the term on the tokens of tiles, within those.
        mse: weight of the mean squared error on the tokens of tiles.
    """

    kl: float = 1.0
    tiles: float = 2.0
    mse: float = 1.0

    def __call__(self, teacher: Tensor, student: Tensor, local: slice) -> Tensor:
        """Mean over prompts, heads and rows of one pair of layers.

        Args:
            teacher: (B, H, R, V) attention scores of a layer of the language model.
            student: (B, H, R, V) those of a layer of the module.
            local: the columns of tiles among the V.
        """
        taught, told = teacher.float()[..., local], student.float()[..., local]
        divergence = _divergence(teacher.float(), student.float())
        divergence = divergence + self.tiles * _divergence(taught, told)
        error = (taught.softmax(-1) - told.softmax(-1)).square().mean(-1)
        return (self.kl * divergence + self.mse * error).mean()


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax of scores, over the last axis."""
    wanted, got = teacher.log_softmax(-1), student.log_softmax(-1)
    return (wanted.exp() * (wanted - got)).sum(-1)


def _sources(family: Family, layers: Sequence[int] | None) -> tuple[int, ...]:
    legal = family.attention_layers
    if layers is None:
        scaled = [i * family.text_layers / 32 for i in PUBLISHED]
        return tuple(sorted({min(legal, key=lambda i, at=at: abs(i - at)) for at in scaled}))  # type: ignore[misc]
    if not layers or list(layers) != sorted(set(layers)) or any(i not in legal for i in layers):
        raise LayerError(
            f"a Region Focus Module copies ascending layers that see the whole sequence, of this "
            f"{family.model_type} any of {', '.join(map(str, legal))}; got {tuple(layers)}"
        )
    return tuple(layers)


def _clone(layer: nn.Module, config: Any, index: int) -> nn.Module:
    """A copy that shares neither weights nor hooks."""
    with torch.device("meta"):
        made: Any = type(layer)(config, index)
    weights = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    made.load_state_dict(weights, assign=True)
    return made


def _consecutive(hidden: Tensor, positions: Tensor | None) -> Tensor:
    if positions is not None:
        return positions
    return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
