"""Streams equal a full-length model that hides evicted tokens, and stay below their cap."""

import functools

import pytest
import torch

import foveate
from foveate.streaming import InfiniPotV, Stream
from tests.methods_for_tests import EveryThird
from tests.streaming.oracle import Oracle
from tests.tinies import IMAGE, PATCHES, tiny_llava

QUESTION = [40, 41, 42, 43]
TOLERANCE = 5e-5


@functools.cache
def model_of(text="qwen2"):
    return tiny_llava(text, layers=4)


def chunk(number, frames=1, before=(), after=()):
    """Ids and pixels of some frames; a slow drift, so that neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(3, 48, 48, generator=generator)
    pixels = []
    for frame in range(number, number + frames):
        generator.manual_seed(1000 + frame)
        pixels.append(still + 0.5 * torch.randn(3, 48, 48, generator=generator))
    ids = [*before, *[IMAGE] * (PATCHES * frames), *after]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.stack(pixels)}


def features_of(model, inputs):
    with torch.no_grad():
        return model.model.get_image_features(inputs["pixel_values"]).pooler_output


def asked(stream, steps=5, **options):
    """Ids of question and answer, and the logits of each step."""
    out = stream.ask(
        torch.tensor([QUESTION]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[0].tolist(), torch.cat(out.logits)


CHUNKS = [
    dict(number=0, before=(1, 5, 6)),
    dict(number=1, after=(7,)),
    dict(number=2, frames=2, before=(8, 9)),
    *(dict(number=n, before=(10,) if n % 2 else ()) for n in range(4, 12)),
]


def against_oracle(method, stream_options, oracle, kept=None, renumbered=False, text="qwen2"):
    """Feed all chunks to both, and ask both after every third."""
    model = model_of(text)
    plain = Oracle(model, None)
    with foveate.use(model, method) as run:
        stream = Stream(run, **stream_options)
        for number, arguments in enumerate(CHUNKS):
            inputs = chunk(**arguments)
            stream.add(**inputs)
            ids = inputs["input_ids"][0].tolist()
            for of in (oracle, plain):
                with_all = () if of is plain else (kept, renumbered)
                of.add(ids, features_of_plain(number), *with_all)
            assert stream.tokens == len(oracle.seen[0][0]) <= stream.cap - stream.reserve
            if number % 3 == 1 or number == len(CHUNKS) - 1:
                compare(stream, oracle, plain)
    return stream


@functools.cache
def features_of_plain(number, text="qwen2"):
    return features_of(model_of(text), chunk(**CHUNKS[number]))


def compare(stream, oracle, plain):
    held = stream.tokens
    said, got = asked(stream)
    assert stream.tokens == held
    want, before = oracle.ask(said[:-1])
    oracle.forget(before)
    other, before = plain.ask(said[:-1])
    plain.forget(before)
    first = len(QUESTION) - 1
    distance = (want[first:] - got).abs().max().item()
    bite = (other[first:] - got).abs().max().item()
    print(f"{distance:.1e}, bite {bite:.2f}, {oracle.evictions} evictions")
    assert distance <= TOLERANCE
    assert bite > 0.02 or not oracle.evictions


ALL = ("uniform", 1.0)


def everything():
    return foveate.get_method("uniform")(keep=1.0)


@pytest.mark.parametrize("tar", [0.5, 0.0, 1.0])
def test_stream_equals_the_oracle(tar):
    """Selection, eviction and questions, with text around frames and chunks of two frames."""
    oracle = Oracle(model_of(), 216, 16, tar=tar)
    rule = InfiniPotV(tar=tar)
    against_oracle(everything(), {"cap": 216, "reserve": 16, "rule": rule}, oracle)
    assert oracle.evictions >= 4
