"""pi0: actions of a pruned prompt are those of the whole prompt with removed tokens masked out."""

import threading

import pytest
import torch

import foveate
from foveate.core.budget import per_request
from foveate.engine.cache_argument import cache_of
from foveate.errors import BudgetError, CacheError, InputError, UnsupportedModelError
from foveate.methods import DivPrune, FastV, PyramidDrop
from tests.methods_for_tests import EveryThird, Forgetful, Glance, Listed
from tests.policies import (
    CHUNK,
    ROWS,
    VISUAL,
    Cut,
    actions,
    batch,
    build,
    observation,
    policy,
    prefix,
    rows_of,
    velocity,
)

KINDS = {
    "pre_llm": [EveryThird(0.25, "original")],
    "pre_llm-renumbered": [EveryThird(0.25, "renumbered")],
    "diverse": [DivPrune(0.5)],
    "fastv": [FastV(2, 0.25)],
    "pyramiddrop": [PyramidDrop((1, 4), (0.5, 0.25), "original")],
    "llm-renumbered": [PyramidDrop((2,), 0.5, "renumbered")],
    "composed": [EveryThird(0.5, "original"), FastV(3, 0.25)],
    "forgetful": [Forgetful(3, 0.25)],
}


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def cuts_of(run, row):
    """What the oracle is told of a row: indices that survived, and nothing else."""
    images = zip(run.record.images, run.kept, strict=True)
    mine = [kept for image, kept in images if image.row == row]
    cuts = []
    for site in mine[0] if mine else ():
        layer = int(site.removeprefix("llm:")) if site.startswith("llm") else 0
        renumber = run.methods[0].positions_on(run.family) == "renumbered"
        forget = isinstance(run.methods[0], Forgetful)
        cuts.append(Cut(layer, [kept[site] for kept in mine], renumber, forget))
    return cuts


def sampled(inputs, *methods, **options):
    """Actions of a batch with methods, and the session."""
    with foveate.use(policy(), list(methods)) as run:
        return policy().sample_actions(**inputs, **options), run


# -- the promises


@pytest.mark.parametrize("side", ["right", "left"])
def test_keeping_all_tokens_changes_no_bit(side):
    model, inputs = policy(), batch(rows_of(), side)
    plain = model.sample_actions(**inputs)
    loss = model(**inputs, timestep=torch.full((len(ROWS),), 0.3), actions=plain).loss
    for method in (EveryThird(1.0), FastV(2, 1.0), Listed(1, 1.0)):
        with foveate.use(model, method):
            assert torch.equal(model.sample_actions(**inputs), plain)
            again = model(**inputs, timestep=torch.full((len(ROWS),), 0.3), actions=plain)
            assert torch.equal(again.loss, loss)
    with foveate.use(model, EveryThird(0.25)):
        assert not torch.equal(model.sample_actions(**inputs), plain)
    assert torch.equal(model.sample_actions(**inputs), plain)
    for module in model.modules():
        assert not {"forward", "embed_prefix", "sample_actions"} & vars(module).keys()


