"""Tiny random retrieval models, pages for them, and an oracle of their embeddings.

The oracle runs the layers itself on a compact sequence: one row, no cache, no padding, with masks
and positions made here. Only what enters layer 0 comes from the unpatched model.
"""

import functools
from dataclasses import dataclass

import torch
from transformers import (
    ColModernVBertConfig,
    ColModernVBertForRetrieval,
    ColPaliConfig,
    ColPaliForRetrieval,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    ModernVBertConfig,
)

from tests.conformance.zoo import MEMBERS

IMAGE, WIDTH, SIDE = 90, 16, 32
BERT = {
    "model_type": "modernbert", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 6, "num_attention_heads": 4, "max_position_embeddings": 512,
    "layer_types": ["full_attention", "sliding_attention"] * 3,
    "local_attention": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "cls_token_id": 1, "sep_token_id": 2,
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 4,
    "vision_use_head": False,
}  # fmt: skip


def _modernvbert():
    return ModernVBertConfig(
        text_config=BERT, vision_config=SIGLIP, image_token_id=IMAGE, pixel_shuffle_factor=2
    )


BUILT = {
    "colmodernvbert": (ColModernVBertConfig, ColModernVBertForRetrieval, _modernvbert),
    "colpali": (ColPaliConfig, ColPaliForRetrieval, MEMBERS["paligemma"]().config),
    "colqwen2": (ColQwen2Config, ColQwen2ForRetrieval, MEMBERS["qwen2_vl"]().config),
}


def build(name, attention="sdpa"):
    """A model, always with the same weights, whose attention is peaked and whose tower matters."""
    config, kind, vlm = BUILT[name]
    torch.manual_seed(0)
    model = kind._from_config(
        config(vlm_config=vlm(), embedding_dim=WIDTH), attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            text = any(part in path for part in ("language_model", "text_model", "embedding_proj"))
            if weight.dim() > 1:
                scale = 0.15 if text else 1.5 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn_like(weight) * scale)
            elif "norm" in path or "embedding_proj" in path:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model


@functools.cache
def retriever(name, attention="sdpa"):
    return build(name, attention)


# -- pages and queries


