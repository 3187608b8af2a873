"""Tokens that keep old keys and values are those of VLA-Cache, and actions follow from them."""

import pytest
import torch

import foveate
from foveate.engine.cache_argument import cache_of
from foveate.errors import BudgetError, InputError, LayerError, UnsupportedModelError
from foveate.robots import Reuse, VLACache
from tests.policies import ROWS, VISUAL, actions, batch, build, observation, policy, prefix
from tests.robots.oracle import film, shares_of, steps

RULES = {
    "paper": {},
    "stricter": {"similarity": 1.0, "static": 0.5, "relevant": 0.25},
    "late": {"layers": (2, 3, 5)},
    "lax": {"similarity": 0.5, "static": 1.0, "relevant": 0.0},
}


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def followed(inputs, rule=None):
    """Actions of one observation after another, and what each step took over."""
    with Reuse(policy(), VLACache() if rule is None else rule) as reuse:
        return [(policy().sample_actions(**given), reuse.last) for given in inputs]


@pytest.mark.parametrize("kind", RULES)
def test_actions_of_a_film_equal_the_oracle(kind):
    """Step after step: what was taken over may be taken over again."""
    rows = film()
    got = followed(rows, VLACache(**RULES[kind]))
    want = steps(rows, **RULES[kind])
    for row, (made, last), (wanted, left) in zip(rows, got, want, strict=True):
        near(made[0], wanted)
        length = row["input_ids"].shape[1]
        assert last.tokens == pytest.approx([n / length for n in left.taken], abs=1e-6)
        if any(left.taken):
            assert (made[0] - actions(row)).abs().max() > 1e-3, "the test does not bite"
    assert max(left.taken) > 2
    if kind == "late":
        assert len(set(left.taken)) > 3, "all layers take over alike"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_of_a_padded_batch_takes_over_what_it_does_alone(side):
    """Rows differ in cameras and words; the second is told something else at the third step, and
    the last has no cameras.
    """
    films = [film(*size, seed=number) for number, size in enumerate(ROWS)]
    films[1][2]["input_ids"][0, -1] = 7
    got = followed([batch(rows, side) for rows in zip(*films, strict=True)])
    alone = [steps(rows) for rows in films]
    total = sum(rows[0]["input_ids"].shape[1] for rows in films)
    taken = []
    for number, (made, last) in enumerate(got):
        lefts = [rows[number][1].taken for rows in alone]
        for row, rows in enumerate(alone):
            near(made[row], rows[number][0])
        shares = [sum(counts) / total for counts in zip(*lefts, strict=True)]
        assert last.tokens == pytest.approx(shares, abs=1e-6)
        taken.append([of[-1] for of in lefts])
    assert taken[0] == [0, 0, 0]
    assert taken[2][1] == 0 < taken[1][1]
    assert all(first > 0 == last for first, _, last in taken[1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_where_nothing_is_alike_no_bit_changes(attention):
    model = policy(attention)
    plain = [model.sample_actions(**row) for row in film()]
    with Reuse(model, VLACache(similarity=2.0)) as reuse:
        for row, want in zip(film(), plain, strict=True):
            assert torch.equal(model.sample_actions(**row), want)
            assert reuse.last.tokens == (0.0,) * 6
    with Reuse(model, VLACache()):
        got = [model.sample_actions(**row) for row in film()]
    assert torch.equal(got[0], plain[0])
    assert not torch.equal(got[1], plain[1])


def test_keys_of_a_still_row_stay_those_of_the_whole_prompt():
    """Everything that can be is taken over in it, beside a row in which the arm moves."""
    still, moving = film()[0], film(seed=1)
    model, held = policy(), []
    rule = VLACache(static=1.0, relevant=0.0, growth=1.0, layers=(0, 1, 2, 3, 4, 5))
    hook = model.model.dit.register_forward_pre_hook(
        lambda module, args, kwargs: held.append([
            (layer.keys[0], layer.values[0]) for layer in cache_of(kwargs).layers
        ]),
        with_kwargs=True,
    )  # fmt: skip
    try:
        with Reuse(model, rule) as reuse:
            for row in moving:
                held.clear()
                model.sample_actions(**batch([still, row]))
    finally:
        hook.remove()
    assert max(reuse.last.tokens) > 0.5
    for got, (want, _, _) in zip(held[0], prefix(still, ()), strict=True):
        for one, two in zip(got, want, strict=True):
            near(one, two)


def test_an_unchanged_prompt_is_not_read_again():
    row, model = film()[0], policy()
    plain = model.sample_actions(**row)
    other = {**row, "state": row["state"] + 1}
    want = model.sample_actions(**other)
    with Reuse(model, VLACache()) as reuse:
        assert torch.equal(model.sample_actions(**row), plain)
        assert torch.equal(model.sample_actions(**other), want)
        assert reuse.last.prompt
        moved = film()[1]
        got = model.sample_actions(**moved)[0]
    near(got, steps([row, moved])[1][0])  # as if there had been one step


@torch.no_grad()
def test_a_prompt_that_the_caller_reads_amid_steps_is_whole():
    model, rows = policy(), film()
    names = ("input_ids", "pixel_values", "pixel_attention_mask")

    def read(row):
        embeds = model.model.embed_prefix(*(row[name] for name in names))
        types = torch.zeros_like(row["input_ids"])
        cache = model.model.vlm(inputs_embeds=embeds, token_type_ids=types, use_cache=True)
        return cache.past_key_values.layers[-1].keys

    want = read(rows[2])
    with Reuse(model, VLACache()):
        for row in rows[:2]:
            model.sample_actions(**row)
        near(read(rows[2]), want)


def test_black_patches_that_stay_black_are_alike():
    """Their pixels have no direction."""
    row = observation()
    row["pixel_values"] = torch.full_like(row["pixel_values"], -1.0)
    row["pixel_values"][:, :, :, :8, :8] = 0.5
    moved = {**row, "pixel_values": row["pixel_values"].roll(8, -1)}
    want, left = steps([row, moved])[1]
    got, last = followed([row, moved])[1]
    near(got[0], want)
    assert left.taken[-1] > 4
    assert last.tokens[-1] > 0.1


def test_nothing_is_taken_over_without_an_instruction_to_go_by():
    rows = film(words=0)
    model = policy()
    want = [model.sample_actions(**row) for row in rows]
    with Reuse(model, VLACache()) as reuse:
        for row, plain in zip(rows, want, strict=True):
            assert torch.equal(model.sample_actions(**row), plain)
            assert not any(reuse.last.tokens)


def test_shares_rise_slower_than_they_fall():
    entropy = [3.0, 1.0, 2.0, 0.5, 0.0, 2.5]
    got = VLACache().shares(torch.tensor([entropy, entropy[::-1]]))
    near(got, torch.tensor([shares_of(entropy), shares_of(entropy[::-1])]))
    near(got[0, :3], torch.tensor([0.0, 0.55 * 2 / 3, 1 / 3]))


def test_layers_are_scaled_to_the_depth():
    assert VLACache().places(32) == (2, 6, 9, 11)
    assert VLACache().places(18) == (2, 4, 6, 7)
    assert VLACache().places(2) == (1,)
    assert (VLACache().reader(32), VLACache().reader(18)) == (15, 8)


# -- refusals


def test_a_session_that_removes_tokens_is_refused():
    model, row = policy(), film()[0]
    with foveate.use(model, "divprune", keep=0.5), pytest.raises(InputError, match="divprune may"):
        Reuse(model, VLACache()).__enter__()
    with (
        Reuse(model, VLACache()),
        foveate.use(model, "divprune", keep=0.5),
        pytest.raises(InputError, match="place in the whole prompt"),
    ):
        model.sample_actions(**row)


def test_kernels_that_take_no_such_mask_are_refused():
    model = build()
    model.model.vlm.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="flash_attention_2 does not take"):
        Reuse(model, VLACache())
    Reuse(model)


@pytest.mark.parametrize("field", ["static", "relevant", "growth", "similarity"])
@pytest.mark.parametrize("value", [-0.1, "half", True, None, float("nan")])
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(BudgetError, match=field):
        VLACache(**{field: value})


@pytest.mark.parametrize(
    "fields", [{"layers": (2, 1)}, {"layers": (6,)}, {"layers": (1, 1)}, {"attention": 6}]
)
def test_layers_that_are_not_there_are_refused(fields):
    with pytest.raises(LayerError):
        Reuse(policy(), VLACache(**fields))


@pytest.mark.parametrize("value", [1.0, True, "1", (0.5,), (True,), ("1",)])
@pytest.mark.parametrize("field", ["layers", "attention"])
def test_layers_that_are_no_ints_are_refused(field, value):
    with pytest.raises(LayerError, match=field):
        VLACache(**{field: value})


def test_nothing_is_taken_over_of_a_row_that_was_not_finite():
    """Or one bad image would be seen by all later steps; rows beside it go on."""
    rows = [batch(rows) for rows in zip(film(), film(seed=1), strict=False)][:3]
    rows[1]["pixel_values"][0, 0, 0, 0, 0] = torch.nan
    (_, _), (bad, before), (good, after) = followed(rows)
    assert bad[0].isnan().any()
    assert before.tokens[-1] > after.tokens[-1] > 0
    with Reuse(policy(), VLACache()) as reuse:
        near(good[0], policy().sample_actions(**rows[2])[0])
        assert not any(reuse.last.tokens)


def test_placeholders_that_are_not_those_of_the_cameras_are_refused():
    rows = [observation(2, 4), observation(1, 3)]
    inputs = batch(rows)
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].flip(0)
    with Reuse(policy(), VLACache()), pytest.raises(InputError, match=f"has {2 * VISUAL} image"):
        policy().sample_actions(**inputs)
