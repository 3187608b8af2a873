"""A kept cache, and a new image in the second turn, in every family."""

import functools
import re
from pathlib import Path

import pytest
import torch

import foveate
from foveate.errors import InputError
from foveate.families import find_family
from foveate.methods import PyramidDrop
from tests.conformance import oracle
from tests.conformance.test_pixels import NAMES
from tests.conformance.test_pixels import model_of as pixels_model
from tests.conformance.test_pixels_grids import GRIDS
from tests.conformance.test_pixels_grids import model_of as grids_model
from tests.conformance.tolerance import kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.gridded import Gridded
from tests.conformance.zoo.member import fresh
from tests.conformance.zoo.mrope import UNPLACED
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

STEPS = 8
PAGE = Path(foveate.__file__).parent.parent / "docs" / "how-it-works.md"
# Where images see what comes after them, no forward over everything equals one turn after another.
TWO_WAY = ("paligemma", "paligemma2", "molmo2", "molmo2-o")
FIRST_ALONE = ("unlimited_ocr",)  # whose later images stand in a window
AS_TEXT = (
    "cosmos3_edge",
    "minicpmv4_7",
)  # to whose new images the bare model gives positions of text
PLAIN = ("kimi_k25", "kimi_k25-halves", "lfm3_vl")  # grids, and positions that are numbers
MROPE = [n for n in GRIDS if not issubclass(MEMBERS[n], Gridded) and n not in (*UNPLACED, *PLAIN)]
EXCEPT = (*MROPE, *TWO_WAY, *UNPLACED, *FIRST_ALONE)
FAMILIES = [*MROPE, *(name for name in NAMES if name not in EXCEPT)]


def model_of(name, attention="sdpa"):
    return (grids_model if name in MROPE else pixels_model)(name, attention)


def images_of(name):
    """What the encoder eats for image A, for image B and for both, and their visual tokens."""
    member = MEMBERS[name]()
    both = member.pixels(2)
    parts = [member.take(both, 0, 1), member.take(both, 1, 2)]
    return *parts, both, member.counts(model_of(name), both)


def prompts(member, counts):
    """Ids of the first turn, and of what the user says in the second."""
    first = [5, 7, 11, *[member.image_id] * counts[0], 20, 31, 8]
    second = [40, 41, *[member.image_id] * counts[1], 9, 12, 13]
    return torch.tensor([first]), torch.tensor([second])


def text_of(member, ids, images):
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | {
        name: value
        for name, value in member.extras(ids, images).items()
        if "grid" not in name and "merge" not in name
    }


def case(name, kind, counts, queries):
    """A method, and what the oracle must do for it; each turn ranks with its own last token."""
    few = min(counts) // 4
    if kind == "pre_llm":
        return EveryThird(few), Spec(kept=[torch.arange(0, 3 * few, 3)] * 2)
    family = find_family(model_of(name))
    legal = [i for i in family.attention_layers if i >= max(1, family.first_llm_layer)]
    layers, kept = (legal[0], legal[-1]), (2 * few, few)
    drops = [
        Drop(layer, layer, [count], images=[image], query=query)
        for layer, count in zip(layers, kept, strict=True)
        for image, query in enumerate(queries)
    ]
    return PyramidDrop(layers, kept, "original"), Spec(drops=drops)


