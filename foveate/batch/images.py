"""Images of a row: files, bytes, data URLs, and addresses of hosts that were allowed."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from foveate.batch.job import Job
from foveate.errors import InputError
from foveate.io.images import load_image
from foveate.io.quoting import quoted, shown

LARGEST = 100_000_000
"""Bytes of an image that is fetched."""
TRIES = 3
TIMEOUT = 20.0  # seconds for a host to answer


def images_of(value: Any, job: Job) -> list[Image.Image]:
    """The images of a row, as RGB.

    Args:
        value: one image or a list of them. An image is a path, relative to the input's folder; a
            data URL; an address; bytes of a file; or a mapping with `bytes` or `path`. An empty
            list is a question without images.
        job: with the folder and the limits.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if value is None:
        raise InputError("the row has no image")
    return [_open(one, job) for one in (value if isinstance(value, list) else [value])]


def count(value: Any) -> int:
    """How many images `images_of` will open."""
    return len(value) if isinstance(value, list) else 1


def _open(value: Any, job: Job) -> Image.Image:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return _decoded(value, "the image", job)
    if not isinstance(value, str) or not value:
        raise InputError(
            f"an image is a path, bytes, a data URL or an address, got {quoted(value)}"
        )
    if value[:5].lower() == "data:":
        return _decoded(_inline(value), "the data URL's image", job)
    if value.lower().startswith(("http://", "https://")):
        return _decoded(_fetched(value, job.hosts), shown(value, 100), job)
    return load_image(job.folder / value, max_pixels=job.max_pixels, option="--max-pixels")


def _decoded(data: bytes, name: str, job: Job) -> Image.Image:
    return load_image(io.BytesIO(data), max_pixels=job.max_pixels, option="--max-pixels", name=name)


def _inline(url: str) -> bytes:
    head, _, text = url.partition(",")
    try:
        if not head.lower().endswith(";base64"):
            raise ValueError
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise InputError(f"no data URL with base64 text: {shown(url, 60)}") from None


def _fetched(url: str, hosts: frozenset[str]) -> bytes:
    """The bytes behind an address; what a network does now and then is tried again.

    Raises:
        InputError: its host is not allowed, or it cannot be fetched.
    """
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:
        raise InputError(f"not an address: {shown(url, 60)}") from None
    if host not in hosts:
        raise InputError(
            f"images are not fetched from {shown(host, 60)}; --allow-host {shown(host, 60)} allows "
            "it"
        )
    httpx = _httpx()
    error: Exception | None = None
    for _ in range(TRIES):
        try:
            return _get(url)
        except httpx.HTTPStatusError as failed:
            error = failed
            if failed.response.status_code < 500 and failed.response.status_code != 429:
                break
        except (httpx.HTTPError, httpx.InvalidURL) as failed:
            error = failed
    raise InputError(f"cannot fetch {shown(url, 100)}: {shown(str(error), 100)}") from None


def _get(url: str) -> bytes:
    """A body, read no further than `LARGEST`; redirects are not followed."""
    data = bytearray()
    with _httpx().stream("GET", url, timeout=TIMEOUT) as response:
        if response.is_redirect:
            where = shown(response.headers.get("location", "elsewhere"), 60)
            raise InputError(f"{shown(url, 60)} redirects to {where}, which is not followed")
        response.raise_for_status()
        for part in response.iter_bytes():
            data += part
            if len(data) > LARGEST:
                raise InputError(f"{shown(url, 100)} has more than {LARGEST} bytes")
    return bytes(data)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise InputError("images are fetched with httpx: pip install 'foveate[serve]'") from None
    return httpx
