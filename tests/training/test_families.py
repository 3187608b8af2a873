"""Every family trains, with logits of all tokens or of labels alone."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.methods import DivPrune, PyramidDrop
from foveate.training.prepare import session_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh

WITHOUT = ("minicpm_ocr", "minicpmv4_6")  # models that make logits of all tokens or none


@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in WITHOUT])
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


@pytest.mark.parametrize("name", WITHOUT)
def test_families_without_a_short_head_train_with_the_whole(name):
    member = MEMBERS[name]()
    model = member.build().train()
    with pytest.raises(UnsupportedModelError, match=r"makes logits of some tokens alone.*'all'"):
        foveate.prepare(model, DivPrune(keep=0.5), head="labels")
    inputs = member.inputs([[4, 6], [3, 5, 7]])
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :-4] = -100
    for method in (DivPrune(keep=0.5), PyramidDrop()):
        foveate.prepare(model, method, head="all")
        model(**fresh(inputs)).loss.backward()
        session_of(model).remove()
        found = [p.grad for p in model.model.language_model.parameters() if p.grad is not None]
        assert len(found) > 60
        assert all(bool(gradient.isfinite().all()) for gradient in found)
        model.zero_grad()


@pytest.mark.parametrize(
    "name", ["lfm2_vl", "lfm3_vl", "llama4", "nemotron_h_omni", "qwen3_5"]
)  # fmt: skip
def test_layers_within_checkpoint_wrappers_are_recomputed_alike(name):
    """Recurrent ones, those that mix nothing, and those with one complex rotary embedding."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    member = MEMBERS[name]()
    found = []
    for wraps in (False, True):
        model = member.build().train()
        inputs = member.inputs([[4, 6], [3, 5, 7]])
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, :-4] = -100
        foveate.prepare(model, PyramidDrop())
        layers = member.text(model).layers
        for number, layer in enumerate(layers if wraps else ()):
            layers[number] = checkpoint_wrapper(layer)
        loss = model(**fresh(inputs), use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    for got, want in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(got, want)
