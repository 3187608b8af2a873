"""What a family's projector is given for each visual token."""

import functools

import pytest
import torch

import foveate
from foveate.engine.inputs import bound
from foveate.families import find_family
from foveate.methods import VisionZip
from tests.conformance.test_pixels import NAMES, model_of, prompt
from tests.conformance.zoo import MEMBERS

ONE_BY_ONE = {
    "deepseek_vl", "hyperclovax_vision_v2", "internvl", "internvl-norms", "janus", "llava",
    "llava-pixtral", "llava-siglip", "llava_next", "llava_next_video", "llava_next_video-video",
    "llava_onevision", "llava_onevision-tiles", "paligemma", "paligemma2", "qianfan_ocr",
    "video_llama_3", "video_llava", "video_llava-video", "vipllava",
}  # fmt: skip


def rows_and_features(name, projector):
    """What the projector is given for the tokens of each image, and the features of each."""
    model, (inputs, counts), modality = model_of(name), prompt(name), MEMBERS[name].modality
    family, found = find_family(model), {}
    features = f"get_{modality}_features"
    original = getattr(family.base, features)

    @functools.wraps(original)
    def watched(*args, **kwargs):
        out = original(*args, **kwargs)
        found["pooled"], found["arguments"] = out.pooler_output, bound(original, args, kwargs)
        return out

    hook = projector.register_forward_pre_hook(lambda m, args: found.update(given=args[0]))
    setattr(family.base, features, watched)
    try:
        model(**inputs)
    finally:
        hook.remove()
        delattr(family.base, features)
    rows = family.unprojected(modality, found["given"], counts, found["arguments"])
    pooled = torch.cat([image.reshape(-1, image.shape[-1]) for image in found["pooled"]])
    return rows, pooled.split(counts)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_projector_that_a_family_names_makes_each_token_of_its_row(name):
    projector = find_family(model_of(name)).projector(MEMBERS[name].modality)
    assert (projector is not None) == (name in ONE_BY_ONE)
    if projector is None:
        return
    interpolated = []
    for rows, features in zip(*rows_and_features(name, projector), strict=True):
        interpolated.append(bool(rows.isnan().all()))
        if interpolated[-1]:
            continue
        made = (rows != 0).any(-1)  # others are newlines
        assert made.any()
        one_by_one = torch.cat([projector(row[None, None])[0] for row in rows])
        torch.testing.assert_close(one_by_one[made], features[made], rtol=1e-4, atol=1e-4)
    assert any(interpolated) == (name == "llava_onevision")
    assert not all(interpolated)


@pytest.mark.parametrize("name", ["aya_vision", "llava_onevision", "mistral3"])
@torch.no_grad()
def test_a_report_says_where_tokens_were_merged_after_the_projector(name):
    with foveate.use(model_of(name), VisionZip(keep=0.5)) as session:
        model_of(name)(**prompt(name)[0])
    want = "visionzip merged image tokens after the projector"
    assert any(note.startswith(want) for note in session.report()["notes"])
