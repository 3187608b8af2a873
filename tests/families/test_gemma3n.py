"""Gemma 3n: tokens with several streams of states, layers that read the keys of earlier ones."""

import pytest
import torch

import foveate
from foveate.core import Need, Step
from foveate.methods import DivPrune, PyramidDrop
from foveate.training.prepare import session_of
from tests.conformance import oracle
from tests.conformance.batches import batch_of
from tests.conformance.test_families import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.engine.test_signals import Spy
from tests.methods_for_tests import Average, EveryThird

MEMBER = MEMBERS["gemma3n"]()
IMAGE = slice(5, 21)  # columns of the image in a prompt of 5, an image and 7


@pytest.fixture
def model():
    return model_of("gemma3n")


@pytest.fixture
def inputs():
    return MEMBER.inputs([[5, 7]])


@torch.no_grad()
def test_merged_tokens_are_means_in_every_stream(model, inputs, monkeypatch):
    text, seen = MEMBER.text(model), []
    altup = text.layers[2].altup
    predict = altup.predict
    monkeypatch.setattr(altup, "predict", lambda states: seen.append(states) or predict(states))
    plain = oracle.Recorded(MEMBER, model, fresh(inputs)).inputs[2]
    with foveate.use(model, Average(layer=2, keep=4)):
        model.model(**fresh(inputs))
    want = plain[..., IMAGE, :].unflatten(-2, (4, 4)).mean(-2)
    want = torch.cat((plain[..., : IMAGE.start, :], want, plain[..., IMAGE.stop :, :]), -2)
    torch.testing.assert_close(seen[-1], want)


@torch.no_grad()
def test_states_that_methods_read_are_those_that_attention_does(inputs):
    """What a layer norms before its attention is predicted from all streams."""
    model, seen = model_of("gemma3n", "eager"), {}

    def note(number):
        def hook(module, args, output):
            seen.setdefault(number, args[0])

        return hook

    spy = Spy(Step("llm", 3, (Need("llm_states", (1, 3)), Need("question_states", (1, 3)))))
    norms = [MEMBER.text(model).layers[number].input_layernorm for number in (1, 3)]
    handles = [norms[i].register_forward_hook(note(number)) for i, number in enumerate((1, 3))]
    model.model(**fresh(inputs))
    with foveate.use(model, spy):
        model.model(**fresh(inputs))
    for handle in handles:
        handle.remove()
    tokens = spy.seen[0]
    for i, number in enumerate((1, 3)):
        states = seen[number][0]
        torch.testing.assert_close(tokens.signal("llm_states")[0, i], states[IMAGE])
        torch.testing.assert_close(tokens.signal("question_states")[0, i], states[IMAGE.stop :])


@torch.no_grad()
def test_input_embeddings_are_the_first_stream(model, inputs):
    embeds, spy = [], Spy(Step("llm", 3, (Need("question_relevance"),)))
    handle = (
        MEMBER.text(model)
        .altup_projections[0]
        .register_forward_hook(lambda module, args, output: embeds.append(args[0][0]))
    )
    with foveate.use(model, spy):
        model.model(**fresh(inputs))
    handle.remove()
    image, question = embeds[0][IMAGE], embeds[0][IMAGE.stop :]
    want = (image @ question.T).softmax(-1).mean(0)
    torch.testing.assert_close(spy.seen[0].signal("question_relevance")[0], want)


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "renumbered"])
def test_cuts_where_keys_are_shared_save_work_and_change_no_text(model, inputs, positions):
    """Text reads what earlier layers have kept, of which nothing is gone."""
    options = {
        "max_new_tokens": 4, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    want = model.generate(**fresh(inputs), **options)
    with foveate.use(model, Spy(Step("llm", 6), 4, positions)) as run:
        got = model.generate(**fresh(inputs), **options)
    assert [tokens for [tokens] in run.record.layer_tokens] == [28] * 6 + [16] * 2
    assert torch.equal(got.sequences, want.sequences)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


@torch.no_grad()
@pytest.mark.parametrize("method", [EveryThird(6), PyramidDrop((3,), 4, "original")], ids=str)
def test_hidden_states_come_back_with_all_their_streams(model, inputs, method):
    plain = model.model(**fresh(inputs), output_hidden_states=True).hidden_states
    with foveate.use(model, method) as run:
        out = model.model(**fresh(inputs), output_hidden_states=True)
    assert [states.shape for states in out.hidden_states] == [states.shape for states in plain]
    (place, kept), first = next(iter(run.kept[0].items())), 0
    if place == "llm:3":
        first = 4  # inputs of the layers before are as they were, and so is that of layer 3
        for got, want in zip(out.hidden_states[:first], plain, strict=False):
            assert torch.equal(got, want)
    removed = sorted(set(range(16)) - set(kept.tolist()))
    before = [max([i for i in kept.tolist() if i < number], default=-1) for number in removed]
    for states in out.hidden_states[max(first, 1) :]:
        image = states[..., IMAGE, :]
        assert torch.equal(
            image[..., removed, :],
            states[..., [IMAGE.start + i for i in before], :],
        )
    joined = MEMBER.norm(MEMBER.text(model))(out.hidden_states[-1])
    torch.testing.assert_close(joined, out.last_hidden_state)


@pytest.mark.parametrize("method", [DivPrune(keep=0.25), PyramidDrop((1, 3), (0.5, 0.25))], ids=str)
def test_gradients_pass_the_size_of_removed_tokens(method):
    """Streams are brought to the size of the first, whose root has no gradient at zero."""
    model = MEMBERS["gemma3n"]().build().train()
    inputs, _ = batch_of(MEMBER, model, (2, 0, 1))
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-2] = -100
    foveate.prepare(model, method, head="all")
    try:
        with torch.autograd.set_detect_anomaly(True):
            model(**fresh(inputs)).loss.backward()
    finally:
        session_of(model).remove()
    found = {path: p.grad for path, p in model.named_parameters() if p.grad is not None}
    assert any(path.startswith("model.vision_tower") for path in found)
    for path, gradient in found.items():
        assert bool(gradient.isfinite().all()), path
