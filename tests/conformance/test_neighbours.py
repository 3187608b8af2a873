"""What an image becomes does not depend on its neighbours: in its row, in other rows, of other
sizes, or none at all.
"""

import functools
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of

import pytest
import torch

import foveate
from foveate.core import Adaptive, Reduction, Step
from foveate.methods import LLaVAPruMerge
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import ONE_BY_ONE, readers_methods
from tests.tinies import prompts, row_of, tiny_llava
from tests.vision import encoders

TOLERANCE = 5e-4  # of logits of about 10
FAMILIES = ("llava", "llava_next", "qwen2_vl")
NEED_CLIP = {  # its class token, or its layers
    "cls-drop", "fastervlm", "flowcut", "llava-prumerge", "recoverable-compression", "vflowopt",
    "vtc-cls",
}  # fmt: skip
APPROXIMATE = {  # which compute encoder layers by the grid of patches, and remove nothing
    slug for slug in foveate.list_methods() if not foveate.get_method(slug).removes
}
REFUSED = {
    "llava": set(),
    "llava_next": {"yopo"},  # its tokens form no single grid
    "qwen2_vl": NEED_CLIP | APPROXIMATE | ONE_BY_ONE,
}
CELLS = [(n, s) for n in FAMILIES for s in readers_methods() if s not in REFUSED[n]]
# Methods whose own rule decides how many tokens stay, beside those with one form of budget.
UNBUDGETED = {"atp-llava", "pixelprune", "recoverable-compression", "yopo"} | APPROXIMATE
COUNTED = {"m3", "ordered-queries", "tokenflex"}  # whose budget is a count
ADAPTIVE = {"dycoke", "prunevid"}  # all or what they find
LEAST = {"tome": 0.45}  # at most half of the tokens merge in a layer


def settings(slug, name=""):
    """The method where nothing goes, something and almost everything, under each policy of
    positions that it has on a family.
    """
    cls = foveate.get_method(slug)
    budgets = [{"keep": 1.0}, published(cls), {"keep": LEAST.get(slug, 0.04)}]
    if slug in UNBUDGETED:
        budgets = [{}, {"threshold": 5.0}] if slug == "pixelprune" else [{}]
    elif slug in COUNTED:
        budgets = [{"keep": 4}, {"keep": 1}]
    elif slug in ADAPTIVE:
        budgets = budgets[:2]
    policies = ["original", "renumbered"]
    if name == "qwen2_vl" or slug in ("lvlm-csp", "yopo"):
        policies = policies[:1]
    return [cls(positions=policy, **fields) for fields in budgets for policy in policies]


def published(cls):
    """What is published, but for counts of tokens that suit larger images."""
    default = {field.name: field.default for field in fields_of(cls)}["keep"]
    return {"keep": 0.25} if isinstance(default, int) else {}


@torch.no_grad()
def read(model, session, inputs):
    """Logits, and for each image its row and survivors."""
    logits = model(**fresh(inputs)).logits
    images = [] if session.record is None else session.record.images
    return logits, [(image.row, image.kept) for image in images]


def check_same(kept, wanted):
    assert [list(places) for places in kept] == [list(places) for places in wanted]
    for places, others in zip(kept, wanted, strict=True):
        for place, index in places.items():
            assert index.tolist() == others[place].tolist(), place


@pytest.mark.parametrize(("name", "slug"), CELLS)
def test_a_row_of_a_batch_gets_what_it_gets_alone(name, slug):
    """Left-padded rows of two images, of none and of one; positions are left to the model."""
    member, model, rows = MEMBERS[name](), model_of(name), (2, 0, 1)
    together, alone = batch_of(member, model, rows)
    for method in settings(slug, name):
        with foveate.use(model, method) as session:
            found = read(model, session, together)
            for row, inputs in enumerate(alone):
                logits, images = read(model, session, inputs)
                got = found[0][row, -logits.shape[1] :]
                torch.testing.assert_close(got, logits[0], rtol=0, atol=TOLERANCE)
                if rows[row]:
                    mine = [kept for at, kept in found[1] if at == row]
                    check_same(mine, [kept for _, kept in images])


BEHIND = [(n, s) for n, s in CELLS if foveate.get_method(s).stage != "llm"]


@pytest.mark.parametrize(("name", "slug"), BEHIND)
@torch.no_grad()
def test_features_of_an_image_are_those_it_has_alone(name, slug):
    """Where the prompt is not asked, in the encoder's output already."""
    member, model = MEMBERS[name](), model_of(name)
    pixels = member.pixels(3)
    encode = getattr(model.model, f"get_{member.modality}_features")
    for method in settings(slug, name):
        with foveate.use(model, method):
            together = member.pooled(encode(**fresh(pixels), return_dict=True))
            for image in range(3):
                one = encode(**fresh(member.take(pixels, image, image + 1)), return_dict=True)
                got, want = together[image], member.pooled(one)[0]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, equal_nan=True)


@functools.cache
def encoder_of(name):
    return encoders.build(encoders.ENCODERS, name)


ALONE = [
    (name, slug)
    for name in encoders.ENCODERS
    for slug in ("cls-drop", "flowcut", "tome")
    if slug not in NEED_CLIP or not ("siglip" in name or name == "ijepa")
]


@pytest.mark.parametrize(("name", "slug"), ALONE)
@torch.no_grad()
def test_an_encoder_alone_makes_of_an_image_what_it_makes_of_it_alone(name, slug):
    model, inputs = encoder_of(name), encoders.images(3, name=name)
    for method in settings(slug):
        with foveate.use(model, method) as session:
            together = model(**inputs).last_hidden_state
            kept = [image.kept for image in session.record.images]
            for image in range(3):
                want = model(**encoders.row_of(inputs, image)).last_hidden_state[0]
                torch.testing.assert_close(together[image], want, rtol=1e-4, atol=1e-4)
                check_same(kept[image : image + 1], [session.record.images[0].kept])


