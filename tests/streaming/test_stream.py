"""Streams equal a full-length model that hides evicted tokens, and stay below their cap."""

import functools

import pytest
import torch

import foveate
from foveate.errors import AttachError, InputError
from foveate.measure.flops import kv_bytes
from foveate.streaming import InfiniPotV, Stream, tokens_in
from tests.methods_for_tests import EveryThird
from tests.streaming.oracle import Oracle
from tests.tinies import IMAGE, PATCHES, tiny_llava

QUESTION = [40, 41, 42, 43]
TOLERANCE = 5e-5
CHUNKS = [
    {"number": 0, "before": (1, 5, 6)},
    {"number": 1, "after": (7,)},
    {"number": 2, "frames": 2, "before": (8, 9)},
    *({"number": n, "before": (10,) if n % 2 else ()} for n in range(4, 9)),
]


@functools.cache
def model_of(text="qwen2"):
    return tiny_llava(text, layers=2, vision_layers=2)


@functools.cache
def everything():
    return foveate.get_method("uniform")(keep=1.0)


def chunk(number, frames=1, before=(), after=()):
    """Ids and pixels of some frames; what changes between them is less than what stays."""
    generator = torch.Generator().manual_seed(0)
    still = torch.randn(3, 48, 48, generator=generator)
    pixels = []
    for frame in range(number, number + frames):
        generator.manual_seed(1000 + frame)
        pixels.append(still + 0.5 * torch.randn(3, 48, 48, generator=generator))
    ids = [*before, *[IMAGE] * (PATCHES * frames), *after]
    return {"input_ids": torch.tensor([ids]), "pixel_values": torch.stack(pixels)}


@functools.cache
def features_of(number):
    with torch.no_grad():
        pixels = chunk(**CHUNKS[number])["pixel_values"]
        return model_of().model.get_image_features(pixels).pooler_output


