"""How often the host waits for the device: the counter, and what methods add to a prefill."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate import methods
from foveate.core.transfer import Downloads, download, upload
from foveate.methods.scope import _cover
from tests.conformance.batches import batch_of
from tests.conformance.cells import encoder_of, images_of, settings
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import loud

ROOT = Path(__file__).parents[1]
BATCHES = {"one": (1,), "ragged": (2, 0, 1)}
TARGET = 2


@pytest.fixture
def waits(monkeypatch):
    """The module that counts."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("_waits")


# -- the counter


def far(machine):
    """Numbers, a mask and floats of the stand-in device."""
    x = torch.tensor([[3, 1, 2], [0, 5, 4]])
    return machine.put((x, x > 2, x.float()))


def counted(waits, act):
    """How often the host waits within a call that is given `far`."""
    with waits.StandIn() as machine:
        given = far(machine)
        with machine.waits() as found:
            act(*given)
    return found["total"]


def _assign(x, index, value):
    x[index] = value


READING = {
    "item": lambda x, m, f: x.sum().item(),
    "tolist": lambda x, m, f: x.tolist(),
    "cpu": lambda x, m, f: x.cpu(),
    "bool": lambda x, m, f: bool(m.any()),
    "int": lambda x, m, f: int(x[0, 0]),
    "float": lambda x, m, f: float(f[0, 0]),
    "a bound": lambda x, m, f: x[: x[0, 1]],
    "a place": lambda x, m, f: x[x[0, 1] - 1],
    "range": lambda x, m, f: range(x[0, 0]),
    "equal": lambda x, m, f: torch.equal(x, x + 0),
    "allclose": lambda x, m, f: torch.allclose(f, f),
    "text": lambda x, m, f: f"{x.sum()}",
}
SIZED_BY_DATA = {
    "nonzero": lambda x, m, f: m.nonzero(),
    "where": lambda x, m, f: torch.where(m),
    "a mask": lambda x, m, f: x[m],
    "a mask beside": lambda x, m, f: x[:, m[0]],
    "rows by a mask": lambda x, m, f: _assign(x, m, x[0].repeat(2)[: int(m.near.sum())]),
    "masked_select": lambda x, m, f: x.masked_select(m),
    "unique": lambda x, m, f: x.unique(),
    "unique_consecutive": lambda x, m, f: x.unique_consecutive(),
    "repeat_interleave": lambda x, m, f: x[0].repeat_interleave(x[1]),
    "bincount": lambda x, m, f: x[0].bincount(),
    "eigh": lambda x, m, f: torch.linalg.eigh(f @ f.T),
}
GIVEN = {
    "a list": lambda x, m, f: torch.tensor([1, 2], device=x.device),
    "new_tensor": lambda x, m, f: x.new_tensor([1, 2]),
    "to": lambda x, m, f: torch.ones(3).to(x.device),
    "copy_": lambda x, m, f: f[0].copy_(torch.ones(3)),
    "an index": lambda x, m, f: x[[0, 1]],
    "an index of the host": lambda x, m, f: x[torch.tensor([0, 1])],
    "a number at indices": lambda x, m, f: _assign(x, x[0].clamp(max=1), 7),
}
FREE = {
    "arithmetic": lambda x, m, f: (x + 1, f @ f.T, x.argsort(), x.cumsum(1), F.one_hot(x, 6)),
    "views": lambda x, m, f: (x[0], x[:, 1:], x[..., None], x.view(-1), x.split([1, 2], 1)),
    "gather": lambda x, m, f: (x.gather(1, x.clamp(max=2)), f[x.clamp(max=1)]),
    "fills": lambda x, m, f: (x.masked_fill(m, 0), torch.zeros_like(x), x.new_ones(3)),
    "a number under a mask": lambda x, m, f: _assign(x, m, 0),
    "a number in a slice": lambda x, m, f: _assign(x, (slice(None), 1), 0),
    "a tensor at indices": lambda x, m, f: _assign(x, x[0].clamp(max=1), x.new_ones(())),
    "sizes": lambda x, m, f: torch.arange(x.shape[1], device=x.device),
    "with output_size": lambda x, m, f: x[0].repeat_interleave(x[0], output_size=6),
    "upload": lambda x, m, f: upload([1, 2], x.device),
    "attention": lambda x, m, f: F.scaled_dot_product_attention(f[None], f[None], f[None]),
    "histc": lambda x, m, f: torch.histc(x.int(), bins=6, min=0, max=5),
    "of the host": lambda x, m, f: (torch.ones(3).tolist(), torch.ones(3).nonzero()),
    "nothing": lambda x, m, f: torch.tensor([], device=x.device),
}


