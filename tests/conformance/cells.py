"""Cells of the support matrix: what becomes of a method on a tiny model of a family."""

import dataclasses
import functools
import importlib.util
import re

import torch
from transformers import (
    Siglip2Config,
    Siglip2ForImageClassification,
    Siglip2VisionConfig,
)

import foveate
from foveate.core import Adaptive
from foveate.core.video import VideoMethod
from foveate.errors import UnsupportedModelError
from foveate.families.hunyuan_vl import HunyuanVL
from foveate.families.llava_next import AnyRes
from foveate.families.phi4_multimodal import Phi4Multimodal
from foveate.families.support import YES
from foveate.methods import M3, Downsample, OrderedQueries, PixelPrune, TokenFLEX
from foveate.run import Session
from foveate.signals import SIGNALS
from tests import policies, retrievers
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.tolerance import TOLERANCE, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.vision import beside_text, dense, encoders, kinds

TOKENS = 3
BATCHES = {"one": (1,), "two-images": (2,), "ragged": (2, 0, 1)}
OFFERED = re.compile(r"\. Methods that work here: ")


class Reader:
    """A zoo member: a vision-language model that reads images, or videos."""

    def __init__(self, name):
        self.name, self.member = name, MEMBERS[name]()
        config = self.member.config()
        self.model_type = config.model_type
        what = self.member.what or f"{self.member.modality}s"
        tower = getattr(config, "vision_config", None) or config.vq_config
        self.variant = f"{what} through {tower.model_type}"
        self.tolerance = None

    @property
    def model(self):
        return model_of(self.name)

    def settle(self):
        """Find the bound, of the model without a session."""
        if self.tolerance is None:
            self.tolerance = tolerance_of(self.name, self.model)

    def check(self, session, rows):
        """Every promise about a batch whose rows have so many images, in an attached session."""
        model = self.model
        inputs, alone = batch_of(self.member, model, rows)
        states = []
        head = self.member.head(model)
        hook = head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        try:
            out = model.generate(
                **fresh(inputs), max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                return_dict_in_generate=True,
            )  # fmt: skip
        finally:
            hook.remove()
        record = session.record
        assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + TOKENS
        check_kept(session)
        assert [image.row for image in record.images] == [
            row for row, images in enumerate(rows) for _ in range(images)
        ]
        check_tokens(record, inputs)
        check_cache(session, out.past_key_values)
        for state, row in zip(states[0][:, -1], alone, strict=True):
            want = self.member.run(model, **fresh(row)).last_hidden_state[0, -1]
            torch.testing.assert_close(state, want, rtol=0, atol=self.tolerance)


class Tower:
    """An encoder without a language model, alone or under a head."""

    variant = "images"

    def __init__(self, table, name):
        self.table, self.name = table, name
        self.model_type = self.model.config.model_type
        if table == TIMM:
            known = "with" if timms.VITS[name.split()[0]][1] else "without"
            self.variant = f"ViTs {known} a class token"

    @property
    def model(self):
        return encoder_of(self.table, self.name)

    def check(self, session, rows):
        """Every promise about a batch of as many images as all rows have."""
        inputs = images_of(self.table, self.name, sum(rows))
        if self.table == "beside text":
            inputs |= beside_text.words(sum(rows))
        inputs = {
            k: v.to(self.model.dtype) if v.is_floating_point() else v for k, v in inputs.items()
        }
        together = read(self.model(**inputs))
        record = session.record
        check_kept(session)
        assert len(record.images) == sum(rows)
        alive = [len(list(image.kept.values())[-1]) for image in record.images]
        special = session.family.encoder.special
        (method,) = session.methods
        step = method.steps(session.family)[-1]
        if "around" in step.effects:  # which not all go through
            alive = [method.entering(count, step) for count in alive]
        assert {special + count for count in alive} == {record.encoder_tokens[-1][1]}
        for number, state in enumerate(together):
            want = read(self.model(**encoders.row_of(inputs, number)))[0]
            bound = TOLERANCE * max(1.0, want.abs().mean().item())
            torch.testing.assert_close(state, want, rtol=0, atol=bound)


class Retriever:
    """A model that makes an embedding of each token of a page."""

    variant = "pages"

    def __init__(self, name):
        self.name = self.model_type = name

    @property
    def model(self):
        return retrievers.retriever(self.name)

    def check(self, session, rows):
        """Every promise about a batch whose pages have so many images, in an attached session."""
        pages = [retrievers.page(self.name, images, seed=n) for n, images in enumerate(rows)]
        inputs = retrievers.batch(self.name, pages)
        stored = retrievers.stored(self.model(**inputs).embeddings)
        record = session.record
        check_kept(session)
        assert [image.row for image in record.images] == [
            row for row, images in enumerate(rows) for _ in range(images)
        ]
        check_tokens(record, inputs)
        assert [len(page) for page in stored] == record.layer_tokens[-1]
        for embeddings, alone in zip(stored, pages, strict=True):
            want = retrievers.stored(self.model(**alone).embeddings)[0]
            torch.testing.assert_close(embeddings, want, rtol=0, atol=TOLERANCE)


