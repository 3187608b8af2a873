"""HunyuanVL, whose images have newlines, and numbers of their own among positions."""

import torch
from transformers import HunYuanVLConfig

from tests.conformance.zoo.mrope import MRopeMember, rope
from tests.conformance.zoo.small import TEXT


class HunyuanVL(MRopeMember):
    """Images made by hand are of 4 x 12 patches: 2 x 6 tokens, two newlines, begin and end."""

    name = "hunyuan_vl"
    thw = (1, 4, 12)
    patch = (48,)
    by_row = True  # whether images are counted in each row, and not through all of a batch

    def config(self):
        vision = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
            "num_attention_heads": 4, "patch_size": 4, "out_hidden_size": 64,
            "text_hidden_size": 64, "min_image_size": 16, "max_image_size": 64,
            "img_max_token_num": 256, "max_vit_seq_len": 256,
        }  # fmt: skip
        text = {**TEXT, "head_dim": 16, "rope_parameters": rope(2, 2, 2, 2)}
        return HunYuanVLConfig(
            vision_config=vision, text_config=text, image_token_id=self.image_id, im_start_id=92,
            im_end_id=93, im_newline_id=94, tie_word_embeddings=False,
        )  # fmt: skip

    def build(self, attention="sdpa"):
        """Transformers 5.23 counts the images of a batch through all its rows, so that positions in
        a row depend on the rows before; here each row counts its own, as it does alone.
        """
        model = super().build(attention)
        if self.by_row:
            model.model.get_rope_index = row_by_row(model.model.get_rope_index)
        return model


def row_by_row(index):
    """A `get_rope_index` that is called for each row by itself."""

    def called(input_ids, mm_token_type_ids, image_grid_thw=None, attention_mask=None, **kwargs):
        found, first = [], 0
        for row in range(len(input_ids)):
            kind = mm_token_type_ids[row]
            images = int((kind.diff(prepend=torch.zeros_like(kind[:1])) == 1).sum())
            grids = image_grid_thw[first : first + images] if images else None
            mask = None if attention_mask is None else attention_mask[row : row + 1]
            found.append(index(input_ids[row : row + 1], kind[None], grids, mask, **kwargs))
            first += images
        positions, deltas = zip(*found, strict=True)
        return torch.cat(positions, 1), torch.cat(deltas)

    return called
