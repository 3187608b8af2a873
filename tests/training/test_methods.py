"""Every method trains: what survives gets its gradients, and labels stay with their tokens."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.core import Need, Step
from foveate.errors import BudgetError, InputError
from foveate.methods import CDPruner, FastV, PyramidDrop, TransPrune
from foveate.training.prepare import session_of
from tests.methods_for_tests import learning_methods, readers_methods
from tests.tinies import tiny_llava
from tests.training.batches import Llava, batch, called, samples
from tests.training.oracle import given_loss_of
from tests.training.test_compact import compare, gradients

KIND = Llava()
# Methods that gather before or within the language model, and leave survivors as they are.
GATHERING = (
    "adatoken-3d", "catp", "cdpruner", "dart", "divprune", "fastervlm", "fastv", "feather", "fopru",
    "hiprune", "holov", "idpruner", "lrs-vqa", "prunesid", "pyramiddrop", "random", "scope",
    "todre", "transprune", "uniform", "vispruner", "vtc-cls",
)  # fmt: skip
# Which signals are asked of what is after an image, so that it is left alone where nothing is.
ASKING = (
    "adatoken-3d", "cdpruner", "catp", "dart", "fastv", "feather", "lrs-vqa", "pyramiddrop",
    "sparsevlm", "transprune",
)  # fmt: skip


@pytest.fixture
def model():
    return tiny_llava(layers=12).train()


def method_of(name):
    """A quarter is left where a budget can be given; survivors stay at their positions."""
    kind = foveate.get_method(name)
    fields = {field.name for field in dataclasses.fields(kind)}
    where = {"positions": "original"} if "positions" in fields else {}
    try:
        return kind(keep=0.25, **where)
    except BudgetError:  # the method decides by itself
        return kind(**where)


PLAIN = [name for name in readers_methods() if name not in learning_methods()]


@pytest.mark.parametrize("name", PLAIN)
def test_gradients_are_finite_and_labels_aligned(model, name):
    inputs, _ = batch(KIND, "text", "left")
    foveate.prepare(model, method_of(name))
    out = model(**called(inputs))
    out.loss.backward()
    assert session_of(model).kept
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    for part in (model.model.language_model.layers, model.model.multi_modal_projector):
        assert all(float(p.grad.abs().max()) > 0 for p in part.parameters())
    want = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(out.loss, want)


@pytest.mark.parametrize("name", GATHERING)
def test_loss_and_gradients_are_those_of_what_the_method_has_left(model, name):
    inputs, talks = batch(KIND, "images", "left")
    foveate.prepare(model, method_of(name))
    loss = model(**called(inputs)).loss
    leaves = KIND.leaves(model, inputs)
    got = gradients(loss, leaves)
    session = session_of(model)
    kept = [[] for _ in talks]
    for record in session.record.images:
        of_layer = {
            0 if p == "pre_llm" else int(p.split(":")[1]): k for p, k in record.kept.items()
        }
        kept[record.row].append(of_layer)
    assert any(len(k) < 36 for images in kept for image in images for k in image.values())
    session.remove()
    text, alone = model.model.language_model, samples(KIND, model, inputs, talks)
    want = given_loss_of(text, model.lm_head, alone, kept)
    compare((loss, got), (want, gradients(want, leaves)))


@pytest.mark.parametrize("name", ASKING)
def test_images_of_which_nothing_is_asked_are_left_alone(model, name):
    rows = "unsupervised" if name not in ("cdpruner", "dart", "sparsevlm", "transprune") else "mute"
    inputs, _ = batch(KIND, rows, "left")
    foveate.prepare(model, method_of(name))
    model(**called(inputs)).loss.backward()
    asked, unasked = session_of(model).kept
    assert all(len(kept) < 36 for kept in list(asked.values())[-1:])
    after = list(unasked.values()) if name != "catp" else list(unasked.values())[1:]
    assert all(len(kept) == 36 for kept in after)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_answers_do_not_take_part_in_choosing(model):
    inputs, _ = batch(KIND, "one", "right")
    answers = inputs["labels"] != -100
    other = inputs["input_ids"].masked_fill(answers, 7)
    changed = inputs | {"input_ids": other, "labels": other.masked_fill(~answers, -100)}
    for method in (FastV(keep=0.25), CDPruner(keep=9), PyramidDrop(), TransPrune(keep=0.25)):
        foveate.prepare(model, method)
        chosen = []
        for one in (inputs, changed):
            model(**called(one))
            chosen.append(session_of(model).kept)
        session_of(model).remove()
        assert [{p: k.tolist() for p, k in i.items()} for i in chosen[0]] == [
            {p: k.tolist() for p, k in i.items()} for i in chosen[1]
        ]


def test_one_turn_chooses_as_inference_does(model):
    inputs, _ = batch(KIND, "one", "right")
    first = int((inputs["labels"][0] != -100).nonzero()[0])
    prompt = {
        n: v[:, :first] for n, v in called(inputs).items() if n not in ("pixel_values", "labels")
    }
    for method in (FastV(), PyramidDrop(), TransPrune(keep=0.25)):
        foveate.prepare(model.train(), method)
        model(**called(inputs))
        trained = session_of(model).kept
        with torch.no_grad():
            model.eval()(**prompt, pixel_values=inputs["pixel_values"])
        inferred = session_of(model).kept
        session_of(model).remove()
        assert {p: k.tolist() for p, k in trained[0].items()} == {
            p: k.tolist() for p, k in inferred[0].items()
        }


SIGNALS = ("text_attention", "content_attention", "question_attention", "llm_states", "llm_keys")


def test_signals_carry_no_gradient_and_features_do(model):
    seen, inputs = {}, batch(KIND, "turns", "left")[0]

    class Spy(FastV):
        def steps(self, model):
            return (Step("llm", 3, tuple(Need(name, (2,)) for name in SIGNALS)),)

        def scores(self, tokens):
            seen.update(tokens.signals, x=tokens.x)
            return super().scores(tokens)

    foveate.prepare(model, Spy())
    model(**called(inputs))
    assert {name for name, value in seen.items() if value.requires_grad} == {"x"}
    assert set(SIGNALS) < set(seen)


# -- what is refused


def test_training_without_labels_is_refused_where_methods_ask(model):
    inputs = called(batch(KIND, "one")[0])
    del inputs["labels"]
    for method in (FastV(), CDPruner(keep=9)):
        foveate.prepare(model.train(), method)
        with pytest.raises(InputError, match="in training only labels say where prompts end"):
            model(**inputs)
        with torch.no_grad():
            model(**inputs)  # a plain forward, as generate runs it
        session_of(model).remove()
    foveate.prepare(model, "divprune")
    model(**inputs).logits.sum().backward()


def test_supervised_placeholders_are_refused(model):
    inputs = called(batch(KIND, "one")[0])
    inputs["labels"] = inputs["input_ids"].clone()
    foveate.prepare(model, "divprune")
    with pytest.raises(InputError, match="labels supervise visual tokens"):
        model(**inputs)


def test_a_supervised_token_after_padding_is_refused(model):
    inputs = called(batch(KIND, "text", "left")[0])
    first = inputs["attention_mask"].argmax(1)
    row = int(first.argmax())
    assert first[row]
    inputs["labels"][row, first[row]] = 5
    foveate.prepare(model, "divprune")
    with pytest.raises(InputError, match="first token after left padding"):
        model(**inputs)