def test_the_oracle_is_the_model_where_nothing_is_removed():
    for row in rows_of():
        near(actions(row), policy().sample_actions(**row)[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_actions_of_a_padded_batch_equal_the_oracle(kind, side):
    rows = rows_of()
    got, run = sampled(batch(rows, side), *KINDS[kind])
    assert [image.row for image in run.record.images] == [0, 0, 1]
    for number, row in enumerate(rows):
        cuts = cuts_of(run, number)
        near(got[number], actions(row, cuts))
        if cuts:
            assert (actions(row) - got[number]).abs().max() > 0.02, "the test does not bite"


@pytest.mark.parametrize("kind", [*KINDS, "within"])
def test_a_batch_equals_its_rows(kind):
    methods = [Listed(1, 0.25)] if kind == "within" else KINDS[kind]
    rows = rows_of()
    got, together = sampled(batch(rows), *methods)
    kept = iter(together.kept)
    for number, row in enumerate(rows):
        alone, run = sampled(row, *methods)
        near(got[number], alone[0])
        for image in run.kept:
            assert all(torch.equal(a, image[site]) for site, a in next(kept).items())


@pytest.mark.parametrize("inside", [False, True])
def test_tokens_removed_inside_the_tower_are_gone_from_the_prompt(inside):
    """The oracle is given what the tower made of survivors; of others, zeros that nobody sees."""
    row = observation()
    with foveate.use(policy(), Listed(1, 0.25, "original", inside=inside)) as run:
        names = ("input_ids", "pixel_values", "pixel_attention_mask")
        embeds = policy().model.embed_prefix(*(row[name] for name in names))
        got = policy().sample_actions(**row)
    cut = Cut(0, [image["vision:1"] for image in run.kept])
    assert embeds.isnan().any(-1).sum() == 2 * (VISUAL - 4)
    near(got[0], actions(row, [cut], embeds=embeds.nan_to_num()))
    assert (actions(row) - got[0]).abs().max() > 0.02, "the test does not bite"


def test_every_step_of_denoising_reads_the_shorter_cache():
    """And leaves it as it was; more steps see the same."""
    row, held = observation(), []
    hook = policy().model.dit.register_forward_pre_hook(
        lambda module, args, kwargs: held.append(
            [layer.keys.shape[2] for layer in cache_of(kwargs).layers]
        ),
        with_kwargs=True,
    )
    try:
        got, run = sampled(row, PyramidDrop((1, 4), (0.5, 0.25), "original"), num_steps=5)
    finally:
        hook.remove()
    words, images = ROWS[0][1], 2 * VISUAL
    want = [images + words] + [images // 2 + words] * 3 + [images // 4 + words] * 2
    assert held == [want] * 5
    assert run.record.cache_slots == want
    near(got[0], actions(row, cuts_of(run, 0), steps=5))


def test_a_loss_is_that_of_the_oracle_and_reaches_the_tower():
    model, rows, time = build().train(), rows_of(), 0.3
    model.config.loss_reduction = "none"
    inputs, target = batch(rows), torch.randn(len(ROWS), CHUNK, rows[0]["noise"].shape[-1])
    methods = [EveryThird(0.25, "original"), FastV(3, 0.125)]
    with foveate.use(model, methods) as run:
        loss = model(**inputs, timestep=torch.full((len(ROWS),), time), actions=target).loss
    for number, row in enumerate(rows):
        noise = row["noise"][0]
        noisy = time * noise + (1 - time) * target[number]
        with torch.no_grad():
            predicted = velocity(row, noisy, time, prefix(row, cuts_of(run, number)))
        near(loss[number], (noise - target[number] - predicted).square())
    loss.mean().backward()
    grads = {path: weight.grad for path, weight in model.named_parameters()}
    reached = {path for path, grad in grads.items() if grad is not None and grad.any()}
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    for part in ("vision_tower", "multi_modal_projector", "language_model", "dit"):
        assert any(part in path for path in reached)


def test_a_prepared_policy_is_saved_and_loaded(tmp_path):
    row = observation()
    foveate.save(foveate.prepare(build(), "divprune", keep=0.25), tmp_path)
    with foveate.use(policy(), "divprune", keep=0.25):
        want = policy().sample_actions(**row)
    near(foveate.load(tmp_path).sample_actions(**row), want)
    assert (policy().sample_actions(**row) - want).abs().max() > 0.02


def test_without_a_mask_positions_go_on_as_the_model_counts_them():
    """PaliGemma counts from 1 then, and the expert from the length of the prompt."""
    row = observation()
    del row["attention_mask"]
    plain = policy().sample_actions(**row)
    got, run = sampled(row, EveryThird(0.25, "original"))
    assert run.record.cache_slots == [2 * 4 + ROWS[0][1]] * 6
    near(got[0], actions(row, cuts_of(run, 0), first=1))
    assert (plain - got).abs().max() > 0.02, "the test does not bite"


# -- ways of calling it


def test_a_prompt_can_be_cached_and_read_again():
    """As control loops do that denoise by themselves."""
    model, row, time = policy(), observation(), torch.tensor([1.0])
    names = ("input_ids", "pixel_values", "pixel_attention_mask")
    with torch.no_grad(), foveate.use(model, EveryThird(0.25, "original")) as run:
        want = model(**row, timestep=time).logits
        embeds = model.model.embed_prefix(*(row[name] for name in names))
        positions = row["attention_mask"].cumsum(-1) - 1
        cache = model.model.vlm(
            inputs_embeds=embeds, attention_mask=row["attention_mask"], position_ids=positions,
            token_type_ids=torch.zeros_like(row["input_ids"]), use_cache=True,
        ).past_key_values  # fmt: skip
        given = {name: row[name] for name in ("state", "noise", "attention_mask")}
        got = model(**given, timestep=time, past_key_values=cache).logits
    assert torch.equal(got, want)
    assert run.record.cache_slots[0] == 2 * 4 + ROWS[0][1]
    cache.crop(-(CHUNK + 1))
    with torch.no_grad(), pytest.raises(CacheError, match="only the session"):
        model(**given, timestep=time, past_key_values=cache)


def test_attention_maps_of_the_expert_have_the_length_of_the_prompt():
    """Nobody attends to what was removed, and what is left shares all of the weight."""
    row, length = observation(), 2 * VISUAL + ROWS[0][1] + CHUNK + 1
    model, time = policy("eager"), torch.tensor([1.0])
    with torch.no_grad(), foveate.use(model, EveryThird(0.25)) as run:
        maps = model(**row, timestep=time, output_attentions=True).attentions
    gone = torch.ones(length, dtype=torch.bool)
    gone[2 * VISUAL :] = False
    for number, kept in enumerate(run.kept):
        gone[number * VISUAL + kept["pre_llm"]] = False
    for of in maps:
        assert of.shape[-2:] == (CHUNK + 1, length)
        assert not of[..., gone].any()
        near(of.sum(-1), torch.ones(of.shape[:-1]))


def test_the_model_without_its_matrices_of_actions_is_served_too():
    model, row = policy(), observation()
    embeds = model.embed_action_time(row["state"], row["noise"], torch.tensor([1.0]))
    given = {name: row[name] for name in row if name not in ("state", "noise")}
    with torch.no_grad(), foveate.use(model.model, EveryThird(0.25)):
        part = model.model(action_embeds=embeds, **given).last_hidden_state
    with torch.no_grad(), foveate.use(model, EveryThird(0.25)):
        whole = model(**row, timestep=torch.tensor([1.0])).logits
    assert torch.equal(model.action_out_proj(part[:, -CHUNK:]), whole)


def test_a_budget_can_be_given_for_each_row():
    rows = rows_of(((2, 4), (1, 3)))
    got, _ = sampled(batch(rows), EveryThird(per_request([0.25, 0.75]), "original"))
    for number, (row, keep) in enumerate(zip(rows, (0.25, 0.75), strict=True)):
        near(got[number], sampled(row, EveryThird(keep, "original"))[0][0])


@pytest.mark.parametrize("total", [9, (9, 5, 3)], ids=str)
def test_the_cameras_of_a_step_share_a_total(total):
    """In each row alone, and anew at each step: what a step before held is no earlier turn."""
    rows = rows_of()
    with foveate.use(policy(), EveryThird(8, "original"), keep_total=total) as run:
        for _ in range(2):
            got = policy().sample_actions(**batch(rows))
            second = 8 if total == 9 else 5
            assert [len(kept["pre_llm"]) for kept in run.kept] == [4, 5, second]
            for number, row in enumerate(rows):
                near(got[number], actions(row, cuts_of(run, number)))
        held = [(of["limit"], of["visual_tokens"]) for of in run.report()["keep_total"]]
    limits = (total,) * 3 if isinstance(total, int) else total
    assert held == list(zip(limits, (9, second, 0), strict=True))


def test_a_step_has_a_token_for_each_camera_and_trains_without_a_total():
    with (
        foveate.use(policy(), EveryThird(8), keep_total=1),
        pytest.raises(BudgetError, match=r"less than one visual token for each of the 2 images"),
    ):
        policy().sample_actions(**batch(rows_of()))
    with pytest.raises(BudgetError, match="train without it"):
        foveate.prepare(build(), EveryThird(8), keep_total=9)
    with pytest.raises(UnsupportedModelError, match="it takes no audio"):
        foveate.use(policy(), EveryThird(8), audio=True)


def test_a_prompt_without_images_passes_untouched():
    row = observation(cameras=0)
    plain = policy().sample_actions(**row)
    for method in (EveryThird(0.25), FastV(2, 0.25), Listed(1, 0.25)):
        got, run = sampled(row, method)
        assert torch.equal(got, plain)
        assert run.record.images == []


@pytest.mark.parametrize("slug", ["every-third", "cdpruner", "fastv"])
def test_a_prompt_may_end_in_a_camera(slug):
    """No token is read from its last one, so that this may go; where methods ask for text, it
    stands for that, though the table of embeddings has no placeholder.
    """
    method = EveryThird(0.25) if slug == "every-third" else foveate.get_method(slug)(keep=0.25)
    rows = [observation(cameras, words=0, seed=cameras) for cameras in (2, 1)]
    got, run = sampled(batch(rows), method)
    if slug == "every-third":
        assert VISUAL - 1 not in run.kept[1]["pre_llm"]
    for number, row in enumerate(rows):
        alone, run = sampled(row, method)
        near(got[number], alone[0])
        near(got[number], actions(row, cuts_of(run, 0)))


@pytest.mark.parametrize("how", ["sampling", "denoising"])
def test_a_thread_that_was_there_before_goes_on_without_a_session(how):
    model, row, found = policy(), observation(), []

    @torch.no_grad()
    def act():
        if how == "sampling":
            return model.sample_actions(**row)
        return model(**row, timestep=torch.tensor([1.0])).logits

    plain = act()
    embedded, attached = threading.Event(), threading.Event()

    def wait(module, args, output):
        embedded.set()
        assert attached.wait(10)

    hook = model.model.vlm.multi_modal_projector.register_forward_hook(wait)
    try:
        thread = threading.Thread(target=lambda: found.append(act()))
        thread.start()
        assert embedded.wait(10)
        with foveate.use(model, FastV(2, 0.25)):
            attached.set()
            thread.join()
    finally:
        hook.remove()
    assert torch.equal(found[0], plain)


def test_an_expert_that_dies_leaves_the_cache_as_it_was():
    model, row = policy(), observation()
    given = {name: row[name] for name in ("state", "noise", "attention_mask")}
    with torch.no_grad(), foveate.use(model, EveryThird(0.25)):
        cache = model(**row, timestep=torch.tensor([1.0])).past_key_values
        cache.crop(-(CHUNK + 1))
        want = model(**given, timestep=torch.tensor([0.5]), past_key_values=cache).logits
        cache.crop(-(CHUNK + 1))
        hook = model.model.dit.layers[3].mlp.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**given, timestep=torch.tensor([0.5]), past_key_values=cache)
        hook.remove()
        got = model(**given, timestep=torch.tensor([0.5]), past_key_values=cache).logits
    assert torch.equal(got, want)


def fail(module, args):
    raise RuntimeError("out of memory")


# -- refusals


def test_placeholders_that_are_not_those_of_the_cameras_are_refused():
    inputs = batch(rows_of(((2, 4), (1, 3))))
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].flip(0)
    with pytest.raises(InputError, match="row 0 has 32 image placeholders, but its cameras"):
        sampled(inputs, EveryThird(0.25))


@torch.no_grad()
def test_embeddings_from_elsewhere_are_refused():
    row = observation()
    names = ("input_ids", "pixel_values", "pixel_attention_mask")
    embeds = policy().model.embed_prefix(*(row[name] for name in names))
    with foveate.use(policy(), EveryThird(0.25)):
        others = policy().model.embed_prefix(*(row[name] for name in names))
        assert policy()(**row, inputs_embeds=others).logits is not None
    for given in (embeds, others):
        with foveate.use(policy(), EveryThird(0.5)), pytest.raises(InputError, match="do not say"):
            policy()(**row, inputs_embeds=given)


def test_methods_that_choose_for_each_new_token_are_refused():
    for method in ("dycoke", Glance(2)):
        with pytest.raises(UnsupportedModelError, match=r"makes no new tokens.*divprune"):
            foveate.use(policy(), method)


def test_methods_that_learn_are_not_trained():
    with pytest.raises(UnsupportedModelError, match="the loss of this pi0 is that of actions"):
        foveate.prepare(policy(), "visionselector")


def test_kernels_of_the_expert_are_checked():
    model = build()
    model.model.dit.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        foveate.use(model, EveryThird(0.25)).attach()


def test_other_models_within_are_refused():
    model = build()
    model.model.dit.config.model_type = "gemma2"
    with pytest.raises(UnsupportedModelError, match="this PI0ForConditionalGeneration holds"):
        foveate.use(model, EveryThird(0.25))
