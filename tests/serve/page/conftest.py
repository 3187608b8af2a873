"""Headless Chromium, a server with canned answers, and the page that it serves."""

import pytest


@pytest.fixture(scope="module")
def browser():
    from tests.serve.page.browser import CHROMIUM, FLAGS, sync_api  # late: packages may be absent

    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def fake():
    from tests.serve.page.fake import Fake

    return Fake()


@pytest.fixture
def fake_address(fake):
    from tests.serve.page.fake import served

    with served(fake.app) as found:
        yield found


@pytest.fixture
def page(browser, fake_address):
    """The page, opened; it must speak to its server alone, and complain of nothing but refusals."""
    from tests.serve.page.browser import expect

    tab = browser.new_page(viewport={"width": 1280, "height": 860})
    complaints, requests = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.on("console", lambda said: complaints.append(said.text))
    tab.goto(fake_address)
    expect(tab.locator("#model")).to_have_text("tiny")
    yield tab
    tab.close()
    assert not [url for url in requests if not url.startswith((fake_address, "data:"))]
    refused = "Failed to load resource: "
    assert not [text for text in complaints if not text.startswith(refused)]
