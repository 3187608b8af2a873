"""What cannot be served is refused with a status and one line that says why."""

import base64
import io
import json

import httpx
import pytest
from PIL import Image

from foveate import tiny
from foveate.serve import Engine
from tests.serve.running import data_url, running, turn

KEY = "a key with spaces"


@pytest.fixture(scope="module")
def small():
    """A server with low limits and a key."""
    engine = Engine(*tiny.load(), max_tokens=16)
    limits = {"max_body": 300_000, "max_images": 2, "max_image_bytes": 100_000}
    more = {"max_pixels": 200_000, "max_tokens": 16, "api_key": KEY}
    with running(engine, **limits, **more) as found:
        yield found


def post(address, body, path="chat/completions", key=KEY, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = {"content-type": "application/json", "authorization": f"Bearer {key}", **headers}
    return httpx.post(f"{address}/v1/{path}", content=data, headers=kind, timeout=60)


def said(response):
    """The message of a refusal, whose form is checked."""
    (name,) = response.json()
    error = response.json()[name]
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    return error["message"]


def image(width=64, height=64):
    return Image.new("RGB", (width, height), "red")


def asking(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "star ?"}]}]


ONE = [{"role": "user", "content": "star ?"}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "fastw"}, "unknown method 'fastw'; did you mean fastv"),
        ({"method": "../secret.json"}, "unknown method"),
        ({"method": "fastv", "keep": 1.5}, "keep must be in (0, 1] or a positive int, got 1.5"),
        ({"method": "fastv", "keep": 0}, "keep must be in"),
        ({"method": "fastv", "keep": True}, "keep must be"),
        ({"method": "fastv", "keep": "half"}, "keep must be"),
        ({"method": "fastv", "keep": {"a": 1}}, "keep must be"),
        ({"method": "fastv", "keep": [0.5, 0.25]}, "keep"),
        ({"method": "fastv", "fields": {"layer": 99}}, "layer"),
        ({"method": "fastv", "fields": {"depth": 2}}, "depth"),
        ({"method": "fastv", "fields": {"keep": 0.5}}, "not one of `fields`"),
        ({"keep_total": 0}, "keep_total: Input should be greater than or equal to 1"),
        ({"keep_total": 2.5}, "keep_total: Input should be a valid integer"),
        ({"keep_total": "90"}, "keep_total: Input should be a valid integer"),
        ({"keep_total": True}, "keep_total: Input should be a valid integer"),
        ({"keep_total": 2**63}, "keep_total: Input should be less than"),
        ({"keep_total": [90]}, "keep_total: Input should be a valid integer"),
        ({"keep_total": 9, "method": "fastv"}, "keep_total lowers what is kept before"),
        ({"method": "fastv", "fields": {"keep_total": 9}}, "keep_total is a field of the request"),
        ({"audio": True}, "audio is not supported by this server, whose messages hold text and"),
        ({"keep": 0.5}, "name the method that keep is of"),
        ({"fields": []}, "fields"),
        ({"model": "other"}, "there is no model 'other' here"),
        ({"n": 2}, "n is not supported"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"tools": [{"type": "function"}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"frames": 3}, "unknown field frames"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 0.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"max_tokens": 17}, "up to 16 tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": []}]}, "needs content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "audio is not"),
        ({"messages": [5]}, "messages.0: must be an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "content: must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "content.0: needs a type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "content.0.text: Value error"),
        ({"messages": asking(None)}, "messages.0.content.0.image_url.url: Field required"),
        ({"stop": 5}, "stop: must be a text or a list"),
        ({"fields": []}, "fields: must be an object"),
        ({"messages": [*ONE, {"role": "assistant", "content": "r"}]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "stands for an image"),
        ({"messages": [{"role": "user", "content": "star " * 3000}]}, "but the model accepts only"),
        ({"messages": asking("/etc/passwd")}, "files of the server and other addresses"),
        ({"messages": asking("file:///etc/passwd")}, "files of the server"),
        ({"messages": asking("http://example.org/a.png")}, "are sent as data URLs"),
        ({"messages": asking("https://example.org/a.png")}, "does not fetch from example.org"),
        ({"messages": asking("data:text/html;base64,aaaa")}, "must begin with data:image"),
        ({"messages": asking("data:image/png;base64,a*aa")}, "no base64 text"),
        ({"messages": asking("data:image/png;base64,aaa")}, "no base64 text (Incorrect padding)"),
        ({"messages": asking("data:image/png;base64,aaaa")}, "damaged, or not in one of the"),
        ({"messages": asking("data:image/png;base64," + "A" * 200_000)}, "more bytes than"),
        ({"messages": asking(data_url(image(500, 500)))}, "250000 pixels"),
        ({"messages": [turn("?", image(400, 400), image(400, 400))]}, "320000 pixels"),
        ({"messages": [turn("?", *[image()] * 3)]}, "has 3 images"),
        ({"messages": asking(data_url(image(), "TIFF"))}, "not in one of the formats"),
    ],
    ids=lambda value: str(value)[:80],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(small, change, words):
    got = post(small, {"model": "tiny", "messages": ONE, **change})
    assert got.status_code == (404 if "model" in change else 400)
    assert words in said(got)


def test_a_total_is_refused_with_its_field(scenes):
    """More than the server allows, less than a token for each image, or none for a method."""
    one, two = scenes[:2]
    with running(Engine(*tiny.load(), "divprune", max_tokens=4, keep_total=90)) as address:
        for more, words in (
            ({"keep_total": 91}, "keep_total: this server allows up to 90 visual tokens, got 91"),
            ({"keep_total": 1}, "keep_total: 2 images keep at least a visual token each, got 1"),
            ({"keep_total": 9, "method": "fastv"}, "keep_total lowers what is kept before the"),
        ):
            body = {"model": "tiny", "messages": [turn("?", one.image, two.image)], **more}
            got = post(address, body)
            assert got.status_code == 400
            assert said(got).startswith(words)
            assert got.json()["error"]["param"] == "keep_total"
        chat = [turn("?", one.image, two.image)]
        got = post(address, {"model": "tiny", "messages": chat, "keep_total": 90})
        assert got.status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"model": NaN}', b"[" * 100_000, b'"\\ud800"'],
    ids=repr,
)
def test_what_is_no_json_object_is_refused(small, body):
    got = post(small, body)
    assert got.status_code == 400
    assert said(got)


