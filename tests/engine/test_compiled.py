"""Compiled models: a session acts whatever was compiled, and whenever that was."""

import copy
import logging

import pytest
import torch

import foveate
from foveate.methods import DivPrune, FastV, ToMe, VisionZip
from tests.tinies import prompts, tiny_llava

METHODS = {
    "llm": FastV(layer=1, keep=0.3),
    "pre_llm": DivPrune(keep=0.3),
    "signals": VisionZip(keep=0.3),
    "vision": ToMe(keep=0.5),
}
LEVELS = {
    "model": lambda model: model,
    "base": lambda model: model.model,
    "text": lambda model: model.model.language_model,
    "tower": lambda model: model.model.vision_tower,
    "layers": lambda model: [
        *model.model.language_model.layers, *model.model.vision_tower.encoder.layers
    ],
}  # fmt: skip
INPUTS = prompts([(3, 5)])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    """Each test compiles anew; recompiling is told in a log that nobody reads here."""
    torch._dynamo.reset()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def small():
    """A model of few layers, as each is traced."""
    return tiny_llava(layers=2, vision_layers=2)


def compile_(model, level):
    """Compile in place; returns what is called."""
    if level == "wrapper":
        return torch.compile(model, backend="eager")
    modules = LEVELS[level](model)
    for module in modules if isinstance(modules, list) else [modules]:
        module.compile(backend="eager")
    return model


@torch.no_grad()
def logits(model):
    return model(**INPUTS).logits


def answers(stage):
    """Logits without a session, and with one."""
    plain = small()
    bare = logits(plain)
    with foveate.use(plain, METHODS[stage]):
        want = logits(plain)
    assert (want - bare).abs().max() > 1e-2
    return bare, want


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


BEFORE = [(stage, level) for level in ("model", "wrapper") for stage in METHODS]
BEFORE += [("llm", "base"), ("llm", "text"), ("pre_llm", "text"), ("llm", "layers")]
BEFORE += [("vision", "tower"), ("signals", "tower"), ("vision", "layers"), ("signals", "layers")]


@pytest.mark.parametrize(("stage", "level"), BEFORE)
def test_a_model_compiled_before_runs_its_session(stage, level):
    bare, want = answers(stage)
    model = compile_(small(), level)
    assert_same(logits(model), bare)
    with foveate.use(model, METHODS[stage]) as run:
        assert_same(logits(model), want)
    assert run.kept
    assert_same(logits(model), bare)


@pytest.mark.parametrize("level", ["model", "wrapper"])
@pytest.mark.parametrize("stage", ["llm", "vision"])
def test_a_model_may_be_compiled_within_and_outlive_its_session(stage, level):
    bare, want = answers(stage)
    plain = small()
    session = foveate.apply(plain, METHODS[stage])
    model = compile_(plain, level)
    assert_same(logits(model), want)
    session.remove()
    assert_same(logits(model), bare)


def test_a_compiled_model_takes_one_method_after_another():
    model = compile_(small(), "model")
    for stage in ("llm", "signals", "llm"):
        with foveate.use(model, METHODS[stage]):
            assert_same(logits(model), answers(stage)[1])


@pytest.mark.parametrize("compiled_within", [False, True])
def test_a_compiled_model_is_one_graph_again_after_the_session(compiled_within):
    """Code with the session's graph breaks is not used once that is gone."""
    runs = []

    def backend(graph, example):
        def run(*args):
            runs.append(graph)
            return graph(*args)

        return run

    plain = small()
    logits(plain)
    model = torch.compile(plain, backend=backend)
    if not compiled_within:
        logits(model)
    with foveate.use(plain, METHODS["llm"]):
        logits(model)
    logits(model)
    runs.clear()
    logits(model)
    again = len(runs)
    torch._dynamo.reset()
    plain = small()
    logits(plain)
    fresh = torch.compile(plain, backend=backend)
    logits(fresh)
    runs.clear()
    logits(fresh)
    assert again == len(runs)


@pytest.mark.parametrize(
    ("stage", "level"), [("llm", None), ("llm", "model"), ("llm", "text"), ("vision", "tower")]
)
def test_compiled_code_is_forgotten_with_the_session_wherever_it_led(stage, level, monkeypatch):
    """Code of the text model alone too: the session breaks up its graph as well."""
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(level))
    model = compile_(small(), level) if level else small()
    with foveate.use(model, METHODS[stage]):
        logits(model)
        assert not resets
    assert resets == [level] * (level is not None)


@pytest.mark.parametrize("level", ["model"])
def test_a_compiled_model_generates_as_it_does_uncompiled(level):
    plain = small()
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with foveate.use(plain, METHODS["llm"]):
        want = plain.generate(**INPUTS, **settings)
    model = compile_(plain, level)
    with foveate.use(model, METHODS["llm"]):
        assert torch.equal(model.generate(**INPUTS, **settings), want)


@pytest.mark.parametrize("stage", ["llm", "vision"])
def test_a_compiled_model_trains_as_it_does_uncompiled(stage):
    plain = small()
    twin = copy.deepcopy(plain)
    labels = INPUTS["input_ids"].clone()
    labels[:, :-3] = -100
    losses, gradients = [], []
    for model in (plain, twin):
        if model is twin:
            model.compile(backend="eager")
        foveate.prepare(model.train(), METHODS[stage])
        loss = model(**INPUTS, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
