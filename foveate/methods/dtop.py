"""DToP: let tokens leave a segmentation encoder as soon as their class is sure.

Paper: Tang et al., "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
arXiv:2308.01045 (ICCV 2023). Reference code: zbwxp/Dynamic-Token-Pruning @ 2baefff, its decisions.
Differs from the reference: images go through the encoder together, padded to the one with most
tokens (there: one by one); a token that has left comes back in the state with which it left (there:
as zeros); heads may be plain classifiers of tokens too; the last head is the user's, who fills in
what it says of the tokens that stayed (`canvas_of`); other rows than patches, such as a class
token, stay to the end. Our own heads are not the release's.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.core import Method, ModelFacts, Positions, Reduction, Step, VisualTokens, register
from foveate.core.fields import Natural, Positive, Range, check_ascending
from foveate.errors import FoveateError, InputError, LayerError, UnsupportedModelError
from foveate.io.quoting import quoted
from foveate.ops.canvas import Canvas
from foveate.ops.learning import flops_of, untrained
from foveate.ops.rows import put_rows
from foveate.ops.token_heads import LinearHead, QueryHead, label, probabilities


@register(
    "dtop",
    stage="vision",
    does="segmentation: tokens leave early",
    paper="Tang et al. 2023, arXiv:2308.01045",
)
@dataclass(frozen=True)
class DToP(Method):
    """After some encoder layers a head labels the tokens; those it is sure of leave, but for the
    surest of each class, which go on as context.

    A token that has left comes back after the last layer, in the state with which it left. What
    the heads say is in `canvas_of(run)`.

    Args:
        exits: 0-based encoder layers after which tokens may leave, ascending; the published 5 and 7
            are of 12.
        threshold: a token leaves whose class has a probability above this; at 1.0 none does.
        context: tokens of each class that stay, the surest.
        heads: a module for each exit. It is given tokens (G, n, D), and returns their logits
            (G, n, C), or as SegViT's does logits of masks (G, C, n) and of a class being there or
            not (G, C, 2). `None` for heads of our own.
        classes: C of our own heads, which are trained with the model (`foveate.prepare`).
        head: what our own heads are: `linear`, or `queries` that attend to the tokens.
        keep: always `None`: the heads decide.
        positions: not used; encoders alone have no language model.

    Cost: the heads.
    """

    exits: tuple[Natural, ...] = (5, 7)
    threshold: Annotated[float, Range(0, 1)] = 0.9
    context: Positive = 5
    heads: tuple[nn.Module, ...] | None = field(default=None, repr=False)
    classes: Positive | None = None
    head: Literal["linear", "queries"] = "linear"
    keep: None = None
    positions: Positions | None = None
    field_errors = {"exits": LayerError}  # noqa: RUF012
    adaptive = True
    encoders_alone = True

    def check_fields(self) -> None:
        """As in `Method`; exits ascend, and there is a head for each.

        Raises:
            LayerError: exits do not ascend.
            FoveateError: another field does not fit.
        """
        if isinstance(self.heads, nn.ModuleList):
            object.__setattr__(self, "heads", tuple(self.heads))
        super().check_fields()
        check_ascending(self.exits, "exits")
        if self.heads is None:
            return
        modules = all(isinstance(head, nn.Module) for head in self.heads)
        if not modules or len(self.heads) != len(self.exits):
            raise FoveateError(
                f"heads must be a module for each of the {len(self.exits)} exits of dtop, got "
                f"{quoted(self.heads)}"
            )
        if self.classes is not None:
            raise FoveateError("dtop takes heads, or classes for heads of its own; give one")

    def check_budget(self, steps: int | None) -> None:
        """There is none."""

    def to_dict(self) -> dict[str, Any]:
        """As in `Method`; heads by the names of their classes, which are not read back."""
        named = None if self.heads is None else [type(head).__name__ for head in self.heads]
        plain = dataclasses.replace(self, heads=None)
        return {"method": self.slug, **dataclasses.asdict(plain), "heads": named}

    def steps(self, model: ModelFacts) -> tuple[Step, ...]:
        """A look at the tokens before the layer after each exit.

        Raises:
            UnsupportedModelError: there are no heads.
            LayerError: an exit is not before the last layer.
        """
        if self.heads is None and self.classes is None:
            raise UnsupportedModelError(
                f"'dtop' decides by a head at each exit that labels tokens, which "
                f"{model.model_type!r} does not have; give heads=..., a module for each exit, or "
                "classes=... and train its own heads with foveate.prepare"
            )
        if self.exits[-1] + 1 >= model.vision_layers:
            raise LayerError(
                f"dtop lets tokens leave after layer {self.exits[-1]}, but this "
                f"{model.model_type} has layers 0 to {model.vision_layers - 1}, of which the last "
                "is everyone's exit"
            )
        return tuple(Step("vision", exit + 1, effects=("ragged", "exit")) for exit in self.exits)

    def learned(self, model: ModelFacts) -> nn.Module:
        """The heads."""
        if self.heads is not None:
            return nn.ModuleList(self.heads)
        assert self.classes is not None  # or there are no steps
        make = LinearHead if self.head == "linear" else QueryHead
        width, classes = model.vision_width, self.classes
        return untrained(lambda: nn.ModuleList(make(width, classes) for _ in self.exits))

    def learned_flops(
        self, model: ModelFacts, step: Step, tokens: int, grid: tuple[int, int]
    ) -> int:
        """What the head of an exit costs, counted on the meta device."""
        heads: Any = self.learned(model)
        head = copy.deepcopy(heads[self.exits.index(step.layer - 1)]).to("meta")
        dtype = next((p.dtype for p in head.parameters()), torch.float32)
        x = torch.empty(1, tokens, model.vision_width, device="meta", dtype=dtype)
        return flops_of(lambda: head(x))

    def count(self, remaining: int, total: int, step: Step, number: int, row: int = 0) -> int:
        """What survives at least."""
        return remaining if self.threshold == 1 else min(self.context, remaining)

    def reduce(self, tokens: VisualTokens, count: int) -> Reduction:
        """Let the head look, and the tokens leave of which it is sure."""
        heads: Any = tokens.learned
        logits, present = label(heads[tokens.number], tokens.x, tokens.valid)
        memory = tokens.memory
        if not memory:  # all tokens are here
            nowhere = torch.full_like(tokens.index, -1)
            memory.update(grid=tokens.grid, layer=nowhere, stages=[], present=[])
            canvas = torch.zeros_like(logits)
        else:
            canvas = memory["stages"][-1]
        memory["stages"].append(put_rows(canvas, tokens.index, logits, tokens.valid))
        memory["present"].append(present)
        with torch.no_grad():
            leaves = self.leaves(probabilities(logits, present), tokens.valid)
            return self._without(tokens, leaves)

    def leaves(self, shares: Tensor, valid: Tensor | None = None) -> Tensor:
        """(G, n) which tokens leave.

        Args:
            shares: (G, n, C) probability of each class.
            valid: (G, n) mask of tokens that have not left before; `None` for all.
        """
        sure, best = shares.max(-1)
        candidate = sure > self.threshold
        if valid is not None:
            candidate &= valid
        order = sure.masked_fill(~candidate, -1).argsort(dim=1, descending=True, stable=True)
        of = F.one_hot(best, shares.shape[-1]) * candidate[..., None]
        of = of.gather(1, order[..., None].expand_as(of))
        rank = torch.zeros_like(order).scatter(1, order, (of.cumsum(1) * of).sum(-1))
        return candidate & (rank > self.context)

    def _without(self, tokens: VisualTokens, leaves: Tensor) -> Reduction:
        """All tokens but those that leave."""
        layer = tokens.memory["layer"]
        left = torch.full_like(tokens.index, tokens.step.layer - 1)[..., None]
        layer = put_rows(layer[..., None], tokens.index, left, leaves)[..., 0]
        tokens.memory["layer"] = layer
        stays = ~leaves if tokens.valid is None else tokens.valid & ~leaves
        counts = stays.sum(1)
        most = int(counts.max())
        if most == tokens.count and bool(stays.all()):
            return Reduction(torch.arange(most, device=leaves.device).expand_as(leaves))
        index = (~stays).long().argsort(dim=1, stable=True)[:, :most]
        valid = torch.arange(most, device=leaves.device) < counts[:, None]
        return Reduction(index, valid=None if bool(valid.all()) else valid)


def canvas_of(run: Any) -> Canvas:
    """What the heads of DToP have said in the last forward of a session.

    Args:
        run: what `foveate.use` returns, or `session_of` of a prepared model.

    Raises:
        InputError: DToP has not run in it.

    Examples:
        >>> with foveate.use(vit, DToP(exits=(5, 7), heads=heads)) as run:  # doctest: +SKIP
        ...     states = vit(pixels).last_hidden_state[:, 1:]
        >>> labels = canvas_of(run).map(final(states), size=(512, 512)).argmax(1)  # doctest: +SKIP
    """
    numbers = [n for n, method in enumerate(run.methods) if isinstance(method, DToP)]
    results = {} if run.record is None else run.record.results
    noted = results.get(numbers[0]) if numbers else None
    if not noted:
        raise InputError("dtop has not run in this session: call the model within it first")
    stages, present = tuple(noted["stages"]), tuple(noted["present"])
    return Canvas(stages[-1], noted["layer"], stages, present, noted["grid"])
