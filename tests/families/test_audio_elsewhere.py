"""Audio of models other than Qwen's: Nemotron-H Omni, and those whose audio is refused."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import ParakeetEncoderConfig

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.measure.conventions import CONVENTIONS
from tests.conformance import oracle
from tests.conformance.tolerance import kernel_of, tolerance_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh, loud
from tests.methods_for_tests import EveryThird
from tests.oracle import Drop, Spec

NAME = "nemotron_h_omni"
AUDIO = 94
HEARING = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_mel_bins": 16, "subsampling_conv_channels": 8, "attention_bias": False,
    "scale_input": False, "projection_hidden_size": 48, "projection_bias": False,
}  # fmt: skip


class Hearing(MEMBERS[NAME]):
    def config(self):
        config = super().config()
        config.audio_config, config.audio_token_id = ParakeetEncoderConfig(**HEARING), AUDIO
        return config


def prompt():
    """A row with clips of 10 and of 6 tokens, and text around them."""
    mask = torch.tensor([[1] * 80, [1] * 40 + [0] * 40])
    features = torch.randn(2, 80, 16, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([[5, 6, *[AUDIO] * 10, 7, *[AUDIO] * 6, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sound = {"input_features": features, "input_features_mask": mask}
    return inputs | sound, [torch.arange(2, 12), torch.arange(13, 19)]


@torch.no_grad()
@pytest.mark.parametrize("what", ["shared", "llm"])
def test_audio_of_nemotron_equals_the_oracle(what):
    member = Hearing()
    eager = loud(member.build("eager"))
    model = loud(member.build(kernel_of(eager)))
    inputs, places = prompt()
    method, spec = EveryThird(2), Spec(kept=[torch.tensor([0, 3])] * 2)
    if what == "llm":
        method = foveate.methods.FastV(2, 2)
        spec = Spec(drops=[Drop(2, 1, [2, 2])])
    with foveate.use(model, method, audio=True) as run:
        got = member.run(model, **fresh(inputs)).last_hidden_state[0, -3:]
    length = inputs["input_ids"].shape[1]
    want, history = oracle.run(member, eager, fresh(inputs), spec, length, None, places)
    plain, _ = oracle.run(member, eager, fresh(inputs), Spec(), length, None, places)
    assert (want[-3:] - got).abs().max() <= tolerance_of(NAME, model)
    assert (plain[-3:] - got).abs().max() > 0.02, "the test does not bite"
    for image, index in zip(run.kept, history[-1], strict=True):
        assert torch.equal(list(image.values())[-1], index)
    assert all(image.audio for image in run.record.images)


@torch.no_grad()
def test_the_account_of_nemotron_equals_what_torch_counts():
    model = Hearing().build("eager").requires_grad_(False)
    model.set_experts_implementation("eager")  # the counter misses grouped products
    counter = FlopCounterMode(display=False)
    with foveate.use(model, EveryThird(2), audio=True) as run, counter:
        model(**prompt()[0], logits_to_keep=1)
    found = account(run.record, run.family, run.methods, CONVENTIONS["dense"])
    assert found.tower > 0
    assert found.total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (NAME, "it has no encoder of audio"),
        ("gemma3n", "it pads every clip to one length"),
        ("gemma4", "features of audio hold padding"),
        ("phi4_multimodal", "one module makes its features and places them"),
        ("muse_spark", "how it makes audio tokens has not been tested"),
        ("llava", "it takes no audio"),
    ],
)
def test_audio_of_other_models_is_refused(name, why):
    model = MEMBERS[name]().build()
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be removed: {why}"):
        foveate.use(model, "divprune", audio=True)
    assert "audio" not in find_family(model).placeholder_ids
