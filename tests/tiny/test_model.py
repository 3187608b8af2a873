"""The packaged model loads offline, answers well, and takes conversations."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from foveate import tiny
from foveate.tiny.build import EOS, IMAGE, UNK
from recipes.data import TRAIN_SEEDS
from recipes.evaluate import accuracy, answers, held_out, readout

VISUAL = 256
Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return tiny.load()


def _say(loaded: Loaded, messages: list[dict], images: list[Image.Image]) -> str:
    """Ask through the chat template, the images given as part of the messages."""
    model, processor = loaded
    queue = iter(images)
    filled = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image", "image": next(queue)} if part["type"] == "image" else part
                for part in content
            ]
        filled.append({"role": message["role"], "content": content})
    inputs = processor.apply_chat_template(
        filled, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == IMAGE).sum() == VISUAL * len(images)
    assert (inputs["input_ids"] == 1).sum() == 1
    output = model.generate(**inputs)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _user(text: str, images: int = 0) -> dict:
    parts = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def test_folder_loads_through_the_auto_classes(loaded: Loaded) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny.PATH)
    processor = AutoProcessor.from_pretrained(tiny.PATH)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(processor, LlavaProcessor)
    assert model.dtype == torch.float16
    for name, tensor in loaded[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].float()), name


def test_load_takes_device_and_dtype() -> None:
    model, processor = tiny.load("cpu", torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert processor.tokenizer.padding_side == "left"


def test_folder_is_small_and_has_a_model_card() -> None:
    assert (tiny.PATH / "model.safetensors").stat().st_size <= 20e6
    assert sum(p.numel() for p in tiny.load()[0].parameters()) < 8e6
    assert "accuracy" in (tiny.PATH / "README.md").read_text().lower()


def test_held_out_questions_are_answered(loaded: Loaded) -> None:
    """300 fresh questions; guessing by kind of question alone gives about a quarter."""
    items = held_out(300, first_seed=77_000_000)
    assert 77_000_000 + len(items) < TRAIN_SEEDS
    result = accuracy(*loaded, items)
    right, asked = result["all"]
    assert asked == 300
    assert right / asked >= 0.90, result


def test_without_the_image_the_answers_are_guesses(loaded: Loaded) -> None:
    """The same questions about blank images: the accuracy above comes from looking."""
    items = held_out(64, first_seed=78_000_000)
    blank = [type(i)(Image.new("RGB", (128, 128), (40, 40, 40)), i.question) for i in items]
    right, asked = accuracy(*loaded, blank)["all"]
    assert right / asked < 0.45


def test_a_batch_answers_like_each_question_alone(loaded: Loaded) -> None:
    """Questions of different lengths, so that rows are padded."""
    model, processor = loaded
    items = held_out(8, first_seed=79_000_000)
    assert len({len(item.question.text.split()) for item in items}) > 1
    together = answers(model, processor, items)
    assert together == [answers(model, processor, [item])[0] for item in items]


def test_an_answer_is_one_word_and_then_the_end(loaded: Loaded) -> None:
    model, processor = loaded
    item = held_out(1, first_seed=80_000_000)[0]
    inputs = processor(images=item.image, text=f"<image> {item.question.text}", return_tensors="pt")
    output = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert len(output) == 2
    assert output[1] == EOS


@pytest.mark.parametrize(
    "text", ["what color is the 47 ?", "What colour is the 47?", "WHAT color, is the 47 ?"]
)
def test_spelling_does_not_matter(loaded: Loaded, text: str) -> None:
    tokenizer = loaded[1].tokenizer
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<bos> what color is the 47 ?"
    assert UNK not in ids


def test_places_stay_one_word_and_strangers_are_unknown(loaded: Loaded) -> None:
    tokenizer = loaded[1].tokenizer
    ids = tokenizer("what is at the top-left, zebra?")["input_ids"]
    assert tokenizer.decode(ids) == "<bos> what is at the top-left <unk> ?"


def test_any_image_is_resized(loaded: Loaded) -> None:
    for size, mode in (((640, 480), "RGB"), ((31, 77), "L"), ((200, 200), "RGBA")):
        image = Image.new(mode, size)
        inputs = loaded[1](images=image, text="<image> where is it ?", return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 128, 128)
        assert (inputs["input_ids"] == IMAGE).sum() == VISUAL


def test_chat_template_agrees_with_plain_text(loaded: Loaded) -> None:
    _, processor = loaded
    prompt = processor.apply_chat_template([_user("what is left ?", 1)], add_generation_prompt=True)
    assert prompt == "<bos> <image> what is left ?"
    assert (
        processor.tokenizer("<image> what is left ?")["input_ids"]
        == (processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])
    )


def test_second_turns_are_answered_too(loaded: Loaded) -> None:
    """After an earlier question and answer, accuracy stays high; strings and parts both work."""
    right = asked = 0
    for seed in range(81_000_000, 81_000_012):
        scene = tiny.draw_scene(seed)
        first, second = scene.questions[0], scene.questions[-1]
        third = scene.questions[len(scene.questions) // 2]
        talk = [_user(first.text, 1), _assistant(first.answer)]
        for question in (second, third):
            answer = _say(loaded, [*talk, _user(question.text)], [scene.image])
            right += answer == question.answer
            asked += 1
    text_only = [*talk[:1], {"role": "assistant", "content": first.answer}]
    last = {"role": "user", "content": second.text}
    assert _say(loaded, [*text_only, last], [scene.image])
    assert right / asked >= 0.8


def test_two_images_in_one_message(loaded: Loaded) -> None:
    one, two = (tiny.draw_scene(seed) for seed in (91, 92))
    answer = _say(loaded, [_user("how many red objects are there ?", 2)], [one.image, two.image])
    assert len(answer.split()) <= 4


def test_hiding_tokens_early_hurts_and_hiding_none_does_not(loaded: Loaded) -> None:
    items = held_out(32, first_seed=82_000_000)
    every = loaded[0].config.text_config.num_hidden_layers
    counts = readout(*loaded, items, depths=(1, every))
    assert counts[every] == accuracy(*loaded, items)
    assert counts[1]["all"][0] < counts[every]["all"][0] - 6


def test_weights_folder_holds_no_training_state() -> None:
    names = {path.name for path in Path(tiny.PATH).iterdir()}
    assert not {name for name in names if name.endswith((".pt", ".bin", ".jsonl"))}
