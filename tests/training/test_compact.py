"""A prepared model's loss and gradients are those of the short sequences that samples become."""

import pytest
import torch

import foveate
from foveate.methods import PyramidDrop
from foveate.training import session_of
from tests.training.batches import ROWS, batch, called, kinds, samples
from tests.training.oracle import Schedule, loss_of

LAYERS, KEEP = (1, 3, 4), (0.5, 0.25, 0.125)
METHOD = PyramidDrop(layers=LAYERS, keep=KEEP)
LOSS, GRADIENTS = 1e-6, 1e-5  # absolute; relative to the largest entry of all gradients


def schedule(kind):
    return Schedule(dict(zip(LAYERS, KEEP, strict=True)), kind.renumber)


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def expected(kind, model, inputs, talks, items=None):
    """Loss, gradients and kept indices of the oracle."""
    loss, kept = loss_of(
        model.model.language_model,
        model.lm_head,
        samples(kind, model, inputs, talks),
        schedule(kind),
        items,
    )
    return loss, gradients(loss, kind.leaves(model, inputs)), kept


def compare(got, want):
    """Losses and gradients, by name."""
    assert abs(got[0].item() - want[0].item()) <= LOSS * max(1.0, want[0].item())
    assert list(got[1]) == list(want[1])
    scale = max(float(gradient.abs().max()) for gradient in want[1].values())
    worst = max(float((got[1][n] - want[1][n]).abs().max()) for n in want[1])
    assert scale > 0
    assert worst <= GRADIENTS * scale


@pytest.fixture(params=kinds(), ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return kind.build().train()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradients_are_those_of_short_sequences(kind, model, rows, side):
    if rows == "adjacent" and not kind.renumber:
        pytest.skip("M-RoPE models find images by the text between them")
    inputs, talks = batch(kind, rows, side)
    plain = float(model(**called(inputs)).loss.detach())
    want = expected(kind, model, inputs, talks)
    foveate.prepare(model, METHOD)
    loss = model(**called(inputs)).loss
    compare((loss, gradients(loss, kind.leaves(model, inputs))), want)
    assert abs(plain - float(loss.detach())) > 1e-4  # something was dropped
    chosen = [image for row in want[2] for image in zip(*row, strict=True)]
    assert [[k.tolist() for k in image.values()] for image in session_of(model).kept] == [
        [k.tolist() for k in image] for image in chosen
    ]
