"""Supervised conversations for tiny models, and the samples that the oracle makes of them."""

import torch

from tests.conformance.zoo.member import MEMBERS
from tests.tinies import IMAGE, PATCHES, tiny_llava
from tests.training.oracle import Sample

# For each row its pieces: numbers are tokens of a prompt, "a5" is an answer, "i" an image.
ROWS = {
    "one": [[3, "i", 4, "a5"]],
    "turns": [[3, "i", 4, "a5", 6, "a3", 2, "a4"], [2, "i", 3, "a2"]],
    "images": [[3, "i", 4, "a5", 2, "i", 3, "a2"], [2, "i", 1, "i", 3, "a6"]],
    "adjacent": [[2, "i", "i", 3, "a6"], [3, "i", 4, "a5"]],
    "text": [[3, "i", 4, "a5"], [7, "a4"], [5, "i", 2, "a3", 1]],
    "unsupervised": [[3, "i", 4, "a5"], [4, "i", 6]],
    "silent first": [[4, "i", 6], [3, "i", 4, "a5"]],
    "mute": [[3, "i", 4, "a5"], [4, "i", "a6"]],
    "bare": [[2, "i", "a5"], ["i", 1, "a4"]],
}


class Llava:
    """CLIP and Llama, fed with pixels."""

    name, image, patches, renumber = "llava", IMAGE, PATCHES, True

    def build(self):
        model = tiny_llava()
        with torch.no_grad():  # losses near log(vocabulary), as where training begins
            model.lm_head.weight.mul_(0.3)
        return model

    def visual(self, images, seed):
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(images, 3, 48, 48, generator=generator)}

    def extras(self, ids):
        return {}

    def features(self, model, inputs):
        """(images, V, D) with a graph."""
        out = model.model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        return torch.stack(list(out.pooler_output))

    def positions(self, model, ids):
        return torch.arange(len(ids))[None]

    def leaves(self, model, inputs):
        """What gradients are compared of, by name."""
        return {n: p for n, p in model.named_parameters() if "vision_tower" not in n} | {
            n: p for n, p in model.named_parameters() if "layers.1.self_attn.k_proj" in n
        }


class FromZoo(Llava):
    """A member of the zoo, fed with features."""

    def __init__(self, name, renumber):
        self.name, self.renumber = name, renumber
        self.member = MEMBERS[name]()
        self.image, self.patches = self.member.image_id, self.member.visual

    def build(self):
        return self.member.build()

    def visual(self, images, seed):
        generator = torch.Generator().manual_seed(seed)
        width = self.member.config().get_text_config().hidden_size
        features = torch.randn(images, self.patches, width, generator=generator).requires_grad_()
        return {"mm_encoder_outputs": {"image": self.member.output(features)}, "leaf": features}

    def extras(self, ids):
        return self.member.extras(ids, int((ids == self.image).sum()) // self.patches)

    def features(self, model, inputs):
        return inputs["leaf"]

    def positions(self, model, ids):
        if self.renumber:
            return torch.arange(len(ids))[None]
        extras = self.extras(ids[None])
        return model.model.get_rope_index(ids[None], **extras)[0]

    def leaves(self, model, inputs):
        text = {n: p for n, p in model.named_parameters() if "vis" not in n and "proj" in n}
        return {**text, "features": inputs["leaf"]}


def kinds():
    return [Llava(), FromZoo("internvl", True), FromZoo("qwen2_5_vl", False)]


def conversation(kind, pieces, generator):
    ids, labels = [], []
    for piece in pieces:
        if piece == "i":
            ids += [kind.image] * kind.patches
            labels += [-100] * kind.patches
            continue
        answer = isinstance(piece, str)
        length = int(piece[1:]) if answer else piece
        words = torch.randint(3, 80, (length,), generator=generator).tolist()
        ids += words
        labels += words if answer else [-100] * length
    return torch.tensor(ids), torch.tensor(labels)


def batch(kind, rows="turns", side="right", seed=0):
    """A padded batch: what the model is called with, and the conversations in it."""
    generator = torch.Generator().manual_seed(seed)
    talks = [conversation(kind, pieces, generator) for pieces in ROWS[rows]]
    width = max(len(ids) for ids, _ in talks)

    def padded(rows, value):
        gaps = [torch.full((width - len(row),), value) for row in rows]
        pairs = zip(gaps, rows, strict=True) if side == "left" else zip(rows, gaps, strict=True)
        return torch.stack([torch.cat(pair) for pair in pairs])

    inputs = {
        "input_ids": padded([ids for ids, _ in talks], 0),
        "labels": padded([labels for _, labels in talks], -100),
        "attention_mask": padded([torch.ones_like(ids) for ids, _ in talks], 0),
    }
    images = int((inputs["input_ids"] == kind.image).sum()) // kind.patches
    inputs |= kind.extras(inputs["input_ids"]) | kind.visual(images, seed)
    return inputs, talks


def samples(kind, model, inputs, talks):
    """What the oracle makes of a batch."""
    features = list(kind.features(model, inputs))
    result = []
    for ids, labels in talks:
        embeds = model.get_input_embeddings()(ids)
        where = (ids == kind.image).nonzero()[:, 0]
        images = list(where.split(kind.patches)) if len(where) else []
        for image in images:
            embeds = embeds.index_put((image,), features.pop(0).to(embeds.dtype))
        result.append(Sample(embeds, labels, images, kind.positions(model, ids)))
    return result


def called(inputs):
    """Arguments for the model; encoder outputs are made anew, since models may change them."""
    inputs = {name: value for name, value in inputs.items() if name != "leaf"}
    if "mm_encoder_outputs" in inputs:
        output = inputs["mm_encoder_outputs"]["image"]
        pooled = output.pooler_output
        inputs["mm_encoder_outputs"] = {"image": type(output)(pooler_output=pooled)}
    return inputs
