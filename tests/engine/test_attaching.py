"""Attaching: whole or not at all, beside what others put on the model, and between its calls."""

import copy
import functools
import threading
import time
from contextlib import suppress

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import foveate
from foveate.engine.gate import Gate
from foveate.engine.text import TextAttachment
from foveate.engine.vision.hooks import VisionAttachment
from foveate.errors import AttachError, FoveateError, UnsupportedModelError
from foveate.methods import DivPrune, FastV, ToMe, VisionZip
from tests.tinies import prompts, tiny_llava

INPUTS = prompts([(3, 5)])
METHODS = {
    "llm": FastV(layer=2, keep=0.3), "pre_llm": DivPrune(keep=0.3),
    "signals": VisionZip(keep=0.3), "vision": ToMe(keep=0.5),
}  # fmt: skip
SETTINGS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model():
    return tiny_llava(layers=4)


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def pruned(method):
    with foveate.use(twin := tiny_llava(layers=4), method):
        return logits(twin)


def outside(model):
    """What of modules a session might touch."""
    return {
        name: (dict(vars(m)), list(m._forward_pre_hooks), list(m._forward_hooks), type(m))
        for name, m in model.named_modules()
    }


# -- whole or not at all


@pytest.mark.parametrize("stage", METHODS)
def test_whatever_is_raised_while_attaching_leaves_the_model_as_it_was(model, stage, monkeypatch):
    """An interrupt at each thing that is put on."""
    bare, before = logits(model), outside(model)
    placed = TextAttachment.replace_forward
    left = 0

    def counted(self, *args, **kwargs):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        placed(self, *args, **kwargs)

    for side in (TextAttachment, VisionAttachment):
        monkeypatch.setattr(side, "replace_forward", counted)
    for number in range(200):
        left = number
        try:
            session = foveate.apply(model, METHODS[stage])
        except KeyboardInterrupt:
            assert outside(model) == before
        else:
            session.remove()
            break
    monkeypatch.undo()
    assert number > 5
    assert outside(model) == before
    assert torch.equal(logits(model), bare)
    with foveate.use(model, METHODS[stage]):
        assert torch.equal(logits(model), pruned(METHODS[stage]))


def test_a_missing_module_leaves_the_model_as_it_was(model):
    before = outside(model)
    projector = model.model.vision_tower.encoder.layers[2].self_attn.q_proj
    del model.model.vision_tower.encoder.layers[2].self_attn.q_proj
    with pytest.raises(AttributeError):
        foveate.apply(model, METHODS["signals"])
    model.model.vision_tower.encoder.layers[2].self_attn.q_proj = projector
    assert {k: v[1:] for k, v in outside(model).items()} == {k: v[1:] for k, v in before.items()}
    with foveate.use(model, METHODS["signals"]):
        logits(model)


def test_an_interrupted_removal_can_be_done_again(model):
    before, session = outside(model), foveate.apply(model, METHODS["llm"])
    undo = session.text._undo

    def interrupt():
        undo.remove(interrupt)
        raise KeyboardInterrupt

    undo.insert(len(undo) // 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.remove()
    session.remove()
    assert outside(model) == before


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.model, lambda m: m.model.language_model])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_an_attached_model_are_refused(model, copied, of):
    with foveate.use(model, METHODS["llm"]), pytest.raises(AttachError, match="cannot be copied"):
        copied(of(model))
    copied(of(model))


def traced(model):
    ids, pixels = INPUTS["input_ids"], INPUTS["pixel_values"]
    return torch.jit.trace(lambda *given: model(*given)[0], (ids, pixels))


def exported(model):
    return torch.export.export(model, (), {**INPUTS, "use_cache": False})


@pytest.mark.parametrize("record", [traced, exported])
@pytest.mark.parametrize("stage", ["llm", "vision"])
def test_what_records_one_run_for_all_is_refused(model, stage, record):
    """Before torch fails at what it cannot record."""
    model.requires_grad_(False)
    with foveate.use(model, METHODS[stage]), pytest.raises(AttachError, match="traced or exported"):
        record(model)
    assert torch.equal(logits(model), logits(tiny_llava(layers=4)))


