"""VFlowOpt: votes, recycling, its three steps, and the search for its numbers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import torch

import foveate
from foveate.calibration.vflowopt import calibrate, second_ratio
from foveate.errors import BudgetError, FoveateError, InputError, LayerError
from foveate.methods.vflowopt import STRATEGIES, VFlowOpt
from foveate.ops.cell_merging import cells, merged, pool_size, recycle, tile_coordinates
from foveate.signals.attention_maps import global_attention
from tests.tinies import PATCHES, prompts, row_of


def votes(query, key, heads, special, above):
    """Attention from global rows, one image, with loops."""
    rows, width = len(query), query.shape[1] // heads
    table = torch.zeros(rows, rows)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        table += (query[:, part] @ key[:, part].T / math.sqrt(width)).softmax(-1) / heads
    received = [float(table[:, j].mean()) for j in range(rows)]
    bound = above * sum(received) / rows
    chosen = [i for i in range(rows) if received[i] > bound] or list(range(rows))
    return torch.stack([table[i] for i in chosen]).mean(0)[special:], len(chosen)


@pytest.mark.parametrize("above", [0.0, 1.2, 2.0, 50.0])
@pytest.mark.parametrize("special", [0, 1])
def test_votes_of_global_rows(above, special):
    torch.manual_seed(0)
    query, key = torch.randn(3, 300, 16) * 2, torch.randn(3, 300, 16) * 2
    got = global_attention(query, key, 4, special, threshold=above)
    sizes = set()
    for picture in range(3):
        want, chosen = votes(query[picture], key[picture], 4, special, above)
        torch.testing.assert_close(got[picture], want, rtol=1e-5, atol=1e-8)
        sizes.add(chosen)
    if above in (1.2, 2.0):
        assert all(0 < size < 300 for size in sizes), "the test does not bite"


def recycled(scores, place, x, pool):
    """Survivors of one image and their values, with loops."""
    order = sorted(range(len(scores)), key=lambda i: float(scores[i]))
    heap, pooled = {}, order[:pool]
    for i in sorted(pooled):
        heap.setdefault(int(place[i]), []).append(i)
    values = {i: x[i] for i in range(len(scores)) if i not in pooled}
    for members in heap.values():
        best = max(members, key=lambda i: float(scores[i]))
        total = sum(float(scores[i]) for i in members)
        weights = [float(scores[i]) / total if total else 1 / len(members) for i in members]
        values[best] = sum(w * x[i] for w, i in zip(weights, members, strict=True))
    index = sorted(values)
    return index, torch.stack([values[i] for i in index])


@pytest.mark.parametrize("side", [1.0, 2.5, 3.0, 40.0])
@pytest.mark.parametrize("pool", [0, 1, 40, 77])
def test_recycling(make_tokens, side, pool):
    torch.manual_seed(0)
    scores = torch.rand(2, 77)
    scores[0, :20] = 0
    tokens = make_tokens(grid=(11, 7), images=2)
    place = cells(tile_coordinates(tokens, torch.zeros(2, 77, dtype=torch.bool)), side)
    row, column = torch.arange(77) // 7, torch.arange(77) % 7
    for image in range(2):
        known = {}
        for token in range(77):
            cell = math.floor(row[token] / side), math.floor(column[token] / side)
            assert known.setdefault(cell, int(place[image, token])) == int(place[image, token])
        assert len(set(known.values())) == len(known)
    x = torch.randn(2, 77, 5)
    into, mass = recycle(scores, place, pool)
    for image in range(2):
        want, values = recycled(scores[image], place[image], x[image], pool)
        reduction = merged(into[image : image + 1], mass[image : image + 1], len(want))
        if image:  # zero scores of the other image tie
            assert reduction.index[0].tolist() == want
            torch.testing.assert_close(reduction.apply(x[image : image + 1])[0], values)
        assert reduction.apply(x[image : image + 1]).isfinite().all()


def test_places_of_a_tiled_image(make_tokens):
    """A thumbnail of 2 x 2, and a map of 3 rows with 4 columns and a newline each."""
    newline = torch.zeros(2, 19, dtype=torch.bool)
    newline[0, [8, 13, 18]] = True
    newline[1, 18] = True  # an image without tiles: what precedes the newline is its thumbnail
    got = tile_coordinates(make_tokens(grid=(1, 19), images=2), newline)
    want = [[0, row, column] for row in range(2) for column in range(2)]
    want += [[1, row, column] for row in range(3) for column in range(5)]
    assert got[0].tolist() == want
    assert got[1, 18].tolist() == [1, 0, 0]
    assert got[1, :18, 0].sum() == 0


def test_the_pool():
    assert pool_size(859, 0.25, 6.5) == 644 + 20
    assert pool_size(36, 1.0, 2.0) == 0
    assert pool_size(36, 0.01, 1.0) == 36


@pytest.mark.parametrize(
    ("total", "first", "second"),
    [(10, 0.75, 0.35), (10, 0.33, 0.85), (18, 0.7, 0.75), (64, 0.7, 0.3)],
)
def test_a_half_is_rounded_by_the_ratio_that_was_meant(total, first, second, make_tokens):
    """A product over its first factor may miss the second by a rounding."""
    tokens = make_tokens(grid=(1, total))
    tokens = replace(tokens, number=2, label=torch.rand(1, total))
    method = VFlowOpt(keep=(1.0, first, first * second))
    ((_, reduction),) = method.reduce_each(tokens)
    assert reduction.kept == total - round(total * (1 - second))


METHOD = VFlowOpt(keep=(0.5, 0.3, 0.15), threshold=1.1, cell=2.5, layers=(2, 4))


def counts(run):
    return [[len(index) for index in image.values()] for image in run.kept]


def test_three_steps_by_one_score(any_llava):
    """Each row alone, the same scores at all steps, and the promised numbers."""
    seen = []

    class Watched(VFlowOpt):
        def reduce_each(self, tokens):
            scores = tokens.label
            if tokens.number == 0:
                scores = tokens.signal("global_attention")[:, 0]
            seen.append(
                {"number": tokens.number, "index": tokens.index, "scores": scores,
                 "rows": tokens.rows}
            )  # fmt: skip
            return super().reduce_each(tokens)

    method = Watched(keep=(0.5, 0.3, 0.15), threshold=1.1, cell=2.5, layers=(2, 4))
    rows = [[5, 7], [4], [2, 3, 9]]
    inputs = prompts(rows)
    with foveate.use(any_llava, method) as run:
        together = any_llava(**inputs).logits
    assert [list(image) for image in run.kept] == [["pre_llm", "llm:2", "llm:4"]] * 3
    given = {}
    for step in (step for step in seen if step["number"] == 0):
        given |= {row: [] for row in step["rows"]}
        for row, scores in zip(step["rows"], step["scores"], strict=True):
            given[row].append(scores)
    later = [step for step in seen if step["number"]]
    assert later
    for step in later:
        for row, index, scores in zip(step["rows"], step["index"], step["scores"], strict=True):
            assert any(torch.equal(first[index], scores) for first in given[row])
    for image, (first, second, third) in zip(run.kept, counts(run), strict=True):
        assert 18 - 5 < first < 36
        assert second == first - round(first * (1 - 0.3 / 0.5))
        assert third == second - round(second * (1 - 0.15 / 0.3))
        before = torch.arange(PATCHES)
        for index in image.values():
            assert torch.isin(index, before).all()
            before = index
    kept = run.kept
    for row, pieces in enumerate(rows):
        with foveate.use(any_llava, METHOD) as alone:
            got = any_llava(**row_of(inputs, row)).logits[0, -1]
        torch.testing.assert_close(together[row, -1], got, rtol=0, atol=2e-4)
        start = sum(len(p) - 1 for p in rows[:row])
        for i in range(len(pieces) - 1):
            for place, index in alone.kept[i].items():
                assert torch.equal(index, kept[start + i][place])


def test_beams_and_decoding_carry_on(llava):
    inputs = prompts([[5, 7], [2, 3, 9]])
    with foveate.use(llava, METHOD) as run:
        out = llava.generate(
            **inputs, max_new_tokens=4, min_new_tokens=4, num_beams=2, do_sample=False
        )
        beams = counts(run)
        llava(**inputs)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 4
    assert beams[0] == counts(run)[0]


def test_keeping_everything_changes_no_bit(llava):
    inputs = prompts([[5, 7], [4]])
    plain = llava(**inputs).logits
    with foveate.use(llava, VFlowOpt(keep=1.0)):
        assert torch.equal(llava(**inputs).logits, plain)


def test_published_strategies():
    """They keep what they say on average, at the published layers."""
    for average, fields in STRATEGIES.items():
        method = VFlowOpt(**fields)
        steps = method.steps(
            SimpleNamespace(text_layers=28, first_llm_layer=0, last_llm_layer=27, feature_layer=25)
        )
        assert [step.site for step in steps] == ["pre_llm", "llm:9", "llm:18"]
        first, second, third = method.keep
        assert (9 * first + 9 * second + 10 * third) / 28 == pytest.approx(average, abs=2e-3)
        last = second_ratio(average, first, second / first, (9, 18), 28)
        assert last == pytest.approx(third / second, abs=0.03)


def test_errors(llava):
    for keep in (64, (0.5, 0.4), (0.5, 0.4, 3), foveate.per_request([0.5])):
        with pytest.raises(BudgetError):
            VFlowOpt(keep=keep)
    with pytest.raises(FoveateError, match="cell must be at least 1"):
        VFlowOpt(cell=0.5)
    with pytest.raises(FoveateError, match="threshold must be at least 0"):
        VFlowOpt(threshold=-1)
    with pytest.raises(LayerError, match="two, ascending"):
        VFlowOpt(layers=(4, 2))
    with pytest.raises(LayerError, match=r"different thresholds: 1\.0, 2\.0"):
        foveate.use(llava, [VFlowOpt(threshold=1.0), VFlowOpt(threshold=2.0)])


# -- the search


def test_a_search_goes_on_where_it_stopped(llava, tmp_path):
    """And its best is at least as good as every trial, the budget being met exactly."""
    samples = [prompts([[5, 7], [3, 4]], seed=seed) for seed in range(2)]
    file = tmp_path / "search.log"
    options = {"startup": 4, "storage": file, "progress": False}
    calibrate(llava, samples, 0.4, trials=2, **options)
    best = calibrate(llava, samples, 0.4, trials=12, **options)
    journal = optuna.storages.journal
    storage = optuna.storages.JournalStorage(journal.JournalFileBackend(str(file)))
    study = optuna.load_study(study_name="foveate", storage=storage)
    values = [trial.value for trial in study.trials if trial.value is not None]
    assert len(study.trials) == 12
    assert len({tuple(trial.params.values()) for trial in study.trials}) == 12
    assert len(set(values)) > 3, "the objective does not tell trials apart"
    first, second, third = best.keep
    assert first == study.best_trial.params["keep"]
    assert (1 * first + 2 * second + 3 * third) / 6 <= 0.4 + 1e-6

    def score(method):
        whole = [llava.model(**s).last_hidden_state[:, -1] for s in samples]
        with foveate.use(llava, method):
            pruned = [llava.model(**s).last_hidden_state[:, -1] for s in samples]
        return torch.cosine_similarity(torch.cat(whole), torch.cat(pruned), dim=-1).mean().item()

    assert score(best) == pytest.approx(max(values), abs=1e-5)
    again = calibrate(llava, samples, 0.4, trials=12, **options)
    assert again == best
    with pytest.raises(InputError, match="holds a search with other settings"):
        calibrate(llava, samples, 0.5, trials=12, **options)
    assert "generate" not in vars(llava)


def test_a_search_needs_prompts_and_a_budget(llava):
    with pytest.raises(InputError, match="at least one prompt"):
        calibrate(llava, [])
    with pytest.raises(BudgetError, match="average must be in"):
        calibrate(llava, [prompts([[5, 7]])], 1.0)
