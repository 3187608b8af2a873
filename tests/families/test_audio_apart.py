"""Methods of audio's own beside those of images: neither touches, nor orders, the other."""

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import LayerError
from foveate.measure.account import account
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.flops import head_flops
from foveate.measure.shapes import TextShape
from foveate.methods import DivPrune, Downsample, FastV, Uniform
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.omni import END, START
from tests.families.prompts_with_audio import NAMES, clip_ids, prompt, sound_of
from tests.methods_for_tests import EveryThird

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
NAME = NAMES[0]


def test_an_image_of_one_row_is_no_clip():
    """An image and a clip of ten tokens in one row each, with a method each."""
    member, model = MEMBERS[NAME](), model_of(NAME)
    grid = torch.tensor([[1, 2, 20]])
    ids = torch.tensor([[5, *clip_ids(10), START, *[member.image_id] * 10, END, 20, 31]])
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), **sound_of(40),
        "pixel_values": member.patches(grid, 0), "image_grid_thw": grid,
    }  # fmt: skip
    methods = {"method": FastV(3, 4), "audio": FastV(3, 2)}
    with torch.no_grad(), foveate.use(model, **methods) as run:
        model.model(**inputs)
    clip, image = run.record.images
    assert clip.grid == image.grid == (1, 10)
    assert [(clip.audio, clip.left), (image.audio, image.left)] == [(True, 2), (False, 4)]


def test_each_has_an_order_of_its_own():
    """Audio may be shortened before images are, and by a method that reads whole grids."""
    model, (inputs, _) = model_of(NAME), prompt(NAME, "beside")
    with torch.no_grad(), foveate.use(model, FastV(3, 4), audio=DivPrune(4)) as run:
        model.model(**fresh(inputs))
    assert [list(image.kept) for image in run.record.images] == [
        ["pre_llm"],
        ["llm:3"],
        ["pre_llm"],
    ]
    with torch.no_grad(), foveate.use(model, DivPrune(4), audio=Downsample(4)) as run:
        model.model(**fresh(inputs))
    assert [image.left for image in run.record.images] == [4, 4, 4]
    with pytest.raises(LayerError, match="list methods in stream order"):
        foveate.use(model, "uniform", audio=[FastV(3, 4), Uniform(4)])
    with pytest.raises(LayerError, match="downsample reads whole grids"):
        foveate.use(model, "uniform", audio=[DivPrune(4), Downsample(2)])


@pytest.mark.parametrize("keep", [3, 12], ids=["drops", "drops-nothing"])
def test_signals_are_read_only_for_what_is_dropped(keep):
    """12 tokens would cut the image, but no clip."""
    model = MEMBERS[NAME]().build("eager").requires_grad_(False)
    inputs, _ = prompt(NAME, "beside")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), foveate.use(model, EveryThird(14), audio=FastV(3, keep)) as run, counter:
        model(**fresh(inputs))
    want = account(run.record, run.family, run.methods, CONVENTIONS["dense"])
    more = head_flops(TextShape.of(run.family.config), inputs["input_ids"].shape[1] - 1)
    assert want.total + more == counter.get_total_flops()
    assert (want.selection > 0) == (keep == 3)


def test_signals_of_the_vision_encoder_are_counted_beside_audio():
    """`generate` encodes images first, a forward audio first; what was read is the same."""
    model, (inputs, _) = model_of(NAME), prompt(NAME, "beside")
    with torch.no_grad(), foveate.use(model, "fopru", audio=DivPrune(4)) as run:
        model.model(**fresh(inputs))
        forward = run.report()["flops"]["selection"]
        model.generate(**fresh(inputs), **STEPS)
        assert run.report()["flops"]["selection"] == forward > 0


def test_tables_show_steps_as_tokens_pass_them():
    """The clip comes first, and its step later."""
    model, (inputs, _) = model_of(NAME), prompt(NAME, "beside")
    with torch.no_grad(), foveate.use(model, EveryThird(4), audio=FastV(3, 2)) as run:
        model.model(**fresh(inputs))
    heading = next(line for line in str(run.report()).splitlines() if "visual tokens" in line)
    assert " ".join(heading.split()).endswith("before the LLM from layer 3 on")


def test_drawings_are_of_images_alone():
    model, (inputs, _) = model_of(NAME), prompt(NAME, "beside")
    with torch.no_grad(), foveate.use(model, EveryThird(4), audio=True) as run:
        model.model(**fresh(inputs))
    assert len(run.show([Image.new("RGB", (32, 32))], "resize")) == 1