def page(name, images=1, text=4, seed=0):
    """The inputs of one row, without padding: text, images and text."""
    generator = torch.Generator().manual_seed(seed)

    def words(count):
        return torch.randint(3, 80, (count,), generator=generator).tolist()

    ids = words(2)
    for count in _counts(name, images):
        ids += [IMAGE] * count + words(1)
    ids = torch.tensor([ids + words(text)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "colpali":  # without them transformers masks padded rows alone causally
        inputs["token_type_ids"] = torch.zeros_like(ids)
    if not images:
        return inputs
    if name == "colqwen2":
        return inputs | _patches(images, generator)
    pixels = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return inputs | {"pixel_values": pixels if name == "colpali" else pixels[None]}


def _counts(name, images):
    if name != "colqwen2":
        return [16] * images
    return [int(grid.prod()) // 4 for grid in _grids(images)]


def _grids(images):
    return torch.tensor([[(1, 8, 8), (1, 4, 12)][i % 2] for i in range(images)]).view(-1, 3)


def _patches(images, generator):
    """Padded as the processor pads them: (images, patches of the longest, channels)."""
    grids = _grids(images)
    pixels = torch.zeros(images, int(grids.prod(1).max()), 96)
    for row, count in zip(pixels, grids.prod(1).tolist(), strict=True):
        row[:count] = torch.randn(count, 96, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grids}


def batch(name, rows):
    """One left-padded batch of rows."""
    width = max(row["input_ids"].shape[1] for row in rows)
    together = {
        key: torch.cat(
            [torch.nn.functional.pad(row[key], (width - row[key].shape[1], 0)) for row in rows]
        )
        for key in ("input_ids", "attention_mask", "token_type_ids")
        if key in rows[0]
    }
    pixels = [row["pixel_values"] for row in rows if "pixel_values" in row]
    if not pixels:
        return together
    if name == "colpali":
        return together | {"pixel_values": torch.cat(pixels)}
    if name == "colqwen2":
        longest = max(part.shape[1] for part in pixels)
        padded = [
            torch.nn.functional.pad(part, (0, 0, 0, longest - part.shape[1])) for part in pixels
        ]
        grids = [row["image_grid_thw"] for row in rows if "image_grid_thw" in row]
        return together | {"pixel_values": torch.cat(padded), "image_grid_thw": torch.cat(grids)}
    tiles = max(part.shape[1] for part in pixels)  # a row without images has empty tiles
    filled = torch.zeros(len(rows), tiles, 3, SIDE, SIDE)
    for number, row in enumerate(rows):
        if "pixel_values" in row:
            filled[number, : row["pixel_values"].shape[1]] = row["pixel_values"][0]
    return together | {"pixel_values": filled}


def stored(embeddings):
    """The rows of each page that an index stores: all but padding."""
    return [rows[rows.any(-1)] for rows in embeddings]


# -- the oracle


@dataclass
class Cut:
    """What survives before a layer.

    Args:
        layer: the decoder layer; 0 for the input.
        kept: for each image of the row, raster positions among all its tokens.
        renumber: whether positions close up.
    """

    layer: int
    kept: list
    renumber: bool = False


@torch.no_grad()
def embeddings(name, inputs, cuts=()):
    """(rows, D) embeddings of what survives of one row without padding."""
    model = retriever(name)
    text = model.vlm.text_model if name == "colmodernvbert" else model.vlm.language_model
    hidden = _entrance(model, text, inputs)
    where = torch.arange(hidden.shape[1])  # in the full prompt
    positions = where + (name == "colpali")  # as PaliGemma counts
    images = _columns(name, inputs["input_ids"][0])
    for number, layer in enumerate(text.layers):
        for cut in cuts:
            if cut.layer == number:
                gone = torch.zeros(int(where.max()) + 1, dtype=torch.bool)
                for columns, kept in zip(images, cut.kept, strict=True):
                    gone[columns] = True
                    gone[columns[kept]] = False
                left = ~gone[where]
                removed = (~left).long().cumsum(0)
                if cut.renumber:
                    positions = positions - removed
                hidden, where, positions = hidden[:, left], where[left], positions[left]
        hidden = layer(hidden, **_arguments(name, text, number, hidden, where, positions))
    norm = text.final_norm if name == "colmodernvbert" else text.norm
    rows = model.embedding_proj_layer(norm(hidden))[0]
    return rows / rows.square().sum(-1, keepdim=True).sqrt()


def _entrance(model, text, inputs):
    """(1, T, D) input of layer 0 in the model without a session."""
    seen = []
    hook = text.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**inputs)
    hook.remove()
    return seen[0]


def _columns(name, ids):
    visual = (ids == IMAGE).nonzero()[:, 0]
    images = (1 if name != "colqwen2" else None) and len(visual) // 16
    if images is None:
        images, left = 0, len(visual)
        while left > 0:
            left -= _counts(name, images + 1)[-1]
            images += 1
    return visual.split(_counts(name, images))


def _arguments(name, text, number, hidden, where, positions):
    """What a layer is handed: a mask of what each row sees, and rotary embeddings."""
    count = len(where)
    kind = text.config.layer_types[number] if name == "colmodernvbert" else "full_attention"
    sees = torch.ones(count, count, dtype=torch.bool)
    if name == "colqwen2":
        sees = sees.tril()
    elif kind == "sliding_attention":
        sees = (where[:, None] - where).abs() <= BERT["local_attention"] // 2
    if name == "colmodernvbert":
        rotary = text.rotary_emb(hidden, positions[None], kind)
    elif name == "colqwen2":
        rotary = text.rotary_emb(hidden, positions[None, None].expand(3, 1, -1))
    else:
        rotary = text.rotary_emb(hidden, positions[None])
    return {"attention_mask": sees[None, None], "position_embeddings": rotary}


def max_sim(queries, pages):
    """(queries, pages) late-interaction scores of lists of (rows, D), one pair at a time."""
    return torch.stack(
        [torch.stack([(q @ p.T).max(1).values.sum() for p in pages]) for q in queries]
    )