class Policy:
    """A model that samples actions of what cameras see."""

    name = model_type = "pi0"
    variant = "cameras"

    @property
    def model(self):
        return policies.policy()

    def check(self, session, rows):
        """Every promise about a batch whose rows have so many cameras, in an attached session."""
        alone = [policies.observation(cameras, seed=n) for n, cameras in enumerate(rows)]
        inputs = policies.batch(alone)
        together = self.model.sample_actions(**inputs)
        record = session.record
        check_kept(session)
        assert [image.row for image in record.images] == [
            row for row, cameras in enumerate(rows) for _ in range(cameras)
        ]
        check_tokens(record, inputs)
        cache = self.model(**inputs, timestep=torch.ones(len(rows))).past_key_values
        check_cache(session, cache, policies.CHUNK + 1)
        for actions, row in zip(together, alone, strict=True):
            want = self.model.sample_actions(**row)[0]
            torch.testing.assert_close(actions, want, rtol=0, atol=TOLERANCE)


def read(output):
    """What a caller gets from an encoder: logits of a head, or all states."""
    for name in ("predicted_depth", "heatmaps", "masks_queries_logits"):
        if name in output:
            return output[name]
    if "feature_maps" in output:
        return output.feature_maps[-1]
    return output.logits if "logits" in output else output.last_hidden_state


def _siglip2():
    sizes = {k: v for k, v in encoders.WIDE.items() if k != "image_size"}
    vision = Siglip2VisionConfig(**sizes, num_patches=encoders.PATCHES)
    return Siglip2ForImageClassification(
        Siglip2Config(vision_config=vision.to_dict(), num_labels=5)
    )


TIMM = "of timm"
TABLES = {
    "alone": encoders.ENCODERS,
    "around a backbone": {
        name: make for name, make in dense.DENSE.items() if not name.endswith(("-beit", "-dinov3"))
    },
    "beside text": {name: beside_text.MODELS[name] for name in ("clipseg", "owlvit", "owlv2")},
    "under a head": {**encoders.HEADS, "siglip2": _siglip2},
    "of another kind": {name: kind.model for name, kind in kinds.KINDS.items()},
    "of another kind, under a head": {
        **{name: kind.heads for name, kind in kinds.KINDS.items() if kind.heads},
        **kinds.BUILT,
    },
}


if importlib.util.find_spec("timm") is not None:  # in `make timm`
    from tests.vision import timms

    TABLES[TIMM] = {
        f"{name}{' under a head' * head}": functools.partial(timms.make, name, head)
        for name in timms.VITS
        for head in (False, True)
    }


@functools.cache
def encoder_of(table, name):
    if table == TIMM:
        return TABLES[table][name]()
    if table == "around a backbone":
        return dense.build(dense.DENSE[name]).double()  # convolutions of heads amplify rounding
    if name in kinds.BUILT:
        return kinds.BUILT[name]()
    if table.startswith("of another kind"):
        return kinds.build(TABLES[table][name])
    if table == "beside text":
        return beside_text.build(beside_text.MODELS[name])
    return encoders.build(TABLES[table], name)


def images_of(table, name, count):
    """What an encoder is called with."""
    if table.startswith("of another kind"):
        return kinds.given(kinds.KINDS[kinds.FED.get(name, name)], count)
    return encoders.images(count, name=name)


@functools.cache
def subjects():
    """Model type -> the tiny models of it; none of timm's where timm is not installed."""
    found = {"timm_wrapper": []}
    towers = [Tower(table, name) for table in TABLES for name in TABLES[table]]
    pages = map(Retriever, retrievers.BUILT)
    for subject in [*map(Reader, sorted(MEMBERS)), *pages, Policy(), *towers]:
        found.setdefault(subject.model_type, []).append(subject)
    return dict(sorted(found.items()))


# -- what must hold


def promised(method, family, total):
    """Tokens that a method promises to leave of so many at each of its places."""
    alive, counts = total, {}
    for number, step in enumerate(method.steps(family)):
        if {"decode", "look", "training"} & set(step.effects):  # removes nothing
            continue
        if not isinstance(method, Adaptive):
            alive = method.count(alive, total, step, number)
        counts[step.site] = alive
    return counts


