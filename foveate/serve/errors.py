"""What can become of a request besides an answer, with the HTTP status that says so."""

from __future__ import annotations

from foveate.errors import FoveateError


class RequestError(FoveateError):
    """A request that is refused.

    Args:
        message: one line.
        status: of HTTP.
        param: the field that is wrong, as `messages.0.content`.
        code: a word for programs.
        headers: more headers of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = headers or {}


class ServerError(RequestError):
    """A request that is sound, and that the server could not answer."""


def busy(message: str) -> ServerError:
    """The server holds as much as it may, or is about to stop."""
    return ServerError(message, 503, code="busy", headers={"Retry-After": "1"})


def too_late() -> ServerError:
    """The deadline has passed; clients that retry by themselves are asked not to."""
    return ServerError(
        "the server's deadline passed before the answer was complete",
        504,
        code="deadline",
        headers={"x-should-retry": "false"},
    )
