"""The official client gets what the model answers, and is told what was removed."""

import asyncio
import base64
import io
import re

import httpx
import openai
import pytest
from PIL import Image

import foveate
from foveate import tiny
from foveate.cli.inputs import answer, encode
from foveate.serve import Engine
from tests.serve.running import client, data_url, running, turn

LONGEST = 6


def ask(address, messages, **more):
    async def go():
        async with client(address) as asked:
            return await asked.chat.completions.create(model="tiny", messages=messages, **more)

    return asyncio.run(go())


def alone(loaded, images, question, method=None, **fields):
    """The answer and the report of the library."""
    model, processor = loaded
    inputs = encode(processor, images, question, model)
    if method is None:
        return answer(model, processor, inputs, LONGEST), None
    with foveate.use(model, method, **fields) as session:
        return answer(model, processor, inputs, LONGEST), session.report()


@pytest.mark.parametrize(
    ("body", "method"),
    [
        ({}, ("pyramiddrop", {})),
        ({"keep": 0.25}, ("pyramiddrop", {"keep": 0.25})),
        (
            {"method": "fastv", "keep": 32, "fields": {"layer": 3}},
            ("fastv", {"keep": 32, "layer": 3}),
        ),
        ({"method": "divprune", "keep": 0.125}, ("divprune", {"keep": 0.125})),
        ({"method": "cls-drop"}, ("cls-drop", {})),
        ({"keep": [0.75, 0.5, 0.25]}, ("pyramiddrop", {"keep": (0.75, 0.5, 0.25)})),
    ],
    ids=str,
)
def test_answers_and_figures_are_the_librarys(address, loaded, scenes, body, method):
    scene = scenes[2]
    for question in scene.questions[:3]:
        want, report = alone(loaded, [scene.image], question.text, method[0], **method[1])
        got = ask(address, [turn(question.text, scene.image)], extra_body=body)
        assert got.choices[0].message.content == want
        assert got.choices[0].finish_reason == "stop"
        (image,) = report["images"]
        after = list(image["after"].values())[-1]
        assert got.usage.visual_tokens == {"before": image["tokens"], "after": after}
        assert got.usage.prompt_tokens == report["prompt_tokens"][0]
        assert got.foveate["visual_tokens"] == got.usage.visual_tokens
        flops, kv = report["flops"]["prefill"], report["kv_bytes"]
        assert got.foveate["flops"] == {"prefill": flops["after"], "prefill_all": flops["before"]}
        assert got.foveate["kv_bytes"] == {"now": kv["after"], "all": kv["before"]}
        assert got.foveate["method"]["method"] == method[0]
        assert got.foveate["seconds"]["total"] >= got.foveate["seconds"]["first_token"] > 0
        assert "images" not in got.foveate


@pytest.mark.parametrize("keep", [1, 1.0])
def test_a_keep_of_one_is_all_tokens(address, loaded, scenes, keep):
    scene = scenes[3]
    want, _ = alone(loaded, [scene.image], scene.questions[0].text)
    got = ask(address, [turn(scene.questions[0].text, scene.image)], extra_body={"keep": keep})
    assert got.choices[0].message.content == want
    assert got.usage.visual_tokens == {"before": 256, "after": 256}
    assert got.foveate["flops"]["prefill"] == got.foveate["flops"]["prefill_all"]
    assert got.foveate["method"]["keep"] == 1.0


def test_kept_tokens_are_drawn_where_they_are_asked_for(address, scenes):
    images = [scenes[0].image, scenes[1].image]
    got = ask(address, [turn("star ?", *images)], extra_body={"show_kept": True})
    assert len(got.foveate["images"]) == 2
    drawn = set()
    for image in got.foveate["images"]:
        assert image["before"] == 256
        assert [stage["kept"] for stage in image["stages"]] == [128, 64, 32]
        for stage in image["stages"]:
            head, _, text = stage["picture"].partition(",")
            assert head == "data:image/png;base64"
            drawn.add(Image.open(io.BytesIO(base64.b64decode(text))).tobytes())
    assert len(drawn) == 6
    assert (
        sum(s["stages"][-1]["kept"] for s in got.foveate["images"])
        == got.usage.visual_tokens["after"]
    )


