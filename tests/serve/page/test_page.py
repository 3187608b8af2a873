"""The page of `foveate serve`, in headless Chromium: what is asked and what is shown."""

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra serve")
pytest.importorskip("playwright", reason="playwright drives the browser")

from tests.serve.page.browser import RED, ask, asked, drop, expect, tokens
from tests.serve.page.fake import METHODS, data_url, png


def test_both_answers_stand_side_by_side(page, fake):
    fake.words = ["a", "heart"], ["a", "red", "heart"]
    asked(page)
    expect(page.get_by_role("article", name="All tokens")).to_contain_text("a red heart")
    expect(page.get_by_role("article", name="pyramiddrop, keep 25 %")).to_contain_text("a heart")
    expect(page.get_by_role("status")).to_have_text("The answers differ.")
    assert tokens(page) == ["256", "64"]


def test_same_answers_are_called_the_same(page):
    asked(page)
    expect(page.get_by_role("status")).to_have_text("Both answers are the same.")


def test_the_question_is_sent_twice(page, fake):
    asked(page)
    method, plain = fake.requests
    content = method["messages"][0]["content"]
    assert content[0] == {"type": "image_url", "image_url": {"url": data_url(RED)}}
    assert content[1] == {"type": "text", "text": "What is red?"}
    assert plain["messages"] == method["messages"]
    assert (method["method"], method["keep"], method["fields"]) == ("pyramiddrop", 0.25, {})
    assert (plain["keep"], "method" in plain) == (1, False)
    assert {body["model"] for body in fake.requests} == {"tiny"}
    assert {body["max_tokens"] for body in fake.requests} == {128}


def test_every_stage_has_its_panel(page):
    asked(page)
    figures = page.get_by_role("figure")
    expect(figures).to_have_count(3)
    expect(figures.nth(1)).to_contain_text("from layer 3 on160 of 256 tokens, 62.5 %")
    name = "red.png: from layer 6 on, 64 of 256 tokens, 25 %"
    expect(page.get_by_role("img", name=name)).to_have_js_property("naturalWidth", 16)


def test_several_images_keep_their_order(page, fake):
    files = [
        {"name": f"{number}.png", "mimeType": "image/png", "buffer": png((number, 0, 0))}
        for number in range(4)
    ]
    page.locator("#files").set_input_files(files)
    expect(page.get_by_role("listitem")).to_have_count(4)
    expect(page.locator("#files")).to_have_value("")  # so that the same file can be chosen again
    page.get_by_role("button", name="Remove 1.png").click()
    page.locator("#files").set_input_files(files[1:2])  # again, at the end
    ask(page)
    expect(page.get_by_role("figure")).to_have_count(12)
    sent = [part.get("image_url") for part in fake.requests[0]["messages"][0]["content"]]
    assert sent[:4] == [{"url": data_url(png((number, 0, 0)))} for number in (0, 2, 3, 1)]


def test_the_slider_asks_the_method_again(page, fake):
    asked(page)
    page.get_by_label("Keep", exact=True).fill("50")
    expect(page.get_by_role("article", name="pyramiddrop, keep 50 %")).to_contain_text("heart")
    expect(page.get_by_role("row", name="visual tokens")).to_contain_text("128")
    assert tokens(page) == ["256", "128"]
    assert [body["keep"] for body in fake.requests] == [0.25, 1, 0.5]


def test_a_changed_question_waits_for_the_button(page, fake):
    asked(page)
    page.get_by_label("Question").fill("What is blue?")
    page.get_by_label("Keep", exact=True).fill("50")
    page.wait_for_timeout(700)
    assert len(fake.requests) == 2


def test_a_change_takes_the_place_of_a_running_answer(page, fake):
    asked(page)
    fake.words, fake.pause = (["slow"] * 50, ["all"]), 0.1
    page.get_by_label("Keep", exact=True).fill("50")
    expect(page.locator("#pruned")).to_contain_text("slow slow")
    fake.words, fake.pause = (["quick"], ["all"]), 0
    page.get_by_label("Keep", exact=True).fill("75")
    expect(page.get_by_role("status")).to_have_text("The answers differ.")
    page.wait_for_timeout(400)  # in which more words would come
    expect(page.locator("#pruned .answer")).to_have_text("quick")
    expect(page.locator("#pruned h2")).to_have_text("pyramiddrop, keep 75 %")
    expect(page.locator("#pruned .error")).to_have_text("")
    assert fake.left == 1


def test_stop_closes_the_stream(page, fake):
    fake.words, fake.pause = (["slow"] * 100, ["all"]), 0.05
    drop(page)
    ask(page)
    expect(page.locator("#pruned")).to_contain_text("slow slow")
    page.get_by_label("Question").fill("")  # what is written meanwhile is no hindrance
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    page.wait_for_timeout(300)
    expect(page.locator("#pruned .error")).to_have_text("")
    assert (len(fake.requests), fake.left) == (1, 1)


def test_the_published_keep_and_fields_are_sent(page, fake):
    page.get_by_label("as published: 50 %, 25 %, 12.5 %").check()
    page.get_by_text("More settings").click()
    page.get_by_label("Fields of the method").fill('{"layers": [3, 6, 9]}')
    page.get_by_label("Longest answer").fill("7")
    asked(page)
    method, plain = fake.requests
    assert (method["keep"], method["fields"]) == ([0.5, 0.25, 0.125], {"layers": [3, 6, 9]})
    assert (method["max_tokens"], plain["max_tokens"]) == (7, 7)
    assert "fields" not in plain


