"""Encoders of real size, built without memory: what tiny configs could hide."""

import pytest
import torch
from transformers import AutoConfig, AutoModel

from foveate.engine.planning import make_plan
from foveate.families import find_family
from foveate.methods import ClsDrop, ToMe

# model type: layers, rows before the patches, class token
SIZES = {
    "audio-spectrogram-transformer": (12, 2, True),
    "clipseg": (12, 1, True),
    "dinov3_vit": (12, 1, True),
    "ijepa": (12, 0, False),
    "metaclip_2": (12, 1, True),
    "mlcd_vision_model": (48, 1, True),
    "owlv2": (12, 1, True),
    "owlvit": (12, 1, True),
    "vit_mae": (12, 1, True),
    "vit_msn": (12, 1, True),
    "vivit": (12, 1, True),
    "vjepa2": (24, 0, False),
}


@pytest.mark.parametrize("model_type", SIZES)
def test_layers_and_rows_are_found(model_type):
    with torch.device("meta"):
        family = find_family(AutoModel.from_config(AutoConfig.for_model(model_type)))
    encoder = family.encoder
    found = len(encoder.layers), encoder.special, encoder.class_token
    assert found == SIZES[model_type]
    for method in [ToMe()] + [ClsDrop(layers=(11,))] * encoder.class_token:
        make_plan(family, [method])
