"""Settings of the HTTP application."""

from __future__ import annotations

from dataclasses import dataclass, field

MEGA = 1_000_000


@dataclass(frozen=True)
class Settings:
    """What a request may be, and how long it may take.

    Args:
        model: the name under which clients ask for the model.
        api_key: what clients must send; `None` for nothing.
        deadline: seconds from a request's first byte to the end of its answer.
        max_held: most requests that are held at once, those that are answered included.
        max_body: bytes of a request.
        max_images: images of a request.
        max_image_bytes: of one image, as it is sent.
        max_pixels: of all images of a request together.
        max_tokens: longest answer.
        allow_hosts: names of hosts from which images are fetched, over https.
        show_kept: whether every answer holds drawings of the kept tokens.
    """

    model: str
    api_key: str | None = field(default=None, repr=False)
    deadline: float = 300.0
    max_held: int = 64
    max_body: int = 20 * MEGA
    max_images: int = 8
    max_image_bytes: int = 10 * MEGA
    max_pixels: int = 20 * MEGA
    max_tokens: int = 1024
    allow_hosts: frozenset[str] = frozenset()
    show_kept: bool = False