def test_a_session_is_entered_once_at_a_time(model):
    """Else leaving the inner block would leave the outer one without the session."""
    session, want = foveate.use(model, METHODS["llm"]), pruned(METHODS["llm"])
    for _ in range(2):
        with session:
            with pytest.raises(AttachError, match="already carries"):
                session.attach()
            assert torch.equal(logits(model), want)
    assert torch.equal(logits(model), logits(tiny_llava(layers=4)))


@pytest.mark.parametrize("training", [False, True])
def test_a_forward_that_is_called_itself_sees_labels(model, training):
    """Tokens are ranked by the question alone, as where the model is called."""
    model.train(training)
    labels = torch.full_like(INPUTS["input_ids"], -100)
    labels[:, -2:] = INPUTS["input_ids"][:, -2:]
    with foveate.use(model, METHODS["llm"]) as run:
        losses, kept = [], []
        for call in (model, model.forward, model, model.forward):
            losses.append(call(**INPUTS, labels=labels).loss.item())
            kept.append(run.record.images[0].kept["llm:2"].tolist())
        model.eval()(**INPUTS)
        assert run.record.images[0].kept["llm:2"].tolist() != kept[0]
    assert losses == [losses[0]] * 4
    assert kept == [kept[0]] * 4


def test_a_forward_after_a_refused_call_sees_labels(model, monkeypatch):
    labels = torch.full_like(INPUTS["input_ids"], -100)
    labels[:, -2:] = INPUTS["input_ids"][:, -2:]
    with foveate.use(model, METHODS["llm"]) as run:
        want = model(**INPUTS, labels=labels).loss, run.record.images[0].kept["llm:2"]
        with monkeypatch.context() as patch:
            patch.setattr("foveate.engine.model_hooks.labels_of", lambda *args: {}["refused"])
            with pytest.raises(KeyError):
                model(**INPUTS, labels=labels)
        got = model.forward(**INPUTS, labels=labels).loss, run.record.images[0].kept["llm:2"]
    assert all(map(torch.equal, want, got))


# -- what others put on


def accelerated(model):
    """accelerate's hooks on every module."""
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    return lambda: remove_hook_from_module(model, recurse=True)


def profiled(model):
    """Forwards that count calls, and are put back from what was there before."""
    calls, undo = [], []
    base = model.model
    text = base.language_model
    for module in (model, base, base.vision_tower, text, *text.layers):
        had, before = "forward" in vars(module), module.forward

        def wrapped(*args, before=before, **kwargs):
            calls.append(1)
            return before(*args, **kwargs)

        module.forward = wrapped
        back = functools.partial(setattr, module, "forward", before)
        undo.append(back if had else functools.partial(delattr, module, "forward"))
    profiled.calls = calls
    return lambda: [back() for back in undo]


def hooked(model):
    handles = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    return lambda: [handle.remove() for handle in handles]


@pytest.mark.parametrize("theirs", [accelerated, profiled, hooked])
@pytest.mark.parametrize("stage", METHODS)
@pytest.mark.parametrize("on", ["before", "within"])
@pytest.mark.parametrize("off", ["within", "after", "in the next"])
def test_what_others_put_on_and_take_off_leaves_sessions_right(model, theirs, stage, on, off):
    bare, want, other = logits(model), pruned(METHODS[stage]), METHODS["llm"]
    take_off = theirs(model) if on == "before" else None
    with foveate.use(model, METHODS[stage]):
        torch.testing.assert_close(logits(model), want)
        take_off = take_off or theirs(model)
        torch.testing.assert_close(logits(model), want)
        if off == "within":
            take_off()
            torch.testing.assert_close(logits(model), want)
    torch.testing.assert_close(logits(model), bare)
    if off == "after":
        take_off()
        torch.testing.assert_close(logits(model), bare)
    with foveate.use(model, other):
        if off == "in the next":
            torch.testing.assert_close(logits(model), pruned(other))
            take_off()
        torch.testing.assert_close(logits(model), pruned(other))
    torch.testing.assert_close(logits(model), bare)
    two = prompts([(3, 5), (2, 4)])
    assert torch.equal(model(**two).logits, tiny_llava(layers=4)(**two).logits)


