"""A total of visual tokens, and three turns with a new image each, in families of every kind."""

import pytest
import torch

import foveate
from foveate.errors import CacheError
from tests.conformance import oracle
from tests.conformance.test_new_images import MROPE, model_of, text_of
from tests.conformance.tolerance import kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.engine.test_total import dealt, order_of
from tests.methods_for_tests import EveryThird
from tests.oracle import Spec

# Plain and in time, height and width; DeepStack; tiles in one image, and one by one; windows.
FAMILIES = ["llava", "qwen2_5_vl", "qwen3_vl", "llava_next", "internvl", "gemma3"]
STEPS = 4
OPTIONS = {
    "max_new_tokens": STEPS,
    "min_new_tokens": STEPS,
    "do_sample": False,
    "return_dict_in_generate": True,
}


def turns_of(name, number):
    """What the encoder eats for each image and for all so far, and their visual tokens."""
    member = MEMBERS[name]()
    pixels = member.pixels(number)
    each = [member.take(pixels, i, i + 1) for i in range(number)]
    so_far = [member.take(pixels, 0, i + 1) for i in range(number)]
    return each, so_far, member.counts(model_of(name), pixels)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_of_earlier_turns_shrink_as_in_the_oracle(name):
    """Each turn has an image, a question and an answer; later ones see less of earlier images."""
    member, model, eager = MEMBERS[name](), model_of(name), model_of(name, "eager")
    model = model_of(name, kernel_of(model))
    each, so_far, counts = turns_of(name, 3)
    keep = min(counts) // 3
    total, states = 2 * keep - 1, []
    hook = member.head(model).register_forward_pre_hook(
        lambda m, args: states.append(args[0][0, -1])
    )
    whole, cache, starts = torch.tensor([[]], dtype=torch.long), None, []
    with torch.no_grad(), foveate.use(model, EveryThird(keep), keep_total=total) as run:
        for number, count in enumerate(counts):
            starts.append(0 if cache is None else cache.get_seq_length())
            said = torch.tensor([[40 + number, 41, *[member.image_id] * count, 9, 12, 13]])
            whole = torch.cat((whole, said), 1)
            inputs = text_of(member, whole, number + 1)
            if name in MROPE and number:
                new = model.get_image_features(**fresh(each[number]), return_dict=True)
                inputs |= {"mm_encoder_outputs": {"image": new}}
                inputs |= {"image_grid_thw": so_far[number]["image_grid_thw"]}
            else:
                inputs |= fresh(each[number])
            states.clear()
            out = model.generate(**inputs, **OPTIONS, past_key_values=cache)
            whole, cache = out.sequences, out.past_key_values
            held = run.record.earlier_tokens[0] + len(run.kept[0]["pre_llm"])
            assert held == min(total, (number + 1) * keep)
    hook.remove()
    got = torch.stack(states)
    spec = spec_of(member, whole[0], counts, starts, keep, total)
    everything = text_of(member, whole[:, :-1], 3) | fresh(so_far[-1])
    prompt = whole.shape[1] - STEPS
    want, _ = oracle.run(member, eager, everything, spec, prompt, counts)
    plain, _ = oracle.run(member, eager, everything, Spec(kept=spec.kept), prompt, counts)
    distance = (want[prompt - 1 :] - got).abs().max().item()
    bite = (plain[prompt - 1 :] - got).abs().max().item()
    print(f"{name}: {counts} tokens, {distance:.1e}, bite {bite:.2f}")
    assert distance <= tolerance_of(name, model)
    assert bite > 0.02, "the test does not bite"


def spec_of(member, ids, counts, starts, keep, total):
    """What is left of each image from each turn on."""
    columns = (ids == member.image_id).nonzero()[:, 0].split(counts)
    kept, held, forgotten = [], [], []
    for start, image in zip(starts, columns, strict=True):
        shares = dealt([*map(len, held), keep], total)
        gone = [c[n:] for c, n in zip(held, shares, strict=False)]
        forgotten += [(start, torch.cat(gone))] if gone else []
        held = [c[:n] for c, n in zip(held, shares, strict=False)]
        kept.append(torch.arange(0, 3 * shares[-1], 3))
        held.append(image[kept[-1]][order_of(shares[-1])])
    return Spec(kept=kept, forgotten=forgotten)


def test_images_that_are_mixed_into_a_running_state_are_refused():
    """From a state no token can be taken; a total that is not reached is kept to."""
    name = "lfm2_vl"
    member, model = MEMBERS[name](), model_of(name)
    each, _, counts = turns_of(name, 2)
    for total, fits in ((12, True), (7, False)):
        whole = torch.tensor([[5, *[member.image_id] * counts[0], 20]])
        with torch.no_grad(), foveate.use(model, EveryThird(6), keep_total=total):
            inputs = text_of(member, whole, 1) | fresh(each[0])
            said = model.generate(**inputs, **OPTIONS)
            more = torch.tensor([[9, *[member.image_id] * counts[1], 20]])
            whole = torch.cat((said.sequences, more), 1)
            inputs = text_of(member, whole, 2) | fresh(each[1])
            inputs |= {"past_key_values": said.past_key_values}
            if fits:
                model.generate(**inputs, **OPTIONS)
                continue
            with pytest.raises(CacheError, match="running state"):
                model.generate(**inputs, **OPTIONS)
