"""A method that computes the attention of encoder layers: what it sees, remembers and leaves."""

import copy
import threading
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core import Approximate, LayerShape, Method, Step
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import ToMe
from tests.conformance.zoo import MEMBERS
from tests.tinies import prompts, tiny_llava
from tests.vision.encoders import ENCODERS, HEADS, LAYERS, PATCHES, SQUARE, build, images, row_of

GRIDS = {"ast": (4, 9), "vivit": (3, 6), "vit_mae": (1, 36)}
UNGRIDDED = ("siglip2", "vit_mae")  # whose patches fill no grid that is known
ROTARY = ("dinov3_vit", "mlcd")  # whose layers are told the position of every row


@dataclass(frozen=True)
class Attending(Method):
    """Attends as the layer does, and removes nothing."""

    layers: tuple[int, ...] = (1, 2)
    log: list = field(default_factory=list, compare=False)
    keep: None = None
    positions: None = None
    slug, stage, needs, paper = "attending", "vision", (), ""

    def check_budget(self, steps):
        pass

    def steps(self, model):
        return tuple(Step("vision", layer, effects=("attend",)) for layer in self.layers)

    def count(self, remaining, total, step, number, row=0):
        return remaining

    def reduce(self, tokens, count):
        raise AssertionError("nothing is removed")

    def attend(self, tokens, layer):
        self.log.append((tokens, layer))
        return super().attend(tokens, layer)


class Explicit(Attending):
    """Attends by products and a softmax."""

    def attend(self, tokens, layer):
        weights = (layer.query @ layer.key.mT * layer.scaling).softmax(-1)
        return (weights @ layer.value).transpose(1, 2)


class Halved(Attending):
    """Attends to every second row only."""

    def attend(self, tokens, layer):
        return layer.kernel(layer.query, layer.key[:, :, ::2], layer.value[:, :, ::2], None)


class Remembering(Attending):
    """Notes the layers that it has come by."""

    def attend(self, tokens, layer):
        before = tokens.memory.setdefault("layers", [])
        self.log.append((tuple(before), float(layer.query.sum())))
        before.append(tokens.step.layer)
        return layer.plain()


class Boom(Exception):
    pass


class Failing(Attending):
    """Fails in its last layer."""

    def attend(self, tokens, layer):
        if tokens.step.layer == self.layers[-1]:
            raise Boom
        return layer.plain()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*SQUARE, "siglip2"])
def test_attending_plainly_changes_no_bit(name, attention):
    model, inputs = build(ENCODERS, name, attention), images(name=name)
    method = Attending(layers=tuple(range(LAYERS)))
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with foveate.use(model, method) as run:
            got = model(**inputs, output_hidden_states=True)
    assert len(method.log) == LAYERS
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert all(len(kept) == PATCHES for image in run.kept for kept in image.values())


@pytest.mark.parametrize("name", [*SQUARE, "siglip2"])
def test_a_method_sees_queries_keys_and_values_as_the_kernel_would(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    method = Attending(layers=(2,))
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, Explicit(layers=(0, 2, 3))):
            got = model(**inputs).last_hidden_state
        torch.testing.assert_close(got, want, rtol=0, atol=5e-5)
        states = model(**inputs, output_hidden_states=True).hidden_states[2]
        with foveate.use(model, method):
            model(**inputs)
    ((tokens, layer),) = method.log
    special = find_family(model).encoder.special
    assert layer.special == tokens.special == special
    assert layer.query.shape == (3, 4, special + PATCHES, 8)
    assert layer.mask is None
    assert torch.equal(tokens.x, states[:, special:])
    assert tokens.grid == GRIDS.get(name, (6, 6))


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_what_a_method_returns_is_what_the_layer_goes_on_with(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True).hidden_states
        with foveate.use(model, Halved(layers=(1,))):
            got = model(**inputs, output_hidden_states=True).hidden_states
            alone = model(**row_of(inputs, 1)).last_hidden_state
            together = model(**inputs).last_hidden_state
    assert torch.equal(got[1], plain[1])
    assert (got[2] - plain[2]).abs().max() > 1e-2
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=2e-5)