def test_their_hooks_still_work_after_the_session(model):
    with foveate.use(model, METHODS["llm"]):
        profiled(model)
    profiled.calls.clear()
    logits(model)
    assert len(profiled.calls) == 4 + 4


PLACES = {
    "base": lambda m: m.model, "text": lambda m: m.model.language_model,
    "layer": lambda m: m.model.language_model.layers[1], "tower": lambda m: m.model.vision_tower,
    "tower layer": lambda m: m.model.vision_tower.encoder.layers[-1],
}  # fmt: skip


VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    image_size=56, patch_size=8, initializer_range=0.2,
)  # fmt: skip


def replaced(module):
    """A forward that knows of no other."""
    module.forward = lambda *args, **kwargs: type(module).forward(module, *args, **kwargs)
    return lambda: delattr(module, "forward")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("stage", METHODS)
def test_a_forward_that_keeps_tokens_from_being_removed_is_no_silent_one(model, stage, place):
    """Either its answer is that of the method, or there is none."""
    want = pruned(METHODS[stage])
    with foveate.use(model, METHODS[stage]):
        take_off = replaced(PLACES[place](model))
        if place in ("base", "text", "layer") or (stage, place) == ("vision", "tower"):
            # A layer that is handed fewer tokens than its arguments tell of raises itself.
            told = "was replaced or taken off within" if place != "layer" else None
            with pytest.raises((AttachError, RuntimeError), match=told):
                logits(model)
            with pytest.raises((AttachError, RuntimeError), match=told):
                model.generate(**INPUTS, **SETTINGS)
        else:
            torch.testing.assert_close(logits(model), want)
        take_off()
        torch.testing.assert_close(logits(model), want)


def test_a_forward_that_keeps_an_encoder_from_losing_tokens_is_no_silent_one():
    pixels, model = (
        torch.rand(2, 3, 56, 56),
        ViTForImageClassification(VIT).eval().requires_grad_(False),
    )
    bare = model(pixels).logits
    with foveate.use(model, METHODS["vision"]):
        want = model(pixels).logits
        assert not torch.allclose(want, bare)
        take_off = replaced(model.vit)
        with pytest.raises(AttachError, match="was replaced or taken off within"):
            model(pixels)
        take_off()
        with suppress(AttachError):  # it is put back by what sees that it is missing
            model(pixels)
        torch.testing.assert_close(model(pixels).logits, want)


@pytest.mark.parametrize("stage", METHODS)
def test_weights_that_accelerate_offloads_are_scored_with(model, stage):
    want = pruned(METHODS[stage])
    cpu_offload(model, execution_device="cpu")
    assert model.model.language_model.layers[2].self_attn.k_proj.weight.is_meta
    with foveate.use(model, METHODS[stage]):
        torch.testing.assert_close(logits(model), want)


# -- wrappers


def test_a_peft_model_is_taken_as_it_is(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    wrapped.add_adapter("other", config)
    for name in ("default", "other"):
        wrapped.set_adapter(name)
        with foveate.use(wrapped, METHODS["llm"]) as run:
            adapted = wrapped.generate(**INPUTS, **SETTINGS)
            got = logits(wrapped)
        assert run.report()["images"]
        with foveate.use(wrapped.get_base_model(), METHODS["llm"]):
            torch.testing.assert_close(logits(wrapped), got)
        assert adapted.shape[1] == INPUTS["input_ids"].shape[1] + 3
    merged = wrapped.merge_and_unload()
    with foveate.use(merged, METHODS["llm"]):
        torch.testing.assert_close(logits(merged), got, rtol=1e-4, atol=1e-4)


def test_what_is_no_model_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="Linear is not a transformers model"):
        foveate.use(nn.Linear(2, 2), "fastv")


# -- threads


