"""A session in an encoder: what it refuses, and that it leaves nothing behind."""

import copy
import functools
import threading

import pytest
import torch

import foveate
from foveate.errors import AttachError, BudgetError, LayerError, UnsupportedModelError
from foveate.methods import ClsDrop, FasterVLM, FastV, ToMe
from tests.leaving import Boom, fail_within, snapshot
from tests.methods_for_tests import Listed
from tests.vision.encoders import ENCODERS, HEADS, build, images
from tests.vision.test_encoders import CASES


@pytest.mark.parametrize("way", ["block", "exception", "handle", "failing forward"])
@pytest.mark.parametrize("case", ["tome", "before", "cls-drop"])
def test_leaving_restores_everything(case, way):
    for table, name in ((ENCODERS, "deit"), (HEADS, "clip")):
        model, inputs, method = build(table, name), images(), CASES[case][0]
        with torch.no_grad():
            want = model(**inputs, output_hidden_states=True)[0]
        before, config = snapshot(model), copy.deepcopy(model.config.to_dict())
        weights = {k: v.clone() for k, v in model.state_dict().items()}
        if way == "handle":
            handle = foveate.apply(model, method)
            model(**inputs)
            assert snapshot(model) != before
            handle.remove()
            handle.remove()
        elif way == "block":
            with foveate.use(model, method):
                model(**inputs)
        elif way == "exception":
            with pytest.raises(Boom):
                fail_within(model, method, inputs)
        else:
            with foveate.use(model, method) as run:
                with pytest.raises((ValueError, RuntimeError)):
                    model(inputs["pixel_values"][:, :, :-3])
                model(**inputs)
                assert len(run.kept) == 3
        assert snapshot(model) == before
        assert model.config.to_dict() == config
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
        with torch.no_grad():
            assert torch.equal(model(**inputs)[0], want)


def test_an_error_inside_a_layer_leaves_nothing_behind():
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad(), foveate.use(model, ToMe(r=5)):
        want = model(**inputs).last_hidden_state

        def fail(*_):
            raise Boom

        handle = model.layers[2].mlp.register_forward_hook(fail)
        with pytest.raises(Boom):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).last_hidden_state, want)


def test_threads_on_one_encoder_do_not_see_each_other():
    model = build(ENCODERS, "vit")
    batches = [images(count, seed) for seed, count in enumerate((1, 3, 2, 4, 1, 2))]
    with torch.no_grad(), foveate.use(model, ToMe(r=5)) as run:
        want = [(model(**batch).last_hidden_state, run.kept) for batch in batches]
        got = [None] * len(batches)

        def work(number):
            with torch.no_grad():
                got[number] = model(**batches[number]).last_hidden_state, run.kept

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(batches))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for (states, kept), (wanted, kept_alone) in zip(got, want, strict=True):
        assert torch.equal(states, wanted)
        for mine, alone in zip(kept, kept_alone, strict=True):
            assert all(torch.equal(mine[place], alone[place]) for place in alone)


def test_tuples_come_back_as_tuples():
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad(), foveate.use(model, ToMe(r=5)):
        want = model(**inputs, output_hidden_states=True)
        got = model(**inputs, output_hidden_states=True, return_dict=False)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], want.last_hidden_state)
    assert all(torch.equal(a, b) for a, b in zip(got[2], want.hidden_states, strict=True))


# -- refusals


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        (
            FastV(),
            UnsupportedModelError,
            "'vit' is an encoder alone. Methods that work here: .*tome",
        ),
        (FasterVLM(), UnsupportedModelError, "encoder alone"),
        (ClsDrop(layers=(4,)), LayerError, "layer 4, but .* sees layers 0 to 3"),
        (ClsDrop(keep=foveate.per_request([0.5])), BudgetError, "one keep for all"),
        ([ToMe(r=2), ClsDrop(layers=(2,))], LayerError, "different layers"),
        ([ClsDrop(layers=(2,)), ToMe(r=2)], LayerError, "stream order"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_attaching(method, error, match):
    with pytest.raises(error, match=match):
        foveate.use(build(ENCODERS, "vit"), method)


def test_a_class_token_is_needed_where_it_is_asked_for():
    with pytest.raises(UnsupportedModelError, match="no class token"):
        foveate.use(build(ENCODERS, "siglip"), ClsDrop())


def test_a_second_session_is_refused():
    model = build(ENCODERS, "vit")
    with foveate.use(model, ToMe()), pytest.raises(AttachError, match="already carries"):
        foveate.apply(model, ClsDrop())


def test_kernels_without_a_bias_are_refused_for_proportional_attention():
    model = build(ENCODERS, "vit")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="proportional attention"):
        foveate.use(model, ToMe())
    foveate.use(model, ToMe(prop_attn=False))


def test_layers_in_which_nothing_is_removed_keep_their_own_forward(monkeypatch):
    from foveate.families.block import Block

    model, inputs = build(ENCODERS, "vit"), images()
    halves = []
    attend = Block.attend
    monkeypatch.setattr(Block, "attend", lambda *a, **k: halves.append(a[1]) or attend(*a, **k))
    with torch.no_grad():
        with foveate.use(model, ToMe(keep=1.0)):
            model(**inputs)
        assert halves == []
        with foveate.use(model, ClsDrop(layers=(1, 2), keep=(10, 10))):
            model(**inputs)
    assert halves == [model.layers[1]]


def test_layers_with_a_forward_of_their_own_are_refused():
    model = build(ENCODERS, "vit")
    model.layers[2].forward = functools.partial(model.layers[2].forward)
    with pytest.raises(UnsupportedModelError, match="encoder layer 2 has had its forward replaced"):
        foveate.apply(model, ToMe())
    assert not model._forward_pre_hooks
    with foveate.use(model, Listed(layer=2)):
        model(**images())


def test_a_refusal_says_so_where_no_method_works(monkeypatch):
    """A list of nothing would read as if it had been lost."""
    model = build(ENCODERS, "vit")
    monkeypatch.setattr("foveate.engine.planning.list_methods", list)
    with pytest.raises(UnsupportedModelError, match=r"\w\. No method works here") as error:
        foveate.use(model, FastV())
    assert "ethods that work" not in str(error.value)
