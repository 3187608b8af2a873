"""What Molmo2's encoder says of its tokens, each of which is pooled from patches of one crop."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch

import foveate
from foveate.core import Need
from foveate.families import find_family
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird


class Reads(EveryThird):
    """Notes the attention that tokens receive in the encoder layer that is read last."""

    seen: ClassVar[list] = []

    def steps(self, model):
        need = Need("received_attention", (model.feature_layer,))
        return tuple(replace(step, needs=(need,)) for step in super().steps(model))

    def reduce(self, tokens, count):
        self.seen.append(tokens.signal("received_attention")[:, 0])
        return super().reduce(tokens, count)


@pytest.mark.parametrize("modality", ["image", "video"])
@torch.no_grad()
def test_signals_are_means_over_pooled_patches(modality):
    """Of two images the second has a crop after its overview; the video has three frames."""
    member, model, eager = MEMBERS["molmo2"](), model_of("molmo2"), model_of("molmo2", "eager")
    pixels = member.pixels(2) if modality == "image" else member.clip()
    counts = [16, 32] if modality == "image" else [48]
    maps = []
    attention = eager.model.vision_tower.layers[2].self_attn
    assert find_family(model).feature_layer == 2
    hook = attention.register_forward_hook(lambda module, args, out: maps.append(out[1].mean(1)))
    getattr(eager.model, f"get_{modality}_features")(**fresh(pixels))
    hook.remove()
    ids = torch.tensor([[7, *(i for n in counts for i in [11, *[member.image_id] * n]), 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **member.extras(ids, 2)}
    with foveate.use(model, Reads(4)):
        model.model(**inputs, **fresh(pixels))
    seen, Reads.seen[:] = torch.cat([part.flatten() for part in Reads.seen]), []
    received = maps[0].mean(1)  # (crops, 64): over queries
    want = received.view(-1, 4, 2, 4, 2).mean((2, 4)).flatten()
    torch.testing.assert_close(seen, want, rtol=0, atol=1e-7)


def test_padding_is_not_pooled():
    """Of a token with three patches the mean of those; tokens without any are no tokens."""
    family = find_family(model_of("molmo2"))
    rows = torch.arange(8.0).view(2, 1, 4)
    given = {
        "image_token_pooling": torch.tensor([(0, 1, -1, 5), (-1, -1, -1, -1), (7, -1, -1, -1)]),
        "image_grids": torch.tensor([(1, 1, 0, 0), (1, 1, 0, 0)]),
    }
    first, second = family.per_token("image", rows, given)
    assert (first.tolist(), second.tolist()) == ([[2.0]], [[7.0]])