class Stream:
    """What `generate` hands tokens to, one by one, when the reader allows."""

    def __init__(self):
        self.allowed, self.begun, self.ended = threading.Event(), threading.Event(), False
        self.got = []

    def put(self, value):
        self.begun.set()
        self.allowed.wait(600)
        self.got.append(value)

    def end(self):
        self.ended = True


def streaming(model, stream):
    thread = threading.Thread(
        target=model.generate, kwargs={**INPUTS, **SETTINGS, "streamer": stream}
    )
    thread.start()
    return thread


def answer(model):
    return model.generate(**INPUTS, **SETTINGS)[0, INPUTS["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("stage", METHODS)
def test_leaving_waits_for_a_thread_that_generates(model, stage):
    with foveate.use(model, METHODS[stage]):
        want = answer(model)
    stream = Stream()
    with foveate.use(model, METHODS[stage]):
        thread = streaming(model, stream)
        stream.begun.wait(600)
        threading.Timer(0.05, stream.allowed.set).start()
    assert stream.ended
    thread.join()
    assert [int(t) for t in torch.cat([v.flatten() for v in stream.got[1:]])] == want


def test_leaving_waits_for_a_thread_that_has_not_begun(model):
    with foveate.use(model, METHODS["llm"]):
        want = answer(model)
    for _ in range(5):
        stream = Stream()
        stream.allowed.set()
        with foveate.use(model, METHODS["llm"]):
            thread = streaming(model, stream)
        thread.join()
        assert [int(t) for t in torch.cat([v.flatten() for v in stream.got[1:]])] == want


def test_a_generate_of_a_session_that_was_left_ends_its_stream_with_an_error(model):
    stream = Stream()
    with foveate.use(model, METHODS["llm"]):
        kept = model.generate
    with pytest.raises(AttachError, match="has been left"):
        kept(**INPUTS, streamer=stream)
    assert stream.ended


def test_a_generate_that_fails_ends_its_stream(model):
    stream = Stream()
    stream.allowed.set()
    with foveate.use(model, METHODS["llm"]), pytest.raises(FoveateError):
        model.generate(**INPUTS, prefill_chunk_size=4, streamer=stream)
    assert stream.ended


def test_sessions_come_and_go_between_the_calls_of_another_thread(model):
    """Each answer of the other thread is one with, or one without a session."""
    bare = logits(model)
    sound = [bare, *(pruned(METHODS[stage]) for stage in ("llm", "pre_llm", "vision"))]
    got, stop = [], threading.Event()

    def calls():
        while not stop.is_set():
            got.append(logits(model))

    thread = threading.Thread(target=calls)
    thread.start()
    try:
        for _ in range(6):
            for stage in ("llm", "pre_llm", "vision"):
                handle = foveate.apply(model, METHODS[stage])
                time.sleep(0.01)
                handle.remove()
    finally:
        stop.set()
        thread.join()
    assert len(got) > 3
    for value in got:
        assert any(torch.allclose(value, other, atol=1e-5) for other in sound)


def test_attaching_or_removing_within_a_forward_is_refused(model):
    def within(act):
        hook = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: act())
        try:
            logits(model)
        finally:
            hook.remove()

    bare = logits(model)
    with pytest.raises(AttachError, match="within a forward"):
        within(lambda: foveate.apply(model, METHODS["llm"]))
    assert torch.equal(logits(model), bare)
    with foveate.use(model, METHODS["llm"]) as run:
        with pytest.raises(AttachError, match="within a forward"):
            within(run.remove)
        torch.testing.assert_close(logits(model), pruned(METHODS["llm"]))


def test_whom_one_waits_for_is_told(monkeypatch):
    gate, inside, leave = Gate(), threading.Event(), threading.Event()
    monkeypatch.setattr("foveate.engine.gate.PATIENCE", 0.02)

    def visit():
        with gate:
            inside.set()
            leave.wait(600)

    thread = threading.Thread(target=visit, name="the-reader")
    thread.start()
    inside.wait(600)
    threading.Timer(0.2, leave.set).start()
    with pytest.warns(UserWarning, match="waits for the-reader"):
        gate.close([], lambda: None)
    thread.join()