@pytest.mark.parametrize("act", [*READING.values(), *SIZED_BY_DATA.values(), *GIVEN.values()],
                         ids=[*READING, *SIZED_BY_DATA, *GIVEN])  # fmt: skip
@pytest.mark.parametrize("graph", [torch.no_grad, torch.inference_mode])
def test_the_host_waits_once(waits, act, graph):
    with graph():
        assert counted(waits, act) == 1


@pytest.mark.parametrize("act", FREE.values(), ids=FREE)
def test_the_host_does_not_wait(waits, act):
    assert counted(waits, act) == 0


def test_copies_cost_nothing_to_read(waits):
    def act(x, m, f):
        here, mask = download([x, m])
        assert here.tolist() == x.near.tolist()
        assert mask.dtype == torch.bool
        here[mask].unique().tolist()
        known = Downloads()
        known.fetch([here, None, "text"])
        assert known.of(here) is here

    assert counted(waits, act) == 1


def test_what_is_known_is_not_read_again(waits):
    def act(x, m, f):
        known = Downloads()
        known.fetch([x, m])
        assert known.of(x).tolist() == x.near.tolist()
        assert known.arguments({"grid": x, "mask": m, "text": "a"})["grid"] is known.of(x)

    assert counted(waits, act) == 1


def test_lists_of_numbers_and_what_is_named_are_read_together(waits):
    def act(x, m, f):
        given = {"sizes": x[0], "places": x[None], "mask": m, "other": m[0], "pixels": f}
        told = Downloads().arguments(given, ("mask", "missing"))
        here = {name for name, value in told.items() if value.device.type == "cpu"}
        assert here == {"sizes", "places", "mask"}
        assert told["mask"].dtype == torch.bool

    assert counted(waits, act) == 1


def test_devices_do_not_mix(waits):
    with pytest.raises(RuntimeError, match="same device"):
        counted(waits, lambda x, m, f: x + torch.ones(3))


def test_the_device_answers_as_the_host_does(waits):
    model, batches = reader("llava")
    want = model(**batches["ragged"]).logits
    with waits.StandIn() as machine:
        got = machine.put(model)(**machine.put(batches["ragged"])).logits
        assert got.device.type == "cuda"
        assert torch.equal(got.near, want)


# -- what methods add


def reader(name):
    """A tiny vision-language model, and a batch of one image and one of ragged rows."""
    member = MEMBERS[name]()
    model = loud(member.build("sdpa"))
    with torch.no_grad():
        return model, {key: batch_of(member, model, rows)[0] for key, rows in BATCHES.items()}


def encoder(name):
    """A tiny encoder, and batches of one image and three."""
    images = {"one": 1, "ragged": 3}
    model = encoder_of.__wrapped__("alone", name)
    return model, {key: images_of("alone", name, count) for key, count in images.items()}


MAIN = (
    "random", "uniform", "divprune", "cdpruner", "vtc-cls", "visionzip", "scope", "dart", "fastv",
    "pyramiddrop", "sparsevlm", "tome", "flowcut",
)  # fmt: skip
LAYOUTS = {
    "llava": "one image, with a class token",
    "qwen3_vl": "cells of all images in one sequence",
    "qwen2_5_vl": "the same in windows",
    "lfm2_vl": "images that are padded to one length",
    "gemma3": "patches that are pooled",
    "internvl": "tiles",
    "idefics3": "tiles with padding between them and in them",
    "llava_next": "tiles that are put together, with newlines",
    "llava_onevision": "the same, interpolated to fewer tokens",
}
"""Families, one for each way in which visual tokens are laid out."""
LINES = "which newlines survive follows from the patches that do, as the host works out"
FRAMES = "survivors of a video are put together from those of its frames, by the host"
PACKED = "signals are interpolated by code of the model, which waits, one after another"
ABOVE = {
    "hunyuan_vl": {"tome": (3, LINES)},
    "llava_next": {"tome": (3, LINES), "flowcut": (3, LINES)},
    "llava_next_video": {"tome": (3, LINES), "flowcut": (3, LINES)},
    "llava_next_video-video": {"tome": (3, FRAMES), "flowcut": (3, FRAMES)},
    "llava_onevision": {"visionzip": (4, PACKED), "scope": (3, PACKED)},
    "llava_onevision-tiles": {"tome": (3, LINES)},
    "phi4_multimodal": {"tome": (3, LINES)},
}
"""Main methods that add more than the target, how many waits, and why."""
BY_DATA = "each step that decides how many tokens survive tells the host, for every group of images"
RAGGED = "images keep different numbers inside the encoder, which the host is told at each step"
EIGEN = "eigenvectors, which the library checks, and loops that end by what they find"
MORE = {
    "llava": {
        "atp-llava": BY_DATA,
        "llava-prumerge": BY_DATA,
        "pixelprune": RAGGED,
        "prunesid": EIGEN,
        "recoverable-compression": BY_DATA,
        "vflowopt": BY_DATA,
    },
    "qwen3_vl": {
        "atp-llava": BY_DATA,
        "feather": BY_DATA,
        "pixelprune": RAGGED,
        "prunesid": EIGEN,
        "vflowopt": BY_DATA,
    },
    "vit": {"flowcut": RAGGED, "pixelprune": RAGGED},
}
"""Methods that add more than the target to ragged rows of a model, and why."""


