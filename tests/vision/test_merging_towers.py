"""Towers that merge rows between layers: which rows a token has in each layer, by gradients."""

import pytest
import torch

import foveate
from foveate.errors import UnsupportedModelError
from foveate.families import find_family
from foveate.methods import ToMe
from tests.conformance.test_patches import local_model
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("name", ["minicpmv4_6", "minicpmv4_7", "minicpm_ocr"])
def test_rows_of_a_token_are_those_that_it_depends_on(name, mode):
    """Without what attention adds, a token depends on its own rows alone, whatever the config says
    of modes.
    """
    model = local_model(name)
    encoder, told, outputs = find_family(model).encoder, {}, []
    hooks = [
        encoder.tower.register_forward_pre_hook(
            lambda module, args, kwargs: told.update(kwargs), with_kwargs=True
        )
    ]
    for layer in encoder.layers:
        hooks.append(layer.register_forward_hook(lambda module, args, out: outputs.append(out)))
    pixels = {**MEMBERS["minicpmv4_6"]().pixels(2), "downsample_mode": mode}
    pooled = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    for hook in hooks:
        hook.remove()
    side = find_family(model).side("image")
    first, later = encoder.later
    assert first < len(encoder.layers)
    for number, output in enumerate(outputs):
        images = (later if number >= first else encoder.packed)(told, side)
        assert len(images) == len(pooled)
        for image, feature in zip(images, pooled, strict=True):
            assert len(image.rows) == len(feature)
            for token in (0, 1, len(feature) - 1):
                (grad,) = torch.autograd.grad(feature[token].sum(), output, retain_graph=True)
                found = grad[0].any(-1).nonzero()[:, 0]
                assert torch.equal(found, image.rows[token].sort().values)


def test_a_call_that_merges_rows_is_refused_inside_the_encoder():
    """The config says otherwise, so that this is known once the call is."""
    model, pixels = model_of("minicpm_ocr"), MEMBERS["minicpmv4_6"]().pixels(2)
    with torch.no_grad(), foveate.use(model, ToMe(r=2)):
        for mode in ("4x", None):
            model.model.get_image_features(**pixels, downsample_mode=mode)
        with pytest.raises(UnsupportedModelError, match="merges windows of 2 x 2 patches"):
            model.model.get_image_features(**pixels, downsample_mode="16x")
