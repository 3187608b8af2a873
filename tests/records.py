"""Hand-made records of a forward, for tests of what reads them."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from foveate.record.record import ImageRecord, Record

CONFIG = LlavaConfig(
    vision_config=CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    ),
    text_config=LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
    ),
    image_token_index=4,
)


class FakeFamily:
    """A family adapter without a model."""

    config = CONFIG
    model_type = "llava"
    text_layers = 4
    vision_layers = 2
    feature_layer = 0
    one_dimensional = True
    first_llm_layer = 0
    last_llm_layer = 3
    attention_layers = keyed_layers = (0, 1, 2, 3)
    recurrent_layers: frozenset[int] = frozenset()
    keyless_layers: frozenset[int] = frozenset()


def image(row: int, *kept: tuple[str, list[int]], grid: tuple[int, int] = (4, 4)) -> ImageRecord:
    """An image whose tokens survive as listed."""
    return ImageRecord(
        row, grid[0] * grid[1], grid, {place: torch.tensor(index) for place, index in kept}
    )


def pyramid_record() -> Record:
    """Two rows, one image each of 16 tokens, 9 and 5 text tokens, dropped to 8, 4, 2."""
    places = [("llm:1", list(range(8))), ("llm:2", [0, 2, 5, 7]), ("llm:3", [2, 7])]
    return Record(
        rows=2,
        prompt_tokens=[25, 21],
        images=[image(0, *places), image(1, *places)],
        layer_tokens=[[25, 21], [17, 13], [13, 9], [11, 7]],
        cache_slots=[25, 17, 13, 11],
    )


def text_record() -> Record:
    """A prompt without an image."""
    return Record(
        rows=1,
        prompt_tokens=[7],
        images=[],
        layer_tokens=[[7]] * 4,
        cache_slots=[7] * 4,
        notes=["no image in the prompt: nothing was removed"],
    )
