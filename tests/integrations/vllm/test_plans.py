"""Which methods vLLM can serve, and how many tokens they leave; no vLLM is needed."""

import pytest
import torch

from foveate.core.tokens import Shape
from foveate.errors import BudgetError, InputError, UnsupportedModelError
from foveate.integrations.vllm.plans import Plans, check_question
from foveate.integrations.vllm.reducing import Encoded, survivors
from foveate.integrations.vllm.request import Request
from foveate.integrations.vllm.signals import whole
from foveate.methods import (
    EVS,
    CDPruner,
    DivPrune,
    FasterVLM,
    FastV,
    LLaVAPruMerge,
    PyramidDrop,
    ToMe,
    Uniform,
    VisionSelector,
    VisionZip,
)
from tests.integrations.vllm.checkpoints import MAKERS

GRID = Shape(16, (4, 4))


@pytest.fixture
def plans():
    return Plans(MAKERS["llava"]()[0])


def test_methods_that_have_learned_are_refused(plans):
    why = plans.why_not(VisionSelector())
    assert "by what it has learned, which a checkpoint of vLLM does not hold" in why


def test_served_methods_act_before_the_language_model(plans):
    assert plans.served == [
        "cdpruner", "divprune", "downsample", "fastervlm", "fopru", "hiprune", "holov", "idpruner",
        "m3", "prunesid", "random", "scope", "uniform", "visionzip", "vispruner", "vtc-cls",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (FastV(), "the paged cache of vLLM has one length for all layers"),
        (PyramidDrop(layers=(2,), keep=0.5), "the paged cache of vLLM"),
        (ToMe(), "acts inside the vision tower"),
        (LLaVAPruMerge(keep=0.25), "chooses from the tokens how many of them survive"),
        (EVS(), "chooses from the tokens"),
        (CDPruner(relevance="clip"), "no text tower of CLIP"),
        (DivPrune(positions="original"), 'give "positions": "renumbered"'),
    ],
)
def test_refusals_say_why_and_what_is_served(plans, method, reason):
    with pytest.raises(UnsupportedModelError) as caught:
        plans.of(method)
    assert reason in str(caught.value)
    assert "Methods that foveate serves in vLLM here: cdpruner, divprune" in str(caught.value)


def test_vllm_loads_layers_that_the_language_model_sees():
    """The tower has three layers, of which the language model sees the second."""
    plans = Plans(MAKERS["llava"]()[0])
    whole_tower = Plans(MAKERS["llava"]()[0], whole_tower=True)
    assert (plans.loaded_layers, whole_tower.loaded_layers) == (2, 3)


def test_a_model_without_class_token_serves_fewer():
    plans = Plans(MAKERS["llava-siglip"]()[0])
    assert "fastervlm" not in plans.served
    with pytest.raises(UnsupportedModelError, match="needs class-token attention"):
        plans.of(FasterVLM())


def test_counts_are_the_methods_own(plans):
    assert plans.kept(DivPrune(keep=0.25), [GRID, Shape(7, (1, 7))]) == [4, 2]
    assert plans.kept(FasterVLM(keep=0.3), [GRID]) == [FasterVLM(keep=0.3).rounding(16 * 0.3)]


def test_a_budget_that_the_method_refuses_later_is_refused_before(plans):
    with pytest.raises(BudgetError, match="cannot be contextual"):
        plans.kept(VisionZip(keep=3, contextual=5), [GRID])


def test_a_method_that_reads_the_question_needs_one(plans):
    plan = plans.of(CDPruner())
    with pytest.raises(InputError, match="foveate_question"):
        check_question(Request(CDPruner(), " "), plan)
    check_question(Request(CDPruner(), "what"), plan)
    check_question(Request(DivPrune()), plans.of(DivPrune()))


def test_survivors_are_in_the_order_of_the_method(plans):
    """VisionZip's contextual tokens come last, whatever their place in the image."""
    plan, layer = plans.of(VisionZip(keep=4, contextual=1)), 1
    attention = torch.linspace(1, 2, 16).expand(2, 16)
    keys = torch.arange(32.0).view(2, 16)
    encoded = Encoded(
        [GRID], [torch.arange(16.0)[:, None].expand(16, 3)],
        {("cls_attention", layer): [attention], ("encoder_keys", layer): [keys]},
    )  # fmt: skip
    (kept,) = survivors(plan, encoded, heads=2)
    assert kept.rows[:3, 0].tolist() == [13, 14, 15]
    assert kept.rows[3, 0] < 13


def test_a_feature_that_overflowed_is_a_token_like_others(plans):
    """Or there would be fewer than the placeholders, which stops the engine."""
    features = torch.randn(16, 3)
    features[:, 0] = torch.nan
    (kept,) = survivors(plans.of(Uniform(keep=0.5)), Encoded([GRID], [features]), heads=1)
    assert kept.rows.shape == (8, 3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_heads_of_all_ranks_are_put_together(ranks):
    """Each rank of vLLM's fused projection holds queries, keys and values of its heads."""
    fused = torch.arange(2 * 5 * 3 * 8.0).view(2, 5, 3, 8)
    module = torch.nn.Identity()
    module.tp_size = ranks
    parts = [part.flatten(2) for part in fused.chunk(ranks, -1)]
    got = whole(module, (parts[0], None), gather=lambda _: torch.cat(parts, -1))
    assert torch.equal(got, fused.flatten(2))
