"""PixelPrune inside towers: what survives of drawn images, and features against an oracle.

Which input values of a tower belong to a visual token is found by gradients.
"""

import functools
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface

import foveate
from foveate.core import Method, Need, Reduction, Step
from foveate.engine.vision.pixels import pixels_of_rows
from foveate.errors import LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import DivPrune, PixelPrune, PyramidDrop, ToMe
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of, prompt
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods.test_pixelprune import kept_by_hand
from tests.methods_for_tests import Listed
from tests.vision.test_readers import Ragged
from tests.vision.test_session import snapshot
from tests.vision.test_tower_promises import SEGMENTS, segments_kernel
from tests.vision.test_towers import TOLERANCE, TOWERS, rows, sheets, split, survivors
from tests.vision.towers import Drop, Full, Tower, encoder_of

TILED = ("llava_next", "llava_next_video", "llava_next_video-video", "llava_onevision-tiles",
         "phi4_multimodal")  # fmt: skip
HANDED = [*{  # a model of each kind of tower
    Tower(model_of(name)).module.config.model_type: name for name in TOWERS if name not in TILED
}.values()]  # fmt: skip
SOME = ["qwen2_5_vl", "qwen3_vl", "glm4v", "gemma4", "lfm2_vl", "paddleocr_vl", "mistral3"]
LOOSE = {"gemma4": 0.95, "lfm2_vl": 4.2, "paddleocr_vl": 4.2}


class Told(Full):
    """The tower at full length, where listed tokens of each image survive before layer 0."""

    def drop(self, step, weights):
        for number, kept in enumerate(step.kept):
            gone = [token for token in range(len(self.tokens[number])) if token not in kept]
            self.alive[self.rows(number, gone)] = False
            self.groups[number] = [[token] for token in kept]


@dataclass
class Survivors(Drop):
    """Before layer 0, the listed tokens of each image survive."""

    layer: int = 0
    share: float = 0.0
    kept: list[list[int]] = field(default_factory=list)


class Handed:
    """A member's tower and its input, and drawn images of as many tokens.

    Args:
        name: the member.
        model: the model.
        pixels: what its features are made from.
        counts: visual tokens of each image, with newlines.
        modality: of these.
    """

    def __init__(self, model, pixels, counts, modality="image"):
        self.model, self.modality = model, modality
        encode, self.tower = encoder_of(model, self.modality, pixels), Tower(model)
        self.tokens, self.counts = self.tower.tokens(encode), counts
        self.pictures = [[token for token in part if token] for part in split(self.tokens, counts)]
        self.places = self._pixels_of_tokens(pixels)
        self.grids = grids_of(model, self.modality, pixels)
        self.pixels = self._drawn(pixels)
        calls = self.tower.record(encoder_of(model, self.modality, self.pixels))
        self.full = functools.partial(Told, self.tower, calls, self.pictures)

    def _pixels_of_tokens(self, pixels):
        """[images][tokens](P): which values of the tower's input belong to each token."""
        name = name_of(pixels)
        leaf = pixels[name].clone().requires_grad_()
        encode = getattr(self.model.model, f"get_{self.modality}_features")
        seen = []
        handle = self.tower.layers[0].register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )
        encode(**{**pixels, name: leaf}, return_dict=True)
        handle.remove()
        states = seen[0].reshape(-1, seen[0].shape[-1])
        found = []
        for picture in self.pictures:
            found.append([])
            for token in picture:
                (grad,) = torch.autograd.grad(states[token].square().sum(), leaf, retain_graph=True)
                found[-1].append(grad.flatten().nonzero()[:, 0])
        return found

    def _drawn(self, pixels):
        """The same images of few kinds of cells, but as noisy within these."""
        name = name_of(pixels)
        pixels = {**fresh(pixels), name: pixels[name].clone()}
        flat = pixels[name].view(-1)
        generator = torch.Generator().manual_seed(0)
        for picture in self.places:
            kinds = torch.randint(3, (len(picture),), generator=generator).tolist()
            source = {kind: flat[picture[kinds.index(kind)]].clone() for kind in set(kinds)}
            for kind, token in zip(kinds, picture, strict=True):
                flat[token] = source[kind]
        return pixels

    def kept(self):
        """Cells that survive of each image, by loops."""
        flat, found = self.pixels[name_of(self.pixels)].view(-1), []
        for picture, (height, width, frames) in zip(self.places, self.grids, strict=True):
            cells, each = torch.stack([flat[token] for token in picture]), height * width
            found.append([
                frame * each + cell for frame in range(frames)
                for cell in kept_by_hand(cells[frame * each :][:each], height, width)
            ])  # fmt: skip
        return found


