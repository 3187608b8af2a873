"""Parts of a small VLM of the form that `scripts/real_parts.py` fetches: a tower and a Llama."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from foveate.tiny.words import COLOURS, KINDS, PLACES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tower(patches: int = 4) -> CLIPVisionModelWithProjection:
    """A random tower of `patches` x `patches` patches."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        image_size=8 * patches, patch_size=8, projection_dim=16, initializer_range=0.2,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and a few words of scenes, as byte-level BPE with ChatML's tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: n for n, t in enumerate((*SPECIAL, *letters))}, []))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
    )  # fmt: skip
    fast.add_tokens([*COLOURS, *(k for k in KINDS if not k.isdecimal()), *PLACES])
    return fast


def language(words: int) -> LlamaForCausalLM:
    """A random Llama with grouped keys and tied embeddings."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=words, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
