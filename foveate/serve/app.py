"""create_app: the HTTP application, which knows no model: an engine answers."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from foveate.errors import FoveateError
from foveate.io.quoting import quoted, shown
from foveate.serve.errors import RequestError, busy
from foveate.serve.exchange import Exchange, said, status_of
from foveate.serve.metrics import Metrics
from foveate.serve.page import router as page
from foveate.serve.settings import Settings
from foveate.serve.wire import Chat, Dialect, Responses

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Service:
    """What the routes share.

    Args:
        engine: an `Engine`, or what answers in its place: `submit`, `methods`, `waiting`, `alive`
            and `close`.
        settings: the limits.
    """

    def __init__(self, engine: Any, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.held, self.closing = 0, False
        self.metrics = Metrics(lambda: self.engine.waiting, lambda: self.held)
        self.started = int(time.time())

    async def answer(self, request: Request, dialect: type[Dialect]) -> Response:
        """Answer a request, if no more than the limit are held."""
        self.authorise(request)
        if self.closing:
            raise self._refused(dialect, busy("the server is stopping"))
        if self.held >= self.settings.max_held:
            full = f"the server holds {self.held} requests, and takes no more"
            raise self._refused(dialect, busy(full))
        self.held += 1
        exchange = Exchange(self.engine, self.settings, self.metrics, dialect, self._leave)
        return await exchange.respond(request)

    def authorise(self, request: Request) -> None:
        """Refuse who does not have the key.

        Raises:
            RequestError: so it is.
        """
        key = self.settings.api_key
        if key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.encode("latin-1"), key.encode()
        ):
            raise RequestError(
                "this server needs its API key, as `Authorization: Bearer KEY`",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _leave(self) -> None:
        self.held -= 1

    def _refused(self, dialect: type[Dialect], error: RequestError) -> RequestError:
        self.metrics.ended(dialect.path, str(error.status))
        return error


def create_app(engine: Any, settings: Settings) -> FastAPI:
    """The application; it closes the engine when it stops.

    Args:
        engine: see `Service`.
        settings: the limits.
    """
    service = Service(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.closing = True
        await asyncio.to_thread(engine.close)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    _add_answers(app, service)
    _add_operations(app, service)
    app.include_router(page)
    app.add_exception_handler(FoveateError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_exception_handler(Exception, _refuse)
    return app


def _add_answers(app: FastAPI, service: Service) -> None:
    """OpenAI's routes, and the list of methods."""

    @app.post(Chat.path)
    async def chat(request: Request) -> Response:
        return await service.answer(request, Chat)

    @app.post(Responses.path)
    async def responses(request: Request) -> Response:
        return await service.answer(request, Responses)

    @app.get("/v1/models", dependencies=[Depends(service.authorise)])
    async def models() -> Any:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}", dependencies=[Depends(service.authorise)])
    async def model(name: str) -> Any:
        if name != service.settings.model:
            raise RequestError(
                f"there is no model {quoted(name)} here", 404, code="model_not_found"
            )
        return _model(service)

    @app.get("/v1/methods")
    async def methods() -> Any:
        return await service.engine.methods()


def _add_operations(app: FastAPI, service: Service) -> None:
    """What those who run the server ask."""

    @app.get("/health")
    async def health() -> Response:
        return _state(service.engine.alive or service.closing, "ok", "the engine has stopped")

    @app.get("/ready")
    async def ready() -> Response:
        return _state(service.engine.alive and not service.closing, "ready", "stopping")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)


def _state(good: bool, yes: str, no: str) -> Response:
    return JSONResponse({"status": yes if good else no}, 200 if good else 503)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model,
        "object": "model",
        "created": service.started,
        "owned_by": "foveate",
    }


async def _refuse(_: Request, error: Exception) -> Response:
    """An error in OpenAI's words."""
    return JSONResponse(said(error), status_of(error), getattr(error, "headers", None))


async def _refuse_route(request: Request, error: Exception) -> Response:
    """No such route, or not by this verb."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path, 100)}: {error.detail}"
    headers = dict(error.headers or {})
    return await _refuse(request, RequestError(what, error.status_code, headers=headers))
