"""CATP: prune the images of an in-context prompt by their own text, then by growing attention.

Paper: Li et al., "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
In-Context Learning", arXiv:2508.07871 (AAAI 2026). No code of the authors is known to us, and the
formulas below are OUR READING of what the abstract and public summaries say: that tokens are first
chosen for diversity and for alignment with the text paired with their image, after the projector;
and then in shallow layers, step by step, by how much the attention of the prompt's last token to
them grows from layer to layer, combined with how similar their representations are. How the two
parts of each stage are weighed, which layers act, and how much each step removes are our choice;
that 2/9 of the tokens are left at the end is the paper's main setting.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core import (
    Keep,
    Method,
    ModelFacts,
    Need,
    Positions,
    Reduction,
    Scheduled,
    Step,
    VisualTokens,
    register,
)
from foveate.core.budget import steps_in
from foveate.core.fields import Natural, UnitFloat
from foveate.core.ranking import TIE, highest
from foveate.core.schedule import Drop
from foveate.errors import LayerError
from foveate.methods.divprune import cosine_distance


@register(
    "catp",
    stage="pre_llm",
    does="prunes in-context images by text",
    needs=("question_embeddings", "text_attention", "question_states", "llm_states"),
    paper="Li et al. 2025, arXiv:2508.07871",
)
@dataclass(frozen=True)
class CATP(Scheduled, Method):
    """Keep tokens that are diverse and close to their image's text, then those that the prompt's
    end turns to.

    Args:
        layers: decoder layers before which tokens are dropped, ascending, from 1. `None` scales
            (6, 8, 10) of 32 layers to the model at hand; where a layer sees only a window of the
            sequence, the nearest one that sees all takes its place.
        keep: what survives the choice after the projector, and then each drop, as a share of the
            ORIGINAL count of each image, or a count. A single entry does without drops in layers.
        balance: weight of alignment against diversity in the first choice, in [0, 1].
        positions: `None` gives survivors consecutive positions (`renumbered`) where positions are
            single numbers; `original` leaves them where they were.

    Cost: a V x V product of the features and K comparisons of V tokens; per drop, two layers' key
    projections and query rows.
    """

    layers: tuple[Natural, ...] | None = None
    keep: Keep = (0.5, 0.4, 0.3, 2 / 9)
    balance: UnitFloat = 0.5
    positions: Positions | None = None
    published_layers = (6, 8, 10)
    first_drop = 1
    rounding = round

    @property
    def step_count(self) -> int | None:
        """The first choice, and one drop per entry of `layers`."""
        return None if self.layers is None else 1 + len(self.layers)

    @property
    def drop_count(self) -> int:
        """Entries of `keep` after the first."""
        return steps_in(self.keep) - 1

    @property
    def published_shares(self) -> tuple[float, ...] | None:
        """None that one number could bend: it is what the first choice leaves, for all layers."""
        return None

    def legal(self, model: ModelFacts) -> list[int]:
        """Layers whose attention can be compared with that of an earlier layer."""
        return [i for i in model.attention_layers[1:] if i >= model.first_llm_layer]

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """The choice after the projector, and a drop before each of the layers.

        Raises:
            LayerError: a layer has none before it to compare with.
        """
        drops = [
            Drop("llm", layer, self._compared(layer, model), entry=entry + 1)
            for layer, entry in self.drops(model)
        ]
        return (Step("pre_llm", needs=(Need("question_embeddings"),)), *drops)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Keep `count` tokens of each image, in raster order."""
        if tokens.number:
            return Reduction.top(growing(tokens), count, scale=1.0)
        order = aligned_and_diverse(
            cosine_distance(tokens.x), alignment(tokens), count, self.balance
        )
        return Reduction(order.sort(dim=-1).values)

    def _compared(self, layer: int, model: ModelFacts) -> tuple[Need, ...]:
        earlier = max((i for i in model.attention_layers if i < layer), default=None)
        if earlier is None:
            raise LayerError(
                f"catp compares the attention of layer {layer} with that of an earlier one, but "
                "none before it sees the whole sequence; those that do are "
                f"{model.attention_layers}"
            )
        states = Need("llm_states", (layer,)), Need("question_states", (layer,))
        return (Need("text_attention", (earlier, layer)), *states)


def alignment(tokens: VisualTokens) -> Tensor:
    """(G, V) mean cosine of each token with the text between its image and the next, scaled to
    [0, 1] within the image.
    """
    text = F.normalize(tokens.signal("question_embeddings").float(), dim=-1)
    mask = tokens.signal("paired_mask")
    mean = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    cosine = (F.normalize(tokens.x.float(), dim=-1) * mean[:, None]).sum(-1)
    return _scaled(cosine, 1.0)


def aligned_and_diverse(distance: Tensor, aligned: Tensor, count: int, balance: float) -> Tensor:
    """Greedy choice: the best aligned token first, then the one with the highest
    balance * alignment + (1 - balance) * half the distance to the nearest token chosen so far.

    Args:
        distance: (G, V, V) cosine distances.
        aligned: (G, V) in [0, 1].
        count: tokens to choose, K.
        balance: weight of alignment.

    Returns:
        (G, K) positions in the order of the choice; the lower index wins ties.
    """
    images = torch.arange(len(distance), device=distance.device)
    picks = [highest(aligned, 1.0)]
    nearest = distance[images, picks[0]]
    taken = torch.zeros_like(aligned).scatter(1, picks[0][:, None], -torch.inf)
    for _ in range(count - 1):
        worth = balance * aligned + (1 - balance) / 2 * nearest + taken
        picks.append(highest(worth, 1.0))
        taken.scatter_(1, picks[-1][:, None], -torch.inf)
        torch.minimum(nearest, distance[images, picks[-1]], out=nearest)
    return torch.stack(picks, dim=-1)


def growing(tokens: VisualTokens) -> Tensor:
    """(G, V) growth of attention from the earlier layer to the later, scaled to [0, 1] within the
    image, times (1 + cosine with the prompt's last token) / 2.
    """
    attention = tokens.signal("text_attention").mean(2)
    grown = _scaled(attention[:, -1] - attention[:, 0], attention.amax((1, 2))[:, None])
    mask = tokens.signal("question_mask")
    if not mask.shape[1]:  # the prompt ends in an image
        return grown
    states = F.normalize(tokens.signal("llm_states")[:, -1].float(), dim=-1)
    last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1)
    images = torch.arange(len(mask), device=mask.device)
    text = F.normalize(tokens.signal("question_states")[images, -1, last].float(), dim=-1)
    similar = (1 + (states * text[:, None]).sum(-1)) / 2
    return grown * torch.where(mask.any(1, keepdim=True), similar, 1.0)


def _scaled(x: Tensor, scale: Tensor | float) -> Tensor:
    """Scaled to [0, 1]; zero where rounding of a scale alone tells tokens apart."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    flat = high - low <= TIE * scale
    return ((x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)).masked_fill(flat, 0.0)