def test_memory_lives_for_one_pass():
    model, inputs = build(ENCODERS, "vit"), images()
    method = Remembering(layers=(0, 1, 3))
    with torch.no_grad(), foveate.use(model, method):
        for _ in range(2):
            model(**inputs)
    assert [before for before, _ in method.log] == [(), (0,), (0, 1)] * 2


def test_methods_have_memories_of_their_own():
    model, inputs = build(ENCODERS, "vit"), images()
    first, second = Remembering(layers=(0, 2)), Remembering(layers=(1, 3))
    with torch.no_grad(), foveate.use(model, [first, second]):
        model(**inputs)
    assert [before for before, _ in first.log] == [(), (0,)]
    assert [before for before, _ in second.log] == [(), (1,)]


def test_threads_do_not_see_each_others_memory():
    model, threads = build(ENCODERS, "vit"), 6
    method = Remembering(layers=(0, 1, 2, 3))
    both = threading.Barrier(threads)

    def wait(*_):
        both.wait(timeout=30)

    hook = model.layers[1].register_forward_hook(wait)

    def work(number):
        with torch.no_grad():
            model(**images(1, number))

    with foveate.use(model, method):
        started = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    hook.remove()
    seen = sorted(before for before, _ in method.log)
    assert seen == sorted([(), (0,), (0, 1), (0, 1, 2)] * threads)


def test_two_methods_on_one_layer_are_refused():
    model = build(ENCODERS, "vit")
    with pytest.raises(LayerError, match="both compute the attention of encoder layer 2"):
        foveate.use(model, [Attending(layers=(1, 2)), Attending(layers=(2, 3))])
    with pytest.raises(LayerError, match="layer 4, but"):
        foveate.use(model, Attending(layers=(4,)))


def test_attention_maps_are_refused():
    """There is none to return, and one of the model's own would not be what was computed."""
    model, inputs = build(ENCODERS, "vit", "eager"), images()
    with foveate.use(model, Attending()):
        with pytest.raises(UnsupportedModelError, match="leave output_attentions out"):
            model(**inputs, output_attentions=True)
        model(**inputs)
    assert len(model(**inputs, output_attentions=True).attentions) == LAYERS


@pytest.mark.parametrize("name", ["qwen2_vl", "gemma4"])
def test_packed_and_padded_towers_are_refused(name):
    model = MEMBERS[name]().build("sdpa")
    with pytest.raises(UnsupportedModelError, match="in one sequence or are padded, as in"):
        foveate.use(model, Attending())


