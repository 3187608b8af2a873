"""LRS-VQA: ranking in a session, and what survives of a level of a large image."""

import pytest
import torch

import foveate
from foveate.core import get_method
from foveate.errors import BudgetError, FoveateError, LayerError
from foveate.families import find_family
from foveate.methods.lrsvqa import LRSVQA, stretched
from tests.tinies import PATCHES, prompts, tiny_llava

NEWLINE = (torch.arange(24) % 6) == 5


def ratings(seed=0, count=24):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_defaults():
    method = get_method("lrs-vqa")()
    assert (method.keep, method.tiles, method.rounds, method.as_released) == (0.25, 40, None, False)
    assert method.published_positions == "renumbered"


def test_scores_are_the_share_of_each_head(make_tokens):
    attention = torch.rand(2, 1, 3, 5)
    attention[0, 0, 1] = 0  # a head that looks elsewhere
    got = LRSVQA().scores(make_tokens((1, 5), 2, text_attention=attention))
    for g in range(2):
        for v in range(5):
            total = 0.0
            for head in attention[g, 0]:
                whole = float(head.sum())
                total += float(head[v]) / whole / 3 if whole else 0.0
            assert got[g, v].item() == pytest.approx(total, abs=1e-6)


def test_a_model_without_a_layer_that_can_rank_is_refused(facts):
    with pytest.raises(LayerError, match="no decoder layer of this model can rank"):
        LRSVQA().steps(facts(attention_layers=()))


def test_the_layer_scales_with_the_model():
    for layers, want in ((32, 14), (6, 3), (1, 0)):
        (step,) = LRSVQA().steps(find_family(tiny_llava(layers=layers)))
        assert step.layer == pytest.approx(want, abs=0.5)
        assert step.needs[0].layers == (step.layer,)
    (step,) = LRSVQA(layer=4).steps(find_family(tiny_llava()))
    assert step.layer == 4


def test_a_session_keeps_its_share():
    model = tiny_llava()
    with foveate.use(model, "lrs-vqa") as run:
        model(**prompts([[4, 6], [3, 5]]))
    assert [len(image["llm:3"]) for image in run.kept] == [PATCHES // 4] * 2


def best(scores, count, candidates):
    """The best of some candidates, one after the other."""
    chosen = set()
    for _ in range(count):
        left = [i for i in candidates if i not in chosen]
        chosen.add(max(left, key=lambda i: float(scores[i])))
    return chosen


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.5, 1.0, 3, 99])
def test_the_best_stay_with_the_newlines_of_their_rows(keep):
    scores = ratings()
    scores[NEWLINE] = 2.0  # never ranked
    patches = [i for i in range(24) if i % 6 != 5]
    count = min(20, keep if isinstance(keep, int) else max(1, int(20 * keep)))
    want = best(scores, count, patches)
    want |= {i // 6 * 6 + 5 for i in want}
    assert LRSVQA(keep=keep).chosen(scores, NEWLINE).tolist() == sorted(want)


def test_the_release_ranks_newlines_and_keeps_all():
    scores = ratings()
    scores[5] = 2.0
    want = best(scores, 6, range(24)) | {5, 11, 17, 23}
    got = LRSVQA(as_released=True).chosen(scores, NEWLINE)
    assert got.tolist() == sorted(want)


def test_no_newlines():
    scores = ratings()
    none = torch.zeros(24, dtype=torch.bool)
    want = sorted(best(scores, 6, range(24)))
    assert LRSVQA().chosen(scores, none).tolist() == want
    assert LRSVQA(as_released=True).chosen(scores, none).tolist() == want


def test_threshold_between_quantiles():
    scores = ratings()
    patches = scores[~NEWLINE]
    low, high = (float(patches.quantile(q)) for q in (0.05, 0.95))
    want = {
        i for i in range(24)
        if i % 6 != 5 and min(1, max(0, (float(scores[i]) - low) / (high - low))) > 0.4
    }  # fmt: skip
    want |= {i // 6 * 6 + 5 for i in want}
    assert LRSVQA(threshold=0.4).chosen(scores, NEWLINE).tolist() == sorted(want)


def test_equal_scores_are_no_nan():
    scores = torch.full((24,), 0.5)
    assert not stretched(scores).isnan().any()
    for method in (LRSVQA(), LRSVQA(threshold=0.5), LRSVQA(as_released=True)):
        assert len(method.chosen(scores, NEWLINE)) > 0


def test_one_token():
    one, no = torch.ones(1), torch.zeros(1, dtype=torch.bool)
    for method in (LRSVQA(), LRSVQA(threshold=0.9), LRSVQA(as_released=True)):
        assert method.chosen(one, no).tolist() == [0]


def test_refusals():
    with pytest.raises(BudgetError, match="tiles and rounds"):
        LRSVQA(tiles=0)
    with pytest.raises(FoveateError, match="'long' or 'short'"):
        LRSVQA(measured="wide")
    with pytest.raises(FoveateError, match="threshold must be"):
        LRSVQA(threshold=1.5)
    with pytest.raises(FoveateError, match=r"foveate\.large\.Reader"):
        foveate.use(tiny_llava(), "lrs-vqa", as_released=True)
    with pytest.raises(BudgetError, match="one keep"):
        LRSVQA(keep=foveate.per_request([0.5])).chosen(ratings(), NEWLINE)
