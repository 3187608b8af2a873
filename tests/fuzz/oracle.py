"""The fuzzer's oracle: the bare model over a whole row, told layer by layer what may be seen.

It is written from the definition: the row stands at full length, without padding and without a
cache. A removed token stays where it is; from its layer on nobody but itself attends to it. Where
positions are renumbered, each token's position is what it was less the tokens before it that are
gone. Nothing of foveate is used, and nothing is cut out of any tensor.

Shapes: `T` length of the row, `H` heads, `V` visual tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TIE = 1e-5  # scores nearer than this to each other may be ranked either way


class Disagreement(AssertionError):
    """The engine and the oracle differ."""


@dataclass(frozen=True)
class Cut:
    """Tokens of one image are removed before a layer.

    Args:
        layer: the decoder layer; -1 for the entrance of the language model.
        columns: (V) where all tokens of the image stand in the row, removed ones too.
        kept: which of the V were left according to the engine, ascending; `None` where it has not
            said, and the oracle ranks.
        renumber: whether what follows moves up.
        rank: how the oracle finds out by itself which are left: by the attention of this layer
            (`same`), of the layer before (`before`), or of that without rotary positions
            (`content`); `None` if it is told.
        count: how many a ranking leaves of so many.
        stride: with `content`, distance of tokens that are left besides; `None` for none.
        grid: (height, width) of the image, or of one of a video's frames.
        frames: of a video.
        asks: columns of the tokens whose attention ranks.
        turn: of which turn of the conversation; those of one turn and layer rank at once.
        pinned: whether a token of the image that ranks is never removed.
    """

    layer: int
    columns: Tensor
    kept: Tensor | None
    renumber: bool = False
    rank: str | None = None
    count: Callable[[int], int] = int
    stride: int | None = None
    grid: tuple[int, int] = (1, 1)
    frames: int = 1
    asks: tuple[int, ...] = ()
    turn: int = 0
    pinned: bool = True


@dataclass(eq=False)
class Row:
    """What became of a row.

    Args:
        logits: (T, vocabulary)
        hidden: what entered each decoder layer, (T, D) each, and what left the last norm.
        alive: which tokens each of these layers saw, (T) each, and which are left in the end.
        given: which tokens each of these layers was given, before its own cuts.
        ties: rankings that could have gone either way, where the engine's is taken.
    """

    logits: Tensor
    hidden: list[Tensor]
    alive: list[Tensor]
    given: list[Tensor]
    ties: int = 0


class Watch:
    """Hooks on an eager model's decoder layers that carry out cuts.

    Args:
        text: the text model.
        rotary: (hidden, positions, layer) -> cos and sin.
        cuts: in the order in which they are made.
        length: T.
        unseen: (T) tokens that nobody else may see from the beginning.
    """

    def __init__(
        self,
        text: Any,
        rotary: Callable[[Tensor, Tensor, int], Any],
        cuts: list[Cut],
        length: int,
        unseen: Tensor | None = None,
    ) -> None:
        self.text, self.rotary, self.cuts = text, rotary, cuts
        self.now = torch.ones(length, dtype=torch.bool)
        self.there = self.now.clone()  # hidden ones too
        if unseen is not None:
            self.now &= ~unseen
        self.shift = torch.zeros(length, dtype=torch.long)
        self.weights: dict[tuple[str, int], Tensor] = {}  # (H, T, T) of layers that have run
        self.hidden: list[Tensor] = []
        self.alive: list[Tensor] = []
        self.given: list[Tensor] = []
        self.ties, self.seen = 0, None
        for cut in cuts:
            if cut.layer < 0:
                self._remove(cut, cut.kept)

    def __enter__(self) -> Watch:
        self.handles = []
        for number, layer in enumerate(self.text.layers):
            self.handles += [
                layer.register_forward_pre_hook(self._before(number), with_kwargs=True),
                layer.self_attn.register_forward_hook(self._attended),
                layer.register_forward_hook(self._after(number)),
            ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _attended(self, module: Any, args: Any, output: Any) -> None:
        self.seen = output[1][0].detach()

    def _before(self, number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0]
            self.hidden.append(hidden[0].detach())
            self.given.append(self.now.clone())
            due = [cut for cut in self.cuts if cut.layer == number]
            for turn in sorted({cut.turn for cut in due}):
                if any(cut.turn == turn and cut.rank == "same" for cut in due):
                    self._try("same", number, layer, hidden, kwargs)
                for cut in due:
                    if cut.turn == turn:
                        self._cut(cut)
            if any(cut.rank == "content" and cut.layer == number + 1 for cut in self.cuts):
                self._try("content", number, layer, hidden, kwargs)
            self.alive.append(self.now.clone())
            return args, self._told(number, hidden, kwargs)

        return hook

    def _after(self, number: int) -> Callable[..., Any]:
        def hook(layer: Any, args: Any, output: Any) -> None:
            self.weights["before", number + 1] = self.seen

        return hook

    def _try(self, what: str, number: int, layer: Any, hidden: Tensor, kwargs: Any) -> None:
        """See what a layer would attend to, with all that is alive now."""
        told = self._told(number, hidden, kwargs)
        if what == "content" and told["position_embeddings"] is not None:
            cos, sin = told["position_embeddings"]
            told["position_embeddings"] = (torch.ones_like(cos), torch.zeros_like(sin))
        with torch.no_grad():
            layer.forward(hidden, **told)
        self.weights[what, number + (what == "content")] = self.seen

    def _told(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's keyword arguments: nobody sees what is gone, but everybody sees itself."""
        told = dict(kwargs)
        mask = kwargs["attention_mask"]
        itself = torch.eye(len(self.now), dtype=torch.bool)
        mask = mask.masked_fill(~(self.now | itself), torch.finfo(mask.dtype).min)
        told["attention_mask"] = mask.masked_fill(itself & ~self.now[:, None], 0.0)
        if self.shift.any() and kwargs["position_embeddings"] is not None:
            positions = kwargs["position_ids"] - self.shift
            told["position_embeddings"] = self.rotary(hidden, positions, number)
        return told

    def _cut(self, cut: Cut) -> None:
        if cut.rank is None:
            self._remove(cut, cut.kept)
        elif cut.asks:
            self._remove(cut, self._ranked(cut))

    def _ranked(self, cut: Cut) -> Tensor:
        """Which of the V the ranking leaves; the engine's choice where scores are as good as equal.

        Raises:
            Disagreement: the engine has left others.
        """
        here = self.there[cut.columns].nonzero()[:, 0]
        if not len(here):
            return here
        rows = self.weights[cut.rank, cut.layer][:, list(cut.asks)][:, :, cut.columns[here]]
        if cut.rank == "content":
            rows = rows / rows.sum(-1, keepdim=True)
        scores = rows.mean((0, 1))
        count = cut.count(len(here))
        best = _best(scores, count)
        read = torch.isin(cut.columns[here], torch.tensor(cut.asks)).nonzero()[:, 0]
        read = read if cut.pinned else read[:0]
        if cut.rank != "content" and not bool(torch.isin(read, best).all()):
            best = torch.cat((_best(scores, count - 1), read))
        left = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, best, True)
        line = scores.topk(count).values[-1]
        if cut.stride:
            left |= _on_grid(here, cut)
        for token in read[~left[read]]:  # counts that are not ranks: the nearest makes room
            there = left.nonzero()[:, 0]
            left[there[(here[there] - here[token]).abs().argmin()]] = False
            left[token] = True
        if cut.kept is None:
            return here[left]
        theirs = torch.isin(here, cut.kept)
        differ = left != theirs
        if differ.any():
            far = (scores[differ] - line).abs().max() / line.abs().clamp(min=1e-12)
            if far > TIE or int(left.sum()) != int(theirs.sum()):
                raise Disagreement(
                    f"before layer {cut.layer} {here[left].tolist()} rank highest, but "
                    f"{cut.kept.tolist()} were left; {far:.1e} from a tie"
                )
            self.ties += 1
        return here[theirs]

    def _remove(self, cut: Cut, kept: Tensor | None) -> None:
        assert kept is not None  # or the oracle has ranked
        before = self.there.clone()
        stays = torch.zeros(len(cut.columns), dtype=torch.bool).index_fill(0, kept, True)
        for tokens in (self.now, self.there):
            tokens[cut.columns[~stays]] = False
        if cut.renumber:
            gone = (before & ~self.there).long()
            self.shift = self.shift + gone.cumsum(0) - gone