def check_kept(session):
    """Indices are ascending, distinct, nested, and as many as the method promises, if it does.

    Inside the encoder of a larger model the promise is about each frame, or each tile, of which
    packing cuts some off, and not about newlines.
    """
    (method,), record = session.methods, session.record
    for image in record.images:
        each = method.stage == "vision" and session.family.text_layers
        frames = image.frames if each else 1
        counts = promised(method, session.family, image.total // frames)
        passes = isinstance(method, VideoMethod) and image.frames == 1
        assert list(image.kept) == list(counts)
        tiled = method.stage == "vision" and frames == 1
        tiled = tiled and isinstance(session.family, (AnyRes, HunyuanVL, Phi4Multimodal))
        before = torch.arange(image.total)
        back = {step.site for step in method.steps(session.family) if "reinsert" in step.effects}
        for place, index in image.kept.items():
            before = torch.arange(image.total) if place in back else before
            if passes or not method.removes:
                assert len(index) == image.total
            elif method.adaptive:
                assert len(index) >= 1
            elif tiled:
                assert 1 <= len(index) < image.total
            elif isinstance(method, Downsample):  # which takes the largest grid of its shape
                assert 1 <= len(index) <= counts[place]
            elif isinstance(method, M3):  # whose cells are squares, of grids that are none
                assert counts[place] <= len(index) < image.total
            else:
                assert len(index) == frames * counts[place]
            assert bool((index.diff() > 0).all()), f"{place}: not ascending"
            assert bool(torch.isin(index, before).all()), f"{place}: came back"
            before = index
        if not method.removes:
            assert len(before) == image.total
        else:
            assert passes or len(before) < image.total, "the cell does not bite"


def check_tokens(record, inputs):
    """The last layer saw the prompt less what was removed."""
    left = inputs["attention_mask"].sum(1).tolist()
    assert record.prompt_tokens == left
    for image in record.images:
        left[image.row] -= image.total - len(list(image.kept.values())[-1])
    last = record.last_tokens_from or len(record.layer_tokens)
    assert record.layer_tokens[last - 1] == left


def check_cache(session, cache, since=TOKENS - 1):
    """Every layer holds what it saw of the longest row and did not forget, and so many tokens
    since.
    """
    (method,), held = session.methods, list(session.record.layer_tokens)
    assert len(cache.layers) == len(held)
    for step in method.steps(session.family):
        if "evict_cache" in step.effects:
            held[: step.layer] = [held[step.layer]] * step.layer
    keyed = session.family.keyed_layers  # the others have a state and no slots
    for layer, tokens in ((cache.layers[number], held[number]) for number in keyed):
        window = getattr(layer, "sliding_window", None) or 10**9
        assert layer.keys.shape[2] == min(max(tokens) + since, window - 1)


# -- outcomes

COUNTS = {M3: 1, OrderedQueries: 4, TokenFLEX: 1}
NOISE = 1e3  # more than the pixels of noise differ by, so that all cells are alike


def settings(cls):
    """A method with its defaults; a count of tokens, which suits real images, becomes a share, or
    one that suits small images where the method takes no share. Images of noise repeat nothing.
    """
    if cls in COUNTS:
        return cls(keep=COUNTS[cls])
    if cls is PixelPrune:
        return cls(threshold=NOISE)
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    return cls(keep=0.25) if isinstance(fields["keep"], int) else cls()


def reason(method, model_type, error):
    """Why a method is refused, without its name and that of the family.

    The message must name the method and the family, and say what to do instead.
    """
    message = str(error)
    for name in (method, model_type):
        assert name in message, f"{name} is not named: {message}"
    assert OFFERED.search(message), f"no way out: {message}"
    what = OFFERED.split(message)[0]
    what = re.sub(rf"this '?{model_type}'?(?!\w)|'{model_type}'", "this model", what)
    return re.sub(rf"^'?{method}'? ", "", what)


def offered(error):
    """Methods that a refusal names as working."""
    return OFFERED.split(str(error))[-1].rstrip(".").split(", ")


@torch.no_grad()
def outcome(subject, slug):
    """`yes`, or why not; whatever else happens is raised."""
    cls = foveate.get_method(slug)
    try:
        session = foveate.use(subject.model, settings(cls))
    except UnsupportedModelError as error:
        return refused(subject, slug, error)
    found = set()
    for rows in BATCHES.values():
        try:
            with session:
                subject.check(session, rows)
        except UnsupportedModelError as error:
            encoder = any(SIGNALS[need].source == "encoder" for need in cls.needs)
            assert encoder or cls.stage == "vision", "refused late"
            found.add(refused(subject, slug, error))
        else:
            found.add(YES)
    assert len(found) == 1, f"it depends on the batch: {found}"
    return found.pop()


def refused(subject, slug, error):
    """The reason of a refusal, once what it offers has been planned."""
    why = reason(slug, subject.model_type, error)
    for other in offered(error):
        assert other != slug
        Session(subject.model, settings(foveate.get_method(other)))
    return why


def entry(model_type, slug):
    """What the matrix says of a method on a family: one outcome, or one for each variant."""
    found = {}
    for subject in subjects()[model_type]:
        if isinstance(subject, Reader):
            subject.settle()
        result = outcome(subject, slug)
        known = found.setdefault(subject.variant, result)
        assert known == result, f"{subject.variant}: {known!r} and {result!r}"
    return found if len(set(found.values())) > 1 else next(iter(found.values()))