def test_fields_must_be_json(page, fake):
    page.get_by_text("More settings").click()
    page.get_by_label("Fields of the method").fill("layer=2")
    page.get_by_text("More settings").click()  # closed again
    drop(page)
    ask(page)
    field = page.get_by_label("Fields of the method")
    expect(field).to_be_focused()
    assert "not JSON" in field.evaluate("field => field.validationMessage")
    assert not fake.requests


def test_another_method_is_chosen_by_keyboard(page, fake):
    asked(page)
    page.get_by_role("radio", name="pyramiddrop").focus()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("article", name="fastv, keep 25 %")).to_contain_text("heart")
    assert fake.requests[-1]["method"] == "fastv"
    expect(page.get_by_role("link")).to_have_attribute("href", "https://arxiv.org/abs/2403.06764")


def test_the_page_begins_with_what_the_server_does(page, fake):
    own = {"keep": 0.4, "fields": {"layer": 3}}
    fake.methods = [{**method, "default": None} for method in METHODS]
    fake.methods[1]["default"] = own
    page.reload()
    expect(page.get_by_role("radio", name="fastv")).to_be_checked()
    asked(page)
    assert fake.requests[0]["keep"] == own["keep"]
    assert fake.requests[0]["fields"] == own["fields"]
    page.get_by_role("radio", name="pyramiddrop").check()
    expect(page.get_by_role("article", name="pyramiddrop, keep 40 %")).to_contain_text("heart")
    assert fake.requests[-1]["fields"] == {}


def test_a_server_without_a_keep_begins_as_published(page, fake):
    fake.methods = [{**method, "default": None} for method in METHODS]
    fake.methods[2]["default"] = {"keep": METHODS[2]["default_keep"], "fields": {}}
    page.reload()
    expect(page.get_by_label("as published")).to_be_checked()
    page.get_by_label("Keep", exact=True).fill("50")
    expect(page.get_by_label("as published")).not_to_be_checked()
    asked(page)
    assert fake.requests[0]["keep"] == 0.5


def test_a_question_waits_for_the_methods(page, fake):
    held = []
    page.route("**/v1/methods", lambda route: held.append(route))
    page.reload()
    drop(page)
    ask(page)
    expect(page.locator("#methods label")).to_have_count(0)
    page.wait_for_timeout(200)
    for route in held:
        route.continue_()
    expect(page.get_by_role("status")).to_contain_text("same")
    assert len(fake.requests) == 2


def test_a_model_on_which_nothing_works(page, fake):
    fake.methods = METHODS[:1]
    page.reload()
    expect(page.get_by_role("radio", name="tome")).to_be_disabled()
    drop(page)
    ask(page)
    expect(page.get_by_role("status")).to_have_text("No method works on this model.")
    assert not fake.requests


def test_methods_that_do_not_work_say_why(page):
    radio = page.get_by_role("radio", name="tome")
    expect(radio).to_be_disabled()
    expect(page.locator("#methods label").last).to_contain_text("needs <b>encoder keys</b>")


def test_methods_can_be_filtered(page):
    page.get_by_label("Filter methods").fill("stage by")
    expect(page.locator("#methods label:visible")).to_have_count(1)
    expect(page.get_by_role("radio", name="pyramiddrop")).to_be_checked()


def test_an_example_can_be_asked_about(page, fake):
    page.get_by_role("button", name="example").click()
    expect(page.get_by_role("listitem")).to_contain_text("scene")
    page.get_by_label("Question").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("same")
    assert fake.requests[0]["messages"][0]["content"][1]["text"].endswith("?")


def test_everything_has_a_name_and_a_place_in_the_tab_order(page):
    asked(page)
    page.get_by_text("More settings").click()
    nameless = """() => [...document.querySelectorAll("input, textarea, button, [role]")].filter(
        (e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim() && !e.role).length"""
    assert page.evaluate(nameless) == 0
    assert page.locator("img:not([alt])").count() == 0
    reached = []
    page.locator("#files").focus()
    for _ in range(10):
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.ariaLabel")
        )
        page.keyboard.press("Tab")
    order = ["files", "Remove red.png", "example", "question", "go", "keep", "own", "filter"]
    assert reached[:8] == order


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_windows_need_no_scrolling_sideways(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 380, "height": 800})
    asked(page, name="a-very-long-name-without-any-space-in-it" * 3 + ".png")
    assert page.evaluate("document.documentElement.scrollWidth") == 380


def test_text_stands_out_from_its_ground(page):
    """At least 4.5 to 1, as WCAG 2.2 asks."""
    luminance = """([scheme, name]) => {
        const probe = document.createElement("p");
        document.body.append(probe);
        probe.style.color = `var(--${name})`;
        const parts = getComputedStyle(probe).color.match(/\\d+/g).map((n) => n / 255);
        probe.remove();
        const linear = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    }"""
    pairs = [
        (ink, ground) for ground in ("paper", "card", "soft") for ink in ("ink", "faint", "accent")
    ]
    pairs += [("error", "card"), ("on-accent", "accent")]
    pairs += [
        (stage, ground) for stage in ("vision", "pre_llm", "llm") for ground in ("card", "soft")
    ]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for pair in pairs:
            low, high = sorted(page.evaluate(luminance, [scheme, name]) for name in pair)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, pair)
