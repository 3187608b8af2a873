"""Running the application: on SIGTERM it refuses what is new and answers what it holds."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from foveate.errors import InputError
from foveate.io.quoting import shown


class Server(uvicorn.Server):
    """uvicorn that tells the application when it is asked to stop."""

    def __init__(self, app: FastAPI, patience: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(patience) + 1,
            )
        )
        self._service = app.state.service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after what is held is answered; a second signal stops the server at once.

        uvicorn would raise the signal again at the end, and the process would die of it.
        """
        self._service.closing = True
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address.

    Args:
        host: address to listen at.
        port: of it; 0 for a free one.

    Raises:
        InputError: it is taken, or not ours.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen at {shown(host, 60)} port {port}: {error}") from None
    return found


def run(app: FastAPI, listening: socket.socket, patience: float) -> None:
    """Serve until a signal comes.

    Args:
        app: made by `create_app`.
        listening: made by `listen`.
        patience: seconds for which answers may take after the signal.
    """
    Server(app, patience).run([listening])
