"""FlowCut: information flow, its smoothing over layers, and how many patches go."""

import dataclasses
import math

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import foveate
from foveate.core import get_method
from foveate.errors import BudgetError, LayerError
from foveate.methods.clsdrop import ClsDrop
from foveate.methods.flowcut import FlowCut, concentration
from foveate.signals.flow import information_flow
from tests.tinies import prompts, row_of, tiny_llava


def flow_by_hand(attention, value, heads):
    """Scores of one image with a class token, by loops: (H, V) rows and (1 + V, D) values."""
    total, width = value.shape[0] - 1, value.shape[1] // heads
    cue = [sum(float(attention[h, j]) for h in range(heads)) / heads for j in range(total)]
    semantic = [0.0] * total
    for h in range(heads):
        part = value[:, h * width : (h + 1) * width]
        powers = [math.exp(float(part[0] @ part[j])) for j in range(total + 1)]
        for j in range(total):
            semantic[j] += powers[j + 1] / sum(powers) / heads
    sizes = []
    for j in range(total):
        mean = sum(value[j + 1, h * width : (h + 1) * width] for h in range(heads)) / heads
        sizes.append(float(mean.abs().sum()))
    return [(cue[j] / sum(cue) + semantic[j] / sum(semantic)) * sizes[j] for j in range(total)]


