"""VTC-CLS: class-token attention summed over encoder layers."""

import pytest
import torch

from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.methods.vtccls import VTCCLS


def layers_of(method, model):
    (step,) = method.steps(model)
    (need,) = step.needs
    assert (step.site, need.name) == ("pre_llm", "cls_attention")
    return need.layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (None, range(16, 23)),
        (16, range(16, 23)),
        (0, range(23)),
        (22, [22]),
        (-2, [22]),
        (-3, [21, 22]),
        (-24, range(23)),
        ((3, 23), [3, 23]),
        ((-1, 5), [5, 23]),
    ],
)
def test_layers_are_the_slice_of_the_release(layers, expected, facts):
    """`attentions[start:-1]` of a 24-layer encoder, or the layers named."""
    assert layers_of(VTCCLS(layers=layers), facts()) == tuple(expected)


@pytest.mark.parametrize("depth", [1, 2, 3, 6, 12, 27])
def test_default_range_is_never_empty(depth, facts):
    feature = max(depth - 2, 0)
    layers = layers_of(VTCCLS(), facts(vision_layers=depth, feature_layer=feature))
    assert layers
    assert layers[-1] == feature


@pytest.mark.parametrize("layers", [24, -25, (0, 24), (-25,)])
def test_layer_outside_encoder_names_its_depth(layers, facts):
    with pytest.raises(LayerError, match="24 layers"):
        VTCCLS(layers=layers).steps(facts())


@pytest.mark.parametrize("layers", [23, -1])
def test_start_after_feature_layer_is_refused(layers, facts):
    with pytest.raises(LayerError, match="24 layers"):
        VTCCLS(layers=layers).steps(facts())


@pytest.mark.parametrize("layers", ["16", 1.0, True, (), (1, 1), (1, "2"), [1, 2]])
def test_wrong_form_of_layers_is_refused_at_once(layers):
    with pytest.raises(LayerError, match="layers must be"):
        VTCCLS(layers=layers)


def test_layer_named_twice_is_refused(facts):
    with pytest.raises(LayerError, match="twice"):
        VTCCLS(layers=(22, -2)).steps(facts())


def test_half_precision_is_summed_in_float32(make_tokens):
    signal = torch.full((1, 2, 4, 24), 0.25, dtype=torch.float16)
    signal[0, 1, 0, 5] += 2**-12
    scores = VTCCLS().scores(make_tokens(cls_attention=signal))
    assert scores.dtype == torch.float32
    assert scores[0].argmax() == 5


def test_defaults_and_registration():
    method = get_method("vtc-cls")()
    assert isinstance(method, VTCCLS)
    assert method.to_dict() == {
        "method": "vtc-cls",
        "keep": 36,
        "layers": None,
        "positions": None,
    }
    assert VTCCLS(positions="original").positions == "original"


def test_wrong_arguments_are_refused():
    with pytest.raises(BudgetError):
        VTCCLS(keep=1.5)
    with pytest.raises(BudgetError):
        VTCCLS(keep=(0.5, 0.25))
    with pytest.raises(FoveateError, match="positions"):
        VTCCLS(positions="compact")
