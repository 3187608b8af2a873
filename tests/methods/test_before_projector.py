"""Merging what the projector is given: against plain computations from pixels to logits."""

import pytest
import torch

import foveate
from foveate.errors import LayerError
from foveate.methods import DivPrune, Downsample, LLaVAPruMerge, RecoverableCompression, VisionZip
from foveate.testing import models
from foveate.testing.checks import check_oracle
from tests.conformance.batches import batch_of
from tests.conformance.zoo import MEMBERS
from tests.tinies import IMAGE, PATCHES, prompts, tiny_llava

KEEP = 12
CASES = {
    "visionzip": VisionZip(keep=KEEP),
    "llava-prumerge": LLaVAPruMerge(plus=False),
    "llava-prumerge, plus": LLaVAPruMerge(),
}


@pytest.fixture(scope="module")
def llava():
    return tiny_llava(attention="eager")


def plain_signals(model, pixels, layer):
    """What transcriptions read, from the encoder's own attention maps and projections."""
    tower = model.model.vision_tower
    out = tower(pixels, output_hidden_states=True, output_attentions=True)
    of = tower.encoder.layers[layer]
    normed = of.layer_norm1(out.hidden_states[layer])[0]
    query, key = of.self_attn.q_proj(normed), of.self_attn.k_proj(normed)
    joint = (query[0] @ key.T / query.shape[-1] ** 0.5).softmax(-1)
    heads = key[1:].unflatten(-1, (tower.config.num_attention_heads, -1))
    return {
        "x": out.hidden_states[-2][0, 1:],
        "cls_attention": out.attentions[layer][:, :, 0, 1:],
        "joint_cls_attention": joint[None, 1:],
        "encoder_keys": heads.transpose(0, 1)[None],
    }


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_equal_those_of_a_plain_computation(name, llava, transcribed):
    """Merge the encoder's features, project them, and read them between the text."""
    slug = name.partition(",")[0]
    transcription = transcribed(slug.replace("-", "")).CASES[name][0]
    inputs = prompts([[5, 7]])
    layer = 2 if slug == "visionzip" else 3
    merged = transcription(plain_signals(llava, inputs["pixel_values"], layer), KEEP)
    ids = inputs["input_ids"][0]
    text = llava.get_input_embeddings()(ids[ids != IMAGE])
    image = llava.model.multi_modal_projector(merged[None])[0]
    plain = llava(inputs_embeds=torch.cat((text[:5], image, text[5:]))[None]).logits[0, -7:]
    with foveate.use(llava, CASES[name]) as session:
        logits = llava(**inputs).logits[0, -7:]
    assert len(session.kept[0]["pre_llm"]) == len(image) < PATCHES
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    assert not any("merged" in note for note in session.report()["notes"])


@pytest.mark.parametrize("method", [VisionZip(), LLaVAPruMerge(), RecoverableCompression()])
def test_gradients_reach_the_projector_and_stay_finite(method):
    """Removed rows are marked after the projector, where they meet no parameter."""
    model, inputs = tiny_llava(), prompts([[5, 7], [3, 4]])
    with foveate.use(model, method):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if "projector" in name or "vision_tower.encoder.layers.0" in name:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_gradients_stay_finite_where_the_projector_was_given_what_is_not_known():
    """Tiles that the model mixes after the projector are merged there; NaN stands for them."""
    member = MEMBERS["llava_onevision"]()
    model = member.build()
    inputs, _ = batch_of(member, model, (1,))
    with foveate.use(model, VisionZip(keep=0.5)) as session:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert any("merged image tokens after" in note for note in session.report()["notes"])
    for name, parameter in model.named_parameters():
        if "projector" in name:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


def test_a_choice_may_come_first_and_a_merge_after_the_projector_may_not(llava):
    inputs = prompts([[5, 7]])
    with torch.no_grad(), foveate.use(llava, [DivPrune(keep=30), VisionZip(keep=8)]) as session:
        llava(**inputs)
    assert len(session.kept[0]["pre_llm"]) == 8
    with pytest.raises(LayerError, match="downsample before it merges tokens after the projector"):
        foveate.use(llava, [Downsample(keep=9), VisionZip(keep=4)])


@torch.no_grad()
def test_together_with_other_methods_it_equals_the_oracle():
    model = models.llava()
    check_oracle([DivPrune(keep=0.8), VisionZip(keep=0.3)], model)
    check_oracle([foveate.get_method("cls-drop")(), VisionZip(keep=0.3)], model)
    check_oracle([VisionZip(keep=0.5), foveate.get_method("fastv")()], model)
