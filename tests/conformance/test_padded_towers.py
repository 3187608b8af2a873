"""Images that an encoder pads to rows of one length: signals are of their own patches."""

from dataclasses import dataclass, field, replace

import torch

import foveate
from foveate.core import Need
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird

LAYER = 1
NAMES = ("received_attention", "given_attention", "encoder_keys", "encoder_features")


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


@dataclass(frozen=True)
class Spy(EveryThird):
    """Keeps every third token, and notes what it is shown of the encoder."""

    seen: list = field(default_factory=list)

    def steps(self, model):
        layers = tuple(range(model.vision_layers))
        needs = tuple(Need(name, layers) for name in NAMES)
        return tuple(replace(step, needs=needs) for step in super().steps(model))

    def scores(self, tokens):
        self.seen.append(tokens)
        return super().scores(tokens)


def watched(model, pixels, modality="image"):
    """Attention (B, H, N, N), normed keys (B, N, h, d) and states (B, N, D) of each layer."""
    maps, keys, states, hooks = [], [], [], []
    for layer in model.model.vision_tower.encoder.layers:
        hooks += [
            layer.self_attn.register_forward_hook(lambda m, args, out: maps.append(out[1])),
            layer.self_attn.k_norm.register_forward_hook(lambda m, args, out: keys.append(out)),
            layer.register_forward_hook(lambda m, args, out: states.append(out)),
        ]
    getattr(model.model, f"get_{modality}_features")(**fresh(pixels))
    for hook in hooks:
        hook.remove()
    return maps, keys, states


def cells(places, side=2):
    """(V, R) rows of an image's tokens: of each cell of patches, wherever these stand."""
    columns, rows = (int(n) for n in places.amax(0) // side + 1)
    found = [[] for _ in range(rows * columns)]
    for number, (x, y) in enumerate(places.tolist()):
        if x >= 0:
            found[y // side * columns + x // side].append(number)
    return torch.tensor(found)


@torch.no_grad()
def test_signals_of_gemma_4_equal_those_of_eager_attention_without_padding():
    """Scores are not divided by the root of a head's width, each axis rotates half a head, and
    heads share keys.
    """
    member, model, eager = MEMBERS["gemma4"](), model_of("gemma4"), model_of("gemma4", "eager")
    inputs, _ = batch_of(member, model, (3,))
    pixels = member.pixels(3)
    pixels["image_position_ids"][0] = pixels["image_position_ids"][0].flip(0)  # in any order
    pixels["pixel_values"][0] = pixels["pixel_values"][0].flip(0)
    maps, keys, states = watched(eager, pixels)
    spy = Spy(2)
    with foveate.use(model, spy):
        model.model(**fresh(inputs | pixels))
    shown = {tokens.grid: tokens for tokens in spy.seen}
    for image, (places, grid) in enumerate(
        zip(pixels["image_position_ids"], [(4, 4), (2, 6), (6, 2)], strict=True)
    ):
        rows = cells(places)
        real = rows.flatten()
        for layer in range(len(maps)):
            seen = {name: shown[grid].signal(name)[0, layer] for name in NAMES}
            received = maps[layer][image].mean(0)[real].mean(0)[rows].mean(1)
            assert maps[layer][image].mean(0)[real][:, real].sum(1).allclose(torch.tensor(1.0))
            close(seen["received_attention"], received)
            close(seen["given_attention"], torch.ones_like(received))
            close(seen["encoder_features"], states[layer][image][rows].mean(1))
            for head, of in enumerate(seen["encoder_keys"]):
                close(of, keys[layer][image][:, head // 2][rows].mean(1))


@torch.no_grad()
def test_frames_of_gemma_4_are_images_to_its_encoder():
    """And a video has what is said of its frames, one after another."""
    member, model, eager = MEMBERS["gemma4"](), model_of("gemma4"), model_of("gemma4", "eager")
    taken = {name: value[[0, 0, 1]] for name, value in member.pixels(2).items()}
    taken["pixel_values"][1] += 0.5
    pixels = {
        "pixel_values_videos": taken["pixel_values"],
        "video_position_ids": taken["image_position_ids"],
        "num_frames_per_video": torch.tensor([2, 1]),
    }
    maps, _, _ = watched(eager, pixels, "video")
    ids = torch.tensor([[5] + [91] * 32 + [6] + [91] * 12 + [7]])
    spy = Spy(2)
    with foveate.use(model, spy):
        model.model(input_ids=ids, mm_token_type_ids=2 * (ids == 91).int(), **fresh(pixels))
    shown = {tokens.grid: tokens for tokens in spy.seen}
    for layer in range(len(maps)):
        received = []
        for frame in range(3):
            rows = cells(pixels["video_position_ids"][frame])
            real = rows.flatten()
            received.append(maps[layer][frame].mean(0)[real].mean(0)[rows].mean(1))
        first, second = torch.cat(received[:2]), received[2]
        close(shown[4, 4].signal("received_attention")[0, layer], first)
        close(shown[2, 6].signal("received_attention")[0, layer], second)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
