"""CLIP's text tower beside a vision-language model."""

import pytest
import torch
import torch.nn.functional as F

from foveate.errors import InputError, UnsupportedModelError
from foveate.signals.clip import ClipText
from tests.tinies import LETTERS, tiny_clip


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


def test_a_question_is_what_clip_makes_of_it(clip):
    model, tokenizer = clip
    questions = ClipText(*clip)(["a cat", "red sky", ""])
    for text, embedding in zip(["a cat", "red sky", ""], questions.embeddings, strict=True):
        wanted = model.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output
        torch.testing.assert_close(embedding, wanted)
    assert not torch.allclose(questions.embeddings[0], questions.embeddings[1], atol=1e-3)


def test_a_long_question_is_cut_into_segments(clip):
    model, tokenizer = clip
    text = "abcdefghijklmnopqrstuvwxyz"  # room for ten letters beside begin and end
    (embedding,) = ClipText(*clip)(text).embeddings
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for got, part in zip(embedding, (ids[:10], ids[10:20], ids[20:]), strict=True):
        wanted = model.get_text_features(input_ids=torch.tensor([[52, *part, 53]])).pooler_output
        torch.testing.assert_close(got, wanted[0])


def test_rows_and_their_padding(clip):
    questions = ClipText(*clip)(["ab", LETTERS, "xyz"])
    text, mask = questions.of((2, 1, 1, 0))
    assert text.shape == (4, 3, 20)
    assert mask.tolist() == [[True, False, False], [True] * 3, [True] * 3, [True, False, False]]
    for got, real, row in zip(text, mask, (2, 1, 1, 0), strict=True):
        assert torch.equal(got[real], questions.embeddings[row])
    one = ClipText(*clip)("ab")
    assert torch.equal(one.of((0, 3, 1))[0], one.embeddings[0].expand(3, 1, -1))


def test_the_class_token_gets_what_clip_gives_it(clip):
    model, _ = clip
    pixels = torch.randn(2, 3, 28, 28)
    states = model.vision_model(pixels).last_hidden_state
    questions = ClipText(*clip)("ab")
    wanted = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    torch.testing.assert_close(questions.patches(states, normed=True)[:, 0], wanted)
    plain = F.normalize(model.visual_projection(states), dim=-1)
    torch.testing.assert_close(questions.patches(states, normed=False), plain)
    assert not torch.allclose(plain[:, 0], wanted, atol=1e-2)


def test_wrong_uses_are_refused(clip):
    questions = ClipText(*clip)(["a", "b"])
    with pytest.raises(UnsupportedModelError, match=r"width 32, .* width 48"):
        questions.patches(torch.randn(1, 4, 48), normed=True)
    with pytest.raises(InputError, match=r"2 questions, .* 3 rows"):
        questions.check(3)
    with pytest.raises(InputError, match="at least one question"):
        ClipText(*clip)([])
    questions.check(2)
    ClipText(*clip)("a").check(3)


def test_it_loads_from_a_folder(clip, tmp_path):
    model, tokenizer = clip
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = ClipText.from_pretrained(str(tmp_path))
    given = dict(model.text_model.named_parameters())
    for name, weight in loaded.text_model.named_parameters():
        assert torch.equal(weight, given[name])
    # Rounding of products differs with where weights lie in memory, on some processors.
    said, meant = loaded("a cat").embeddings[0], ClipText(*clip)("a cat").embeddings[0]
    torch.testing.assert_close(said, meant, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in loaded.text_model.parameters())