def snapshot(model):
    return {
        name: (sorted(vars(module)), getattr(module, "config", None), vars(module).get("forward"))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("way", ["block", "exception", "failing method"])
@pytest.mark.parametrize(("table", "name"), [(ENCODERS, "vit"), (HEADS, "clip")])
def test_config_and_kernel_are_restored(table, name, way):
    model, inputs = build(table, name), images()
    before, config = snapshot(model), copy.deepcopy(model.config.to_dict())
    kernels = [module.config._attn_implementation for module in attentions(model)]
    with torch.no_grad():
        want = model(**inputs)[0]
        if way == "block":
            with foveate.use(model, Halved()):
                assert not torch.equal(model(**inputs)[0], want)
        elif way == "exception":
            with pytest.raises(Boom), foveate.use(model, Halved()):
                raise Boom
        else:
            method = Failing(layers=(1, 2))
            with foveate.use(model, method):
                for _ in range(2):
                    with pytest.raises(Boom):
                        model(**inputs)
        got = model(**inputs)[0]
    assert torch.equal(got, want)
    assert model.config.to_dict() == config
    assert [module.config._attn_implementation for module in attentions(model)] == kernels
    after = snapshot(model)
    assert after.keys() == before.keys()
    for module, (names, own, forward) in before.items():
        assert after[module][0] == names
        assert after[module][1] is own
        assert after[module][2] is forward


def attentions(model):
    encoder = find_family(model).encoder
    return [encoder.attention(layer) for layer in encoder.layers]


def test_while_it_lasts_the_models_own_config_says_what_it_said():
    model = build(ENCODERS, "vit", "eager")
    with foveate.use(model, Attending()):
        assert model.config._attn_implementation == "eager"
        assert attentions(model)[0].config is model.config


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_gradients_flow(name):
    model, inputs = build(ENCODERS, name).train(), images(name=name)
    method = Explicit(layers=(1, 3))
    found = []
    for session in (None, foveate.use(model, method)):
        model.zero_grad()
        if session is None:
            model(**inputs).last_hidden_state.square().mean().backward()
        else:
            with session:
                model(**inputs).last_hidden_state.square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, through = found
    assert plain.keys() == through.keys()
    for key, want in plain.items():
        torch.testing.assert_close(through[key], want, rtol=1e-3, atol=1e-6)
    assert all(
        float(through[key].abs().max()) > 0 for key in through if key.endswith("q_proj.weight")
    )


def test_a_tower_within_a_language_model_is_attended_in():
    model = tiny_llava()
    inputs = prompts([(3, 6), (5,)])
    with torch.no_grad():
        want = model(**inputs).logits
        with foveate.use(model, Attending(layers=(0, 1))) as run:
            assert torch.equal(model(**inputs).logits, want)
        assert len(run.record.images) == 1
        with foveate.use(model, Halved(layers=(0,))):
            assert not torch.equal(model(**inputs).logits, want)


# -- what it costs


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "siglip"])
def test_what_a_method_says_that_attending_costs_is_accounted(name):
    """As torch counts it."""

    class Cheaper(Halved):
        def attend_flops(self, step, shape):
            special = find_family(model).encoder.special
            assert shape == LayerShape(special + PATCHES, special, (6, 6), 1, 32)
            return 4 * shape.width * shape.rows * ((shape.rows + 1) // 2)

    model, inputs = build(ENCODERS, name, "eager"), images(2, name=name)
    for method in (Cheaper(layers=(0, 3)), Attending(layers=(1,))):
        counter = FlopCounterMode(display=False)
        with foveate.use(model, method) as run, torch.no_grad(), counter:
            model(**inputs)
        assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


# -- around a layer


class Around(Approximate):
    """Every third token goes through, and others get what the first of them has gained."""

    slug, stage, needs, paper = "around", "vision", (), ""
    effect = "around"

    def entering(self, tokens, step):
        return -(-tokens // 3)

    def enter(self, tokens, states):
        tokens.memory["before"] = states[:, ::3]
        return states[:, ::3]

    def leave(self, tokens, states, passed):
        gain = passed - tokens.memory["before"]
        return (states + gain[:, :1]).index_copy(1, torch.arange(0, 36, 3), passed)


class Whole(Around):
    """Everything goes through."""

    def entering(self, tokens, step):
        return tokens

    def enter(self, tokens, states):
        return states

    def leave(self, tokens, states, passed):
        return passed


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in UNGRIDDED + ROTARY])
def test_all_tokens_around_a_layer_change_no_bit(name):
    model, inputs = build(ENCODERS, name), images(name=name)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
        with foveate.use(model, Whole()):
            got = model(**inputs, output_hidden_states=True)
    assert all(map(torch.equal, got.hidden_states, want.hidden_states))
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("name", [n for n in ENCODERS if n not in UNGRIDDED + ROTARY])
def test_some_tokens_go_through_a_layer_and_all_are_there_after_it(name):
    model, inputs = build(ENCODERS, name, "eager"), images(name=name)
    special, counter = find_family(model).encoder.special, FlopCounterMode(display=False)
    method = Around(layers=(1, 2))
    with torch.no_grad(), foveate.use(model, method) as run:
        with counter:
            model(**inputs)
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert account(run.record, run.family, run.methods).total == counter.get_total_flops()
    full, fewer = special + 36, special + 12
    assert run.record.encoder_tokens == [(full, full), (fewer, fewer), (fewer, fewer), (full, full)]
    encoder = find_family(model).encoder
    for number in (1, 2):
        before, after = states[number], states[number + 1]
        rows = [*range(special), *range(special, full, 3)]
        with torch.no_grad():
            passed = encoder.layers[number](before[:, rows], None)
        want = before + (passed - before[:, rows])[:, special : special + 1]
        want[:, rows] = passed
        torch.testing.assert_close(after, want, rtol=0, atol=1e-5)
    assert all(len(kept) == 36 for image in run.kept for kept in image.values())


