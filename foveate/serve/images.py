"""Images of a request: checked before they are decoded, and fetched only from allowed hosts."""

from __future__ import annotations

import asyncio
import base64
import io
import warnings
from collections.abc import Sequence
from urllib.parse import urljoin, urlsplit

import httpx
from PIL import Image, UnidentifiedImageError

from foveate.errors import InputError
from foveate.io.images import as_rgb
from foveate.io.quoting import shown
from foveate.serve.errors import RequestError
from foveate.serve.settings import Settings

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
REDIRECTS = 3
TIMEOUT = 20.0  # seconds for a remote host to answer


async def load_images(
    urls: Sequence[str], settings: Settings, transport: httpx.AsyncBaseTransport | None = None
) -> list[Image.Image]:
    """The images behind the URLs of a request, as RGB.

    Args:
        urls: `data:image/...;base64,...`, or `https://` of an allowed host.
        settings: with the limits.
        transport: for tests.

    Raises:
        RequestError: a limit is passed, a URL is of another kind, or an image is damaged.
    """
    if len(urls) > settings.max_images:
        raise RequestError(
            f"the request has {len(urls)} images, and this server accepts {settings.max_images}"
        )
    fetched = []
    for number, url in enumerate(urls, 1):
        if url[:5].lower() == "data:":
            fetched.append(_inline(url, f"image {number}", settings))
        else:
            fetched.append(await _remote(url, f"image {number}", settings, transport))
    return await asyncio.to_thread(_decode, fetched, settings)


def _inline(url: str, name: str, settings: Settings) -> bytes:
    """The bytes of a data URL."""
    head, comma, text = url.partition(",")
    head = head.lower()
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise RequestError(f"{name}: a data URL must begin with data:image/...;base64,")
    text = "".join(text.split())  # `base64` writes it in lines
    _check_bytes(len(text) * 3 // 4 - 2, name, settings)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(
            f"{name}: the data URL holds no base64 text ({shown(error, 100)})"
        ) from None


async def _remote(
    url: str, name: str, settings: Settings, transport: httpx.AsyncBaseTransport | None
) -> bytes:
    """The bytes behind an address."""
    try:
        async with httpx.AsyncClient(transport=transport, timeout=TIMEOUT) as client:
            for _ in range(REDIRECTS + 1):
                _check_address(url, name, settings)
                async with client.stream("GET", url) as response:
                    if not response.has_redirect_location:
                        response.raise_for_status()
                        return await _read(response, name, settings)
                    url = urljoin(url, response.headers["location"])
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = shown(str(error), 100) or type(error).__name__
        raise RequestError(f"{name}: cannot be fetched ({reason})") from None
    raise RequestError(f"{name}: more than {REDIRECTS} redirects")


def _check_address(url: str, name: str, settings: Settings) -> None:
    """Refuse files, other schemes, other ports, and hosts that are not allowed."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise RequestError(f"{name}: not an address: {shown(url, 60)}") from None
    if parts.scheme != "https":
        raise RequestError(
            f"{name}: images are sent as data URLs (data:image/png;base64,...); files of the "
            f"server and other addresses are refused, got {shown(url, 60)}"
        )
    if port not in (None, 443) or parts.username is not None or host not in settings.allow_hosts:
        allowed = ", ".join(sorted(settings.allow_hosts)) or "none"
        raise RequestError(
            f"{name}: this server does not fetch from {shown(host, 60)}; hosts that are allowed: "
            f"{allowed}"
        )


async def _read(response: httpx.Response, name: str, settings: Settings) -> bytes:
    """A body, read no further than the limit."""
    data = bytearray()
    async for part in response.aiter_bytes():
        data += part
        _check_bytes(len(data), name, settings)
    return bytes(data)


def _check_bytes(size: int, name: str, settings: Settings) -> None:
    if size > settings.max_image_bytes:
        raise RequestError(
            f"{name}: more bytes than this server accepts for an image ({settings.max_image_bytes})"
        )


def _decode(files: Sequence[bytes], settings: Settings) -> list[Image.Image]:
    """Images of files; all headers are read before the first is decoded."""
    opened, pixels = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large images are refused here, not warned of
        for number, data in enumerate(files, 1):
            image = _open(data, f"image {number}")
            pixels += image.width * image.height
            if pixels > settings.max_pixels:
                raise RequestError(
                    f"image {number}: with it the request has {pixels} pixels, and this server "
                    f"accepts {settings.max_pixels}"
                )
            opened.append(image)
        try:
            return [as_rgb(image, f"image {n}") for n, image in enumerate(opened, 1)]
        except InputError as error:
            raise RequestError(str(error)) from None


def _open(data: bytes, name: str) -> Image.Image:
    """An image of which only the header is read."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        moves = image.format != "MPO" and getattr(image, "is_animated", False)  # MPO: a preview
    except UnidentifiedImageError:
        raise RequestError(
            f"{name}: damaged, or not in one of the formats {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # damaged headers raise all kinds
        raise RequestError(f"{name}: cannot be read ({shown(str(error), 100)})") from None
    if moves:
        raise RequestError(
            f"{name}: an animation, of which the model would see the first frame alone; send its "
            "frames as images"
        )
    return image
