"""What is equal to the step before is not computed again, and no bit changes for that."""

import threading

import pytest
import torch

import foveate
from foveate.errors import AttachError, InputError, UnsupportedModelError
from foveate.methods import DivPrune, FastV, PyramidDrop
from foveate.robots import Reuse
from tests.conformance.zoo import MEMBERS
from tests.methods_for_tests import EveryThird, Listed
from tests.policies import ACTION, CHUNK, ROWS, batch, build, observation, policy, rows_of

WHOLE = None, "divprune", "fastv", "renumbered", "composed"
METHODS = {
    "divprune": DivPrune(0.5),
    "fastv": FastV(2, 0.25),
    "renumbered": PyramidDrop((2,), 0.5, "renumbered"),
    "composed": [EveryThird(0.5, "original"), FastV(3, 0.25)],
}


class Encoded:
    """How many images the tower's first module is given, and how often PaliGemma is called."""

    def __init__(self, model):
        tower, text = model.model.vlm.vision_tower, model.model.vlm.language_model
        patches = next(m for m in tower.modules() if isinstance(m, torch.nn.Conv2d))
        self.images, self.prompts = [], 0
        self.handles = [
            patches.register_forward_pre_hook(lambda _, args: self.images.append(len(args[0]))),
            text.layers[0].register_forward_pre_hook(self.called, with_kwargs=True),
        ]

    def called(self, *_):
        self.prompts += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def moved(inputs, row=0, camera=1):
    """The same with another picture of one camera."""
    pixels = inputs["pixel_values"].clone()
    pixels[row, camera] = pixels[row, camera].flip(-1)
    return {**inputs, "pixel_values": pixels}


def elsewhere(inputs):
    """The same with a robot in another state."""
    return {**inputs, "state": inputs["state"] + 1, "noise": inputs["noise"].flip(0)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", WHOLE)
def test_no_bit_changes_and_nothing_is_computed_twice(name, side):
    model, inputs = policy(), batch(rows_of(), side)
    seen = [inputs, elsewhere(inputs), moved(inputs), moved(inputs), inputs]
    session = foveate.use(model, METHODS[name] if name else EveryThird(1.0))
    with session as run:
        want = [model.sample_actions(**given) for given in seen]
        kept = run.kept
    got, last = [], []
    with session if name else Encoded(model), Reuse(model) as reuse, Encoded(model) as encoded:
        for given in seen:
            got.append(model.sample_actions(**given))
            last.append(reuse.last)
    every = torch.ones(len(ROWS), 2, dtype=torch.bool)
    other = every.clone()
    other[0, 1] = False
    assert encoded.images == [6, 1, 1]
    assert encoded.prompts == 3
    assert [step.prompt for step in last] == [False, True, False, True, False]
    for step, equal in zip(last, (~every, every, other, every, other), strict=True):
        assert torch.equal(step.cameras, equal)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[3], got[2])
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # an image alone rounds so
    assert not torch.equal(got[2], got[0])
    if name:
        assert [list(image) for image in session.kept] == [list(image) for image in kept]


def test_all_images_anew_change_no_bit():
    model, rows = policy(), [observation(2, 4, seed=seed) for seed in range(3)]
    want = [model.sample_actions(**row) for row in rows]
    with Reuse(model):
        for row, plain in zip(rows, want, strict=True):
            assert torch.equal(model.sample_actions(**row), plain)


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "pixel_attention_mask"])
def test_a_prompt_is_read_again_if_anything_of_it_changes(name):
    """But for cameras, which are encoded for themselves."""
    model, inputs = policy(), batch(rows_of(((2, 4), (1, 4))))
    other = {**inputs, name: inputs[name].clone()}
    if name == "pixel_attention_mask":
        other[name][1] = other[name][1].flip(0)
    else:
        other[name][0, 33] = 5 if name == "input_ids" else 0
    want = model.sample_actions(**other)
    with Reuse(model) as reuse, Encoded(model) as encoded:
        model.sample_actions(**inputs)
        assert torch.equal(model.sample_actions(**other), want)
    assert not reuse.last.prompt
    assert reuse.last.cameras.all()
    assert encoded.images == [4]


def test_a_camera_may_write_into_the_same_memory():
    model, row = policy(), observation()
    with Reuse(model):
        model.sample_actions(**row)
        row["pixel_values"][0, 0] += 0.5
        got = model.sample_actions(**row)
    torch.testing.assert_close(got, model.sample_actions(**row), rtol=1e-5, atol=1e-5)


def test_noise_and_steps_are_those_of_the_model():
    model, row = policy(), observation()
    del row["noise"]
    torch.manual_seed(3)
    want = model.sample_actions(**row, num_steps=5)
    with Reuse(model) as reuse:
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(model.sample_actions(**row, num_steps=5), want)
    assert reuse.last.prompt


@torch.no_grad()
def test_single_steps_and_losses_are_served_and_caches_are_the_callers():
    """Actions stay in the cache that the model returns; the next step must not see them."""
    model, row, time = policy(), observation(), torch.tensor([0.5])
    want = model(**row, timestep=time)
    target = torch.zeros(1, CHUNK, ACTION)
    loss = model(**row, timestep=time, actions=target).loss
    with Reuse(model) as reuse:
        first = model(**row, timestep=time)
        second = model(**row, timestep=time)
        assert reuse.last.prompt
        second.past_key_values.crop(-3)
        assert torch.equal(model(**row, timestep=time, actions=target).loss, loss)
    for got in (first, second):
        assert torch.equal(got.logits, want.logits)
    assert first.past_key_values.get_seq_length() == want.past_key_values.get_seq_length()
    assert second.past_key_values.get_seq_length() == want.past_key_values.get_seq_length() - 3


