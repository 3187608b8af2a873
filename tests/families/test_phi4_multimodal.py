"""Phi-4 Multimodal: what its text model does with images and audio itself, and LongRoPE."""

import contextlib
import functools

import pytest
import torch
from transformers import Phi4MultimodalConfig, Phi4MultimodalForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPooling

import foveate
from foveate.bench.speed import Bench
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import find_family
from foveate.loading import load_skeleton
from foveate.measure.trace import trace
from foveate.methods import FastV
from tests.conformance import oracle
from tests.conformance.tolerance import TOLERANCE, states_of
from tests.conformance.zoo.member import fresh, loud
from tests.conformance.zoo.phi4_multimodal import Phi4Multimodal
from tests.methods_for_tests import EveryThird
from tests.oracle import Spec

PROMPT = 29  # tokens of [5, 7] with an image between


class Long(Phi4Multimodal):
    """Other frequencies from the position that `switch` says."""

    def __init__(self, switch):
        self.switch = switch

    def config(self):
        config = super().config()
        config.original_max_position_embeddings = self.switch
        config.rope_parameters = {
            **config.rope_parameters, "rope_type": "longrope", "short_factor": [1.0] * 6,
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            "original_max_position_embeddings": self.switch,
        }  # fmt: skip
        return config


@functools.cache
def model_of(switch, attention="sdpa"):
    member = Phi4Multimodal() if switch is None else Long(switch)
    return member.build(attention)


def distance(switch, method, spec, tokens=9):
    """Largest distance to the oracle in a prompt's last state and those of its answer."""
    member = Long(switch)
    inputs = member.inputs([[5, 7]])
    with foveate.use(model_of(switch), method):
        states, out = states_of(member, model_of(switch), inputs, tokens)
    whole = member.continued(inputs, out[:, PROMPT:-1])
    eager = model_of(switch, "eager")
    want, _ = oracle.run(member, eager, whole, spec, PROMPT)
    plain, _ = oracle.run(member, eager, whole, Spec(), PROMPT)
    assert (plain[PROMPT - 1 :] - states[0]).abs().max() > 0.02
    return (want[PROMPT - 1 :] - states[0]).abs().max().item()


@pytest.mark.parametrize("switch", [20, 200], ids=["long", "short"])
def test_prompts_that_stay_on_one_side_equal_the_oracle(switch):
    kept = [torch.arange(0, 17, 3)]
    assert distance(switch, EveryThird(6, "original"), Spec(kept=kept)) < TOLERANCE


def test_the_switch_matters():
    inputs = Long(20).inputs([[5, 7]])
    with torch.no_grad():
        long, short = (model_of(s).model(**inputs).last_hidden_state for s in (20, 200))
    assert (long - short).abs().max() > 0.02


def test_renumbered_prompts_have_the_frequencies_of_the_shorter_sequence():
    """Of 29 tokens 18 are left, and 9 more come: 27 where others would begin at 28."""
    spec = Spec(kept=[torch.arange(0, 17, 3)], renumber=True)
    assert distance(28, EveryThird(6, "renumbered"), spec) < TOLERANCE


def test_renumbered_answers_that_grow_beyond_the_switch_are_refused():
    model, inputs = model_of(20), Long(20).inputs([[5, 7]])
    options = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    with foveate.use(model, EveryThird(6, "renumbered")):
        model.generate(**fresh(inputs), **{**options, "max_new_tokens": 3, "min_new_tokens": 3})
        with pytest.raises(InputError, match="grown to more, but the cached keys"):
            model.generate(**fresh(inputs), **options)
    with foveate.use(model, EveryThird(6, "original")):
        model.generate(**fresh(inputs), **options)


def test_renumbered_turns_with_an_image_that_grow_beyond_the_switch_are_refused():
    """Of 29 tokens 18 are left, and then of 24 more 13."""
    member, model = Long(24), model_of(24)
    first, second = member.inputs([[5, 7]]), member.inputs([[2, 5]])
    with torch.no_grad(), foveate.use(model, EveryThird(6, "renumbered")):
        cache = model(**fresh(first), use_cache=True).past_key_values
        second["attention_mask"] = torch.ones(1, 29 + 24, dtype=torch.long)
        with pytest.raises(InputError, match="grown to more, but the cached keys"):
            model(**fresh(second), past_key_values=cache)


@pytest.mark.parametrize("method", [EveryThird(6), FastV(2, 3)], ids=str)
def test_answers_for_which_transformers_drops_the_prompt_are_refused(method):
    """Bare, it goes on from single tokens: what it says no longer depends on the prompt."""
    model, inputs = model_of(32), Long(32).inputs([[5, 7]])
    options = {"do_sample": False, "min_new_tokens": 8}
    handed = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: handed.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    model.generate(**fresh(inputs), **options, max_new_tokens=8)
    hook.remove()
    assert handed[-1] is None, "transformers keeps the cache now: nothing to refuse"
    with foveate.use(model, method):
        model.generate(**fresh(inputs), do_sample=False, max_new_tokens=3)
        with pytest.raises(InputError, match="drops its cache and goes on without the prompt"):
            model.generate(**fresh(inputs), **options, max_new_tokens=8)


def test_features_from_elsewhere_are_refused():
    """The model would not read them."""
    member, model = Phi4Multimodal(), model_of(None)
    inputs = {k: v for k, v in member.inputs([[5, 7]]).items() if not k.startswith("image")}
    made = {"image": BaseModelOutputWithPooling(pooler_output=[torch.zeros(17, 64)])}
    with foveate.use(model, EveryThird(6)), pytest.raises(InputError, match="pass the pixels"):
        model(**inputs, mm_encoder_outputs=made)