def asked(stream, steps=4, **options):
    """Ids of question and answer, and the logits of each step."""
    out = stream.ask(
        torch.tensor([QUESTION]), max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return out.sequences[0].tolist(), torch.cat(out.logits)


def watch(stream, number, oracle, plain, keep=False):
    """Ask the stream and both oracles; with `keep`, the stream's remembers what was said."""
    held = stream.tokens
    said, got = asked(stream, keep=keep)
    want, before = oracle.ask(said[:-1])
    other, later = plain.ask(said[:-1])
    plain.forget(later)
    if keep:
        oracle.next += len(said) - 1
        oracle.make_room(0)
    else:
        assert stream.tokens == held
        oracle.forget(before)
    assert stream.tokens == len(oracle.seen[0][0]) <= stream.cap - stream.reserve
    first = len(QUESTION) - 1
    distance, bite = ((of[first:] - got).abs().max().item() for of in (want, other))
    print(f"{number}: {distance:.1e}, bite {bite:.2f}, {oracle.evictions} evictions")
    assert distance <= TOLERANCE
    assert bite > 0.02 or not (oracle.evictions or oracle.renumberings)


def against_oracle(method, oracle, *options, keeps=(), rule=None, positions="original"):
    """Give all chunks to both, and ask both now and then; `options` are of the oracle's `add`."""
    plain = Oracle(model_of(), None)
    features = [features_of(number) for number in range(len(CHUNKS))]  # with nothing removed
    with foveate.use(model_of(), method) as run:
        stream = Stream(run, oracle.cap, rule, reserve=oracle.reserve, positions=positions)
        for number, arguments in enumerate(CHUNKS):
            inputs = chunk(**arguments)
            stream.add(**inputs)
            ids = inputs["input_ids"][0].tolist()
            oracle.add(ids, features[number], *options)
            plain.add(ids, features[number])
            assert stream.tokens == len(oracle.seen[0][0])
            if number in (1, 4, len(CHUNKS) - 1):
                watch(stream, number, oracle, plain, keep=number in keeps)
    assert oracle.evictions >= 3


@pytest.mark.parametrize(
    ("keep", "recent", "tar"),
    [(0.75, 0.25, 0.5), (0.75, 0.25, 0.0), (0.6, 0.5, 1.0)],
    ids=["both", "values", "time"],
)
def test_stream_equals_the_oracle(keep, recent, tar):
    """Selection, eviction and questions, with text around frames and a chunk of two frames."""
    oracle = Oracle(model_of(), 180, 16, keep, recent, tar)
    against_oracle(everything(), oracle, rule=InfiniPotV(keep, recent, tar))


def test_kept_questions_equal_the_oracle():
    """The answers stay in sight, until their frames are no longer recent."""
    oracle = Oracle(model_of(), 180, 16)
    against_oracle(everything(), oracle, keeps=(1, 4))


def test_closed_gaps_equal_the_oracle():
    """Positions run out several times; keys then move to where slots are."""
    model = model_of()
    model.config.text_config.max_position_embeddings, before = 200, 512
    try:
        oracle = Oracle(model, 150, 16, limit=200)
        against_oracle(everything(), oracle, positions="renumbered")
    finally:
        model.config.text_config.max_position_embeddings = before
    assert oracle.renumberings >= 2


@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_shortened_frames_equal_the_oracle(positions):
    """A method takes two thirds of each frame before the cache sees it."""
    oracle, kept = Oracle(model_of(), 110, 16), set(range(0, PATCHES, 3))
    against_oracle(EveryThird(12, positions=positions), oracle, kept, positions == "renumbered")


def test_a_thousand_frames_stay_below_the_cap():
    """Bytes after every layer of every forward, in questions too; positions run out 70 times."""
    model = model_of("llama")
    layers, peaks = model.model.language_model.layers, []
    with foveate.use(model, everything()) as run:
        cap = tokens_in(run, 200_000)
        stream = Stream(run, cap, reserve=12, positions="renumbered")
        most = kv_bytes(run.family, [cap] * len(layers), 1, model.dtype)
        hooks = [
            layer.register_forward_hook(lambda *of: peaks.append(stream.bytes)) for layer in layers
        ]
        inputs = chunk(0, before=(1,))
        for number in range(1000):
            stream.add(**inputs)
            inputs = chunk(number + 1)
            if number % 100 == 99:
                assert len(asked(stream)[0]) == len(QUESTION) + 4
        for hook in hooks:
            hook.remove()
    held = sum(x.nbytes for layer in stream._held.layers for x in (layer.keys, layer.values))
    assert held == stream.bytes == kv_bytes(run.family, [stream.tokens] * 2, 1, model.dtype)
    assert len(peaks) == 2 * (1000 + 10 * 4)
    assert 0.9 * most < max(peaks) <= most <= 200_000
    assert stream.frames == 1000


def test_cap_of_bytes_is_what_fits():
    with foveate.use(model_of(), everything()) as run:
        one = kv_bytes(run.family, [1] * 2, 1, torch.float32)
        assert one == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, width, bytes
        assert [tokens_in(run, n) for n in (one, 5 * one - 1, 5 * one)] == [1, 4, 5]
        with pytest.raises(InputError, match="the cache of one token takes 512 bytes"):
            tokens_in(run, one - 1)


def test_a_forward_that_dies_leaves_the_stream():
    model = model_of()
    with foveate.use(model, everything()) as run:
        stream, other = Stream(run, 400, reserve=16), Stream(run, 400, reserve=16)
        for of in (stream, other):
            of.add(**chunk(0))
        layer = model.model.language_model.layers[1]
        hook = layer.register_forward_pre_hook(lambda *of: 1 / 0)
        for call in (lambda: stream.add(**chunk(1)), lambda: asked(stream)):
            with pytest.raises(ZeroDivisionError):
                call()
        hook.remove()
        for of in (stream, other):
            of.add(**chunk(2))
        assert stream.tokens == other.tokens == 2 * PATCHES
        assert torch.equal(asked(stream)[1], asked(other)[1])


def test_streams_share_a_session():
    """What one is given does not reach the other."""
    with foveate.use(model_of(), everything()) as run:
        first, second, alone = (Stream(run, 150, reserve=16) for _ in range(3))
        for number in range(6):
            first.add(**chunk(number))
            second.add(**chunk(number + 20))
        for number in range(6):
            alone.add(**chunk(number))
        assert torch.equal(asked(first)[1], asked(alone)[1])
        assert not torch.allclose(asked(second)[1], asked(alone)[1])


WRONG = {
    "text": ({"input_ids": torch.tensor([[4, 5]])}, "there is none in these inputs"),
    "rows": ({"input_ids": torch.full((2, PATCHES), IMAGE)}, "one row without padding"),
    "padding": (chunk(0) | {"attention_mask": torch.zeros(1, PATCHES)}, "one row without padding"),
    "no ids": ({"pixel_values": chunk(0)["pixel_values"]}, "one row without padding"),
    "no pixels": ({"input_ids": chunk(0)["input_ids"]}, "but no pixels came with it"),
    "long": (chunk(0, frames=4), "144 more tokens .* do not fit .* give fewer frames at once"),
}


@pytest.mark.parametrize("what", WRONG)
def test_chunks_that_do_not_fit_are_refused(what):
    inputs, why = WRONG[what]
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 120, reserve=20)
        stream.add(**chunk(0))
        with pytest.raises(InputError, match=why):
            stream.add(**inputs)
        assert (stream.frames, stream.tokens) == (1, PATCHES)
        with pytest.raises(InputError, match=why):
            Stream(run, 120, reserve=20).add(**inputs)  # as the first


