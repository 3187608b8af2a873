"""Images that an encoder pads to rows of one length: signals are of their own patches."""

from dataclasses import replace

import torch

import foveate
from foveate.core import Need
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird

LAYER = 1


class Reads(EveryThird):
    """Keeps every third token, and is shown the attention that tokens receive in the encoder."""

    def steps(self, model):
        need = Need("received_attention", (LAYER,))
        return tuple(replace(step, needs=(need,)) for step in super().steps(model))


@torch.no_grad()
def test_received_attention_equals_eager_attention_without_padding():
    member, model, eager = MEMBERS["lfm2_vl"](), model_of("lfm2_vl"), model_of("lfm2_vl", "eager")
    inputs, _ = batch_of(member, model, (3,))
    maps, shown = [], {}
    attention = eager.model.vision_tower.encoder.layers[LAYER].self_attn
    hook = attention.register_forward_hook(lambda module, args, out: maps.append(out[1].mean(1)))
    eager.model.get_image_features(**fresh(member.pixels(3)))
    hook.remove()

    class Spy(Reads):
        def reduce(self, tokens, count):
            shown[tokens.grid] = tokens.signals["received_attention"]
            return super().reduce(tokens, count)

    with foveate.use(model, Spy(2)):
        model.model(**fresh(inputs))
    for row, (height, width) in zip(maps[0], member.pixels(3)["spatial_shapes"], strict=True):
        count, grid = height * width, (int(height) // 2, int(width) // 2)
        received = row[:count, :count].mean(0).view(grid[0], 2, grid[1], 2)
        want = received.mean((1, 3)).flatten()
        torch.testing.assert_close(shown[grid].flatten(), want, rtol=0, atol=1e-7)