@torch.no_grad()
def test_the_model_without_its_matrices_of_actions_is_served_too():
    model, row = policy(), observation()
    embeds = model.embed_action_time(row["state"], row["noise"], torch.tensor([1.0]))
    given = {name: row[name] for name in row if name not in ("state", "noise")}
    want = model.model(action_embeds=embeds, **given).last_hidden_state
    with Reuse(model.model) as reuse:
        for _ in range(2):
            assert torch.equal(model.model(embeds, **given).last_hidden_state, want)
    assert reuse.last.prompt


@torch.no_grad()
def test_loops_of_the_callers_own_encode_no_image_twice():
    model, row = policy(), observation()
    names = ("input_ids", "pixel_values", "pixel_attention_mask")
    want = model.model.embed_prefix(*(row[name] for name in names))
    with Reuse(model), Encoded(model) as encoded:
        for _ in range(2):
            assert torch.equal(model.model.embed_prefix(*(row[name] for name in names)), want)
        states = model.model.vlm.vision_tower(
            row["pixel_values"][0], output_hidden_states=True
        ).hidden_states
    assert encoded.images == [2, 2]
    assert len(states) > 1


def test_what_a_session_has_made_is_for_it_alone():
    model, row = policy(), observation()
    plain = model.sample_actions(**row)
    with Reuse(model) as reuse:
        model.sample_actions(**row)
        with foveate.use(model, "divprune", keep=0.25) as run:
            pruned = model.sample_actions(**row)
            assert not reuse.last.prompt
            assert reuse.last.cameras.all()
            assert torch.equal(model.sample_actions(**row), pruned)
            assert reuse.last.prompt
        assert torch.equal(model.sample_actions(**row), plain)
        assert not reuse.last.prompt
    assert run.record.cache_slots[0] == 2 * 4 + 4


def test_it_forgets_when_told_and_when_it_ends():
    model, row = build(), observation()
    reuse = Reuse(model)
    with reuse:
        assert reuse.last is None
        model.sample_actions(**row)
        with torch.no_grad():
            model.model.vlm.multi_modal_projector.linear.weight.mul_(2)
        reuse.forget()
        want = model.sample_actions(**row)
        assert not reuse.last.prompt
    assert torch.equal(model.sample_actions(**row), want)
    with reuse:
        model.sample_actions(**row)
        assert not reuse.last.cameras.any()


def test_a_step_that_dies_leaves_nothing_half_done():
    model, row = policy(), observation()
    other = moved(row)
    want = model.sample_actions(**other)

    def fail(module, args):
        raise RuntimeError("out of memory")

    with Reuse(model) as reuse:
        model.sample_actions(**row)
        for module in (model.model.vlm.language_model.layers[3], model.model.dit.layers[2]):
            hook = module.mlp.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                model.sample_actions(**other)
            hook.remove()
        got = model.sample_actions(**other)
        assert reuse.last.cameras.all()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_threads_go_by_their_own_steps():
    model, found = policy(), []
    row = observation()
    with Reuse(model) as reuse:
        model.sample_actions(**row)

        def act():
            model.sample_actions(**row)
            found.append(reuse.last)

        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
        assert not found[0].cameras.any()
        model.sample_actions(**row)
        assert reuse.last.prompt


def test_the_model_is_as_it_was():
    model, row = policy(), observation()
    before = {id(module): set(vars(module)) for module in model.modules()}
    plain = model.sample_actions(**row)
    with Reuse(model):
        assert any(set(vars(module)) != before[id(module)] for module in model.modules())
        model.sample_actions(**row)
    assert {id(module): set(vars(module)) for module in model.modules()} == before
    assert torch.equal(model.sample_actions(**row), plain)


# -- refusals


def test_models_that_take_no_control_steps_are_refused():
    with pytest.raises(UnsupportedModelError, match="such as pi0, and paligemma is none"):
        Reuse(MEMBERS["paligemma"]().build())


def test_two_blocks_on_one_model_are_refused():
    with (
        Reuse(policy()),
        pytest.raises(AttachError, match="reused already"),
        Reuse(policy()),
    ):
        pass
    with Reuse(policy()):
        pass


def test_gradients_are_refused():
    model, row = policy(), observation()
    with Reuse(model):
        for call in (
            lambda: model(**row, timestep=torch.tensor([0.5])),
            lambda: model.model.vlm.get_image_features(row["pixel_values"][0]),
        ):
            with pytest.raises(InputError, match="has no gradients"):
                call()
        model.sample_actions(**row)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("method", [Listed(1, 0.5, "original", inside=True), "visionzip"])
def test_methods_that_need_the_tower_to_run_are_refused(method, order):
    model, row = policy(), observation()
    if isinstance(method, str):
        method = foveate.get_method(method)()
    session = foveate.use(model, method)
    if order == "before":
        with session, pytest.raises(InputError, match="acts inside the vision tower or reads it"):
            Reuse(model).__enter__()
        model.sample_actions(**row)
        return
    with Reuse(model), session, pytest.raises(InputError, match=f"{method.slug} acts inside"):
        model.sample_actions(**row)


def test_what_the_model_refuses_it_refuses_still():
    model, row = policy(), observation()
    del row["pixel_attention_mask"]
    with Reuse(model), pytest.raises(AttributeError, match="shape"):
        model.sample_actions(**row)


def test_it_cannot_begin_within_a_forward_of_the_model():
    model, row = policy(), observation()
    hook = model.model.dit.register_forward_pre_hook(lambda *_: Reuse(model).__enter__())
    try:
        with torch.no_grad(), pytest.raises(AttachError, match="within a forward"):
            model(**row, timestep=torch.tensor([0.5]))
    finally:
        hook.remove()
