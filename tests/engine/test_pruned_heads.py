"""Heads that were pruned: signals are of those left, however many the config says."""

import pytest
import torch

import foveate
from foveate.core import get_method
from foveate.errors import FoveateError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import CATP, YOPO
from tests.conformance.batches import batch_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.pruned import cut_heads


@pytest.fixture
def pruned():
    """LLaVA without one head of each encoder layer, and without two of a decoder layer."""
    member = MEMBERS["llava"]()
    model = member.build("eager")
    family = find_family(model)
    for layer in family.encoder.layers:
        cut_heads(layer.self_attn, [1], "out_proj")
    cut_heads(family.layers[1].self_attn, [1, 2], "o_proj")
    return model, batch_of(member, model, (2,))[0]


def test_attention_of_the_class_token_is_that_of_the_heads_left(pruned):
    """As in the attention maps that the encoder itself makes."""
    model, inputs = pruned
    layer = find_family(model).feature_layer
    with torch.no_grad():
        seen = model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
        want = seen.attentions[layer][:, :, 0, 1:].mean(1).topk(4).indices.sort().values
        with foveate.use(model, get_method("fastervlm")(keep=4)) as session:
            model(**fresh(inputs))
    kept = [[*image.kept.values()][-1].tolist() for image in session.record.images]
    assert kept == want.tolist()


def test_heads_of_layers_with_different_numbers_are_not_put_side_by_side(pruned):
    model, inputs = pruned
    with (
        torch.no_grad(),
        foveate.use(model, CATP()),
        pytest.raises(UnsupportedModelError, match="heads of some were pruned"),
    ):
        model(**fresh(inputs))


def test_heads_of_different_widths_are_not_read(pruned):
    model, _ = pruned
    attention = find_family(model).encoder.layers[0].self_attn
    attention.head_dim //= 2
    with pytest.raises(UnsupportedModelError, match="not equally wide"):
        find_family(model).encoder.heads_of(24)


def test_a_mask_of_heads_is_of_those_left(pruned):
    model, inputs = pruned
    whole = ((True,) * 4,) * 6
    with pytest.raises(FoveateError, match="the mask has 4 heads, and layer 1 has 2"):
        foveate.use(model, YOPO(1, heads=whole, layer=4))
    left = (whole[0], (True, False), *whole[2:])
    with torch.no_grad(), foveate.use(model, YOPO(1, heads=left, layer=4)):
        assert model(**fresh(inputs)).logits.isfinite().all()