def test_information_flow_matches_loops():
    attention, value = torch.rand(2, 3, 6) / 6, torch.randn(2, 7, 12)
    flow = information_flow(attention, value)
    for image in range(2):
        expected = flow_by_hand(attention[image], value[image], 3)
        torch.testing.assert_close(flow[image], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_information_flow_of_nothing_is_nothing():
    assert information_flow(torch.zeros(1, 2, 3), torch.zeros(1, 4, 8)).tolist() == [[0.0] * 3]


def steps_of(method, **model):
    return method.steps(Facts(**model))


@dataclasses.dataclass(frozen=True)
class Facts:
    text_layers: int = 32
    vision_layers: int = 24
    feature_layer: int = 22
    class_token: bool = True


def test_it_drops_before_every_second_layer_up_to_the_one_that_is_seen():
    steps = steps_of(FlowCut())
    assert [step.layer for step in steps] == list(range(2, 23, 2))
    assert [step.remaining for step in steps] == list(range(20, -1, -2))
    for step in steps:
        assert {need.name: need.layers for need in step.needs} == {
            "information_flow": tuple(range(step.layer)),
            "cls_attention": (step.layer - 1,),
        }
    odd = steps_of(FlowCut(every=3), vision_layers=9, feature_layer=7)
    assert [(step.layer, step.remaining) for step in odd] == [(1, 6), (4, 3), (7, 0)]


def test_scores_are_a_running_mean(make_tokens):
    flow = torch.rand(2, 4, 24)
    scores = FlowCut(momentum=0.7).scores(make_tokens(images=2, information_flow=flow))
    running = flow[:, 0]
    for layer in range(1, 4):
        running = 0.7 * running + 0.3 * flow[:, layer]
    torch.testing.assert_close(scores, running)
    newest = FlowCut(momentum=0.0).scores(make_tokens(images=2, information_flow=flow))
    torch.testing.assert_close(newest, flow[:, -1])


def at(make_tokens, remaining, attention, flow):
    step = dataclasses.replace(steps_of(FlowCut())[0], remaining=remaining)
    signals = {"cls_attention": attention, "information_flow": flow}
    tokens = make_tokens(grid=(1, flow.shape[-1]), images=len(flow), **signals)
    return dataclasses.replace(tokens, step=step)


@pytest.mark.parametrize("remaining", [2, 4, 20])
def test_how_many_go_follows_the_entropy(remaining, make_tokens, check_index):
    attention, flow = torch.rand(1, 1, 3, 24) ** 12, torch.rand(1, 5, 24)
    index = FlowCut().reduce(at(make_tokens, remaining, attention, flow), 8).index
    shares = [float(a) for a in attention[0, 0].mean(0) / attention[0, 0].mean(0).sum()]
    entropy = -sum(p * math.log(p) for p in shares if p) / math.log(24)
    gone = round((24 - 8) / math.sqrt(remaining) * (1 - entropy**2))
    assert 0 < gone < 16
    check_index(index, 24 - gone, 24)
    scores = FlowCut().scores(at(make_tokens, remaining, attention, flow))[0]
    ranked = scores.argsort(descending=True).tolist()
    assert index[0].tolist() == sorted(ranked[: 24 - gone])


def test_the_last_step_meets_the_budget(make_tokens, check_index):
    attention, flow = torch.rand(2, 1, 3, 24), torch.rand(2, 5, 24)
    check_index(FlowCut().reduce(at(make_tokens, 0, attention, flow), 8).index, 8, 24)


def test_even_attention_removes_nothing_and_a_single_peak_most(make_tokens):
    flow = torch.rand(1, 5, 24)
    even = torch.full((1, 1, 3, 24), 0.04)
    assert FlowCut().reduce(at(make_tokens, 2, even, flow), 8).kept == 24
    peak = torch.zeros(1, 1, 3, 24)
    peak[..., 5] = 0.9
    assert FlowCut().reduce(at(make_tokens, 2, peak, flow), 8).kept == 24 - round(16 / 2**0.5)


def two_schedules():
    """Signals of two images that lose different numbers of tokens."""
    attention, flow = torch.rand(2, 1, 3, 24) ** 2, torch.rand(2, 5, 24)
    attention[1] = attention[1] ** 6
    return attention, flow


def test_an_image_keeps_what_it_keeps_alone(make_tokens):
    attention, flow = two_schedules()
    alone = [
        FlowCut().reduce(at(make_tokens, 4, attention[i : i + 1], flow[i : i + 1]), 8).index[0]
        for i in range(2)
    ]
    assert len(alone[0]) != len(alone[1])
    made = FlowCut().reduce(at(make_tokens, 4, attention, flow), 8)
    assert made.kept == max(len(index) for index in alone)
    for index, real, want in zip(made.index, made.valid, alone, strict=True):
        assert index[real].tolist() == want.tolist()


def test_what_fills_up_an_image_counts_for_nothing(make_tokens):
    """The next step sees only the image's own tokens."""
    attention, flow = torch.rand(1, 1, 3, 24), torch.rand(1, 5, 24)
    real = torch.rand(1, 24) < 0.7
    few = FlowCut().reduce(at(make_tokens, 4, attention[..., real[0]], flow[..., real[0]]), 8)
    hidden = at(make_tokens, 4, attention.masked_fill(~real[:, None, None], 0), flow + 9 * ~real)
    made = FlowCut().reduce(dataclasses.replace(hidden, valid=real), 8)
    assert made.index[0].tolist() == real[0].nonzero()[few.index[0], 0].tolist()


def test_as_released_images_lose_as_many_as_the_one_that_loses_most(make_tokens):
    attention, flow = two_schedules()
    method = FlowCut(as_released=True)
    alone = [
        method.reduce(at(make_tokens, 4, attention[i : i + 1], flow[i : i + 1]), 8).kept
        for i in range(2)
    ]
    assert alone[0] != alone[1]
    made = method.reduce(at(make_tokens, 4, attention, flow), 8)
    assert made.kept == min(alone)
    assert made.valid is None


def llava():
    """A random LLaVA with an encoder deep enough for several drops."""
    config = tiny_llava().config
    config.vision_config.num_hidden_layers = 8
    torch.manual_seed(3)
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("method", [FlowCut(keep=6), FlowCut(keep=1, every=1)], ids=str)
def test_in_a_model_an_image_keeps_what_it_keeps_alone(method):
    """Features and what is left at each layer; the same inputs share a schedule as released."""
    model, inputs = llava(), prompts([[5, 7]] * 4)
    inputs["pixel_values"][3] *= 0.01

    def run(method, inputs):
        with foveate.use(model, method) as session, torch.no_grad():
            return model(**inputs).logits, session.kept

    logits, kept = run(method, inputs)
    alone = [run(method, row_of(inputs, row)) for row in range(4)]
    counts = [tuple(len(index) for index in image.values()) for image in kept]
    assert len(set(counts)) > 1, "all have the same schedule, so nothing is tested"
    for row, (want, (image,)) in enumerate(alone):
        assert {p: i.tolist() for p, i in kept[row].items()} == {
            p: i.tolist() for p, i in image.items()
        }
        torch.testing.assert_close(logits[row], want[0], rtol=1e-4, atol=1e-5)
    shared = dataclasses.replace(method, as_released=True)
    together = [tuple(map(len, image.values())) for image in run(shared, inputs)[1]]
    assert set(together) == {together[0]}


def test_nothing_else_acts_in_the_encoder_while_images_differ():
    model = llava()
    with pytest.raises(LayerError, match=r"cls-drop acts at vision:3.*as_released=True"):
        foveate.use(model, [FlowCut(keep=9), ClsDrop(layers=(3,), keep=0.5)])
    foveate.use(model, [FlowCut(keep=9, as_released=True), ClsDrop(layers=(3,), keep=0.5)])


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_attention_that_underflows_is_no_nan(value):
    attention = torch.full((1, 6), value)
    attention[0, 0] = 0.5 if value else 0.0
    assert concentration(attention, torch.tensor([6.0])).isfinite().all()


def test_budget_is_of_the_end():
    method, (first, *_) = FlowCut(), steps_of(FlowCut())
    assert method.count(576, 576, first, 0) == 128
    assert method.count(100, 576, first, 0) == 100
    assert FlowCut(keep=0.5).count(400, 576, first, 3) == 288


def test_defaults_and_registration():
    method = get_method("flowcut")()
    assert isinstance(method, FlowCut)
    assert (method.keep, method.every, method.momentum) == (128, 2, 0.5)


def test_wrong_arguments_are_refused():
    for keep in (0, (0.5, 0.25)):
        with pytest.raises(BudgetError):
            FlowCut(keep=keep)
    with pytest.raises(LayerError):
        FlowCut(every=0)
    with pytest.raises(LayerError):
        FlowCut(momentum=1.0)
    with pytest.raises(LayerError, match="between encoder layers"):
        steps_of(FlowCut(), vision_layers=1, feature_layer=0)
