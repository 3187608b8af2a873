"""Methods that decide how many tokens survive, and methods that begin before the language model."""

import pytest
import torch

import foveate
from foveate import per_request
from foveate.methods import CATP, Feather, SparseVLM, Uniform
from foveate.signals.layer_view import LayerView
from tests.tinies import PATCHES, prompts, row_of

ROWS = [(3, 6), (2, 4), (5, 9)]


def counts(run):
    return [{place: len(index) for place, index in image.items()} for image in run.kept]


def test_budgets_per_request_reach_adaptive_methods(llava):
    """The budget of each row, whatever else is in the batch."""
    inputs = prompts(ROWS)
    method = Feather(layers=(2, 4), keep=per_request([0.5, 0.2, 1.0]), stride=None)
    with foveate.use(llava, method) as run:
        llava(**inputs)
    assert counts(run) == [
        {"llm:2": 18, "llm:4": 9},
        {"llm:2": 7, "llm:4": 1},
        {"llm:2": 36, "llm:4": 36},
    ]


def test_images_of_one_batch_may_keep_different_numbers(llava):
    """The grid and the ranking overlap more in some images than in others."""
    inputs = prompts([(3, 6)] * 6)
    with foveate.use(llava, Feather(layers=(2,), keep=0.2)) as run:
        logits = llava(**inputs).logits
    left = [image["llm:2"] for image in counts(run)]
    assert len(set(left)) > 1
    for row in range(6):
        with foveate.use(llava, Feather(layers=(2,), keep=0.2)) as alone:
            want = llava(**row_of(inputs, row)).logits
        assert counts(alone) == [{"llm:2": left[row]}]
        torch.testing.assert_close(logits[row, -1], want[0, -1], rtol=0, atol=3e-5)


@pytest.mark.parametrize("positions", ["renumbered", "original"])
def test_recycled_tokens_come_last_where_positions_are_consecutive(llava, positions):
    """Rank by rank: the states that enter the next layer are kept ones, then merged ones."""
    inputs = prompts([(3, 6)])
    method = SparseVLM(layers=(2,), keep=12, positions=positions)
    states = {}

    def look(name):
        return lambda module, args, kwargs: states.update({name: args[0][0]})

    layer = llava.model.language_model.layers[2].input_layernorm
    handles = [layer.register_forward_pre_hook(look("plain"), with_kwargs=True)]
    llava(**inputs)
    handles.pop().remove()
    with foveate.use(llava, method) as run:
        handle = layer.register_forward_pre_hook(look("cut"), with_kwargs=True)
        llava(**inputs)
        handle.remove()
    image, text = states["plain"][3 : 3 + PATCHES], states["plain"][3 + PATCHES :]
    survivors = run.kept[0]["llm:2"]
    assert len(survivors) == 13
    torch.testing.assert_close(states["cut"][16:], text)
    inside = states["cut"][3:16]
    same = (inside[:, None] == image[None]).all(-1)
    whole = same.any(1)
    assert whole.sum() == 12
    if positions == "renumbered":
        assert whole.tolist() == [True] * 12 + [False]
    else:
        merged = int((~whole).nonzero())
        assert same[whole].long().argmax(1).tolist() == [
            int(i) for n, i in enumerate(survivors) if n != merged
        ]


def test_a_step_may_reorder_without_removing(llava):
    """The released SparseVLM moves its last token even if the budget allows all."""
    inputs = prompts(ROWS)
    plain = llava(**inputs).logits
    method = SparseVLM(layers=(2,), keep=1.0, as_released=True)
    with foveate.use(llava, method) as run:
        out = llava.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        moved = llava(**inputs).logits
    assert counts(run) == [{"llm:2": PATCHES}] * 3
    assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1] + 2
    assert moved.isfinite().all()
    assert not torch.equal(moved[:, -1], plain[:, -1])


def test_shares_are_of_where_the_method_began(llava):
    """Behind another method, and across the border of the language model."""
    inputs = prompts(ROWS)
    methods = [Uniform(keep=0.5), CATP(layers=(3,), keep=(0.5, 0.25))]
    with foveate.use(llava, methods) as run:
        llava(**inputs)
    assert counts(run) == [{"pre_llm#1": 18, "pre_llm": 9, "llm:3": 4}] * 3


def test_shares_hold_for_beams(llava):
    inputs = prompts(ROWS)
    with foveate.use(llava, CATP(layers=(3,), keep=(0.5, 0.25))) as run:
        llava.generate(**inputs, num_beams=3, max_new_tokens=2)
    assert counts(run) == [{"pre_llm": 18, "llm:3": 9}] * len(counts(run))


def test_closeness_is_the_mean_cosine_of_rotary_angles(llava):
    text = llava.model.language_model
    hidden = torch.randn(2, 9, 64)
    positions = torch.tensor([[0, 1, 2, 5, 6, 9, 10, 11, 40], list(range(9))])
    view = LayerView(text.layers[0], hidden, text.rotary_emb(hidden, positions))
    asked = torch.tensor([[3, 8], [2, 8]])
    got = view.closeness(asked)
    frequency = text.config.rope_parameters["rope_theta"] ** (-torch.arange(0, 16, 2) / 16)
    for row in range(2):
        for query in range(2):
            apart = positions[row, asked[row, query]] - positions[row]
            want = (apart[:, None] * frequency).cos().mean(-1)
            torch.testing.assert_close(got[row, query], want)
    assert (LayerView(text.layers[0], hidden, None).closeness(asked) == 1).all()