# -- merging without removal


@dataclass(frozen=True)
class Blend(Adaptive):
    """Mix each token with the one before it; images lose one whose first token says so."""

    layer: int | None = None
    channel: int = 0
    before_projector: bool = False
    keep: None = None
    positions: str = "original"
    slug, needs, paper = "blend", (), ""

    @property
    def stage(self):
        return "pre_llm" if self.layer is None else "llm"

    def steps(self, model):
        if self.layer is None:
            return (Step("pre_llm", before_projector=self.before_projector),)
        return (Step("llm", self.layer),)

    def reduce_each(self, tokens):
        total = tokens.count
        eye = torch.eye(total)
        weights = ((eye + eye.roll(1, 1)) / 2).expand(len(tokens.index), -1, -1)
        index = torch.arange(total).expand(len(weights), -1)
        loses = (tokens.x[:, 0, self.channel] * 100).long() % 2
        return [
            ([image], Reduction(index[:1, gone:], weights[:1, gone:]))
            for image, gone in enumerate(loses.tolist())
        ]


BLENDS = {
    "after the projector": Blend(),
    "before the projector": Blend(before_projector=True),
    "between decoder layers": Blend(layer=2),
}


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("where", BLENDS)
def test_merged_values_count_where_no_image_loses_a_token(name, where):
    """In a call of one image that keeps all of its tokens they are those that it has beside others
    that do not.
    """
    member, model, gone = MEMBERS[name](), model_of(name), []
    together, alone = batch_of(member, model, (1, 1, 1))
    for channel in range(5):
        with foveate.use(model, replace(BLENDS[where], channel=channel)) as session:
            logits, _ = read(model, session, together)
            images = session.record.images
            gone.append({image.total - len(list(image.kept.values())[-1]) for image in images})
            for row, inputs in enumerate(alone):
                want, _ = read(model, session, inputs)
                got = logits[row, -want.shape[1] :]
                torch.testing.assert_close(got, want[0], rtol=0, atol=TOLERANCE)
    assert {0, 1} in gone, "the test does not bite"


@torch.no_grad()
def test_prumerge_folds_neighbours_into_tokens_that_all_stay():
    member, model = MEMBERS["llava"](), model_of("llava")
    pixels = member.pixels(1)

    def features():
        return model.model.get_image_features(**pixels, return_dict=True).pooler_output[0]

    plain = features()
    with foveate.use(model, LLaVAPruMerge(ratio=1.0, neighbours=3, positions="original")):
        merged = features()
    assert not merged.isnan().any()
    assert (merged - plain).abs().max() > 0.01


# -- ties


@functools.cache
def unplaced(dtype):
    """LLaVA whose encoder does not tell patches apart by where they are."""
    model = tiny_llava()
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
    return model.to(dtype)


def alike(kind, images):
    """Images of one colour, or made of six patches that come again and again."""
    generator = torch.Generator().manual_seed(5)
    if kind == "one colour":
        return torch.rand(images, 3, 1, 1, generator=generator).expand(-1, -1, 48, 48)
    patches = torch.randn(images, 6, 3, 8, 8, generator=generator)
    which = torch.randint(6, (36,), generator=generator)
    rows = patches[:, which].view(images, 6, 6, 3, 8, 8)
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(images, 3, 48, 48)


ROWS = [(3, 6), (12, 4), (2, 3), (5,), (7, 4, 2)]  # one text-only, one of two images


@torch.no_grad()
def kept_of(model, session, inputs):
    model(**inputs)
    return [image.kept for image in session.record.images]


@pytest.mark.parametrize("kind", ["one colour", "six patches"])
@pytest.mark.parametrize("slug", readers_methods())
def test_tokens_that_tie_are_chosen_alike_in_every_batch(slug, kind):
    """Rounding depends on how many rows there are, and how far they are padded."""
    model = unplaced(torch.float32)
    together = prompts(ROWS)
    together["pixel_values"] = alike(kind, 5)
    for method in some_or_few(slug):
        with foveate.use(model, method) as session:
            kept = kept_of(model, session, together)
            for row, first, images in ((0, 0, 1), (1, 1, 1), (2, 2, 1), (4, 3, 2)):
                alone = kept_of(model, session, row_of(together, row))
                check_same(kept[first : first + images], alone)


def some_or_few(slug):
    """The method where something is removed, in the order of the image."""
    return [m for m in settings(slug) if m.positions == "original" and m.keep != 1.0]


def before_the_language_model(slug):
    """Whether a method chooses by what the encoder and the embeddings say."""
    cls = foveate.get_method(slug)
    return cls.stage == "pre_llm" and slug != "random"


@pytest.mark.parametrize(
    "slug", [slug for slug in readers_methods() if before_the_language_model(slug)]
)
@torch.no_grad()
def test_half_precision_leaves_ties_ties(slug):
    """Choices after the encoder, alone and among 1, 2, 3 and 5 images."""
    model = unplaced(torch.bfloat16)
    everything = prompts(ROWS)
    everything["pixel_values"] = alike("six patches", 5).to(torch.bfloat16)
    for method in some_or_few(slug):
        with foveate.use(model, method) as session:
            wanted = [image["pre_llm"] for image in kept_of(model, session, everything)]
            for rows, images in ((1, 1), (2, 2), (3, 3)):
                inputs = {name: value[:rows] for name, value in everything.items()}
                inputs["pixel_values"] = everything["pixel_values"][:images]
                found = [image["pre_llm"] for image in kept_of(model, session, inputs)]
                for got, want in zip(found, wanted[:images], strict=True):
                    assert got.tolist() == want.tolist()
