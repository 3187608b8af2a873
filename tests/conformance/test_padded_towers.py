"""Images that an encoder pads to rows of one length: signals are of their own patches, and steps
inside the encoder remove patches of each as of an image alone.
"""

from dataclasses import dataclass, field, replace

import pytest
import torch

import foveate
from foveate.core import Need
from foveate.errors import InputError
from foveate.methods import ToMe
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird, Listed
from tests.vision.towers import Drop, Full, Tower, encoder_of

LAYER = 1
NAMES = (
    "received_attention", "given_attention", "global_attention", "encoder_keys", "encoder_features",
)  # fmt: skip
ABOVE = 1.0


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
        needs = tuple(Need(name, layers, ABOVE) for name in NAMES)
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


def from_global(attention):
    """(N) attention that rows receive from those that receive more than `ABOVE` times its mean."""
    votes = attention.sum(0) > ABOVE * attention.sum(0).mean()
    assert 0 < votes.sum() < len(votes), "the test does not bite"
    return attention[votes].mean(0)


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
            globally = torch.zeros(len(maps[layer][image][0]))
            globally[real] = from_global(maps[layer][image].mean(0)[real][:, real])
            close(seen["global_attention"], globally[rows].mean(1))
            close(seen["encoder_features"], states[layer][image][rows].mean(1))
            for head, of in enumerate(seen["encoder_keys"]):
                close(of, keys[layer][image][:, head // 2][rows].mean(1))


@torch.no_grad()
def test_frames_of_gemma_4_are_images_to_its_encoder():
    """And a video has what is said of its frames, one after another."""
    member, model, eager = MEMBERS["gemma4"](), model_of("gemma4"), model_of("gemma4", "eager")
    taken = {name: value[[0, 0, 1]] for name, value in member.pixels(2).items()}
    taken["pixel_values"][1] += 0.5
    pixels = as_video(taken, [2, 1])
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


def as_video(pixels, frames):
    """Images as the frames of videos."""
    return {
        "pixel_values_videos": pixels["pixel_values"],
        "video_position_ids": pixels["image_position_ids"],
        "num_frames_per_video": torch.tensor(frames),
    }


@torch.no_grad()
def test_frames_lose_inside_the_encoder_what_images_lose():
    model, pixels = model_of("gemma4").model, MEMBERS["gemma4"]().pixels(3)
    with foveate.use(model_of("gemma4"), ToMe(r=(2, 1))):
        images = model.get_image_features(**fresh(pixels), return_dict=True).pooler_output
        videos = model.get_video_features(**as_video(pixels, [1, 2]), return_dict=True)
    assert [len(image) for image in images] == [16, 12, 12]
    first, second = videos.pooler_output
    for got, want in ((first, images[0]), (second, torch.cat(images[1:]))):
        assert 0 < want.isnan().any(1).sum() < len(want)
        assert torch.equal(got.isnan(), want.isnan())
        close(got.nan_to_num(), want.nan_to_num())


@torch.no_grad()
def test_attention_maps_come_back_with_the_padding_that_there_was():
    """Images that lose different numbers of patches go on as rows of one length."""
    model, pixels = model_of("gemma4", "eager"), MEMBERS["gemma4"]().pixels(3)
    encode = encoder_of(model, "image", pixels)
    tower = Tower(model)
    rows = [cells(p) + 64 * n for n, p in enumerate(pixels["image_position_ids"])]
    full = Full(tower, tower.record(encode), [of.tolist() for of in rows])
    wanted = []
    attend = full.attend
    full.attend = lambda number: wanted.append(attend(number)) or wanted[-1]
    full.run([Drop(1, 0.5)])
    with foveate.use(model, Listed(layer=1, keep=0.5)):
        maps = encoder_of(model, "image", {**pixels, "output_attentions": True})().attentions
    gone = ~full.alive.view(3, -1)
    padding = (pixels["image_position_ids"] < 0).all(-1)
    for number, (of, (weights, _, _)) in enumerate(zip(maps, wanted, strict=True)):
        hidden = padding | gone if number else padding
        for image in range(3):
            alive = (~hidden[image]).nonzero()[:, 0]
            want = weights[:, image * 64 + alive][..., image * 64 + alive]
            close(of[image][:, alive][..., alive], want)
            assert not of[image][..., hidden[image]].any()
    assert gone.sum(1).tolist() == [32, 24, 24]


@torch.no_grad()
def test_layers_are_told_where_the_patches_that_remain_stand():
    model, pixels = model_of("gemma4"), MEMBERS["gemma4"]().pixels(3)
    told = []
    hook = model.model.vision_tower.encoder.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True
    )
    with foveate.use(model, Listed(layer=1, keep=0.5)):
        output = model.model.get_image_features(**fresh(pixels), return_dict=True)
    hook.remove()
    for image, features in enumerate(output.pooler_output):
        places = pixels["image_position_ids"][image]
        rows = cells(places)[~features[:, 0].isnan()].flatten().sort().values
        assert torch.equal(told[0][image, : len(rows)], places[rows])
    assert told[0].shape[1] == 32


@torch.no_grad()
def test_patches_that_do_not_fill_cells_are_refused():
    pixels = MEMBERS["gemma4"]().pixels(1)
    pixels["image_position_ids"][0, 5] = -1
    with (
        foveate.use(model_of("gemma4"), ToMe()),
        pytest.raises(InputError, match="63 patches of image 0 do not fill cells of 2 x 2"),
    ):
        model_of("gemma4").model.get_image_features(**pixels, return_dict=True)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
