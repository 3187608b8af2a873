"""An independent oracle: the encoder at full length.

Nothing here uses foveate, and attention is an explicit softmax. A dropped token stays in its row,
but from where it was dropped nobody attends to it. Merged tokens stay in their rows too, with one
value: attention to all of them is what proportional attention to one of them must be, and their
plain mean is the mean weighted by sizes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

VIT = ("layernorm_before", "attention", "layernorm_after", "o_proj")
DINOV2 = ("norm1", "attention", "norm2", "o_proj")
CLIP = ("layer_norm1", "self_attn", "layer_norm2", "out_proj")
NAMES = {
    **dict.fromkeys(("vit", "deit", "vit_msn", "ijepa", "vivit", "vit_mae"), VIT),
    "audio-spectrogram-transformer": VIT,
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit"), DINOV2),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "siglip2_vision_model"), CLIP),
    **dict.fromkeys(("metaclip_2_vision_model", "clipseg_vision_model"), CLIP),
    **dict.fromkeys(("owlvit_vision_model", "owlv2_vision_model", "mlcd_vision_model"), CLIP),
}


@dataclass
class Drop:
    """In `layer`, keep `count` patches: inside it by class attention, or before it the ones
    listed.
    """

    layer: int
    count: int = 0
    listed: list[int] | None = None


@dataclass
class Merge:
    """In `layer`, merge `r` pairs; attention after it counts sources unless `proportional` is
    off.
    """

    layer: int
    r: int
    proportional: bool = True


class Full:
    """One image at full length.

    Args:
        tower: the encoder.
        special: rows before the patches.
        states: (N, D) input of layer 0.
        padding: (N) rows that nobody attends to.
        rotary: cosines and sines of the patches, (V, d), or of all rows.
    """

    def __init__(
        self,
        tower,
        special: int,
        states: Tensor,
        padding: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ):
        self.rotary = rotary
        self.tower, self.special = tower, special
        self.names = NAMES.get(tower.config.model_type)
        self.x = states
        self.total = len(states) - special
        self.alive = torch.ones(len(states), dtype=torch.bool)
        self.real = self.alive.clone() if padding is None else ~padding
        self.groups = [[i] for i in range(len(states))]  # in the order of the encoder's rows
        self.stands = list(range(len(states)))  # row at which each group stands
        self.weigh = True
        self.states = [states]
        self.kept = {}

    def attend(self, layer):
        """Probabilities (H, N, N), keys (N, H, d), and the output (N, D)."""
        q, k, v = self.project(layer)
        keys = k.transpose(0, 1)
        q, k = self.turned(q), self.turned(k)
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + self.bias(layer)
        seen = self.alive.clone()
        if not self.weigh:  # one row for each group
            seen[:] = False
            for group in self.groups:
                seen[[row for row in group if self.alive[row] and self.real[row]][:1]] = True
        weights = scores.masked_fill(~(seen & self.real), -torch.inf).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).flatten(1)
        return weights, keys, self.mix(layer, mixed)

    def project(self, layer):
        """Queries, keys and values (H, N, d)."""
        norm1, attention, *_ = self.names
        normed = getattr(layer, norm1)(self.x)
        return self.by_heads(getattr(layer, attention), normed, ("q_proj", "k_proj", "v_proj"))

    def by_heads(self, module, normed, names):
        """(H, N, d) of what some modules make."""
        heads = self.tower.config.num_attention_heads
        return [
            getattr(module, name)(normed).view(len(normed), heads, -1).transpose(0, 1)
            for name in names
        ]

    def bias(self, layer):
        """What scores (H, N, N) get."""
        return 0.0

    def mix(self, layer, mixed):
        """(N, D) output of the attention."""
        return getattr(getattr(layer, self.names[1]), self.names[3])(mixed)

    def turned(self, x):
        """(H, N, d) with rotary positions, if there are any: rows that were merged all have that of
        the row at which their group stands.
        """
        if self.rotary is None:
            return x
        bare = len(self.real) - len(self.rotary[0])  # rows before, if they have no positions
        stands = torch.arange(len(self.real))
        for group, stand in zip(self.groups, self.stands, strict=True):
            stands[group] = stand
        cos, sin = (part[stands[bare:] - bare] for part in self.rotary)
        rows, turned = x[:, :bare], x[:, bare:]
        first, second = turned.chunk(2, -1)
        return torch.cat((rows, turned * cos + torch.cat((-second, first), -1) * sin), 1)

    def run(self, steps):
        """(N, D) output of the last layer."""
        for number, layer in enumerate(self._layers()):
            due = [step for step in steps if step.layer == number]
            for step in due:
                if isinstance(step, Drop) and step.listed is not None:
                    wanted = {self.special + i for i in step.listed}
                    self.keep([g for g, row in enumerate(self.stands) if row in wanted], number)
            weights, keys, output = self.attend(layer)
            if hasattr(layer, "layer_scale1"):
                output = output * layer.layer_scale1.lambda1
            self.x = self.x + output
            for step in due:
                if isinstance(step, Merge):
                    self.merge(keys.mean(1), step, number)
                elif step.listed is None:
                    row = weights.mean(0)[0]
                    scores = torch.stack([row[rows].sum() for rows in self.groups])
                    chosen = scores[self.special :].topk(step.count).indices.sort().values
                    self.keep((chosen + self.special).tolist(), number)
            self.x = self.x + self.feed(layer)
            self.states.append(self.filled())
        return self.x

    def feed(self, layer):
        """(N, D) what the MLP adds."""
        fed = layer.mlp(getattr(layer, self.names[2])(self.x))
        return fed * layer.layer_scale2.lambda1 if hasattr(layer, "layer_scale2") else fed

    def _layers(self):
        encoder = getattr(self.tower, "encoder", self.tower)
        return encoder.layers if hasattr(encoder, "layers") else encoder.layer

    def filled(self):
        """The states, where dropped rows hold the mean of the patches that are left."""
        patches = self.alive & self.real
        patches[: self.special] = False
        mean = self.x[patches].mean(0)
        return torch.where(self.alive[:, None], self.x, mean)

    def keep(self, chosen, number):
        """Drop all groups of patches but some."""
        chosen = [*range(self.special), *chosen]
        self.groups = [self.groups[i] for i in chosen]
        self.stands = [self.stands[i] for i in chosen]
        self.alive[:] = False
        self.alive[[row for rows in self.groups for row in rows]] = True
        self.note(number)

    def note(self, number):
        rows = sorted(self.stands[self.special :])
        entry = f"vision:{number}"
        if entry in self.kept:  # a step before the layer, and one within it
            self.kept[f"{entry}#1"] = self.kept.pop(entry)
        self.kept[entry] = torch.tensor(rows) - self.special

    def merge(self, keys, step, number):
        """Merge the r most similar pairs of even and odd groups."""
        self.weigh = step.proportional
        patches = torch.stack([keys[group[0]] for group in self.groups[self.special :]])
        into, order = matched(patches, self.special, step.r)
        into = {a + self.special: b + self.special for a, b in into.items()}
        order = [*range(self.special), *(i + self.special for i in order)]
        members = {i: list(group) for i, group in enumerate(self.groups)}
        for a, b in into.items():
            members[b] += self.groups[a]
        for rows in members.values():
            self.x[rows] = self.x[rows].mean(0)
        self.groups = [members[i] for i in order]
        self.stands = [self.stands[i] for i in order]
        self.note(number)


def matched(keys, special, r):
    """Which tokens go into which, and the order of those that are left.

    Args:
        keys: (V, d) keys of the tokens, which are the even and odd ones of a row that begins with
            `special` others.
        special: how many.
        r: pairs.
    """
    unit, count = keys / keys.norm(dim=-1, keepdim=True), len(keys)
    sources = [i for i in range(count) if (i + special) % 2 == 0]
    targets = [i for i in range(count) if (i + special) % 2 == 1]
    candidates = []
    for a in sources:
        best = max(((float(unit[a] @ unit[b]), b) for b in targets), default=None)
        if best is not None:
            candidates.append((best[0], a, best[1]))
    candidates.sort(reverse=True)
    r = min(r, count // 2)
    into = {a: b for _, a, b in candidates[:r]}
    rest = [a for a in sources if a not in into]
    if not special:
        rest = [a for _, a, _ in candidates[r:]] + [
            a for a in rest if a not in {c[1] for c in candidates}
        ]
    return into, [*rest, *targets]


@torch.no_grad()
def run(
    tower, special, embedded: Tensor, steps, padding: Tensor | None = None, rotary=None, kind=Full
):
    """The oracle of each image.

    Args:
        embedded: (B, N, D) input of layer 0.
        padding: (B, N) rows that nobody attends to.
        rotary: cosines and sines of the patches, (V, d), or of all rows.
        kind: the oracle.
    """
    results = []
    for row, states in enumerate(embedded):
        full = kind(
            tower, special, states.clone(), None if padding is None else padding[row], rotary
        )
        full.run(steps)
        results.append(full)
    return results
