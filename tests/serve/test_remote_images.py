"""Images are fetched from hosts that are allowed, over https, and from nowhere else."""

import asyncio
import io

import httpx
import pytest
from PIL import Image

from foveate.serve import Settings
from foveate.serve.errors import RequestError
from foveate.serve.images import load_images

HOST = "images.example.org"
LIMIT = 5000


def png(colour="red", size=8):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


class Web:
    """Hosts that answer by path; it notes what it was asked."""

    def __init__(self):
        self.asked, self.read = [], 0

    async def __call__(self, request):
        self.asked.append(str(request.url))
        path = request.url.path
        if path == "/endless.png":
            return httpx.Response(200, content=self._endless())
        if path == "/timeout.png":
            raise httpx.ReadTimeout("no answer", request=request)
        if path.startswith("/to/"):
            return httpx.Response(302, headers={"location": path.removeprefix("/to/")})
        pages = {"/a.png": png(), "/b.png": png("blue"), "/text.png": b"<html>"}
        return httpx.Response(200 if path in pages else 404, content=pages.get(path, b"none"))

    async def _endless(self):
        while True:
            self.read += 1000
            yield b"x" * 1000


def load(web, *urls, hosts=(HOST,)):
    settings = Settings("tiny", allow_hosts=frozenset(hosts), max_image_bytes=LIMIT)
    return asyncio.run(load_images(urls, settings, httpx.MockTransport(web)))


def test_allowed_hosts_are_asked():
    web = Web()
    one, two = load(web, f"https://{HOST}/a.png", f"https://{HOST}/to//b.png")
    assert one.getpixel((0, 0)) == (255, 0, 0)
    assert two.getpixel((0, 0)) == (0, 0, 255)
    assert web.asked == [f"https://{HOST}/{path}" for path in ("a.png", "to//b.png", "b.png")]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://{HOST}/a.png", "are sent as data URLs"),
        (f"ftp://{HOST}/a.png", "are sent as data URLs"),
        ("file:///a.png", "files of the server"),
        ("https://example.org/a.png", "does not fetch from example.org"),
        (f"https://{HOST}.example.net/a.png", "does not fetch from"),
        (f"https://a.{HOST}/a.png", "does not fetch from"),
        (f"https://{HOST}@example.net/a.png", "does not fetch from example.net"),
        (f"https://me:word@{HOST}/a.png", "does not fetch from"),
        (f"https://{HOST}:8443/a.png", "does not fetch from"),
        (f"https://{HOST}:port/a.png", "not an address"),
        ("https://[::1/a.png", "not an address"),
        ("https://127.0.0.1/a.png", "does not fetch from 127.0.0.1"),
        ("https:///a.png", "does not fetch from"),
    ],
)
def test_others_are_not_asked(url, words):
    web = Web()
    with pytest.raises(RequestError, match="image 1") as refused:
        load(web, url)
    assert words in str(refused.value)
    assert not web.asked


@pytest.mark.parametrize(
    "target", ["https://169.254.169.254/a.png", f"http://{HOST}/a.png", "file:///etc/passwd"]
)
def test_redirects_lead_nowhere_else(target):
    web = Web()
    with pytest.raises(RequestError, match=r"does not fetch from|sent as data URLs"):
        load(web, f"https://{HOST}/to/{target}")
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.png", "cannot be fetched"),
        ("timeout.png", "cannot be fetched"),
        ("text.png", "damaged, or not in one of the formats"),
        ("to//to//to//to//a.png", "more than 3 redirects"),
        ("endless.png", "more bytes than this server accepts"),
    ],
)
def test_what_comes_is_checked(path, words):
    web = Web()
    with pytest.raises(RequestError, match=words):
        load(web, f"https://{HOST}/{path}")
    assert web.read <= LIMIT + 1000


def test_no_host_is_allowed_by_default():
    with pytest.raises(RequestError, match="hosts that are allowed: none"):
        load(Web(), f"https://{HOST}/a.png", hosts=())
