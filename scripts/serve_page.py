"""Take docs/serve-page.png, the page of `foveate serve` with the embedded model:
`python scripts/serve_page.py`. It needs the extra `serve`, playwright, and Chromium.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from foveate import tiny
from foveate.serve import Engine, Settings, create_app

OUT = Path(__file__).resolve().parent.parent / "docs" / "serve-page.png"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SEED, KIND = 2, "diamond"  # the scene, and what the question is about
SIZE = {"width": 1200, "height": 800}


@contextmanager
def server() -> Iterator[str]:
    """The embedded model with PyramidDrop, served on a free port; gives the address."""
    app = create_app(Engine(*tiny.load(), "pyramiddrop"), Settings("tiny"))
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


def take(address: str, chromium: str) -> Image.Image:
    """Ask on the page, twice, so that the first call's warming up is not in the times."""
    scene, file = tiny.draw_scene(SEED), io.BytesIO()
    scene.image.save(file, "PNG")
    question = next(one.text for one in scene.questions if KIND in one.text)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport=SIZE)
        page.goto(address)
        shown = {"name": "scene.png", "mimeType": "image/png", "buffer": file.getvalue()}
        page.locator("#files").set_input_files(shown)
        page.get_by_label("Question").fill(question)
        for _ in range(2):
            page.get_by_role("button", name="Ask").click()
            expect(page.get_by_role("status")).to_contain_text("nswers", timeout=60_000)
        page.mouse.move(0, 0)
        taken = page.screenshot(full_page=True)
        browser.close()
    return Image.open(io.BytesIO(taken)).convert("RGB")


def main() -> None:
    """Take the image, and write it with six bits a channel, which nobody sees."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    chromium = parser.parse_args().chromium
    with server() as address:
        image = take(address, chromium)
    image.point(lambda value: value & 0xFC | value >> 6).save(OUT, optimize=True)
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
