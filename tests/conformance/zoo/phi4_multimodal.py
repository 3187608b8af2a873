"""Phi-4 Multimodal, whose prompts have pixels: nothing else brings it features."""

from typing import ClassVar

import torch
from torch.nn.functional import adaptive_avg_pool2d, pad
from transformers import AutoModelForCausalLM, Phi4MultimodalConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.phi4_multimodal.configuration_phi4_multimodal import (
    Phi4MultimodalAudioConfig,
    Phi4MultimodalVisionConfig,
)

from tests.conformance.zoo.member import Member, fresh
from tests.conformance.zoo.towers import pictures

CROP, PATCH = 16, 4
SIDE = CROP // PATCH
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "image_size": CROP, "patch_size": PATCH, "crop_size": CROP,
}  # fmt: skip
AUDIO = {
    "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2,
    "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8,
    "input_size": 16, "bias_max_distance": 16,
}  # fmt: skip
PIXELS = ("image_pixel_values", "image_sizes", "image_attention_mask")
# Height and width of images, for two, four and two crops. Each has padding in the last: where no
# crop of a batch has, transformers' SDPA attention makes the tower causal, which eager does not.
SIZES = [(16, 28), (20, 28), (28, 16)]


class Phi4Multimodal(Member):
    name = "phi4_multimodal"
    kind = AutoModelForCausalLM
    visual = 17  # two crops side by side less a line, a separator, and a thumbnail
    beams_of_many = False
    what = "images with eager attention"
    of_tower: ClassVar[str] = "eager"

    def build(self, attention="sdpa"):
        model = super().build(attention)
        if attention == "sdpa":
            model.set_attn_implementation({"vision_config": self.of_tower})
        return model

    def config(self):
        return Phi4MultimodalConfig(
            vocab_size=self.vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=6,
            num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, max_position_embeddings=512, original_max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4,
                             "partial_rotary_factor": 0.75},
            vision_config=Phi4MultimodalVisionConfig(**VISION, image_token_id=self.image_id),
            audio_config=Phi4MultimodalAudioConfig(**AUDIO, audio_token_id=self.image_id + 1),
        )  # fmt: skip

    def text(self, model):
        return model.model

    # -- pixels

    def given(self, images, generator):
        seed = int(torch.randint(1000, (), generator=generator))
        return processed(images_of([SIZES[0]] * images, seed))

    def given_of(self, inputs, start, stop):
        return self.take({name: inputs[name] for name in PIXELS}, start, stop)

    def encode_again(self, model, inputs):
        self.encode(model, {name: inputs[name] for name in PIXELS})

    def pixels(self, images, seed=0):
        made = processed(images_of(SIZES[:images], seed))
        return made | {PIXELS[2]: made[PIXELS[2]].bool()}

    def counts(self, model, pixels):
        return tokens_of(pixels)

    def encode(self, model, pixels, modality=None):
        counts, base = tokens_of(pixels), model.model
        ids = torch.full((1, sum(counts)), self.image_id)
        embeds = base.embed_tokens_extend(ids, base.embed_tokens(ids), **fresh(pixels))
        return list(embeds[0].split(counts))


class Phi4MultimodalSdpa(Phi4Multimodal):
    name = "phi4_multimodal-sdpa"
    what = ""
    of_tower = "sdpa"
    closed = True


def images_of(sizes, seed):
    """(3, H, W) of each image."""
    side = -(-max(map(max, sizes)) // CROP) * CROP
    made = pictures(len(sizes), 3, side, side, seed=seed)
    return [image[:, :height, :width] for image, (height, width) in zip(made, sizes, strict=True)]


def processed(images):
    """What the processor makes of images that are not scaled: a thumbnail and crops of each, empty
    crops up to the most of any, and which patches of these are no padding.
    """
    crops, masks, sizes = [], [], []
    for image in images:
        below, right = (-image.shape[1] % CROP, -image.shape[2] % CROP)
        canvas = pad(image, (0, right, 0, below))
        real = pad(torch.ones_like(image[0]), (0, right, 0, below))[::PATCH, ::PATCH]
        thumbnail = adaptive_avg_pool2d(canvas, CROP)[None]
        cut = canvas.unfold(1, CROP, CROP).unfold(2, CROP, CROP).permute(1, 2, 0, 3, 4)
        crops.append(torch.cat((thumbnail, cut.flatten(0, 1))))
        seen = real.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).flatten(0, 1)
        masks.append(torch.cat((torch.ones(1, SIDE, SIDE), seen)))
        sizes.append(canvas.shape[1:])
    most = max(map(len, crops))
    crops = [pad(of, (0, 0, 0, 0, 0, 0, 0, most - len(of))) for of in crops]
    masks = [pad(of, (0, 0, 0, 0, 0, most - len(of)), value=1) for of in masks]
    values = torch.stack(crops), torch.tensor(sizes), torch.stack(masks)
    return dict(zip(PIXELS, values, strict=True))


def within_a_prompt(model, pixels):
    """Features of some images, as they stand in the embeddings of a prompt."""
    counts, token, made = tokens_of(pixels), Phi4Multimodal.image_id, []
    ids = torch.tensor([[5, *[token] * sum(counts), 6]])
    hook = model.model.embed_tokens_extend.image_embed.register_forward_hook(
        lambda module, args, output: made.append(output)
    )
    model.model(input_ids=ids, **pixels)
    hook.remove()
    return BaseModelOutputWithPooling(pooler_output=list(made[0][0, 1:-1].split(counts)))


def tokens_of(pixels):
    """Visual tokens of each image, as the processor counts them."""
    counts = []
    sizes, masks = pixels["image_sizes"], pixels["image_attention_mask"]
    for (height, width), mask in zip((sizes // CROP).tolist(), masks, strict=True):
        cells = mask[1 : 1 + height * width, ::2, ::2]
        side = cells.shape[-1]
        lines = cells[::width, :, 0].sum()
        counts.append(int(cells.sum() + lines) + 1 + side * (side + 1))
    return counts