def test_halves_of_characters_do_no_harm(small):
    """JSON can spell them, UTF-8 cannot."""
    broken = b'{"model": "tiny", "input": "a", "instructions": "\\ud800"}'
    assert post(small, broken, "responses").status_code == 400
    broken = b'{"model": "tiny", "\\ud800": 1, "messages": [{"role": "user", "content": "a"}]}'
    assert post(small, broken).status_code == 400
    broken = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    assert post(small, broken).status_code in (200, 400)


def test_nothing_is_decoded_before_all_sizes_are_known(small, monkeypatch):
    monkeypatch.setattr("foveate.serve.images.as_rgb", lambda *_: pytest.fail("decoded"))
    got = post(small, {"model": "tiny", "messages": [turn("?", image(400, 400), image(400, 400))]})
    assert got.status_code == 400


def test_a_small_file_of_many_pixels_is_refused(small):
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    assert len(file.getvalue()) < 100_000
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    got = post(small, {"model": "tiny", "messages": asking(url)})
    assert got.status_code == 400
    assert "pixels" in said(got)


@pytest.mark.parametrize("cut", [0.3, 0.7, 0.95])
def test_damaged_images_are_the_clients_fault(small, cut):
    file = io.BytesIO()
    tiny.draw_scene(1).image.save(file, "PNG")
    data = file.getvalue()[: int(len(file.getvalue()) * cut)]
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    got = post(small, {"model": "tiny", "messages": asking(url)})
    assert got.status_code == 400
    assert "image 1" in said(got)


@pytest.mark.parametrize("declared", [True, False])
def test_long_bodies_are_refused(small, declared):
    data = b'{"model": "' + b"x" * 400_000 + b'"}'
    body = data if declared else iter([data[:200_000], data[200_000:]])
    kind = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    got = httpx.post(f"{small}/v1/chat/completions", content=body, headers=kind)
    assert got.status_code == 413
    assert "300000 bytes" in said(got)