@pytest.mark.parametrize("kind", ["llm", "pre_llm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_image_in_the_second_turn_equals_the_oracle(name, kind):
    """Image A, an answer, image B and a question after it, eight steps; both images pruned."""
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    model = model_of(name, kernel_of(model))
    a, b, both, counts = images_of(name)
    ids, more = prompts(member, counts)
    options = {"do_sample": False, "return_dict_in_generate": True}
    turns = []
    head = member.head(model)
    hook = head.register_forward_pre_hook(lambda m, args: turns[-1].append(args[0][0, -1]))
    method, _ = case(name, kind, counts, (0, 0))
    with torch.no_grad(), foveate.use(model, method) as run:
        turns.append([])
        said = model.generate(
            **text_of(member, ids, 1), **fresh(a), **options, max_new_tokens=3, min_new_tokens=3
        )
        kept = [list(run.kept[0].values())]
        whole = torch.cat((said.sequences, more), 1)
        inputs = text_of(member, whole, 2)
        if name in MROPE:
            new = model.get_image_features(**fresh(b), return_dict=True)
            inputs |= {"mm_encoder_outputs": {"image": new}}
            inputs |= {"image_grid_thw": both["image_grid_thw"]}
        else:
            inputs |= fresh(b)
        turns.append([])
        out = model.generate(
            **inputs, **options, past_key_values=said.past_key_values, max_new_tokens=STEPS,
            min_new_tokens=STEPS,
        )  # fmt: skip
        kept.append(list(run.kept[0].values()))
    hook.remove()
    queries = ids.shape[1] - 1, whole.shape[1] - 1
    _, spec = case(name, kind, counts, queries)
    everything = text_of(member, out.sequences[:, :-1], 2) | fresh(both)
    want, history = oracle.run(member, eager, everything, spec, whole.shape[1], counts)
    plain, _ = oracle.run(member, eager, everything, Spec(), whole.shape[1], counts)
    for image, places in enumerate(kept):
        assert len(run.kept) == 1
        then = history[image::2] if kind == "llm" else history
        for place, indices in zip(places, then, strict=True):
            assert torch.equal(place, indices[image])
    got = torch.stack(turns[1])
    distance = (want[queries[1] :] - got).abs().max().item()
    bite = (plain[queries[1] :] - got).abs().max().item()
    print(f"{name} {kind}: {counts} tokens, {distance:.1e}, bite {bite:.2f}")
    assert distance <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


WRONG = {
    "both pixels": "it was given pixel_values",
    "new pixels": "it was given pixel_values",
    "new grid": "the grids say 12 visual tokens where the ids have 28",
    "no grid": "the grids say 0 visual tokens where the ids have 28",
    "no types": "mm_token_type_ids are missing",
    "alone": "called directly, without position_ids",
}


@pytest.mark.parametrize("name", MROPE)
@pytest.mark.parametrize("what", WRONG)
def test_a_new_image_that_would_be_misplaced_is_refused(name, what):
    """Without a session these fail otherwise, or put the image where text would be."""
    member, model = MEMBERS[name](), model_of(name)
    a, b, both, counts = images_of(name)
    ids, more = prompts(member, counts)
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    with torch.no_grad(), foveate.use(model, EveryThird(4)):
        said = model.generate(**text_of(member, ids, 1), **fresh(a), **options)
        whole = torch.cat((said.sequences, more), 1)
        inputs = text_of(member, whole, 2) | {"image_grid_thw": both["image_grid_thw"]}
        cache = said.past_key_values
        if what == "both pixels":
            inputs |= fresh(both)
        elif what == "new pixels":
            inputs |= {"pixel_values": b["pixel_values"]}
        else:
            new = model.get_image_features(**fresh(b), return_dict=True)
            inputs |= {"mm_encoder_outputs": {"image": new}}
        if what == "new grid":
            inputs |= {"image_grid_thw": b["image_grid_thw"]}
        missing = {"no grid": "image_grid_thw", "no types": "mm_token_type_ids"}.get(what)
        inputs.pop(missing, None)
        call = functools.partial(model.generate, **options)
        if what == "alone":
            call, past = model, cache.get_seq_length()
            inputs.pop("attention_mask")
            inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][:, past:]
            inputs["input_ids"] = whole[:, past:]
        with pytest.raises(InputError, match=rf"{WRONG[what]}.*get_image_features"):
            call(**inputs, past_key_values=cache)


@pytest.mark.parametrize("how", ["generate", "forward"])
@pytest.mark.parametrize("name", AS_TEXT)
def test_a_new_image_that_would_be_placed_as_text_is_refused(name, how):
    """The bare model says nothing, and gives it positions of text."""
    member, model = MEMBERS[name](), model_of(name)
    a, b, _, counts = images_of(name)
    ids, more = prompts(member, counts)
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    first = {**text_of(member, ids, 1), **fresh(a)}
    positions = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    said = model.generate(**first, **options)
    second = {**text_of(member, torch.cat((said.sequences, more), 1), 2), **fresh(b)}
    model.generate(**second, past_key_values=said.past_key_values, **options)
    hook.remove()
    assert (positions[3].diff() == 1).all(), "the bare model gives it positions of text"
    with torch.no_grad(), foveate.use(model, EveryThird(4)):
        said = model.generate(**first, **options)
        second |= {"past_key_values": said.past_key_values}
        if how == "forward":
            past = said.past_key_values.get_seq_length()
            second |= {n: second[n][:, past:] for n in ("input_ids", "mm_token_type_ids")}
        with pytest.raises(InputError, match=r"positions of text.*without the cache"):
            model(**second) if how == "forward" else model.generate(**second, **options)


@pytest.mark.parametrize("name", UNPLACED)
def test_a_new_image_that_transformers_cannot_place_is_refused(name):
    member, model = MEMBERS[name](), model_of(name)
    a, b, _, counts = images_of(name)
    ids, more = prompts(member, counts)
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    with torch.no_grad(), foveate.use(model, EveryThird(4)):
        said = model.generate(**text_of(member, ids, 1) | fresh(a), **options)
        whole = torch.cat((said.sequences, more), 1)
        second = text_of(member, whole, 2) | fresh(b)
        with pytest.raises(InputError, match=r"positions of text.*without the cache"):
            model.generate(**second, past_key_values=said.past_key_values)


def test_an_image_after_a_turn_of_text_needs_nothing_special():
    """No image is cached yet, so that the grids of the conversation are those of the pixels."""
    name = "qwen2_5_vl"
    member, model = MEMBERS[name](), model_of(name)
    pixels = member.take(member.pixels(1), 0, 1)
    text, (_, more) = torch.tensor([[5, 7, 11, 3]]), prompts(member, [0, 16])
    options = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True}
    method = EveryThird(4)
    with torch.no_grad(), foveate.use(model, method):
        said = model.generate(**text_of(member, text, 0), **options)
        whole = torch.cat((said.sequences, more), 1)
        inputs = text_of(member, whole, 1)
        after = model.generate(
            **inputs, **fresh(pixels), **options, past_key_values=said.past_key_values
        )
        at_once = model.generate(**inputs, **fresh(pixels), **options)
    assert torch.equal(after.sequences, at_once.sequences)


def test_the_page_shows_how():
    """The code on the page, run on a model, answers as the same conversation without a cache."""
    name = "qwen2_5_vl"
    member, model = MEMBERS[name](), model_of(name)
    a, _, both, counts = images_of(name)
    ids, more = prompts(member, counts)
    blocks = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    (code,) = [block for block in blocks if "past_key_values" in block]
    first = text_of(member, ids, 1) | fresh(a)
    limits = model.generation_config.max_new_tokens, model.generation_config.do_sample
    model.generation_config.max_new_tokens, model.generation_config.do_sample = 3, False
    try:
        with foveate.use(model, EveryThird(4)):
            whole = torch.cat((model.generate(**fresh(first)), more), 1)
            want = model.generate(**text_of(member, whole, 2), **fresh(both))
        given = {"foveate": foveate, "model": model, "first": first, "method": EveryThird(4)}
        given["both"] = text_of(member, whole, 2) | fresh(both)
        exec(compile(code.replace('"pyramiddrop"', "method"), str(PAGE), "exec"), given)
    finally:
        model.generation_config.max_new_tokens, model.generation_config.do_sample = limits
    assert torch.equal(given["answer"], want)
