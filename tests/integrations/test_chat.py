"""A ChatModel answers batches as the model answers alone."""

import pytest
import torch

import foveate
from foveate import tiny
from foveate.errors import FoveateError, InputError
from foveate.integrations.chat import ChatModel, _generation, _until
from foveate.methods import FastV, Random


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


@pytest.fixture(scope="module")
def scenes():
    return [tiny.draw_scene(seed) for seed in (3, 4, 5)]


def turn(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def batch(scenes):
    """One image, none, two, one with a longer question."""
    one, two, three = scenes
    return [
        turn(one.questions[0].text, one.image),
        turn("what color is the star ?"),
        turn(two.questions[1].text, two.image, three.image),
        turn(max((q.text for q in three.questions), key=len), three.image),
    ]


@pytest.mark.parametrize("method", [None, FastV(layer=2, keep=0.25), Random(keep=0.5)], ids=str)
def test_a_batch_gets_what_each_gets_alone(loaded, batch, method):
    chat = ChatModel(*loaded, method)
    together = chat.answer(batch, max_new_tokens=4)
    assert together == [chat.answer([one], max_new_tokens=4)[0] for one in batch]
    assert all(text and tokens for text, tokens in together)


def test_answers_are_those_of_generate_in_a_session(loaded, scenes):
    model, processor = loaded
    question = scenes[0].questions[0].text
    prompt = processor.apply_chat_template(turn(question, scenes[0].image), tokenize=False)
    inputs = processor(images=scenes[0].image, text=prompt, return_tensors="pt")
    inputs["input_ids"] = inputs["input_ids"]
    with foveate.use(model, "random", keep=0.1, seed=3):
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    want = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    chat = ChatModel(model, processor, Random(keep=0.1, seed=3))
    assert chat.answer([turn(question, scenes[0].image)], max_new_tokens=3)[0][0] == want


def test_the_method_removes_tokens(loaded, batch, monkeypatch):
    seen = []
    chat = ChatModel(*loaded, Random(keep=16))
    monkeypatch.setattr(
        chat, "session", lambda: seen.append(foveate.use(loaded[0], chat.method)) or seen[-1]
    )
    chat.answer([batch[0], batch[3]], max_new_tokens=1)
    assert [len(kept["pre_llm"]) for kept in seen[0].kept] == [16, 16]


@pytest.mark.parametrize("method", [None, FastV(layer=2, keep=0.25)], ids=str)
def test_loss_is_the_mean_over_the_continuation(loaded, scenes, method):
    model, processor = loaded
    chat = ChatModel(model, processor, method)
    question = turn(scenes[0].questions[0].text, scenes[0].image)
    inputs = chat.encode([question])
    words = processor.tokenizer(" red blue", add_special_tokens=False)["input_ids"]
    assert len(words) == 2
    total, greedy = 0.0, True
    ids = inputs["input_ids"]
    with torch.inference_mode(), chat.session():
        cache = None
        step = dict(inputs)
        for word in words:
            out = model(**step, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[0, -1], out.past_key_values
            total -= float(logits.log_softmax(-1)[word])
            greedy &= int(logits.argmax()) == word
            ids = torch.tensor([[word]])
            step = {"input_ids": ids}
    loss, same = chat.loss(question, " red blue")
    assert loss == pytest.approx(total / 2, abs=1e-4)
    assert same == greedy
    best = chat.answer([question], max_new_tokens=1)[0][0]
    assert chat.loss(question, best)[1]
    with pytest.raises(InputError, match="at least one token"):
        chat.loss(question, "")


def test_answers_end_at_a_stop_string():
    assert _until("red\n\nblue", ["\n\n"]) == "red"
    assert _until("red, blue", "blue") == "red, "
    assert _until("red", None) == _until("red", [""]) == "red"


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "top_p": 0.9}, {"max_new_tokens": 1024, "do_sample": False}),
        (
            {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "until": ["x"], "other": 1},
            {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5, "do_sample": True},
        ),
        ({"do_sample": True}, {"max_new_tokens": 1024, "do_sample": True}),
        (
            {"num_beams": 2, "temperature": None},
            {"max_new_tokens": 1024, "num_beams": 2, "do_sample": False},
        ),
    ],
)
def test_generation_settings(given, want):
    assert _generation(given) == want


def test_without_a_template_images_come_first(loaded, scenes, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(processor, "chat_template", None)
    chat = ChatModel(model, processor)
    question = turn(scenes[0].questions[0].text, scenes[0].image)
    inputs = chat.encode([question, turn("what color is the star ?", scenes[1].image)])
    plain = processor(
        images=scenes[0].image, text=f"<image>\n{scenes[0].questions[0].text}", return_tensors="pt"
    )
    real = inputs["attention_mask"][0].bool()
    assert inputs["input_ids"][0][real].tolist() == plain["input_ids"][0].tolist()
    assert inputs["pixel_values"].shape[0] == 2
    assert chat.answer([question], max_new_tokens=2)[0][0]


def test_what_the_model_cannot_take_is_refused(loaded):
    chat = ChatModel(*loaded)
    video = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(InputError, match="llava takes no video"):
        chat.answer([video])
    with pytest.raises(FoveateError):
        ChatModel(*loaded, FastV(layer=99))


def test_audio_and_a_total_without_a_method_are_refused(loaded):
    with pytest.raises(InputError, match="keep_total needs a method that acts before"):
        ChatModel(*loaded, keep_total=9)
    sound = [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]
    with pytest.raises(InputError, match=r"no audio; call the model itself within foveate\.use"):
        ChatModel(*loaded).answer([sound])