def test_a_stream_says_what_a_whole_answer_says(address, scenes):
    messages = [turn(scenes[1].questions[0].text, scenes[1].image)]
    whole = ask(address, messages, extra_body={"show_kept": True})

    async def stream():
        async with client(address) as asked:
            chunks = await asked.chat.completions.create(
                model="tiny",
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"show_kept": True},
            )
            return [chunk async for chunk in chunks]

    *chunks, usage = asyncio.run(stream())
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].foveate["images"] == whole.foveate["images"]
    assert usage.usage == whole.usage
    assert not usage.choices
    assert not any(hasattr(chunk, "foveate") for chunk in chunks[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_responses(address, loaded, scenes, stream):
    scene = scenes[4]
    question = scene.questions[0].text
    parts = [
        {"type": "input_image", "image_url": data_url(scene.image, "BMP")},
        {"type": "input_text", "text": question},
    ]
    body = {"model": "tiny", "input": [{"role": "user", "content": parts}]}
    body["extra_body"] = {"method": "fastv", "keep": 0.25}

    async def go():
        async with client(address) as asked:
            if not stream:
                return await asked.responses.create(**body)
            async with asked.responses.stream(**body) as events:
                async for event in events:
                    assert event.type != "error"
                return await events.get_final_response()

    got = asyncio.run(go())
    assert got.status == "completed"
    assert got.output_text == alone(loaded, [scene.image], question, "fastv", keep=0.25)[0]
    assert got.usage.visual_tokens == {"before": 256, "after": 64}
    assert got.foveate["method"]["keep"] == 0.25


def user(image, text):
    return {"role": "user", "content": [image, {"type": "text", "text": text}]}


def test_conversations_have_several_turns(address, loaded, scenes):
    """And an image in each."""
    model, processor = loaded
    one, two = scenes[:2]
    turns = [("star ?", one.image), (two.questions[0].text, two.image)]
    messages = [turn(*turns[0]), {"role": "assistant", "content": "red"}, turn(*turns[1])]
    got = ask(address, messages, extra_body={"keep": 1})
    prompt = [
        user({"type": "image", "image": turns[0][1]}, "star ?"),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        user({"type": "image", "image": turns[1][1]}, turns[1][0]),
    ]
    inputs = processor.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert got.choices[0].message.content == answer(model, processor, inputs, LONGEST)
    assert got.usage.visual_tokens["before"] == 512
    assert got.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_an_answer_can_be_sent_back_as_it_is(address, scenes):
    """With all fields that a client's objects have, most of which are null."""
    scene = scenes[0]
    first = turn(scene.questions[0].text, scene.image)
    got = ask(address, [first]).choices[0].message
    assert got.model_dump()["tool_calls"] is None
    again = ask(address, [first, got.model_dump(), turn(scene.questions[1].text)])
    assert again.choices[0].message.content


@pytest.mark.parametrize("temperature", [1e-320, 1e-38, 1e-7])
def test_the_least_temperatures_take_the_likeliest_token(address, scenes, temperature):
    messages = [turn(scenes[0].questions[0].text, scenes[0].image)]
    want = ask(address, messages).choices[0].message.content
    assert ask(address, messages, temperature=temperature).choices[0].message.content == want


def test_models_and_methods(address):
    listed = httpx.get(f"{address}/v1/methods").json()
    assert {entry["slug"] for entry in listed} == set(foveate.list_methods())
    first = next(entry for entry in listed if entry["slug"] == "pyramiddrop")
    assert first["works"] is True
    assert first["default_keep"] == [0.5, 0.25, 0.125]
    assert first["stage"] == "llm"
    assert first["summary"].endswith(".")
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{address}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{address}/v1/models/other").status_code == 404


def test_a_server_keeps_to_its_total(loaded, scenes):
    """Also for requests that name a method or ask for all tokens, and for all turns of a chat."""
    images = [scene.image for scene in scenes[:3]]
    chat = []
    with running(Engine(*tiny.load(), "divprune", keep_total=90)) as address:
        asked = [({}, 25), ({"keep": 1}, 90), ({"method": "fastervlm", "keep": 0.5}, 90)]
        for image, (extra, after) in zip(images, asked, strict=True):
            chat.append(turn("what color is the star ?", image))
            got = ask(address, chat, max_tokens=2, extra_body=extra)
            before = 256 * len([one for one in chat if one["role"] == "user"])
            assert got.usage.visual_tokens == {"before": before, "after": after}
            chat.append({"role": "assistant", "content": got.choices[0].message.content})
        with pytest.raises(openai.BadRequestError, match="fastv does not act"):
            ask(address, chat[:1], extra_body={"method": "fastv"})


def chat_of(scenes, turns):
    """A conversation in which each turn of the user brings an image."""
    messages = []
    for scene in scenes[:turns]:
        messages += [turn("star ?", scene.image), {"role": "assistant", "content": "red"}]
    return messages[:-1]


def test_a_request_may_set_a_total(loaded, scenes):
    """Later turns of a conversation shrink its earlier images, as in the library."""
    model, processor = loaded
    with running(Engine(*tiny.load(), "divprune", max_wait=0)) as address:
        for turns in (1, 2, 3):
            messages = chat_of(scenes, turns)
            extra = {"keep": 64, "keep_total": 100, "show_kept": True}
            got = ask(address, messages, extra_body=extra, max_tokens=LONGEST)
            images = iter(scene.image for scene in scenes)
            prompt = [
                user({"type": "image", "image": next(images)}, "star ?")
                if message["role"] == "user"
                else {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
                for message in messages
            ]
            inputs = processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            with foveate.use(model, "divprune", keep=64, keep_total=100) as run:
                want = answer(model, processor, inputs, LONGEST)
            assert got.choices[0].message.content == want
            kept = [image["stages"][0]["kept"] for image in got.foveate["images"]]
            assert kept == [[64], [50, 50], [33, 33, 34]][turns - 1]
            assert kept == [len(image["pre_llm"]) for image in run.kept]
            assert got.foveate["keep_total"] == 100
        free = ask(address, chat_of(scenes, 2), extra_body={"keep": 64}, max_tokens=1)
        assert free.usage.visual_tokens["after"] == 128
        assert free.foveate["keep_total"] is None


def test_requests_of_several_totals_are_answered_together(loaded, scenes):
    """Each as alone; those without a total are another batch."""
    asked = [{"keep_total": 30}, {"keep_total": 41}, {"keep": 20, "keep_total": 36}, {}]
    asked.append({"keep": 1, "keep_total": 80})

    async def go(address, bodies):
        async with client(address) as asking:
            requests = [
                asking.chat.completions.create(
                    model="tiny", messages=chat_of(scenes, 2), max_tokens=LONGEST, extra_body=body
                )
                for body in bodies
            ]
            return await asyncio.gather(*requests)

    def said(got):
        return got.choices[0].message.content, got.usage.visual_tokens["after"]

    with running(Engine(*tiny.load(), "divprune", max_wait=1000, max_batch=3)) as address:
        alone = [said(asyncio.run(go(address, [body]))[0]) for body in asked]
        together = asyncio.run(go(address, asked))
        counted = httpx.get(f"{address}/metrics").text
    rows = float(re.search(r"^foveate_batch_rows_sum (.*)$", counted, re.MULTILINE)[1])
    assert [said(got) for got in together] == alone
    assert [after for _, after in alone] == [30, 41, 36, 50, 80]
    assert [got.foveate["keep_total"] for got in together] == [30, 41, 36, None, 80]
    assert rows == 5 + (3 + 3 + 3) + 1 + 1
