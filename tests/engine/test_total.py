"""`keep_total`: a conversation never holds more visual tokens, however many images come."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveate
from foveate.core import get_method
from foveate.core.budget import divide
from foveate.errors import BudgetError, CacheError, InputError
from foveate.methods import FastV, LLaVAPruMerge, PyramidDrop
from foveate.streaming import Stream
from tests import oracle
from tests.engine.test_oracle import TOLERANCE, features_of
from tests.methods_for_tests import EveryThird, readers_methods
from tests.tinies import IMAGE, PATCHES, prompts, row_of, tiny_llava


def dealt(wants, total):
    """One token after another, newest image first."""
    counts, left = [0] * len(wants), total
    while left and counts != list(wants):
        for number in reversed(range(len(wants))):
            if left and counts[number] < wants[number]:
                counts[number], left = counts[number] + 1, left - 1
    return counts


def order_of(count):
    """Which of `count` survivors of `EveryThird` stay longest, in words: those that it keeps of a
    half, a quarter, ... of as many; of equals, those whose place reads least backwards in bits.
    """
    levels, half = [], count // 2
    while half:
        levels.append(half)
        half //= 2
    bits = max(count - 1, 1).bit_length()
    backwards = [
        sum((place >> i & 1) << (bits - 1 - i) for i in range(bits)) for place in range(99)
    ]
    return sorted(
        range(count), key=lambda place: (-sum(place < n for n in levels), backwards[place])
    )


wanted = st.lists(st.integers(0, 60), min_size=1, max_size=9)


@given(wanted, st.integers(1, 400))
def test_tokens_are_dealt_one_by_one(wants, total):
    assert divide(wants, total) == dealt(wants, total)


@given(wanted, st.integers(0, 60), st.integers(1, 400))
def test_a_new_image_takes_and_never_gives(wants, new, total):
    """So what was removed is never missed, and images in a cache end where they would without."""
    before, after = divide(wants, total), divide([*wants, new], total)[:-1]
    assert all(b >= a for b, a in zip(before, after, strict=True))
    assert divide([*before, new], total)[:-1] == after


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(3, 60), st.integers(1, 36))
def test_sums_never_exceed_the_total(small_llava, images, total, keep):
    rows = [[3] * (count + 1) for count in images]
    if not any(images):
        return
    with foveate.use(small_llava, EveryThird(keep), keep_total=total) as run:
        small_llava(**prompts(rows), use_cache=False)
    got = [
        [len(i.kept["pre_llm"]) for i in run.record.images if i.row == n] for n in range(len(rows))
    ]
    assert got == [dealt([keep] * count, total) for count in images]
    assert all(sum(counts) <= total for counts in got)


@pytest.fixture(scope="module")
def small_llava():
    return tiny_llava(layers=2)


# -- one prompt


def test_a_prompt_equals_the_oracle_and_each_row_alone(any_llava):
    rows, totals = [[5, 4, 7], [4], [2, 3, 9, 1]], [20, 1, 25]
    inputs = prompts(rows)
    with foveate.use(any_llava, EveryThird(12), keep_total=totals) as run:
        got = any_llava(**inputs).logits
    assert run.record.keep_total == totals
    assert [len(kept["pre_llm"]) for kept in run.kept] == [10, 10, 8, 8, 9]
    for row, counts in enumerate([(10, 10), (), (8, 8, 9)]):
        alone = row_of(inputs, row)
        with foveate.use(any_llava, EveryThird(12), keep_total=totals[row]):
            own = any_llava(**alone).logits[0]
        length = alone["input_ids"].shape[1]
        text = alone["input_ids"][0] != IMAGE
        assert (got[row, -length:] - own)[text].abs().max() <= TOLERANCE
        spec = oracle.Spec(kept=[torch.arange(0, 3 * n, 3) for n in counts])
        want, _ = oracle.run(
            any_llava, alone["input_ids"][0], features_of(any_llava, alone), spec, length
        )
        assert (want - own)[text].abs().max() <= TOLERANCE


def test_a_step_within_the_language_model_follows(llava):
    """Its shares are of what the total has left."""
    methods = [EveryThird(12), FastV(layer=2, keep=0.5)]
    with foveate.use(llava, methods, keep_total=16) as run:
        llava(**prompts([[5, 4, 7]]))
    assert [[len(k) for k in kept.values()] for kept in run.kept] == [[8, 4], [8, 4]]
    assert run.report()["keep_total"] == [{"limit": 16, "visual_tokens": 16, "of_earlier_turns": 0}]
    assert "row 0 holds 16 of at most 16 visual tokens" in str(run.report())


@pytest.mark.parametrize("beams", [1, 2])
def test_a_total_that_nothing_reaches_changes_nothing(llava, beams):
    """Logits and generations are bit-equal, in a second turn with a new image too."""
    inputs, more = prompts([[5, 7], [3, 6]]), prompts([[4, 4], [4, 4]], seed=3)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    found = []
    for total in (None, 24, [99, 24]):
        with foveate.use(llava, EveryThird(12), keep_total=total):
            answer = llava.generate(**inputs, **options)
            first = llava(**inputs, use_cache=True)
            second = llava(**continued(more, inputs), past_key_values=first.past_key_values)
        found.append((answer, first.logits, second.logits))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def continued(more, *before):
    """Inputs of a turn after others that are cached."""
    mask = torch.cat([turn["attention_mask"] for turn in (*before, more)], 1)
    return {**more, "attention_mask": mask}


def in_budget(name):
    """Whether a method acts before the language model with a budget."""
    return get_method(name).stage == "pre_llm"


@pytest.mark.parametrize("name", [*filter(in_budget, readers_methods())])
def test_every_method_keeps_to_a_total_or_says_that_it_does_not(llava, name):
    try:
        with foveate.use(llava, name, keep_total=15) as run:
            llava(**prompts([[5, 4, 7]]))
    except BudgetError as error:
        if "keep_total" not in str(error):
            raise
        return
    assert run.record.visual_tokens(0)[1] <= 15


# -- several turns


class Chat:
    """Turns of a conversation with a cache, and of rows as the oracle reads them."""

    def __init__(self, model, method, total):
        self.model, self.method, self.total = model, method, total
        self.turns, self.cache, self.logits, self.lengths = [], None, [], []

    def say(self, pieces, seed):
        turn = prompts(pieces, seed=seed)
        inputs = continued(turn, *self.turns)
        with torch.no_grad(), foveate.use(self.model, self.method, keep_total=self.total) as run:
            out = self.model(**inputs, past_key_values=self.cache, use_cache=True)
        self.turns.append(turn)
        self.cache = out.past_key_values
        self.logits.append(out.logits)
        real = [(layer.slots.index >= 0).sum(1).tolist() for layer in self.cache.layers]
        assert all(layer.keys.shape[2] == layer.slots.count for layer in self.cache.layers)
        self.lengths.append(real)
        return run

    def row(self, row):
        """(T) ids of a row without padding, features of its images, and where turns begin."""
        parts = [row_of(turn, row) for turn in self.turns]
        ids = torch.cat([part["input_ids"][0] for part in parts])
        starts = torch.tensor([0, *(part["input_ids"].shape[1] for part in parts)]).cumsum(0)
        return ids, [f for part in parts for f in features_of(self.model, part)], starts.tolist()


def expected(ids, starts, keep, total, renumber):
    """A spec of the oracle for a row, and how many tokens of its images it holds per turn."""
    columns = list((ids == IMAGE).nonzero()[:, 0].split(PATCHES)) if IMAGE in ids else []
    kept, forgotten, held, history = [], [], [], []
    for start, end in pairwise(starts):
        new = [c for c in columns if start <= c[0] < end]
        counts = dealt([*map(len, held), *[keep] * len(new)], total)
        gone = [c[n:] for c, n in zip(held, counts, strict=False)]
        if gone:
            forgotten.append((start, torch.cat(gone)))
        held = [c[:n] for c, n in zip(held, counts, strict=False)]
        for image, count in zip(new, counts[len(held) :], strict=True):
            kept.append(torch.arange(0, 3 * count, 3))
            held.append(image[kept[-1]][order_of(count)])
        history.append(list(map(len, held)))
    return oracle.Spec(kept=kept, renumber=renumber, forgotten=forgotten), history


ROWS = {
    "one": [[[5, 7]], [[4, 4]], [[3]], [[2, 1, 6]]],
    "ragged": [
        [[5, 7], [4], [2, 3, 9]],
        [[4, 4], [44], [4 + PATCHES + 4]],
        [[3], [3], [3]],
        [[2, 1, 6], [2, PATCHES + 7], [PATCHES + 2, 7]],
    ],
}


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_turns_with_new_images_equal_the_oracle(any_llava, rows, positions):
    """An image, another, text alone, and two more at once: earlier ones shrink each time."""
    keep, total = 12, 20
    chat = Chat(any_llava, EveryThird(keep, positions), total)
    records = [chat.say(pieces, seed).record for seed, pieces in enumerate(rows)]
    everything, lengths = 0, [[] for _ in rows]
    for row in range(len(rows[0])):
        ids, features, starts = chat.row(row)
        spec, history = expected(ids, starts, keep, total, positions == "renumbered")
        want, _ = oracle.run(any_llava, ids, features, spec, len(ids))
        plain, _ = oracle.run(
            any_llava, ids, features, oracle.Spec(kept=spec.kept, renumber=spec.renumber), len(ids)
        )
        for turn, (start, end) in enumerate(pairwise(starts)):
            text = ids[start:end] != IMAGE
            got = chat.logits[turn][row, start - end :]
            assert (want[start:end] - got)[text].abs().max() <= TOLERANCE
            everything = max(everything, (plain[start:end] - got)[text].abs().max().item())
            held = sum(history[turn])
            assert held <= total
            lengths[turn].append(int((ids[:end] != IMAGE).sum()) + held)
            if turn != 2:  # the turn of text has no record of its own
                new = [i.left for i in records[turn].images if i.row == row]
                assert records[turn].earlier_tokens[row] == held - sum(new)
        # The whole conversation at once has as many tokens of each image.
        with foveate.use(any_llava, EveryThird(keep, positions), keep_total=total) as run:
            parts = [row_of(turn, row) for turn in chat.turns]
            pixels = [part["pixel_values"] for part in parts if "pixel_values" in part]
            if pixels:
                any_llava(input_ids=ids[None], pixel_values=torch.cat(pixels))
                assert [len(kept["pre_llm"]) for kept in run.kept] == history[-1]
    assert chat.lengths == [[of_rows] * 6 for of_rows in lengths]
    assert everything > 0.05, "the test does not bite"


def test_a_pruned_cache_generates_on(llava):
    """Eight steps after a shrink equal a forward over them."""
    chat = Chat(llava, EveryThird(12), 15)
    for seed, pieces in enumerate(ROWS["ragged"][:2]):
        chat.say(pieces, seed)
    ids = torch.randint(3, 119, (3, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.cat([turn["attention_mask"] for turn in chat.turns], 1)
    with torch.no_grad(), foveate.use(llava, EveryThird(12), keep_total=15):
        steps = []
        for number in range(8):
            mask = torch.cat((mask, mask.new_ones(3, 1)), 1)
            step = ids[:, number : number + 1]
            out = llava(input_ids=step, attention_mask=mask, past_key_values=chat.cache)
            steps.append(out.logits)
    for row in range(3):
        own, features, starts = chat.row(row)
        spec, _ = expected(own, starts, 12, 15, False)
        whole = torch.cat((own, ids[row]))
        want, _ = oracle.run(llava, whole, features, spec, len(own))
        assert (want[-8:] - torch.cat(steps, 1)[row]).abs().max() <= TOLERANCE


def test_rows_of_a_cache_take_their_images_along(llava):
    """After the rows of a cache have changed places, each shrinks as it would have."""
    first, second = prompts([[5, 4, 3], [5, PATCHES + 4, 3]][:1] * 2), prompts([[4, 4]] * 2, seed=3)
    first = prompts([[5, 4, 3], [5, PATCHES + 7]])
    found = []
    for order in ([0, 1], [1, 0]):
        with torch.no_grad(), foveate.use(llava, EveryThird(12), keep_total=20):
            cache = llava(**first, use_cache=True).past_key_values
            cache.reorder_cache(torch.tensor(order))
            inputs = {name: value[order] for name, value in second.items()}
            out = llava(**continued(inputs, first), past_key_values=cache)
        found.append(out.logits[order])
    torch.testing.assert_close(*found, atol=TOLERANCE, rtol=0)


def test_a_turn_that_fails_leaves_the_cache_as_it_was(llava):
    chat = Chat(llava, EveryThird(12), 15)
    chat.say([[5, 7]], 0)
    before = [layer.keys.clone() for layer in chat.cache.layers]
    turn = continued(prompts([[4, 4]], seed=1), *chat.turns)
    layer = llava.model.language_model.layers[3]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), foveate.use(llava, EveryThird(12), keep_total=15):
        llava(**turn, past_key_values=chat.cache)
    handle.remove()
    for layer, keys in zip(chat.cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
    chat.say([[4, 4]], 1)
    ids, features, starts = chat.row(0)
    spec, _ = expected(ids, starts, 12, 15, False)
    want, _ = oracle.run(llava, ids, features, spec, len(ids))
    assert (want[-1] - chat.logits[1][0, -1]).abs().max() <= TOLERANCE


# -- what is refused


@pytest.mark.parametrize("total", [0, -3, 1.5, True, "9", [], [5, 0], [5, None]])
def test_other_totals_are_refused(llava, total):
    with pytest.raises(BudgetError, match="keep_total must be a positive int"):
        foveate.use(llava, EveryThird(), keep_total=total)


def test_methods_that_cannot_keep_to_a_total_are_refused(llava):
    with pytest.raises(BudgetError, match=r"fastv does not act.*'uniform'"):
        foveate.use(llava, "fastv", keep_total=9)
    with pytest.raises(BudgetError, match=r"llava-prumerge decides by itself.*'uniform'"):
        foveate.use(llava, LLaVAPruMerge(), keep_total=9)
    with foveate.use(llava, [LLaVAPruMerge(), EveryThird(1.0)], keep_total=9) as run:
        llava(**prompts([[5, 4, 7]]))
    assert run.record.visual_tokens(0)[1] <= 9


def test_prompts_that_leave_an_image_nothing_are_refused(llava):
    inputs = prompts([[2, 2, 2, 2]])
    with (
        foveate.use(llava, EveryThird(), keep_total=2),
        pytest.raises(BudgetError, match="less than one visual token for each of the 3 images"),
    ):
        llava(**inputs)
    with (
        foveate.use(llava, EveryThird(), keep_total=[3, 3]),
        pytest.raises(BudgetError, match="keep_total has 2 entries, but the batch has 1 rows"),
    ):
        llava(**inputs)


@pytest.mark.parametrize("where", ["plain", "session", "between"])
def test_caches_whose_images_were_not_counted_are_refused(llava, where):
    first, second, third = prompts([[5, 7]]), prompts([[4, 4]], seed=1), prompts([[3, 3]], seed=2)
    cache, turns = None, [first]
    if where == "between":
        with foveate.use(llava, EveryThird(), keep_total=30):
            cache = llava(**first, use_cache=True).past_key_values
        turns.append(second)
    turn = continued(turns[-1], *turns[:-1])
    if where == "plain":
        cache = llava(**turn, use_cache=True).past_key_values
    else:
        with foveate.use(llava, EveryThird()):
            cache = llava(**turn, past_key_values=cache, use_cache=True).past_key_values
    with (
        foveate.use(llava, EveryThird(), keep_total=30),
        pytest.raises(CacheError, match=r"keep_total counts.*outside of a session"),
    ):
        llava(**continued(third, *turns), past_key_values=cache)


def test_streams_and_training_are_refused(llava):
    run = foveate.use(llava, EveryThird(), keep_total=9)
    with pytest.raises(InputError, match=r"keep_total.*cap"):
        Stream(run, cap=50)
    with pytest.raises(BudgetError, match="train without it"):
        run.check_training()


def test_refusals_of_several_methods_are_grammatical(llava):
    with pytest.raises(BudgetError, match=r"model, where none of fastv and pyramiddrop acts; put"):
        foveate.use(llava, [FastV(1), PyramidDrop((2,), 0.5)], keep_total=9)