def name_of(pixels):
    """The argument with the pixels."""
    return next(name for name in pixels if name.startswith("pixel_values"))


def encoded(model, methods, modality, pixels):
    """What an encoder makes within a session, and what survives of each image of the pass."""
    session = foveate.use(model, methods)
    found, tags = [], session.text.tags
    tag = tags.tag

    def noted(modality, output, arguments, rows, passes, *rest):
        found.extend(passes)
        return tag(modality, output, arguments, rows, passes, *rest)

    tags.tag = noted
    with torch.no_grad(), session:
        output = encoder_of(model, modality, pixels)()
    (encoding,) = found
    return output, encoding.survivors()


def without_repetition(inputs):
    """The same with noise on all pixels but zeros, as tiles of zeros are skipped."""
    name = name_of(inputs)
    noise = torch.rand(inputs[name].shape, generator=torch.Generator().manual_seed(2))
    return {**inputs, name: inputs[name] + noise * (inputs[name] != 0)}


def grids_of(model, modality, pixels):
    """(height, width, frames) of each image, as a pass has it."""
    _, images = encoded(model, [Listed(layer=0, keep=0.5)], modality, pixels)
    return [(*shape.grid, shape.frames) for shape, _ in images]


@functools.cache
def handed(name):
    inputs, counts = prompt(name)
    pixels = {k: v for k, v in fresh(inputs).items() if k in MEMBERS[name]().pixels(1)}
    return Handed(model_of(name), pixels, counts, MEMBERS[name].modality)


def check(drawn, tolerance=TOLERANCE):
    """What survives, and features of it, are those of an oracle."""
    kept, model, modality = drawn.kept(), drawn.model, drawn.modality
    full = drawn.full().run([Survivors(kept=kept)])
    alive = survivors(full, drawn.tokens, drawn.counts)
    with torch.no_grad():
        plain = encoder_of(model, modality, drawn.pixels)()
        with drawn.tower.replaced(full.states):
            want = encoder_of(model, modality, drawn.pixels)()
    got, images = encoded(model, [PixelPrune()], modality, drawn.pixels)
    assert [index["vision:0"].tolist() for _, index in images] == kept
    mask, worst, bite = torch.cat(alive), 0.0, 0.0
    assert 0 < mask.sum() < len(mask)
    for mine, theirs, unpruned in zip(*map(sheets, (got, want, plain)), strict=True):
        mine, theirs, unpruned = rows(mine), rows(theirs), rows(unpruned)
        assert torch.equal(~mine[:, 0].isnan(), mask)
        scale = theirs[mask].abs().mean().clamp(min=1)
        worst = max(worst, ((mine - theirs)[mask].abs().max() / scale).item())
        bite = max(bite, ((mine - unpruned)[mask].abs().max() / scale).item())
    print(f"{int(mask.sum())} of {len(mask)}, {worst:.1e}, bite {bite:.2f}")
    assert worst <= tolerance
    assert bite > 1e-3, "the test does not bite"
    return kept


@pytest.mark.parametrize("name", HANDED)
def test_features_equal_those_of_the_full_length_oracle(name):
    check(handed(name))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