def _best(scores: Tensor, count: int) -> Tensor:
    """The highest scores; of those as good as equal to the least of them, the first."""
    if not count:
        return scores.argsort()[:0]
    least = scores.topk(count).values[-1]
    near = least.abs() * 2**-20
    surely = (scores > least + near).nonzero()[:, 0]
    tied = ((scores - least).abs() <= near).nonzero()[:, 0]
    return torch.cat((surely, tied[: count - len(surely)]))


def _on_grid(index: Tensor, cut: Cut) -> Tensor:
    """Which tokens are every `stride`-th of every `stride`-th row of their frame."""
    height, width = cut.grid
    frame = (index // (height * width)).clamp(max=cut.frames - 1)
    cell = index - frame * height * width
    return (cell // width % cut.stride == 0) & (cell % width % cut.stride == 0)


def run(
    model: Any,
    text: Any,
    rotary: Callable[[Tensor, Tensor, int], Any],
    inputs: dict[str, Any],
    cuts: list[Cut],
    unseen: Tensor | None = None,
) -> Row:
    """A row of the batch, from which tokens are removed.

    Args:
        model: bare, with eager attention.
        text: its text model.
        rotary: (hidden, positions, layer) -> cos and sin of its rotary embedding.
        inputs: one row without padding.
        cuts: what is removed.
        unseen: as in `Watch`.

    Raises:
        Disagreement: a ranking leaves other tokens than the engine's.
    """
    with Watch(text, rotary, cuts, inputs["input_ids"].shape[1], unseen) as watch:
        states = []
        hook = text.register_forward_hook(lambda m, a, out: states.append(out.last_hidden_state))
        try:
            logits = model(**inputs, use_cache=False).logits[0]
        finally:
            hook.remove()
    hidden = [*watch.hidden, states[0][0]]
    return Row(logits, hidden, [*watch.alive, watch.now], [*watch.given, watch.now], watch.ties)