def test_the_newest_frame_stays_where_the_rule_leaves_less():
    """So what is refused does not fit, whatever `keep` says."""
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 120, InfiniPotV(keep=0.1), reserve=20)
        for number in range(5):
            stream.add(**chunk(number))
        assert stream.tokens == 2 * PATCHES
        assert set(stream._held.tables[0][0, 0].tolist()) == {3, 4}


def test_answers_that_could_not_be_kept_are_refused_before():
    """Beside the newest frame there is room for some; afterwards the stream goes on."""
    with foveate.use(model_of(), everything()) as run:
        stream, question = Stream(run, 140, reserve=20), torch.tensor([QUESTION])
        for number in range(3):
            stream.add(**chunk(number))
        options = {"max_new_tokens": 15, "min_new_tokens": 15, "do_sample": False, "keep": True}
        for _ in range(4):
            stream.ask(question, **options)
            assert stream.tokens <= 120
        held = stream.tokens
        with pytest.raises(InputError, match="may take 19 tokens, but 12 can be kept beside"):
            stream.ask(question, **options)
        assert stream.tokens == held
        assert stream.ask(question, **options | {"keep": False}).shape == (1, 19)


def test_questions_that_do_not_fit_are_refused():
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 60, reserve=20)
        question = torch.tensor([QUESTION])
        with pytest.raises(InputError, match="add a frame, then ask"):
            stream.ask(question, max_new_tokens=2)
        stream.add(**chunk(0))
        for options, why in (
            ({"max_new_tokens": 21}, "need 25 tokens, but the cache has room for 24"),
            ({"max_new_tokens": 2, "num_beams": 2}, "num_beams would hold the cache several times"),
            ({"max_new_tokens": 2, "use_cache": False}, "leave use_cache on"),
        ):
            with pytest.raises(InputError, match=why):
                stream.ask(question, **options)
        for other in (chunk(1)["input_ids"], question[0], question[:, :0], QUESTION):
            with pytest.raises(InputError, match="give frames to add"):
                stream.ask(other, max_new_tokens=2)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_question_may_be_read_in_chunks(size):
    """At the positions after the frames, of which some were evicted."""
    with foveate.use(model_of(), EveryThird(12)) as run:
        stream = Stream(run, 80, reserve=20)
        for number in range(7):
            stream.add(**chunk(number))
        said, want = asked(stream)
        again, got = asked(stream, prefill_chunk_size=size)
    assert said == again
    assert (want - got).abs().max() <= TOLERANCE


def test_a_stream_that_kept_text_fills_says_so():
    """And goes on answering."""
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 100, reserve=40)
        stream.add(**chunk(0))
        for _ in range(2):
            asked(stream, keep=True)
        why = (
            r"36 more tokens .* do not fit into a cache of 100 with 40 for questions, of which the "
            r"newest frame holds 36 and text that stays 14; .* less text that stays, such as "
            r"questions asked with keep=True"
        )
        with pytest.raises(InputError, match=why):
            stream.add(**chunk(1))
        assert asked(stream)


def test_positions_run_out_where_they_are_original():
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 150, reserve=16)
        for number in range(13):
            stream.add(**chunk(number))
        with pytest.raises(
            InputError, match="would be at position 520, and llava was made for 512"
        ):
            stream.add(**chunk(13))
        assert asked(stream)


def test_frames_of_another_size_are_refused():
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 150, reserve=16)
        stream.add(**chunk(0))
        stream._shape = ((4, 9), 36)
        with pytest.raises(InputError, match="one of 6 x 6 tokens came after 4 x 9"):
            stream.add(**chunk(1))
        assert stream.tokens == PATCHES


def test_a_session_that_was_left_is_noticed():
    with foveate.use(model_of(), everything()) as run:
        stream = Stream(run, 150, reserve=16)
    with pytest.raises(AttachError, match="stay in its block"):
        stream.add(**chunk(0))
    assert stream.tokens == 0


@pytest.mark.parametrize(
    ("method", "options", "why"),
    [
        ("pyramiddrop", {"cap": 90, "reserve": 9}, "pyramiddrop reads the question or acts"),
        ("cdpruner", {"cap": 90, "reserve": 9}, "cdpruner reads the question or acts"),
        ("uniform", {"cap": 90, "reserve": 90}, "leaves no room for frames"),
        ("uniform", {"cap": 0}, "cap must be an integer of at least 1, got 0"),
        ("uniform", {"cap": 513}, "more than the 512 positions"),
        ("uniform", {"cap": 90, "reserve": 9, "positions": "x"}, "original or renumbered"),
        ("uniform", {"cap": 90, "reserve": 9, "rule": 0.5}, "must be an InfiniPotV, got 0.5"),
    ],
)
def test_what_no_stream_can_do_is_refused(method, options, why):
    with pytest.raises(InputError, match=why):
        Stream(foveate.use(model_of(), method), **options)
