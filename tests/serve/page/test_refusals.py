"""The page of `foveate serve` shows errors as they are, and runs nothing that it is told."""

import json

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra serve")
pytest.importorskip("playwright", reason="playwright drives the browser")

from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient

from foveate.serve.page import HEADERS, SCENES
from tests.serve.page.browser import ask, asked, drop, expect


def test_everything_is_inserted_as_text(page, fake):
    hostile = "<img src=x onerror=\"document.title='bad'\"><script>document.title='bad'</script>"
    fake.words = [hostile], ["fine"]
    asked(page, name=f"{hostile[:40]}.png")
    expect(page.locator("#pruned .answer")).to_have_text(hostile)
    expect(page.locator("#images li")).to_contain_text("<img src=x")
    expect(page.locator("#stages b").first).to_contain_text("<img src=x")
    fake.refusal = JSONResponse({"error": {"message": hostile}}, 422)
    ask(page)
    expect(page.locator("#plain .error")).to_have_text(hostile)
    assert (
        page.locator("article img, #images img[src=x], #stages img[src=x], main script").count()
        == 0
    )
    assert page.title() == "foveate"


@pytest.mark.parametrize(
    ("refusal", "shown"),
    [
        (JSONResponse({"error": {"message": "unknown method"}}, 422), "unknown method"),
        (JSONResponse({"detail": "no such path"}, 404), "no such path"),
        (PlainTextResponse("bad gateway", 502), "bad gateway"),
        (PlainTextResponse("", 500), "The server answered 500."),
        (
            JSONResponse({"error": {"message": "the queue is full"}}, 503, {"Retry-After": "3"}),
            "the queue is full (Try again in 3 s.)",
        ),
    ],
)
def test_errors_are_shown_as_they_are(page, fake, refusal, shown):
    fake.refusal = refusal
    drop(page)
    ask(page)
    for side in ("#plain", "#pruned"):
        expect(page.locator(side).get_by_role("alert")).to_have_text(shown)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()


def test_errors_within_a_stream_are_shown(page, fake):
    fake.broken = "the deadline of 60 s has passed"
    drop(page)
    ask(page)
    expect(page.locator("#plain").get_by_role("alert")).to_have_text(fake.broken)


def test_a_server_that_is_gone_is_said_to_be(page, fake):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    drop(page)
    ask(page)
    expect(page.locator("#plain").get_by_role("alert")).to_contain_text("cannot be reached")


def test_half_an_answer_is_not_taken_for_one(page, fake):
    fake.truncated = True
    drop(page)
    ask(page)
    expect(page.locator("#plain").get_by_role("alert")).to_contain_text("before the answer ended")
    expect(page.get_by_role("status")).to_have_text("")


def test_a_key_is_asked_for_and_stays_in_the_tab(page, fake):
    expect(page.get_by_label("API key")).to_be_hidden()
    fake.key = "secret"
    drop(page)
    ask(page)
    expect(page.locator("#plain").get_by_role("alert")).to_have_text("a key is needed")
    page.get_by_label("API key").fill("secret")
    ask(page)
    expect(page.get_by_role("status")).to_contain_text("same")
    assert page.evaluate("Object.values({...sessionStorage})") == ["secret"]
    assert page.evaluate("Object.keys({...localStorage})") == []
    assert page.context.cookies() == []


def test_what_is_missing_is_said(page, fake):
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#files")).to_be_focused()
    assert page.locator("#files").evaluate("field => field.validationMessage")
    drop(page, "notes.txt", b"hello", "text/plain")
    expect(page.get_by_role("status")).to_have_text("notes.txt is not an image.")
    drop(page)
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_label("Question")).to_be_focused()
    assert not fake.requests


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css"])
def test_files_come_with_a_strict_policy(fake, path):
    answer = TestClient(fake.app).get(path)
    assert answer.status_code == 200
    assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]
    assert "unsafe" not in HEADERS["Content-Security-Policy"]
    assert "http" not in HEADERS["Content-Security-Policy"]


def test_examples_repeat(fake):
    client = TestClient(fake.app)
    first, again, other = (client.get(f"/example/{n}").json() for n in (0, SCENES, 1))
    assert first == again != other
    assert client.get("/example/x").status_code == 404
    assert json.dumps(other).startswith('{"name": "scene 1"')