def added(machine, model, batches, slugs, run=None):
    """Method -> waits that it adds to a forward, or to `run` of the model and a batch, at most, and
    where; without those refused.
    """
    machine.put(model)
    batches = machine.put(batches)

    def prefill(batch):
        with machine.waits() as found:
            run(model, batch) if run else model(**batch)
        return found

    bare = {key: prefill(batch)["total"] for key, batch in batches.items()}
    found = {}
    for slug in slugs:
        try:
            with foveate.use(model, settings(foveate.get_method(slug))):
                runs = {key: prefill(batch) for key, batch in batches.items()}
        except foveate.FoveateError:  # the support matrix says which
            continue
        worst = max(runs, key=lambda key: runs[key]["total"] - bare[key])
        found[slug] = runs[worst]["total"] - bare[worst], runs[worst]["places"]
    return found


def beyond(found):
    """Those of `added` that are above the target."""
    return {slug: of for slug, of in found.items() if of[0] > TARGET}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prefill_waits_at_most_twice_more(waits, name):
    """With the most used methods, for one image and for ragged rows, or as often as is said."""
    model, batches = reader(name)
    with waits.StandIn() as machine:
        found = added(machine, model, batches, MAIN)
    assert len(found) >= 8
    above = {slug: count for slug, (count, _) in ABOVE.get(name, {}).items()}
    assert {slug: count for slug, (count, _) in beyond(found).items()} == above, beyond(found)


@pytest.mark.parametrize("name", sorted(MEMBERS.keys() - LAYOUTS.keys()))
def test_a_prefill_of_other_families_too(waits, name):
    test_a_prefill_waits_at_most_twice_more(waits, name)


@pytest.mark.parametrize("name", MORE)
def test_methods_that_wait_more_are_these(waits, name):
    """Of all methods that a model takes, in ragged rows."""
    model, batches = encoder(name) if name == "vit" else reader(name)
    with waits.StandIn() as machine:
        found = added(machine, model, {"ragged": batches["ragged"]}, foveate.list_methods())
    assert len(found) > (8 if name == "vit" else 40)
    assert beyond(found).keys() == MORE[name].keys(), beyond(found)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_generate_waits_once_more_and_decoding_never(waits, name):
    """The prompt is read before the encoder, so that a token which is read from can stay."""
    model, batches = reader(name)

    def answer(tokens):
        def run(model, batch):
            model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

        found = added(machine, model, batches, MAIN, run)
        return {slug: count for slug, (count, _) in found.items()}

    with waits.StandIn() as machine:
        first, more = answer(1), answer(3)
    assert more == first
    assert max(first.values()) <= TARGET + 1


def test_a_wait_that_was_added_is_found(waits, monkeypatch):
    scores = methods.FastV.scores

    def slow(self, tokens):
        tokens.index.sum().item()
        return scores(self, tokens)

    model, batches = reader("llava")
    with waits.StandIn() as machine:
        before = added(machine, model, batches, ["fastv"])["fastv"][0]
        monkeypatch.setattr(methods.FastV, "scores", slow)
        assert added(machine, model, batches, ["fastv"])["fastv"][0] > before


def test_scope_covers_alike_on_both_devices(waits):
    generator = torch.Generator().manual_seed(0)
    like = torch.rand(2, 9, 9, generator=generator)
    before, gain = torch.rand(2, 9, generator=generator) / 2, torch.zeros(2, 9).double()
    after = torch.maximum(before, like[:, 3])
    there = gain.clone()
    _cover(gain, like, before, after)
    with waits.StandIn() as machine:
        _cover(*machine.put((there, like, before, after)))
    torch.testing.assert_close(there, gain, rtol=0, atol=1e-12)
    assert bool((gain < 0).any())
