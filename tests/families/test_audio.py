"""Audio tokens removed together with those of images and videos, or by a method of their own."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import BudgetError, InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account, unpruned
from foveate.measure.conventions import CONVENTIONS
from foveate.measure.flops import head_flops
from foveate.measure.shapes import TextShape
from foveate.methods import DivPrune, FastV, PyramidDrop
from foveate.training.prepare import session_of
from tests.conformance import oracle
from tests.conformance.test_pixels import TOLERANCE, model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.families.prompts_with_audio import NAMES, longer, prompt, sound_of
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

STEPS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
HEARD = {"alone": [0], "beside": [0, 2], "within": [1]}  # which of a prompt's images are audio
names = pytest.mark.parametrize("name", NAMES)


def case(kind, what):
    """Methods, those of audio, and what the oracle must do for them."""
    heard = HEARD[kind]
    images = {"alone": 1, "beside": 3, "within": 2}[kind]
    seen = [i for i in range(images) if i not in heard]
    every, two, four = range(images), torch.tensor([0, 3]), torch.arange(0, 12, 3)
    if what == "shared":
        return EveryThird(2), True, Spec(kept=[two for _ in every])
    if what == "shared-llm":
        drop = Drop(3, 3, [3] * images)
        return PyramidDrop((3,), 3, "original"), True, Spec(drops=[drop])
    if what == "own":
        kept = [two if i in heard else four for i in every]
        return EveryThird(4), EveryThird(2), Spec(kept=kept)
    drops = [Drop(3, 3, [4] * len(seen), images=seen)] if seen else []
    drops.append(Drop(3, 2, [2] * len(heard), images=heard))
    return PyramidDrop((3,), 4, "original"), FastV(3, 2), Spec(drops=drops)


@names
@pytest.mark.parametrize("kind", HEARD)
@pytest.mark.parametrize("what", ["shared", "shared-llm", "own", "own-llm"])
def test_generating_equals_the_oracle(name, kind, what):
    """The whole model at full length, where nobody attends to what was removed."""
    member, model, states = MEMBERS[name](), model_of(name), []
    inputs, places = prompt(name, kind)
    method, audio, spec = case(kind, what)
    with torch.no_grad(), foveate.use(model, method, audio=audio) as run:
        hook = model.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        out = model.generate(**fresh(inputs), **STEPS, return_dict_in_generate=True)
        hook.remove()
    length = inputs["input_ids"].shape[1]
    whole, eager = longer(inputs, out.sequences[:, length:-1]), model_of(name, "eager")
    want, history = oracle.run(member, eager, fresh(whole), spec, length, None, places)
    plain, _ = oracle.run(member, eager, fresh(whole), Spec(), length, None, places)
    got = torch.cat([state[0, -1:] for state in states])
    torch.testing.assert_close(got, want[length - 1 :], rtol=0, atol=TOLERANCE)
    assert (plain[length - 1 :] - got).abs().max() > 0.02, "the test does not bite"
    records = run.record.images
    assert [n for n, image in enumerate(records) if image.audio] == HEARD[kind]
    assert [image.total for image in records] == list(map(len, places))
    for image, index in zip(records, history[-1], strict=True):
        (kept,) = image.kept.values()
        assert torch.equal(kept, index)
    gone = sum(image.total - image.left for image in records)
    assert run.record.layer_tokens[-1] == [length - gone]
    assert out.past_key_values.layers[-1].keys.shape[2] == length - gone + 2


@names
@pytest.mark.parametrize("kind", HEARD)
@pytest.mark.parametrize("audio", [True, EveryThird(1.0)], ids=["shared", "own"])
def test_keeping_everything_changes_nothing(name, kind, audio):
    model = model_of(name)
    inputs, _ = prompt(name, kind)
    options = {**STEPS, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        plain = model(**fresh(inputs)).logits
        said = model.generate(**fresh(inputs), **options).logits
        with foveate.use(model, EveryThird(1.0), audio=audio) as run:
            assert torch.equal(model(**fresh(inputs)).logits, plain)
            again = model.generate(**fresh(inputs), **options).logits
    assert all(map(torch.equal, again, said))
    assert all(image.left == image.total for image in run.record.images)


@names
def test_without_the_option_audio_stays(name):
    model = model_of(name)
    inputs, _ = prompt(name, "beside")
    with torch.no_grad(), foveate.use(model, EveryThird(2)) as run:
        model.model(**fresh(inputs))
    (image,) = run.record.images
    assert (image.audio, image.left) == (False, 2)


@names
@pytest.mark.parametrize("audio", [True, FastV(3, 0.3)], ids=["shared", "own"])
def test_rows_of_a_batch_get_what_they_get_alone(name, audio):
    """Rows of two clips and an image, of text, and of one clip."""
    model, method = model_of(name), DivPrune(0.3)
    (both, _), (one, _) = prompt(name, "beside"), prompt(name, "alone")
    text = torch.tensor([[4, 9, 11]])
    alone = [both, {"input_ids": text, "attention_mask": torch.ones_like(text)}, one]
    width = max(row["input_ids"].shape[1] for row in alone)
    ids = torch.cat(
        [torch.nn.functional.pad(x := row["input_ids"], (width - x.shape[1], 0)) for row in alone]
    )
    batch = {**both, "input_ids": ids, "attention_mask": (ids != 0).long()}
    for key in ("input_features", "feature_attention_mask"):
        batch[key] = torch.cat((both[key], one[key]))
    options = {**STEPS, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad(), foveate.use(model, method, audio=audio) as run:
        together = model.generate(**fresh(batch), **options)
        kept = [(image.row, image.audio, image.left) for image in run.record.images]
        found = []
        for number, row in enumerate(alone):
            single = model.generate(**fresh(row), **options)
            found += [(number, image.audio, image.left) for image in run.record.images]
            for got, want in zip(together.logits, single.logits, strict=True):
                torch.testing.assert_close(got[number], want[0], rtol=0, atol=TOLERANCE)
    assert kept == found
    assert len(kept) == 4


@names
@pytest.mark.parametrize("kind", HEARD)
@pytest.mark.parametrize("audio", [True, FastV(3, 0.3)], ids=["shared", "own"])
def test_accounts_equal_what_torch_counts(name, kind, audio):
    """The audio tower included, with all tokens and as it was."""
    model = MEMBERS[name]().build("eager").requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the counter misses grouped products
    family, dense, (inputs, _) = find_family(model), CONVENTIONS["dense"], prompt(name, kind)

    def counted():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**fresh(inputs))
        return counter.get_total_flops()

    plain = counted()
    with foveate.use(model, EveryThird(0.3), audio=audio) as run:
        got = counted()
    more = head_flops(TextShape.of(family.config), inputs["input_ids"].shape[1] - 1)
    assert account(run.record, family, run.methods, dense).total + more == got
    assert account(unpruned(run.record), family, (), dense).total + more == plain
    assert got < plain


@names
def test_new_audio_after_a_cache_equals_the_oracle(name):
    """Its positions are those of text, which models give it there."""
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    (first, (old,)), (second, (new,)) = prompt(name, "alone"), prompt(name, "alone")
    sound, states = sound_of(40, seed=6), []
    with torch.no_grad(), foveate.use(model, EveryThird(2), audio=True) as run:
        answer = model.generate(**fresh(first), **STEPS, return_dict_in_generate=True)
        ids = torch.cat((answer.sequences, second["input_ids"]), 1)
        turn = {**sound, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        hook = model.lm_head.register_forward_pre_hook(lambda m, args: states.append(args[0]))
        out = model.generate(**turn, **STEPS, past_key_values=answer.past_key_values)
        hook.remove()
    assert [image.left for image in run.record.images] == [2]
    length, whole = ids.shape[1], out[:, :-1]
    both = {name: torch.cat((first[name], sound[name])) for name in sound}
    whole = {**both, "input_ids": whole, "attention_mask": torch.ones_like(whole)}
    places = [old, new + answer.sequences.shape[1]]
    spec = Spec(kept=[torch.tensor([0, 3])] * 2)
    want, _ = oracle.run(member, eager, fresh(whole), spec, length, None, places)
    got = torch.cat([state[0, -1:] for state in states])
    torch.testing.assert_close(got, want[length - 1 :], rtol=0, atol=TOLERANCE)


@names
def test_forwards_take_new_audio_after_a_cache(name):
    """Without position ids too, as the bare model takes it."""
    model, (first, _) = model_of(name), prompt(name, "alone")
    more = {"input_ids": first["input_ids"], **sound_of(40, seed=6)}

    def states():
        with torch.no_grad():
            cache = model.model(**fresh(first), use_cache=True).past_key_values
            return model.model(**more, past_key_values=cache).last_hidden_state

    plain = states()
    with foveate.use(model, EveryThird(1.0), audio=True):
        assert torch.equal(states(), plain)


def test_a_prompt_that_ends_in_audio_keeps_the_last_token():
    model = model_of(NAMES[0])
    inputs, (place,) = prompt(NAMES[0], "alone")
    ids = inputs["input_ids"][:, : int(place[-1]) + 1]
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), foveate.use(model, EveryThird(2), audio=True) as run:
        model.generate(**fresh(inputs), **STEPS)
    assert run.kept[0]["pre_llm"].tolist() == [0, 9]


@names
def test_beams_hear_their_own_audio(name):
    """Beams of a row with one clip equal those of the model that is given its features; of several
    clips, transformers would give each beam the wrong ones.
    """
    model, search = model_of(name), {**STEPS, "num_beams": 2}
    one, two = prompt(name, "alone")[0], prompt(name, "beside")[0]
    with torch.no_grad(), foveate.use(model, EveryThird(1.0), audio=True):
        got = model.generate(**fresh(one), **search)
        with pytest.raises(InputError, match="different images, or clips of audio"):
            model.generate(**fresh(two), **search)
    assert torch.equal(got, model.generate(**fresh(one), **search))


@names
def test_training_reaches_the_audio_tower(name):
    """Gradients are those of the tokens that survive, and no mark becomes one."""
    model = MEMBERS[name]().build().train()
    inputs, _ = prompt(name, "beside")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    with foveate.use(model, EveryThird(2), audio=True):
        model(**fresh(inputs), labels=labels).loss.backward()
    grads = [p.grad for p in model.model.audio_tower.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("audio", [True, DivPrune(0.5)], ids=["shared", "own"])
def test_a_prepared_model_is_trained_saved_and_loaded_with_audio(audio, tmp_path):
    """Its loss is that of the same session at inference, as the choice reads no prompt."""
    name = NAMES[0]
    inputs, _ = prompt(name, "beside")
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    model = MEMBERS[name]().build()
    with torch.no_grad(), foveate.use(model, DivPrune(0.3), audio=audio) as run:
        want = model(**fresh(inputs), labels=labels)
        left = [image.left for image in run.record.images]
    loss = (
        foveate.prepare(model, DivPrune(0.3), audio=audio)
        .train()(**fresh(inputs), labels=labels)
        .loss
    )
    torch.testing.assert_close(loss, want.loss, rtol=0, atol=TOLERANCE)
    loss.backward()
    foveate.save(model, tmp_path)
    again = foveate.load(tmp_path)
    session = session_of(again)
    assert session.audio == (audio if audio is True else (audio,))
    assert session.shared_methods == (DivPrune(0.3),)
    with torch.no_grad():
        got = again(**fresh(inputs), labels=labels)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=TOLERANCE)
    assert [image.left for image in session.record.images] == left
    with foveate.use(model_of(name), tmp_path / "foveate.json") as run:
        assert (run.audio, run.methods) == (session.audio, session.methods)
    with pytest.raises(UnsupportedModelError, match="it takes no audio"):
        foveate.prepare(model_of("qwen2_5_vl"), "divprune", audio=True)


# -- the encoder of images, and audio apart from it


def test_a_method_in_the_vision_encoder_goes_with_one_for_audio():
    model, (inputs, _) = model_of(NAMES[0]), prompt(NAMES[0], "beside")
    with torch.no_grad(), foveate.use(model, "pixelprune", audio=DivPrune(0.5)) as run:
        model.generate(**fresh(inputs), **STEPS)
    clip, image, other = run.record.images
    assert (list(clip.kept), list(image.kept)) == (["pre_llm"], ["vision:0"])
    assert (clip.left, other.left) == (5, 4)


def test_the_report_tells_audio_apart():
    model, (inputs, _) = model_of(NAMES[0]), prompt(NAMES[0], "beside")
    with torch.no_grad(), foveate.use(model, EveryThird(4), audio=DivPrune(0.5)) as run:
        model.model(**fresh(inputs))
    report = run.report()
    assert [image["audio"] for image in report["images"]] == [True, False, True]
    assert "divprune acted on them alone" in report["notes"][0]
    assert " audio " in str(report)
    left = run.record.images[0].boxes[0].tolist()
    assert left == pytest.approx([0.0, 0.0, 0.1, 1.0])


# -- refusals


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("pixelprune", "acts inside the vision encoder, which audio does not pass"),
        ("divprune", None),
        ("uniform", None),
        ("random", None),
        ("dart", None),
        ("downsample", None),
        ("m3", None),
        ("fopru", "reads received_attention of the vision encoder, which audio does not pass"),
        ("holitom", "compares the frames of a video, and audio has none"),
    ],
)
def test_methods_that_read_what_audio_has_not_are_refused(method, why):
    model, (inputs, _) = model_of(NAMES[0]), prompt(NAMES[0], "beside")
    if why is None:
        with torch.no_grad(), foveate.use(model, method, keep=2, audio=True) as run:
            model.model(**fresh(inputs))
        assert all(image.left < image.total for image in run.record.images)
        return
    for audio in (True, method):
        with pytest.raises(UnsupportedModelError, match=why):
            foveate.use(model, method if audio is True else "divprune", audio=audio)


def test_other_refusals():
    model, (inputs, _) = model_of(NAMES[0]), prompt(NAMES[0], "alone")
    with pytest.raises(BudgetError, match="not divided among images and audio"):
        foveate.use(model, "divprune", audio=True, keep_total=20)
    with pytest.raises(UnsupportedModelError, match=r"lvlm-csp.*at once, also on audio"):
        foveate.use(model, "lvlm-csp", audio="divprune")
    with pytest.raises(UnsupportedModelError, match="cannot be removed: it takes no audio"):
        foveate.use(model_of("qwen2_5_vl"), "divprune", audio=True)
    with torch.no_grad(), foveate.use(model, "divprune", audio=True):
        with pytest.raises(InputError, match="10 audio placeholders, but audio has 7"):
            model.model(**{**fresh(inputs), **sound_of(28)})
        with pytest.raises(InputError, match="does not read audio from mm_encoder_outputs"):
            model.model(**fresh(inputs), mm_encoder_outputs={"audio": object()})
