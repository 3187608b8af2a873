"""How far pruning inside a tower moves its image embeddings, and what a probe reads from them.

Shapes: `N` images, `E` numbers of an embedding, whose length is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _survival import Means, Pair, mean_of
from _tower_methods import Name
from torch import Tensor

WHOLE: Name = ("all tokens", 1.0)
DECAYS = (1e-5, 1e-4, 1e-3, 1e-2)


def neighbours(query: Tensor, gallery: Tensor, count: int) -> Tensor:
    """(N, count) the nearest others of each of (N, E) embeddings of length 1, nearest first."""
    cosines = query @ gallery.T
    return cosines.fill_diagonal_(-2).topk(count, dim=1).indices


def agreement(pruned: Tensor, whole: Tensor) -> dict[str, list[Pair]]:
    """How (N, E) embeddings of pruned images agree with those of the same images unpruned.

    Returns:
        For each image: `cosine`; `nearest`, whether the same other image is nearest among the
        unpruned; `five`, the share of the five nearest that stays; `indexed`, as `nearest`, among
        the pruned.
    """
    now, before = neighbours(pruned, whole, 5), neighbours(whole, whole, 5)
    columns = {
        "cosine": (pruned * whole).sum(1),
        "nearest": now[:, 0] == before[:, 0],
        "five": (now[:, :, None] == before[:, None]).any(2).double().mean(1),
        "indexed": neighbours(pruned, pruned, 1)[:, 0] == before[:, 0],
    }
    return {key: [(float(value), 1.0) for value in column] for key, column in columns.items()}


def rows(
    embedded: Mapping[Name, Sequence[Tensor]], right: Callable[[Tensor], Tensor] | None = None
) -> list[dict[str, Any]]:
    """A row for each method: means over images, and differences on the same images.

    Args:
        embedded: (N, E) embeddings for each seed, without a method too.
        right: which of (N, E) embeddings are classified right, (N,).
    """
    if WHOLE not in embedded:
        return []
    whole = embedded[WHOLE][0]

    def measure(pruned: Tensor) -> dict[str, list[Pair]]:
        found = agreement(pruned, whole)
        if right is not None:
            found["accuracy"] = [(float(value), 1.0) for value in right(pruned)]
        return found

    means = {}
    for name, seeds in embedded.items():
        found = [measure(pruned) for pruned in seeds]
        means[name] = {
            key: Means.of([mean_of(of) for of in zip(*(seed[key] for seed in found), strict=True)])
            for key in found[0]
        }
    made = []
    for (method, keep), own in means.items():
        row = {"method": method, "keep": keep} | {k: mean.to_dict() for k, mean in own.items()}
        if right is not None:
            row["over all"] = own["accuracy"].minus(means[WHOLE]["accuracy"])
        chance = means.get((method.replace("cls-drop", "random"), keep))
        if method.startswith("cls-drop") and chance:
            row["over random"] = {key: mean.minus(chance[key]) for key, mean in own.items()}
        made.append(row)
    return made


def fit(features: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights and biases of a multinomial logistic regression.

    Args:
        features: (N, E).
        labels: (N,) numbers of classes.
        decay: of the weights' squares.
    """
    classes = int(labels.max()) + 1
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS((weight, bias), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), labels)
        value = value + decay * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach(), bias.detach()


def probe(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A head on (N, E) features, whose decay is the best on every fifth of them."""
    held = torch.arange(len(features)) % 5 == 4

    def accuracy(decay: float) -> float:
        weight, bias = fit(features[~held], labels[~held], decay)
        found = F.linear(features[held], weight, bias).argmax(1)
        return float((found == labels[held]).double().mean())

    return fit(features, labels, max(DECAYS, key=accuracy))
