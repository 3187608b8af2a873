"""Several methods in one session: all of it works, or it is refused when planned.

Every pair has its cell: each method inside the encoder with each method after it on
every family, and all other pairs on families of each kind of positions, and on videos.
"""

import functools
from dataclasses import replace

import pytest
import torch

import foveate
from foveate.core.video import VideoMethod
from foveate.errors import FoveateError, LayerError
from foveate.families import find_family
from foveate.run import Session
from foveate.signals import SIGNALS
from tests.conformance.batches import batch_of
from tests.conformance.cells import settings
from tests.conformance.test_pixels import NAMES, model_of
from tests.conformance.tolerance import tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

STAGES = {
    stage: [name for name in foveate.list_methods() if foveate.get_method(name).stage == stage]
    for stage in ("vision", "pre_llm", "llm")
}
POOLING = ("downsample", "m3", "ordered-queries", "tokenflex")  # which read whole grids
VIDEOS = "llava_next_video-video"
KINDS = ("llava", "qwen2_5_vl", "qwen3_vl", VIDEOS)  # 1-D, M-RoPE, DeepStack, frames
# Whether methods act inside these encoders depends on what is encoded: the first image refuses.
LATE = ("llava_onevision", "llava_onevision-video", "video_llava-video")


SOME = {"pixelprune": {"threshold": 5.0}}  # which leaves more than one token of noise
ALL = {"pixelprune": {"threshold": 0.0}}  # which keeps all of it


@functools.cache
def method_of(slug, **fields):
    return replace(settings(foveate.get_method(slug)), **{**SOME.get(slug, {}), **fields})


def session_of(name, *methods):
    return Session(model_of(name), list(methods))


def planned(name, *methods):
    """A session, or `None` if it is refused, in one line that names what does not go together."""
    try:
        return session_of(name, *methods)
    except FoveateError as error:
        if len(methods) > 1:
            message = str(error)
            named = [method.slug for method in methods if method.slug in message]
            assert len(set(named)) == len({method.slug for method in methods}), message
            assert len(message) <= 300
            assert "\n" not in message
        return None


@functools.cache
def works(name, slug):
    return planned(name, method_of(slug)) is not None


@functools.cache
def ragged(name):
    """Rows with two images, none, and one; and the first row alone."""
    inputs, rows = batch_of(MEMBERS[name](), model_of(name), (2, 0, 1))
    return inputs, rows[0]


@torch.no_grad()
def state(name, session, inputs):
    """State of the last token of the first row, and what is alive of its images."""
    with session:
        out = model_of(name).model(**fresh(inputs)).last_hidden_state[:, -1]
    assert bool(out.isfinite().all())
    back = {step.step.site for step in session.plan.llm if "reinsert" in step.step.effects}
    for image in session.record.images:
        before = torch.arange(image.total)
        for place, index in image.kept.items():
            before = torch.arange(image.total) if place in back else before
            assert bool((index.diff() > 0).all()), f"{place}: not ascending"
            assert bool(torch.isin(index, before).all()), f"{place}: came back"
            before = index
    return out[0], [image.kept for image in session.record.images if image.row == 0]


def check(name, slugs, *, alone):
    """Run what is not refused when planned; `alone` also without the other rows. Returns whether
    it ran, or `None` if a method does not work by itself.
    """
    if not all(works(name, slug) for slug in slugs):
        return None
    session = planned(name, *map(method_of, slugs))
    if session is None:
        return False
    batch, row = ragged(name)
    got, kept = state(name, session, batch)
    assert len(kept) == 2, slugs
    assert str(session.report())
    if not alone:
        return True
    want, same = state(name, session, row)
    for mine, theirs in zip(kept, same, strict=True):
        assert list(mine) == list(theirs)
        for place, index in mine.items():
            assert torch.equal(index, theirs[place]), f"{slugs} at {place}"
    bound = tolerance_of(name, model_of(name)) * max(1.0, want.abs().mean().item())
    torch.testing.assert_close(got, want, rtol=0, atol=bound, msg=lambda m: f"{slugs}: {m}")
    return True


@pytest.mark.parametrize("vision", STAGES["vision"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in LATE])
def test_inside_and_after_the_encoder(name, vision):
    """A row of a padded batch gets what it gets alone; whole grids are there no more, if any token
    has been removed.
    """
    removes = foveate.get_method(vision).removes
    videos = "video" in find_family(model_of(name)).placeholder_ids
    for slug in STAGES["pre_llm"]:
        if vision == "toc3d" and slug in READERS:  # some rows of its layers were not computed
            continue
        ran = check(name, (vision, slug), alone=True)
        whole = removes and (slug in POOLING or (works_on_videos(slug) and videos))
        assert ran in (None, not whole), slug


RUN = {  # pairs that are not refused; methods that come later may only add to them
    "pre_llm-pre_llm": (378, 135, 135, 265), "pre_llm-llm": (236, 177, 177, 53),
    "llm-llm": (82, 82, 95, 71), "vision-llm": (36, 12, 12, 33), "vision-vision": (3, 0, 0, 3),
}  # fmt: skip


def after(name, stages, first):
    """Methods that are tried after one of the first stage."""
    if name == VIDEOS and stages == "pre_llm-llm" and not works_on_videos(first):
        return []
    return STAGES[stages.partition("-")[2]]