def test_other_kinds_of_content_are_refused(small):
    """A page of another site can send them without asking the browser's leave."""
    got = post(small, {"model": "tiny", "messages": ONE}, **{"content-type": "text/plain"})
    assert got.status_code == 415


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
@pytest.mark.parametrize("key", ["", "another key", KEY[:-1], KEY + "x", "ключ"])
def test_a_key_is_needed(small, path, key):
    raw = f"Bearer {key}".strip().encode()  # httpx sends no space at a header's end
    got = httpx.post(f"{small}/v1/{path}", content=b"{}", headers={b"authorization": raw})
    assert got.status_code == 401
    assert got.headers["www-authenticate"] == "Bearer"
    assert KEY not in got.text


def test_what_needs_a_key(small):
    assert httpx.get(f"{small}/v1/models").status_code == 401
    key = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{small}/v1/models", headers=key).status_code == 200
    for path in ("health", "ready", "metrics", "v1/methods"):
        assert httpx.get(f"{small}/{path}").status_code == 200


def test_unknown_routes_answer_in_the_same_form(small):
    for path in ("v1/other", "v1/a%0Ab" + "c" * 1000, "example/x"):
        assert "Not Found" in said(httpx.get(f"{small}/{path}"))
    got = httpx.get(f"{small}/v1/chat/completions")
    assert got.status_code == 405
    assert got.headers["allow"] == "POST"
    assert said(got)
    key = {"authorization": f"Bearer {KEY}"}
    assert "no model" in said(httpx.get(f"{small}/v1/models/{'x' * 1000}", headers=key))


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("chat/completions", {"max_tokens": 17}, "max_tokens"),
        ("chat/completions", {"max_completion_tokens": 17}, "max_completion_tokens"),
        ("responses", {"max_output_tokens": 17}, "max_output_tokens"),
        ("chat/completions", {"messages": asking(5)}, "messages.0.content.0.image_url.url"),
        ("responses", {"input": [{"role": "user", "content": [5]}]}, "input.0.content.0"),
    ],
    ids=str,
)
def test_the_field_that_is_wrong_is_named(small, path, change, param):
    own = {"input": "star ?"} if path == "responses" else {"messages": ONE}
    got = post(small, {"model": "tiny", **own, **change}, path)
    assert got.status_code == 400
    assert got.json()["error"]["param"] == param


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animations_are_refused(small, kind):
    """A model would see their first frame alone. A photograph's preview is no second frame."""
    file, frames = io.BytesIO(), [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    got = post(small, {"model": "tiny", "messages": asking(url)})
    assert got.status_code == 400
    assert "image 1: an animation" in said(got)
    assert post(small, {"model": "tiny", "messages": asking(data_url(frames[0], kind))}).is_success
    file = io.BytesIO()
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    assert post(small, {"model": "tiny", "messages": asking(url)}).is_success


def test_base64_text_may_have_lines(small):
    head, _, text = data_url(image()).partition(",")
    for url in (f"{head},\n{text[:20]}\r\n {text[20:]}\n", f"{head.upper()},{text}"):
        assert post(small, {"model": "tiny", "messages": asking(url)}).is_success


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input": []}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"store": True}, "store is not supported"),
        ({"max_output_tokens": 17}, "up to 16 tokens"),
        ({"seed": 3}, "unknown field seed"),
        ({"stop": "a"}, "unknown field stop"),
    ],
    ids=str,
)
def test_responses_are_refused_alike(small, change, words):
    got = post(small, {"model": "tiny", "input": "star ?", **change}, "responses")
    assert got.status_code == 400
    assert words in said(got)


def test_fields_that_ask_for_nothing_are_taken(small):
    nothing = {"n": 1, "presence_penalty": 0, "tools": [], "user": "me", "metadata": {"a": "b"}}
    more = {"response_format": {"type": "text"}, "logprobs": False, "store": False, "stop": None}
    got = post(small, {"model": "tiny", "messages": ONE, **nothing, **more})
    assert got.status_code == 200


def test_keys_may_have_any_letters():
    with running(Engine(*tiny.load(), max_tokens=1), api_key="ключ") as address:
        raw = {b"authorization": "Bearer ключ".encode()}
        assert httpx.get(f"{address}/v1/models", headers=raw).status_code == 200
        raw = {b"authorization": "Bearer клюв".encode()}
        assert httpx.get(f"{address}/v1/models", headers=raw).status_code == 401