def test_around_a_layer_of_a_tower_whose_tokens_have_several_rows():
    model = MEMBERS["internvl"]().build("eager")
    tower = find_family(model).encoder.tower
    pixels = torch.randn(2, 3, *tower.config.image_size)
    with torch.no_grad():
        want = model.model.get_image_features(pixels, return_dict=True).pooler_output
        with foveate.use(model, Whole()):
            got = model.model.get_image_features(pixels, return_dict=True).pooler_output
    for one, other in zip(got, want, strict=True):  # rows come in another order
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_method_must_hand_over_as_many_tokens_as_it_promises():
    class Loose(Around):
        def entering(self, tokens, step):
            return 5

    model = build(ENCODERS, "vit")
    with foveate.use(model, Loose()), pytest.raises(FoveateError, match="promises that 5 of 36"):
        model(**images())


@pytest.mark.parametrize("name", UNGRIDDED + ROTARY)
def test_layers_that_are_told_of_each_row_are_not_acted_around(name):
    match = "told the position" if name in ROTARY else "may differ from image to image"
    with pytest.raises(UnsupportedModelError, match=match):
        foveate.use(build(ENCODERS, name), Whole())


def test_what_does_not_go_with_a_step_around_a_layer_is_refused():
    model = build(ENCODERS, "vit", "eager")
    with pytest.raises(LayerError, match="tome acts within encoder layer 2, which only some"):
        foveate.use(model, [Around(layers=(2,)), ToMe(r=(0, 0, 4))])
    with pytest.raises(LayerError, match="both compute"):
        foveate.use(model, [Around(layers=(2,)), Attending(layers=(2,))])
    with pytest.raises(LayerError, match=r"around reads whole grids.*tome removes"):
        foveate.use(model, [ToMe(r=(4,)), Around(layers=(2,))])
    with foveate.use(model, Around()):
        with pytest.raises(UnsupportedModelError, match="leave output_attentions out"):
            model(**images(), output_attentions=True)
        mask = torch.ones(3, 1, 1, 37, dtype=torch.bool)
        hook = model.layers[0].register_forward_pre_hook(
            lambda module, args: (args[0], mask), prepend=True
        )
        with pytest.raises(UnsupportedModelError, match=r"every row \(attention_mask\)"):
            model(**images())
        hook.remove()


def test_leaving_restores_layers_that_fewer_rows_went_through():
    model, inputs = build(ENCODERS, "vit"), images()
    before = snapshot(model)
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, Around()):
            assert not torch.equal(model(**inputs).last_hidden_state, want)
        assert torch.equal(model(**inputs).last_hidden_state, want)
    assert {k: v[0] for k, v in snapshot(model).items()} == {k: v[0] for k, v in before.items()}


def test_gradients_flow_around_a_layer():
    model = build(ENCODERS, "vit").train()
    with foveate.use(model, Around()):
        model(**images()).last_hidden_state.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "layers" in n]
    assert all(float(grad.abs().max()) > 0 for grad in grads if grad.dim() > 1)