def test_videos_equal_the_oracle_frame_by_frame(name):
    counts = [8] * 3 if name == "glm4v" else [24]  # GLM's frames are images of their own
    check(Handed(model_of(name), MEMBERS[name]().clip(), counts, "video"), tolerance=2e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "paddleocr_vl"])
def test_images_of_one_size_keep_numbers_of_their_own(name):
    """They are split into groups without padding, and each gets what it gets alone."""
    model, member = model_of(name), MEMBERS[name]()
    grids = torch.tensor([(1, 8, 8), (1, 4, 12), (1, 8, 8), (1, 8, 8)])
    pixels = {"pixel_values": member.patches(grids, 0), "image_grid_thw": grids}
    drawn = Handed(model, pixels, [16, 12, 16, 16])
    kept = check(drawn)
    assert len({len(kept[number]) for number in (0, 2, 3)}) > 1, "the test does not bite"
    with torch.no_grad(), foveate.use(model, PixelPrune()):
        together = encoder_of(model, "image", drawn.pixels)().pooler_output
        for number, feature in enumerate(together):
            one = member.take(drawn.pixels, number, number + 1)
            (alone,) = encoder_of(model, "image", one)().pooler_output
            torch.testing.assert_close(feature, alone, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in SEGMENTS if name in HANDED])
def test_kernels_with_segments_are_told_those_that_are_left(name, monkeypatch):
    """Without a mask, as nothing is padded."""
    drawn, model, calls = handed(name), model_of(name), []
    monkeypatch.setitem(
        AttentionInterface._global_mapping, "emulated_flash", segments_kernel(calls)
    )
    with torch.no_grad():
        with foveate.use(model, PixelPrune()):
            want = encoder_of(model, "image", drawn.pixels)().pooler_output
        monkeypatch.setattr(drawn.tower.module.config, "_attn_implementation", "emulated_flash")
        with foveate.use(model, PixelPrune()):
            got = encoder_of(model, "image", drawn.pixels)().pooler_output
    torch.testing.assert_close(rows(got), rows(want), rtol=0, atol=TOLERANCE, equal_nan=True)
    cell = len(drawn.pictures[0][0])
    assert {bounds[-1] for bounds in calls} == {cell * sum(map(len, drawn.kept()))}


@pytest.mark.parametrize("name", HANDED)
def test_images_without_repetitions_change_no_bit(name):
    model, (inputs, counts) = model_of(name), prompt(name)
    inputs = without_repetition(fresh(inputs))
    with torch.no_grad():
        want = model(**fresh(inputs)).logits
        with foveate.use(model, PixelPrune()) as run:
            assert torch.equal(model(**fresh(inputs)).logits, want)
            assert [len(image["vision:0"]) for image in run.kept] == counts


@pytest.mark.parametrize("name", SOME)
def test_a_row_gets_what_it_gets_alone_through_all_stages(name):
    """Rows of two images, none, and one, of noise in which cells are alike by a threshold."""
    model = model_of(name)
    inputs, alone = batch_of(MEMBERS[name](), model, (2, 0, 1))
    first = max(1, find_family(model).first_llm_layer)
    legal = next(i for i in find_family(model).attention_layers if i >= first)
    methods = [
        PixelPrune(threshold=LOOSE.get(name, 5.0)), ToMe(r=(0, 2), positions="original"),
        DivPrune(keep=0.6, positions="original"), PyramidDrop((legal,), 0.5, "original"),
    ]  # fmt: skip
    with torch.no_grad(), foveate.use(model, methods) as run:
        together, kept = model.model(**fresh(inputs)).last_hidden_state[:, -1], iter(run.kept)
        left = [len(image["vision:0"]) for image in run.kept]
        assert len(set(left)) > 1
        assert min(left) > 1
        for state, row in zip(together, alone, strict=True):
            want = model.model(**fresh(row)).last_hidden_state[0, -1]
            torch.testing.assert_close(state, want, rtol=0, atol=TOLERANCE)
            for image in run.kept:
                mine = next(kept)
                assert list(mine) == ["vision:0", "vision:1", "pre_llm", f"llm:{legal}"]
                assert all(torch.equal(mine[place], image[place]) for place in image)