def test_embeddings_in_place_of_ids_are_refused():
    """The model would read no pixels beside them."""
    member, model = Phi4Multimodal(), model_of(None)
    inputs = member.inputs([[5, 7]])
    inputs["inputs_embeds"] = model.model.embed_tokens(inputs.pop("input_ids"))
    with (
        foveate.use(model, EveryThird(6)),
        pytest.raises(InputError, match="pass input_ids with the pixels"),
    ):
        model(**inputs)


def with_audio(member, inputs):
    """The same prompt with four tokens of audio before its last token."""
    ids = inputs["input_ids"]
    audio = torch.full((1, 4), member.image_id + 1)
    ids = torch.cat((ids[:, :-1], audio, ids[:, -1:]), 1)
    sound = {
        "audio_input_features": torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(3)),
        "audio_embed_sizes": torch.tensor([4]),
    }
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids), **sound}


def test_audio_beside_an_image_is_text_to_methods():
    """Prompts with both equal the oracle, and what is kept of the image is as without audio."""
    member = Phi4Multimodal()
    model, eager = (loud(member.build(kernel)) for kernel in ("sdpa", "eager"))
    inputs = with_audio(member, member.inputs([[5, 7]]))
    silent = {**inputs, "audio_input_features": 2 * inputs["audio_input_features"]}
    with torch.no_grad(), foveate.use(model, EveryThird(6)) as run:
        got = model.model(**fresh(inputs)).last_hidden_state[0, -1]
        other = model.model(**fresh(silent)).last_hidden_state[0, -1]
        (image,) = run.record.images
    spec = Spec(kept=[torch.arange(0, 17, 3)])
    want, _ = oracle.run(member, eager, fresh(inputs), spec, inputs["input_ids"].shape[1])
    assert image.total == 17
    assert (got - other).abs().max() > 1e-3, "audio is heard"
    assert (want[-1] - got).abs().max() < TOLERANCE


def test_its_skeleton_is_built_from_a_config_alone(tmp_path):
    """To transformers it is a causal language model, and none that reads images."""
    Phi4Multimodal().config().save_pretrained(tmp_path)
    assert find_family(load_skeleton(str(tmp_path))).model_type == "phi4_multimodal"


def checkpoint(**others):
    """The default config on the meta device: the checkpoint's, but for the rotary embedding."""
    with torch.device("meta"):
        return Phi4MultimodalForCausalLM._from_config(Phi4MultimodalConfig(), **others)


def test_the_tower_of_a_checkpoint_is_read_where_its_attention_is_whole():
    """Of 27 layers the model reads the output of the last but one."""
    model = checkpoint(attn_implementation={"": "sdpa", "vision_config": "eager"})
    family = find_family(model)
    assert (family.vision_layers, family.feature_layer) == (27, 25)
    with foveate.use(model, "tome"), foveate.use(checkpoint(), "divprune"):
        pass
    with pytest.raises(UnsupportedModelError, match="set it to 'eager' by"):
        foveate.use(checkpoint(), "tome")


@pytest.mark.parametrize(("size", "tokens"), [((448, 448), 545), ((1344, 896), 1857)])
def test_a_checkpoint_makes_as_many_tokens_of_an_image_as_its_processor_says(size, tokens):
    """256 + 1 + 256 + 16 + 16 tokens of one crop; of three by two, 6 * 256 + 3 * 16."""
    height, width = size
    crops = height * width // 448**2
    given = {
        "image_pixel_values": torch.empty(1, 1 + crops, 3, 448, 448, device="meta"),
        "image_sizes": torch.tensor([size]),
        "image_attention_mask": torch.ones(1, 1 + crops, 32, 32),
    }
    family = find_family(checkpoint())
    assert family.lengths("image", given) == [tokens]
    traced = trace(family, "image", family.fed(given))
    assert [shape.total for shape in traced.shapes] == [tokens]
    boxes = family.boxes("image", 0, traced.shapes[0], given)
    assert boxes.isnan().any(1).sum() == tokens - 256 * (1 + crops)


def test_beams_show_each_image_once():
    """Its thumbnail, without the padding that the processor puts around an image."""
    member, model = Phi4Multimodal(), model_of(None)
    inputs = member.inputs([[5, 7], [4], [2, 3]])
    with torch.no_grad(), foveate.use(model, EveryThird(6)) as run:
        model.generate(**fresh(inputs), num_beams=2, max_new_tokens=2, do_sample=False)
        record = run.record
    assert len(record.images) == 4
    assert record.pixels.shape == (2, 3, 16, 16)
    whole = inputs["image_pixel_values"][:, 0]
    assert not whole[..., 14:].any(), "the last columns are padding"
    assert record.pixels[..., 14:].any()


@pytest.mark.parametrize("method", [None, EveryThird(6)])
def test_benchmarks_know_when_features_are_made(method):
    member, model = Phi4Multimodal(), model_of(None)
    bench = Bench(model, new_tokens=1, cpu_time=False)
    before = dict(vars(model.model.embed_tokens_extend.image_embed))
    with torch.no_grad(), bench.watching():
        session = contextlib.nullcontext() if method is None else foveate.use(model, method)
        with session:
            bench.prompt(member.inputs([[5, 7]]))
    assert bench.watch.phases_ms()["vision"] > 0
    assert vars(model.model.embed_tokens_extend.image_embed) == before