@pytest.mark.parametrize(
    ("stages", "first"), [(s, first) for s in RUN for first in STAGES[s.partition("-")[0]]]
)
@pytest.mark.parametrize("name", KINDS)
def test_other_pairs(name, stages, first):
    for second in after(name, stages, first):
        check(name, (first, second), alone=False)


@pytest.mark.parametrize("stages", RUN)
@pytest.mark.parametrize("name", KINDS)
def test_no_pair_is_refused_that_was_not(name, stages):
    pairs = [(m, n) for m in STAGES[stages.partition("-")[0]] for n in after(name, stages, m)]
    able = [pair for pair in pairs if all(works(name, slug) for slug in pair)]
    ran = sum(planned(name, *map(method_of, pair)) is not None for pair in able)
    assert ran >= RUN[stages][KINDS.index(name)]


def works_on_videos(slug):
    return issubclass(foveate.get_method(slug), VideoMethod)


@pytest.mark.parametrize("vision", STAGES["vision"])
@pytest.mark.parametrize("name", KINDS)
def test_three_in_a_row(name, vision):
    """A reader of the encoder or of the prompt between the encoder and the decoder layers."""
    between = ("visionzip", "cdpruner")
    for number, llm in enumerate(STAGES["llm"]):
        second = between[number % 2] if vision != "toc3d" else "cdpruner"
        check(name, (vision, second, llm), alone=False)


READERS = [
    slug
    for slug in STAGES["pre_llm"]
    if any(SIGNALS[need].source == "encoder" for need in foveate.get_method(slug).needs)
]


@pytest.mark.parametrize(
    "vision", [slug for slug in STAGES["vision"] if foveate.get_method(slug).removes]
)
@pytest.mark.parametrize("name", ["internvl", "llava", "llava-pixtral", "qwen2_5_vl", VIDEOS])
def test_a_method_that_keeps_everything_changes_no_bit_for_readers(name, vision):
    for slug in READERS:
        if not (works(name, vision) and works(name, slug)):
            continue
        whole = method_of(vision, **ALL.get(vision, {"keep": 1.0}))
        reader = method_of(slug)
        if vision in ALL:  # which holds for positions, and is only known to keep all once run
            reader = method_of(slug, positions="original")
            if not planned(name, whole, reader):
                continue
        got, kept = state(name, planned(name, whole, reader), ragged(name)[0])
        want, same = state(name, planned(name, reader), ragged(name)[0])
        assert torch.equal(got, want), slug
        for mine, theirs in zip(kept, same, strict=True):
            assert torch.equal(list(mine.values())[-1], list(theirs.values())[-1])


# -- what is refused, and what is not


def test_whole_grids_cannot_be_read_once_tokens_are_missing():
    with pytest.raises(LayerError, match=r"downsample reads whole grids.*tome removes.*vision:0"):
        session_of("llava", method_of("tome"), method_of("downsample"))
    with pytest.raises(LayerError, match=r"fopru reads whole grids.*random removes"):
        session_of("llava", method_of("random"), method_of("fopru", strategy="row"))
    with pytest.raises(LayerError, match=r"evs reads whole grids.*random removes"):
        session_of(VIDEOS, method_of("random"), method_of("evs"))
    with pytest.raises(LayerError, match=r"downsample reads whole grids.*evs removes"):
        session_of(VIDEOS, method_of("evs"), method_of("downsample"))


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("llava", (("tome", {"keep": 1.0}), ("downsample", {}))),
        ("llava", (("random", {"keep": 1.0}), ("downsample", {}))),
        ("llava", (("random", {}), ("downsample", {"keep": 1.0}))),
        ("llava", (("random", {}), ("fopru", {"strategy": "rank"}))),
        ("llava", (("tome", {}), ("evs", {}))),  # which does nothing without videos
        ("llava", (("evs", {}), ("downsample", {}))),
        (VIDEOS, (("evs", {}), ("random", {}))),
        (VIDEOS, (("evs", {"keep": 1.0}), ("downsample", {}))),
    ],
)
def test_where_nothing_is_removed_or_nothing_whole_is_read_nothing_is_refused(name, methods):
    run = session_of(name, *(method_of(slug, **fields) for slug, fields in methods))
    state(name, run, ragged(name)[0])


def test_merging_before_the_projector_comes_before_merging_after_it():
    with pytest.raises(LayerError, match=r"downsample before it merges.*use one of them alone"):
        session_of("llava", method_of("downsample"), method_of("llava-prumerge"))
    with pytest.raises(LayerError, match=r"vflowopt before it merges.*put visionzip first"):
        session_of("llava", method_of("vflowopt"), method_of("visionzip"))
    session_of("llava", method_of("visionzip"), method_of("vflowopt"))
    session_of("gemma3", method_of("downsample"), method_of("visionzip"))  # all merge after it


def test_how_much_a_layer_changes_tokens_is_not_asked_where_it_computes_parts():
    with pytest.raises(LayerError, match=r"transprune asks.*yopo has that layer computed in parts"):
        session_of("llava", method_of("transprune"), method_of("yopo"))


def test_a_method_given_twice_is_two_methods():
    """The second set of steps lies where tokens of the first are suspended."""
    twice = method_of("lvlm-csp")
    with pytest.raises(LayerError, match=r"are suspended"):
        session_of("llava", twice, twice)


def test_a_refusal_names_only_layers_that_there_are():
    """Tokens are suspended from the first layer to the last."""
    with pytest.raises(LayerError) as error:
        session_of("llava", method_of("lvlm-csp"), method_of("fastv"))
    assert "before 0" not in str(error.value)
