"""The page and the server itself, with the embedded model."""

import io

import pytest

pytest.importorskip("playwright", reason="playwright drives the browser")

import foveate
from foveate.cli.inputs import answer, encode
from foveate.serve import Engine
from tests.serve.page.browser import ask, drop, expect, tokens
from tests.serve.running import running


@pytest.fixture
def tab(browser):
    found = browser.new_page(viewport={"width": 1280, "height": 860})
    complaints = []
    found.on("console", lambda said: complaints.append(said.text))
    found.on("pageerror", lambda error: complaints.append(str(error)))
    yield found
    found.close()
    refused = "Failed to load resource: "
    assert not [text for text in complaints if not text.startswith(refused)]


@pytest.fixture
def page(tab, address):
    tab.goto(address)
    expect(tab.locator("#model")).to_have_text("tiny")
    return tab


def test_answers_are_the_librarys(page, loaded, scenes):
    model, processor = loaded
    image, question = scenes[4].image, scenes[4].questions[0].text
    file = io.BytesIO()
    image.save(file, "PNG")
    drop(page, "scene.png", file.getvalue())
    expect(page.get_by_label("as published")).to_be_checked()  # as the server was started
    ask(page, question)
    expect(page.get_by_role("status")).to_contain_text("nswers")
    inputs = encode(processor, [image], question, model)
    plain = answer(model, processor, inputs, 6)
    with foveate.use(model, "pyramiddrop") as session:
        pruned = answer(model, processor, inputs, 6)
    expect(page.locator("#plain .answer")).to_have_text(plain)
    expect(page.locator("#pruned .answer")).to_have_text(pruned)
    kept = list(session.report()["images"][0]["after"].values())
    assert tokens(page) == ["256", str(kept[-1])]
    captions = page.locator("figcaption").all_inner_texts()
    assert [caption.split("\n")[0] for caption in captions] == [
        "scene.png",
        "from layer 3 on",
        "from layer 6 on",
        "from layer 9 on",
    ]
    for caption, count in zip(captions[1:], kept, strict=True):
        assert f"{count} of 256 tokens" in caption
    panels = page.locator("figure img").evaluate_all("all => all.map((one) => one.naturalWidth)")
    assert len(panels) == 4
    assert min(panels) > 0


def test_the_slider_changes_the_tokens(page):
    page.get_by_role("button", name="example").click()
    expect(page.get_by_role("listitem")).to_have_count(1)
    page.get_by_label("Filter methods").fill("divprune")
    page.get_by_role("radio", name="divprune").check()
    page.get_by_label("Keep", exact=True).fill("50")
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_role("row", name="visual tokens")).to_contain_text("128")
    expect(page.get_by_role("status")).to_contain_text("nswers")
    page.get_by_label("Keep", exact=True).fill("25")
    expect(page.get_by_role("row", name="visual tokens")).to_contain_text("64")
    assert tokens(page) == ["256", "64"]


def test_the_servers_refusals_are_shown(page):
    page.get_by_role("button", name="example").click()
    expect(page.get_by_role("listitem")).to_have_count(1)
    page.get_by_text("More settings").click()
    page.get_by_label("Fields of the method").fill('{"layer": 3}')
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#pruned").get_by_role("alert")).to_contain_text("layer")
    expect(page.locator("#plain .answer")).not_to_be_empty()


def test_a_key_opens_the_server(tab, loaded):
    with running(Engine(*loaded, "pyramiddrop"), api_key="secret") as address:
        tab.goto(address)
        expect(tab.get_by_role("status")).to_contain_text("this server needs its API key")
        tab.get_by_role("button", name="example").click()
        expect(tab.get_by_role("listitem")).to_have_count(1)
        tab.get_by_label("API key").fill("wrong")
        tab.get_by_label("API key").press("Enter")
        expect(tab.get_by_role("status")).to_contain_text("this server needs its API key")
        tab.get_by_label("API key").fill("secret")
        tab.get_by_label("API key").press("Enter")  # asks at once
        expect(tab.get_by_role("status")).to_contain_text("nswers")
        expect(tab.locator("#model")).to_have_text("tiny")
