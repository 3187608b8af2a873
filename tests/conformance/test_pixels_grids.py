"""Images and videos on grids, from pixels through tower and merger: the oracle, and every grid."""

import functools

import pytest
import torch

import foveate
from foveate.families import find_family
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.tolerance import kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.mrope import MRopeMember
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

GRIDS = [name for name in sorted(MEMBERS) if issubclass(MEMBERS[name], MRopeMember)]
GRIDS.remove("hunyuan_vl")  # whose rows end in newlines
STILLS = ("kimi_k25", "kimi_k25-halves", "paddleocr_vl")
VIDEO = [name for name in GRIDS if name not in STILLS] + ["molmo2"]
BOTH = [name for name in GRIDS if name in VIDEO and not name.startswith("glm")]
CELLS = [
    *((name, "images") for name in [*GRIDS, "molmo2"]),
    *((name, "video") for name in VIDEO),
    *((name, "both") for name in BOTH),
]


@functools.cache
def model_of(name, attention="sdpa"):
    """A member's model whose tower and projector are loud enough to matter."""
    model = MEMBERS[name]().build(attention)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "language_model" not in path and "lm_head" not in path and weight.dim() > 1:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * 1.5 / weight[0].numel() ** 0.5)
    return model


def prompt(name, what):
    """A row of text with what is seen, its placeholders' columns, and frames and grid of each."""
    member = MEMBERS[name]()
    inputs, pieces, grids = {}, [], []
    if what != "video":
        inputs |= member.pixels(2)
        pooled = encoded(name, "image", member.pixels(2))
        pieces += [(1, [len(feature)], member.image_id) for feature in pooled]
        sizes = inputs.get("image_grid_thw")
        grids = [(1, 4, 4)] * 2
        if sizes is not None:
            sides = inputs.get("image_merge_sizes", torch.tensor([2, 2])).tolist()
            grids = [
                (1, h // side, w // side)
                for (_, h, w), side in zip(sizes.tolist(), sides, strict=True)
            ]
        if name.startswith("molmo2"):
            grids[1] = (1, 1, 32)  # an overview with a crop after it
    if what != "images":
        inputs |= member.clip()
        pooled = encoded(name, "video", member.clip())
        frame = len(pooled[0]) // 3
        frames = [frame] * 3 if member.timestamps else [3 * frame]
        kind = 1 if name.startswith("molmo2") else 2
        pieces.insert(len(pieces) // 2, (kind, frames, member.video_id))
        grids.insert(len(grids) // 2, (3, 4, 4) if name.startswith("molmo2") else (3, 2, 4))
    ids, types = [5, 7, 11, 2], [0] * 4
    for number, (kind, lengths, token) in enumerate(pieces):
        for length in lengths:
            ids += [token] * length + [20 + number, 31, 8]
            types += [kind] * length + [0] * 3
    ids = torch.tensor([ids])
    extras = member.extras(ids, 0)
    if "mm_token_type_ids" in extras:
        extras["mm_token_type_ids"] = torch.tensor([types])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extras}
    return inputs, [sum(lengths) for _, lengths, _ in pieces], grids


def encoded(name, modality, pixels):
    encode = getattr(model_of(name).model, f"get_{modality}_features")
    with torch.no_grad():
        return encode(**pixels, return_dict=True).pooler_output


def case(name, kind, counts):
    """A method, and what the oracle must do for it."""
    images, few = len(counts), min(counts) // 4
    if kind == "pre_llm":
        return EveryThird(few), Spec(kept=[torch.arange(0, 3 * few, 3)] * images)
    family = find_family(model_of(name))
    legal = [i for i in family.attention_layers if i >= max(1, family.first_llm_layer)]
    layers, kept = (legal[0], legal[-1]), (2 * few, few)
    drops = [Drop(layer, layer, [k] * images) for layer, k in zip(layers, kept, strict=True)]
    return PyramidDrop(layers, kept, "original"), Spec(drops=drops)


@pytest.mark.parametrize("kind", ["llm", "pre_llm"])
@pytest.mark.parametrize(("name", "what"), CELLS)
def test_pruning_what_a_real_tower_saw_equals_the_oracle(name, what, kind):
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    model = model_of(name, kernel_of(model))
    member.others = (getattr(member, "video_id", member.image_id),)
    inputs, counts, grids = prompt(name, what)
    method, spec = case(name, kind, counts)
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1]))
    with torch.no_grad(), foveate.use(model, method) as run:
        got = model.model(**fresh(inputs)).last_hidden_state[0]
        kept = [list(image.values()) for image in run.kept]
        # Here the features are made before the model is called.
        model.generate(**fresh(inputs), max_new_tokens=1, do_sample=False)
    hook.remove()
    assert [(image.frames, *image.grid) for image in run.record.images] == grids
    assert run.record.pixels is None, "patches and crops are no images"
    length = inputs["input_ids"].shape[1]
    want, history = oracle.run(member, eager, fresh(inputs), spec, length, counts)
    plain, _ = oracle.run(member, eager, fresh(inputs), Spec(), length, counts)
    for image, places in enumerate(kept):
        for place, indices in zip(places, history, strict=True):
            assert torch.equal(place, indices[image])
    ids = torch.tensor([member.image_id, *member.others])
    visual = torch.isin(inputs["input_ids"][0], ids).nonzero()[:, 0].split(counts)
    alive = torch.ones(length, dtype=torch.bool)
    for columns, places in zip(visual, kept, strict=True):
        alive[columns] = False
        alive[columns[places[-1]]] = True
    distance = (want - got)[alive].abs().max().item()
    generated = (want[-1] - seen[-1]).abs().max().item()
    bite = (plain - got)[alive].abs().max().item()
    print(f"{name} {what} {kind}: {counts} {distance:.1e} {generated:.1e}, bite {bite:.2f}")
    assert max(distance, generated) <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"