@pytest.mark.parametrize("name", SOME)
def test_gradients_are_finite_and_reach_the_tower(name):
    model, (inputs, _) = model_of(name), prompt(name)
    model.zero_grad()
    inputs, ids = {**fresh(inputs), **handed(name).pixels}, inputs["input_ids"]
    with foveate.use(model, PixelPrune()) as run:
        model(**inputs, labels=ids.masked_fill(ids >= 80, -100)).loss.backward()
        assert any(len(image["vision:0"]) < total for image, total in totals(run))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert all(grad.isfinite().all() for grad in grads.values())
    first = [g for n, g in grads.items() if "patch" in n and "norm" not in n and "merger" not in n]
    assert any(grad.abs().sum() > 0 for grad in first)


def totals(run):
    return zip(run.kept, [image.total for image in run.record.images], strict=True)


@pytest.mark.parametrize("name", SOME)
def test_leaving_restores_the_model(name):
    model, (inputs, _) = model_of(name), prompt(name)
    inputs = {**fresh(inputs), **handed(name).pixels}
    with torch.no_grad():
        want, before = model(**inputs).logits, snapshot(model)
        with foveate.use(model, PixelPrune()):
            assert not torch.equal(model(**inputs).logits, want)
            assert snapshot(model) != before
        assert snapshot(model) == before
        assert torch.equal(model(**inputs).logits, want)


# -- refusals


def test_no_other_method_acts_before_the_first_layer():
    model = model_of("qwen2_5_vl")
    for methods in ([PixelPrune(), Listed(layer=0)], [Listed(layer=0), PixelPrune()]):
        with pytest.raises(LayerError, match=r"listed|pixelprune"):
            foveate.use(model, methods)
    foveate.use(model, [PixelPrune(), Listed(layer=1)])


def test_rows_that_are_not_the_patches_of_an_image_are_refused():
    """A row of a class token has no pixels; a row of nothing known is no patch."""
    encoder = SimpleNamespace(cuts=(2, 2), leading=1, trailing=0)
    images = torch.arange(16.0).view(1, 1, 4, 4)
    rows = pixels_of_rows(encoder, images, (1, 5), "clip")
    assert rows.tolist() == [[0] * 4, [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(UnsupportedModelError, match="'clip' has 6 rows for an image of 4 patches"):
        pixels_of_rows(encoder, images, (1, 6), "clip")


class AtOnce(Ragged):
    """Leaves images different numbers of tokens, for good."""

    slug = "at-once"

    def steps(self, model):
        return (Step("vision", 0, effects=("ragged",)),)


def test_padding_that_stays_is_shown_to_no_other_method():
    """Rows of a batch stay as long as the longest; images in one sequence need not."""
    with pytest.raises(LayerError, match="different numbers of tokens; use one of them alone"):
        foveate.use(model_of("llava"), [AtOnce(), Listed(layer=1)])
    foveate.use(model_of("qwen2_5_vl"), [AtOnce(), Listed(layer=1)])


@dataclass(frozen=True)
class AfterwardsPixels(Method):
    """Asks for pixels after the encoder."""

    keep: float = 0.5
    positions: str | None = None
    slug, stage, needs, paper = "afterwards-pixels", "pre_llm", ("pixels",), ""

    def steps(self, model):
        return (Step("pre_llm", needs=(Need("pixels"),)),)

    def reduce(self, tokens, count):
        return Reduction(tokens.index[:, :count])


def test_pixels_are_for_steps_inside_the_encoder():
    with pytest.raises(LayerError, match="needs pixels at pre_llm, but only vision steps"):
        foveate.use(model_of("qwen2_5_vl"), AfterwardsPixels())
