"""What a user does on the page, in headless Chromium."""

import base64
from pathlib import Path

import pytest

from tests.serve.page.fake import png

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
expect = sync_api.expect
expect.set_options(timeout=30_000)  # measures hangs, not speed

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
RED = png((220, 20, 20))
DROP = """([name, type, text]) => {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], name, { type }));
    return data;
}"""


def drop(page, name="red.png", data=RED, kind="image/png"):
    given = [name, kind, base64.b64encode(data).decode()]
    page.dispatch_event("body", "drop", {"dataTransfer": page.evaluate_handle(DROP, given)})


def ask(page, text="What is red?"):
    page.get_by_label("Question").fill(text)
    page.get_by_role("button", name="Ask").click()


def asked(page, **image):
    """A question that was answered twice."""
    drop(page, **image)
    expect(page.get_by_role("listitem")).to_have_count(1)
    ask(page)
    expect(page.get_by_role("status")).to_contain_text("nswers")


def tokens(page):
    """The row of visual tokens: all, and what the method kept."""
    return page.get_by_role("row", name="visual tokens").get_by_role("cell").all_inner_texts()[:2]
