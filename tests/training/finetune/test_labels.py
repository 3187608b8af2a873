"""Labels are on the answers and the tokens that end them, whatever the template looks like."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from foveate.errors import InputError
from foveate.training.finetune import Collator, Example, Message, Scenes
from foveate.training.finetune.labels import label_ids, render


def say(role, text, images=0):
    return Message(role, ({"type": "image"},) * images + ({"type": "text", "text": text},))


def talk(*messages, images=()):
    return Example(tuple(images), messages)


class Chat:
    """A processor in the manner of Qwen2.5-VL: byte-level tokens, roles as special tokens."""

    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for p in m.content %}{% if p.type == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )

    def __init__(self, template=None):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        marks = [
            "<|im_start|>",
            "<|im_end|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|image_pad|>",
        ]
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tokens, eos_token="<|im_end|>", additional_special_tokens=marks
        )
        self.chat_template = template or self.template

    def apply_chat_template(self, messages, tokenize):
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, tokenize=tokenize
        )

    def ids(self, text, *counts):
        """Ids with the placeholder of each image repeated."""
        pieces = text.split("<|image_pad|>")
        for piece, count in zip(pieces[1:], counts, strict=True):
            pieces[0] += "<|image_pad|>" * count + piece
        return self.tokenizer(pieces[0])["input_ids"]

    def learned(self, example, *counts):
        """What a row's labels spell, and where they are."""
        rendered = render(self, example)
        ids = self.ids(rendered.text, *counts)
        labels = label_ids(self.tokenizer, rendered, ids, example)
        on = [i for i, label in enumerate(labels) if label != -100]
        assert [labels[i] for i in on] == [ids[i] for i in on]
        return self.tokenizer.decode([ids[i] for i in on]), on, ids


def test_labels_of_the_embedded_model_equal_hand_made_spans(processor):
    scenes = Scenes(3, turns=3)
    batch = Collator(processor)([scenes[0], scenes[1]])
    for row in range(2):
        wanted = torch.full_like(batch["labels"][row], -100)
        ids = batch["input_ids"][row]
        at = 1 + 256  # <bos>, visual tokens
        for message in scenes[row].messages:
            words = processor.tokenizer(message.text, add_special_tokens=False)["input_ids"]
            if message.role == "assistant":
                words.append(processor.tokenizer.eos_token_id)
                wanted[at : at + len(words)] = torch.tensor(words)
            assert ids[at : at + len(words)].tolist() == words
            at += len(words)
        assert torch.equal(batch["labels"][row], wanted)
        assert batch["attention_mask"][row].sum() == at


def test_images_of_several_turns_shift_later_answers():
    chat = Chat()
    example = talk(
        say("system", "You see."), say("user", "what?", 1), say("assistant", "a cat"),
        say("user", "and here?", 2), say("assistant", "two dogs"),
    )  # fmt: skip
    text, on, ids = chat.learned(example, 5, 17, 3)
    assert text == "a cat<|im_end|>two dogs<|im_end|>"
    assert chat.tokenizer.decode(ids[on[0] - 11 : on[0]]).endswith("assistant\n")


def test_an_answer_that_is_also_asked_is_found_where_it_is_given():
    text, on, _ = Chat().learned(
        talk(say("user", "yes yes", 1), say("assistant", "yes"), say("user", "yes"),
             say("assistant", "yes")), 4,
    )  # fmt: skip
    assert text == "yes<|im_end|>yes<|im_end|>"
    assert on[4] - on[3] > 5


def test_a_template_without_end_marks_gets_one_at_the_end():
    chat = Chat("{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }} {% endfor %}")
    example = talk(
        say("user", "a?"), say("assistant", "b"), say("user", "c"), say("assistant", "d")
    )
    assert chat.learned(example)[0] == "bd<|im_end|>"


def test_a_template_that_trims_answers_is_followed():
    chat = Chat(Chat.template.replace("{{ p.text }}", "{{ p.text | trim }}"))
    text, _, _ = chat.learned(talk(say("user", "a?"), say("assistant", " b \n")))
    assert text == "b<|im_end|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ m.content[-1].text | upper }}{% endfor %}", "as other text"),
        ("{% for m in messages[-1:] %}{{ m.content[-1].text }}{% endfor %}", "once, in order"),
        ("{{ nothing.there }}", "the chat template refuses it"),
    ],
)
def test_templates_that_hide_answers_are_refused(template, reason):
    example = talk(
        say("user", "a?"), say("assistant", "b"), say("user", "c"), say("assistant", "d")
    )
    with pytest.raises(InputError, match=reason):
        render(Chat(template), example)


def test_a_row_that_was_cut_off_is_refused():
    chat = Chat()
    example = talk(say("user", "a?"), say("assistant", "a long answer"))
    rendered = render(chat, example)
    with pytest.raises(InputError, match="truncated"):
        label_ids(chat.tokenizer, rendered, chat.ids(rendered.text)[:-4], example)


def test_a_processor_without_a_template_is_refused():
    chat = Chat()
    chat.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        render(chat, talk(say("user", "a"), say("assistant", "b")))
