"""An independent oracle of streams: nothing is removed, and each head is told what it may see.

A plain loop over the layers of a Llama with explicit softmax attention. Keys are kept as they are
before they are rotated, those of evicted tokens too; for each layer and head there is a list of
tokens that are still seen, and the position of each. Evictions follow InfiniPot-V's equations, pair
by pair.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.oracle import rotate
from tests.tinies import IMAGE

PREFIX = -1


def survivors(keys, values, tokens, frames, cells, recent, count, tar):
    """InfiniPot-V for one head, pair by pair.

    Args:
        keys: token -> rotated key.
        values: token -> value.
        tokens: visual tokens that are seen, in order.
        frames: token -> frame.
        cells: token -> cell.
        recent: the first recent frame.
        count: how many survive.
        tar: the share that goes by time.
    """
    newest = [t for t in tokens if frames[t] >= recent]
    older = [t for t in tokens if frames[t] < recent]
    alike = {}
    for token in older:
        here = [u for u in newest if cells[u] == cells[token]]
        cosines = [torch.cosine_similarity(keys[token], keys[u], dim=0).item() for u in here]
        alike[token] = sum(cosines) / len(cosines) if cosines else 0.0
    kept = set(newest)
    unlike = sorted(older, key=lambda t: (alike[t], t))
    kept |= set(unlike[: max(round(tar * count) - len(newest), 0)])
    large = sorted(set(tokens) - kept, key=lambda t: (-values[t].norm().item(), t))
    kept |= set(large[: count - len(kept)])
    return sorted(kept)


@dataclass
class Oracle:
    """A stream at full length.

    Args:
        model: a tiny LLaVA around a Llama.
        cap: tokens of a layer at most, as of `Stream`; `None` evicts nothing.
        reserve: as of `Stream`.
        keep: as of `InfiniPotV`, and the next two.
        recent: see there.
        tar: see there.
        limit: most positions; `None` if gaps are never closed.
    """

    model: object
    cap: int | None
    reserve: int = 0
    keep: float = 0.75
    recent: float = 0.25
    tar: float = 0.5
    limit: int | None = None
    next: int = 0
    evictions: int = 0
    renumberings: int = 0
    frames: list[int] = field(default_factory=list)  # of each token
    cells: list[int] = field(default_factory=list)  # of each token; -1 is text
    whole: int = 0

    def __post_init__(self):
        layers = self.model.model.language_model.layers
        config = layers[0].self_attn.config
        self.heads = config.num_key_value_heads
        self.keys = [[[] for _ in range(self.heads)] for _ in layers]
        self.values = [[[] for _ in range(self.heads)] for _ in layers]
        self.seen = [[[] for _ in range(self.heads)] for _ in layers]
        self.position = [[{} for _ in range(self.heads)] for _ in layers]

    # -- the model

    def turned(self, x: Tensor, positions: list[int]) -> Tensor:
        """(n, d) rotated to positions."""
        width = x.shape[-1]
        inverse = 1 / 10000.0 ** (torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.tensor(positions).float(), inverse)
        angle = torch.cat((angle, angle), -1)
        return rotate(x, angle.cos(), angle.sin())

    @torch.no_grad()
    def run(self, ids: list[int], features: Tensor | None, positions: list[int]) -> Tensor:
        """Logits (n, vocabulary) of new tokens, which are seen from now on."""
        text = self.model.model.language_model
        hidden = text.embed_tokens(torch.tensor(ids))
        if features is not None:
            hidden[torch.tensor(ids) == IMAGE] = features
        first = len(self.frames) - len(ids)  # the caller has noted frames and cells
        new = range(first, first + len(ids))
        for number, layer in enumerate(text.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q, k, v = (
                projection(normed).view(len(ids), -1, attention.head_dim)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            outputs = []
            for head in range(q.shape[1]):
                own = head // (q.shape[1] // self.heads)
                if head % (q.shape[1] // self.heads) == 0:
                    self.keys[number][own] += list(k[:, own])
                    self.values[number][own] += list(v[:, own])
                    self.position[number][own].update(zip(new, positions, strict=True))
                    self.seen[number][own] += list(new)
                outputs.append(self.attend(number, own, q[:, head], list(new), positions))
            mixed = torch.stack(outputs, 1).flatten(1)
            hidden = hidden + attention.o_proj(mixed)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(text.norm(hidden))

    def attend(self, number, head, q, new, positions):
        seen = self.seen[number][head]
        k = self.rotated(number, head, seen)
        v = torch.stack([self.values[number][head][t] for t in seen])
        later = torch.tensor([[t > query for t in seen] for query in new])
        scores = self.turned(q, positions) @ k.T / q.shape[-1] ** 0.5
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v

    def rotated(self, number, head, tokens):
        keys = torch.stack([self.keys[number][head][t] for t in tokens])
        return self.turned(keys, [self.position[number][head][t] for t in tokens])

    # -- the stream

    def add(self, ids, features, kept=None, renumbered=False):
        """Frames of equal size among text; with `kept`, only these tokens of each frame are there,
        but the chunk's last token always is, in place of its frame's last.
        """
        total = len(ids)
        self.make_room(total)
        if self.limit is not None and self.next + total + self.reserve > self.limit:
            self.close_gaps()
        many = ids.count(IMAGE) // len(features[0])
        place, rows, tokens = 0, [], []
        start = frame = max([f for f in self.frames if f >= 0], default=-1)
        for offset, token in enumerate(ids):
            if token != IMAGE:
                text = frame if frame > start else start + 1 if start >= 0 else PREFIX
                tokens.append((token, offset, text, -1))
                continue
            frame = start + 1 + place // len(features[0])
            cell = place % len(features[0])
            own = kept
            if kept is not None and place // len(features[0]) == many - 1 and ids[-1] == IMAGE:
                own = kept - {max(kept)} | {len(features[0]) - 1}
            if own is None or cell in own:
                tokens.append((token, offset, frame, cell))
                rows.append(features[frame - start - 1][cell])
            place += 1
        assert place == many * len(features[0])
        offsets = range(len(tokens)) if renumbered else [t[1] for t in tokens]
        self.frames += [t[2] for t in tokens]
        self.cells += [t[3] for t in tokens]
        self.run([t[0] for t in tokens], torch.stack(rows), [self.next + i for i in offsets])
        self.next += len(tokens) if renumbered else total

    def ask(self, ids):
        """Logits (n, vocabulary) of a question and its answer, which are forgotten again."""
        before = len(self.frames)
        newest = max(self.frames)
        self.frames += [newest] * len(ids)
        self.cells += [-1] * len(ids)
        logits = self.run(ids, None, list(range(self.next, self.next + len(ids))))
        return logits, before

    def forget(self, before):
        """Forget the tokens after the first ones."""
        del self.frames[before:], self.cells[before:]
        for number, of in enumerate(self.seen):
            for head in range(self.heads):
                del self.keys[number][head][before:], self.values[number][head][before:]
                of[head] = [t for t in of[head] if t < before]

    def make_room(self, coming):
        if self.cap is None:
            return
        most, held = self.cap - self.reserve, len(self.seen[0][0])
        if held + coming <= most:
            return
        self.evictions += 1
        left = min(int(self.keep * most), most - coming)
        here = self.seen[0][0]
        shows = [t for t in here if self.cells[t] >= 0]
        newest = max(self.frames)
        size = sum(self.frames[t] == newest and self.cells[t] >= 0 for t in here)
        recent = newest + 1 - max(int(self.recent * (len(shows) // size)), 1)
        recent = self.whole = max(recent, self.whole)
        text = [
            t
            for t in here
            if self.cells[t] < 0 and (self.frames[t] >= recent or self.frames[t] < 0)
        ]
        count = min(left - len(text), len(shows))
        for number, of in enumerate(self.seen):
            for head in range(self.heads):
                visual = [t for t in of[head] if self.cells[t] >= 0]
                keys = dict(zip(visual, self.rotated(number, head, visual), strict=True))
                values = {t: self.values[number][head][t] for t in visual}
                kept = survivors(
                    keys, values, visual, self.frames, self.cells, recent, count, self.tar
                )
                of[head] = sorted([*kept, *text])

    def close_gaps(self):
        self.renumberings += 1
        for number, of in enumerate(self.seen):
            for head in range(self.heads):
                self.position[number][head].update({t: i for i, t in enumerate(of[head])})
        self.next = len(self.seen[0][0])
