"""Every family trains, with logits of all tokens or of labels alone."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.methods import DivPrune, PyramidDrop
from foveate.training.prepare import session_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh


@pytest.mark.parametrize("name", MEMBERS)
def test_the_short_head_has_the_same_loss_and_gradients(name):
    member = MEMBERS[name]()
    model = member.build().train()
    inputs = member.inputs([[4, 6], [3, 5, 7]])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-4] = -100
    heads = ("all", "labels") if member.some_logits else ("all", "all")
    if not member.some_logits:
        with pytest.raises(UnsupportedModelError, match="use head='all'"):
            foveate.prepare(model, DivPrune(keep=0.5), head="labels")
    for method in (DivPrune(keep=0.5), PyramidDrop()):
        found = []
        for head in heads:
            foveate.prepare(model, method, head=head)
            out = model(**fresh(inputs))
            out.loss.backward()
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            found.append((out.loss.detach(), grads))
            model.zero_grad()
            session_of(model).remove()
        assert not member.some_logits or out.logits.shape[0] == 8
        torch.testing.assert_close(found[0][0], found[1][0])
        scale = max(float(gradient.abs().max()) for gradient in found[0][1].values())
        for (path, got), want in zip(found[1][1].items(), found[0][1].values(), strict=True):
            assert float((got - want).abs().max()) <= 1e-5 * scale, path
