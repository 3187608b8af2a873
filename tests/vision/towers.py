"""An oracle for any tower: its layers at full length, with removed tokens masked.

What each layer is handed is recorded from the unpatched model. The oracle then runs the layers
itself, with an explicit softmax over all rows: a dropped row stays, but nobody attends to it; the
rows of merged tokens stay too, with one value, at the place of the token that they went into. The
model reads the oracle's states in place of its own, so that readers, projectors and packing are the
model's, at full length. Which rows a token has is found by gradients.
"""

import functools
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tests.conformance.zoo import phi4_multimodal
from tests.conformance.zoo.member import fresh
from tests.vision.oracle import matched

# vision model type -> where the layers are, and the names within a layer and its attention
NAMES = {
    "clip_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "cohere_compass_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "cosmos3_edge_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "dots3_note_vision_encoder": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "ernie4_5_vl_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "exaone4_5_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "gemma4_vision": (
        "encoder.layers", "input_layernorm", "self_attn", "pre_feedforward_layernorm", "mlp",
    ),
    "glm4v_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "glm4v_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "glm_ocr_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "granite_docling_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "hunyuan_vl_vision": ("layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "idefics3_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "internvl_vision": (
        "encoder.layer", "layernorm_before", "attention", "layernorm_after", "mlp",
    ),
    "kimi_k25_vision": ("layers", "norm1", "attn", "norm2", "mlp"),
    "janus_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "minicpm_ocr_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "minimax_m3_vl_vision": ("layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "muse_glimmer_vision": ("layers", "norm1", "attn", "norm2", "mlp"),
    "muse_spark_vision": ("layers", "norm1", "attn", "norm2", "mlp"),
    "ovis2_vision": ("transformer.encoder.layers", "rms_norm1", "attention", "rms_norm2", "ffn"),
    "paddleocr_vl_vision": (
        "vision_model.encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp",
    ),
    "phi4_multimodal_vision": (
        "encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp",
    ),
    "pixtral": (
        "transformer.layers", "attention_norm", "attention", "ffn_norm", "feed_forward",
    ),
    "qianfan_ocr_vision": (
        "layers", "layernorm_before", "attention", "layernorm_after", "mlp",
    ),
    "qwen2_5_omni_vision_encoder": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen2_5_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen2_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_5_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_5_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_omni_moe_vision_encoder": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_vl_moe_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "qwen3_vl_vision": ("blocks", "norm1", "attn", "norm2", "mlp"),
    "siglip_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "video_llama_3_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "siglip2_vision_model": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "smolvlm_vision": ("encoder.layers", "layer_norm1", "self_attn", "layer_norm2", "mlp"),
}  # fmt: skip
PATHS = ("vision_tower", "vision_model", "visual", "image_tower", "vision_encoder",
         "embed_tokens_extend.image_embed.img_processor")  # fmt: skip


@dataclass
class Drop:
    """Before a layer, or inside it, keep a share of what each image has: the tokens at positions
    0, 3, 6, ... first; or inside it those that the class token attends to most.
    """

    layer: int
    share: float
    inside: bool = False
    by_class: bool = False


@dataclass
class Merge:
    """Inside a layer, merge `r` pairs of each image; each counts its sources if proportional."""

    layer: int
    r: int
    proportional: bool = True


class Tower:
    """The tower of a model, its layers and their names."""

    def __init__(self, model):
        self.model = model
        self.module = next(m for p in PATHS if (m := child(model.model, p)) is not None)
        layers, *self.names = NAMES[self.module.config.model_type]
        self.layers = self.module.get_submodule(layers)
        config = self.module.config
        self.heads = getattr(config, "num_heads", None) or config.num_attention_heads

    @contextmanager
    def hooked(self, make):
        """Forward hooks `make(number)` on all layers, ahead of those that capture states."""
        handles = [
            layer.register_forward_hook(make(n), with_kwargs=True, prepend=True)
            for n, layer in enumerate(self.layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def record(self, encode):
        """Inputs and arguments of every layer, as (args, kwargs)."""
        calls = [None] * len(self.layers)

        def make(number):
            def hook(module, args, kwargs, output):
                calls[number] = args, kwargs

            return hook

        with self.hooked(make), torch.no_grad():
            encode()
        return calls

    def tokens(self, encode):
        """The rows that make each visual token, by gradients: a list of lists, in their order.

        Rows are those of the deepest layer that is read.
        """
        for layer in reversed(range(len(self.layers))):
            leaves = []

            def make(number, layer=layer, leaves=leaves):
                def hook(module, args, kwargs, output):
                    if number == layer:
                        leaves.append(output.detach().requires_grad_())
                        return leaves[0]
                    return None

                return hook

            with self.hooked(make):
                pooled = encode().pooler_output
            features = torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in pooled])
            noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
            sums = (features * noise).sum(1)
            grads = [
                torch.autograd.grad(sums[i], leaves, retain_graph=True, allow_unused=True)[0]
                for i in range(len(sums))
            ]
            if any(grad is not None and grad.any() for grad in grads):
                break
        shape = leaves[0].shape[-1]
        return [grad.reshape(-1, shape).any(1).nonzero()[:, 0].tolist() for grad in grads]

    @contextmanager
    def replaced(self, states):
        """While open, the model reads these states after its layers."""

        def make(number):
            def hook(module, args, kwargs, output):
                return states[number].view_as(output)

            return hook

        with self.hooked(make):
            yield


class Full:
    """All images of a pass at full length.

    Args:
        tower: the tower.
        calls: what its layers are handed.
        images: rows of each token of each image: [images][tokens][rows].
    """

    def __init__(self, tower, calls, pictures):
        self.tower, self.calls = tower, calls
        hidden = calls[0][0][0]
        self.shape = hidden.shape
        self.x = hidden.reshape(-1, hidden.shape[-1]).clone()
        self.number = len(self.x)
        self.batch = hidden.shape[0] if hidden.dim() == 3 else 1
        self.tokens = [[list(rows) for rows in picture] for picture in pictures]
        self.groups = [[[i] for i in range(len(picture))] for picture in pictures]
        self.alive = torch.ones(self.number, dtype=torch.bool)
        self.stand = torch.arange(self.number)  # the row at whose place each row is
        self.weigh = True
        self.states = []
        self.placed = "position_ids" in calls[0][1]  # which say where each patch stands
        width = self.number // self.batch
        of_pictures = {sum(len(token) for token in picture) for picture in self.tokens}
        self.special = int(of_pictures == {width - 1})

    def seen(self, number):
        """(N, N) which rows a layer lets each row attend to, but for padding, and rotary (cos, sin)
        of each.
        """
        args, kwargs = self.calls[number]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        allowed = torch.ones(self.number, self.number, dtype=torch.bool)
        picture = torch.arange(self.number) // (self.number // self.batch)
        allowed &= picture[:, None] == picture
        if "cu_seqlens" in kwargs:
            segment = torch.bucketize(
                torch.arange(self.number), kwargs["cu_seqlens"].long(), right=True
            )
            allowed &= segment[:, None] == segment
        rotary = kwargs.get("position_embeddings")
        if self.placed:
            return allowed, [part.flatten(0, 1) for part in rotary]
        if mask is not None and rotary is not None:
            allowed &= mask[0, 0] == 0
        return allowed, rotary

    def attend(self, number):
        """(H, N, N) probabilities, (N, H, d) keys as projected, and the output (N, D)."""
        layer = self.tower.layers[number]
        norm1, attention, _, _ = self.tower.names
        module = getattr(layer, attention)
        normed = getattr(layer, norm1)(self.x)
        if hasattr(module, "qkv"):
            parts = list(self.apart(module, module.qkv(normed)))
        else:
            names = "qkv" if hasattr(module, "q") else ("q_proj", "k_proj", "v_proj")
            parts = [getattr(module, name)(normed) for name in names]
        parts[1:] = (self.shared(module, part) for part in parts[1:])
        parts = [self.normed(module, of, part) for of, part in zip("qkv", parts, strict=True)]
        q, k, v = (part.view(self.number, self.tower.heads, -1).transpose(0, 1) for part in parts)
        projected = k.transpose(0, 1)
        allowed, rotary = self.seen(number)
        if rotary is not None:
            cos, sin = (part[self.stand] for part in rotary)
            turned = by_axis if self.placed else rotated
            width = cos.shape[-1]  # less than a head in some
            q, k = (
                torch.cat((x[..., :width] * cos + turned(x[..., :width]) * sin, x[..., width:]), -1)
                for x in (q, k)
            )
        allowed = allowed[self.stand][:, self.stand]
        # Padding is hidden row by row, not where its token stands.
        allowed &= self.visible(number) & self.alive
        if not self.weigh:  # one row for each merged
            once = torch.zeros_like(self.alive)
            for row in self.stand[self.alive & self.visible(number)].unique():
                once[(self.alive & self.visible(number) & (self.stand == row)).nonzero()[0]] = True
            allowed &= once
        scores = (q @ k.transpose(1, 2)) / (1 if self.placed else q.shape[-1] ** 0.5)
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        mixed = (weights @ v).transpose(0, 1).reshape(self.number, -1)
        out = next(n for n in ("proj", "out_proj", "o_proj", "projection_layer")
                   if hasattr(module, n))  # fmt: skip
        return weights, projected, getattr(module, out)(mixed)

    def apart(self, module, made):
        """Queries (N, H d), and keys and values of as many heads as there are."""
        count = self.tower.heads // getattr(module, "num_key_value_groups", 1)
        heads = made.view(self.number, self.tower.heads + 2 * count, -1)
        return (part.flatten(1) for part in heads.split([self.tower.heads, count, count], 1))

    def shared(self, module, part):
        """(N, H d) keys or values, for each of the heads that share them."""
        groups = getattr(module, "num_key_value_groups", 1)
        heads = part.view(self.number, self.tower.heads // groups, -1)
        return heads[:, torch.arange(self.tower.heads) // groups].flatten(1)

    def normed(self, module, of, part):
        """(N, H d) queries, keys or values under their norm, which is of all heads or of each by
        itself.
        """
        norm = getattr(module, f"{of}_norm", None)
        if norm is None or isinstance(norm, torch.nn.Identity):
            return part
        weight = getattr(norm, "weight", None)
        width = module.head_dim if weight is None else len(weight)
        return norm(part.view(self.number, -1, width)).flatten(1)

    def visible(self, number):
        """(N) rows that are no padding."""
        args, kwargs = self.calls[number]
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if self.placed:
            return (kwargs["position_ids"] >= 0).all(-1).flatten()
        if mask is None or mask.shape[0] != self.batch or "position_embeddings" in kwargs:
            return torch.ones(self.number, dtype=torch.bool)
        return (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0].flatten()

    @torch.no_grad()
    def run(self, steps):
        """States after every layer."""
        for number, layer in enumerate(self.tower.layers):
            due = [step for step in steps if step.layer == number]
            for step in due:
                if isinstance(step, Drop) and not step.inside:
                    self.drop(step, None)
            weights, keys, output = self.attend(number)
            if hasattr(layer, "lambda_1"):
                output = output * layer.lambda_1
            if self.placed:
                output = layer.post_attention_layernorm(output)
            self.x = self.x + output
            for step in due:
                if isinstance(step, Merge):
                    self.merge(step, keys.mean(1))
                elif step.inside:
                    self.drop(step, weights.mean(0))
            fed = getattr(layer, self.tower.names[3])(getattr(layer, self.tower.names[2])(self.x))
            if hasattr(layer, "lambda_2"):
                fed = fed * layer.lambda_2
            if self.placed:
                fed = layer.post_feedforward_layernorm(fed)
            self.x = self.x + fed
            self.states.append(self.x.clone())
        return self

    def rows(self, picture, group):
        """Rows of all tokens of a group."""
        return [row for token in group for row in self.tokens[picture][token]]

    def drop(self, step, weights):
        for number, groups in enumerate(self.groups):
            order = sorted(range(len(groups)), key=lambda g: (groups[g][0] % 3, groups[g][0]))
            if step.by_class:
                first = number * (self.number // self.batch)
                scores = [-weights[first, self.rows(number, g)].sum().item() for g in groups]
                order = sorted(range(len(groups)), key=scores.__getitem__)
            count = int(step.share * len(groups))
            chosen = sorted(order[:count])
            for group in order[count:]:
                self.alive[self.rows(number, groups[group])] = False
            self.groups[number] = [groups[g] for g in chosen]

    def merge(self, step, keys):
        """The first token of a group is the one that the others went into."""
        self.weigh = step.proportional
        for number, groups in enumerate(self.groups):
            unit = torch.stack([keys[self.tokens[number][g[0]]].mean(0) for g in groups])
            into, order = matched(unit, self.special, step.r)
            for a, b in into.items():
                groups[b] += groups[a]
            for group in groups:
                tokens = [self.tokens[number][token] for token in group]
                for place in zip(*tokens, strict=True):
                    self.x[list(place)] = self.x[list(place)].mean(0)
                    self.stand[list(place)] = self.stand[place[0]].clone()
            self.groups[number] = [groups[g] for g in order]

    def kept(self, number):
        """Tokens of an image that are left, ascending."""
        return sorted(group[0] for group in self.groups[number])


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def by_axis(x):
    """The same for each half of a head, which one axis rotates."""
    return torch.cat([rotated(part) for part in x.chunk(2, -1)], -1)


def child(module, path):
    """A module within another; `None` where there is none."""
    return functools.reduce(lambda of, name: getattr(of, name, None), path.split("."), module)


def encoder_of(model, modality, pixels):
    """A call that encodes pixels."""
    if hasattr(model.model, "embed_tokens_extend"):
        return lambda: phi4_multimodal.within_a_prompt(model, fresh(pixels))
    encode = getattr(model.model, f"get_{modality}_features")
    return lambda: encode(**fresh(pixels), return_dict=True)
