"""Replicas: engines in processes under Ray Serve, which look like one engine to the application.

Each replica runs the same `Engine` as a server without replicas, so requests are batched in the
replica that they are sent to, with mixed budgets and rows that end independently. Ray Serve's own
batching would hold a batch until its last row has ended.

An answer is a function of its request, so a request whose replica died is sent to another one. A
stream whose first words were sent is not: it ends with an error.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from foveate.core import Method
from foveate.errors import FoveateError
from foveate.integrations.ray_cluster import connected, import_ray
from foveate.io.quoting import shown
from foveate.loading import load_model
from foveate.serve.engine import Engine
from foveate.serve.errors import ServerError, too_late
from foveate.serve.request import Delta, End, Question
from foveate.tune.policy import Policy

NAME = "foveate"
OPTION = "--replicas"
TRIES = 4
"""How often a request is sent to a replica, if each of them dies of it."""
PAUSE = 0.2  # seconds before a request is sent again; doubled each time
LATE = 2.0  # seconds after a deadline in which a replica can say so itself
WATCH = 1.0  # seconds between looks at the replicas


@dataclass(frozen=True)
class Spec:
    """What a replica is made of.

    Args:
        model: hub id, local folder, `tiny` or `small`.
        methods: of requests that name none; none for all tokens.
        device: where models run.
        dtype: of their weights, or `auto`.
        max_batch: see `Engine`.
        max_wait: see `Engine`.
        max_tokens: see `Engine`.
        policy: see `Engine`.
        keep_total: see `Engine`.
    """

    model: str
    methods: tuple[Method, ...] = ()
    device: str = "cpu"
    dtype: str = "auto"
    max_batch: int = 8
    max_wait: float = 10.0
    max_tokens: int = 1024
    policy: Policy | None = None
    keep_total: int | None = None


@dataclass(frozen=True)
class Fleet:
    """How many replicas there are, and where.

    Args:
        replicas: how many, or the fewest.
        most: the most, where their number follows the load; `None` for `replicas`.
        gpus: GPUs of each, a fraction where several share one.
        cpus: CPUs of each.
        address: of a Ray cluster, see `connected`.
        patience: seconds for which a replica that is to stop may go on answering.
    """

    replicas: int
    most: int | None = None
    gpus: float = 0
    cpus: float = 1
    address: str | None = None
    patience: float = 300.0


class Replica:
    """An engine in a process of its own.

    Args:
        spec: what it is made of.
    """

    def __init__(self, spec: Spec) -> None:
        loaded = load_model(spec.model, spec.device, spec.dtype)
        self._engine = Engine(
            *loaded, list(spec.methods) or None, max_batch=spec.max_batch, max_wait=spec.max_wait,
            max_tokens=spec.max_tokens, policy=spec.policy, keep_total=spec.keep_total,
        )  # fmt: skip

    async def stream(self, question: Question) -> AsyncIterator[Delta | End]:
        """Text as it comes, then the end."""
        async for event in self._engine.submit(question):
            yield event

    async def answer(self, question: Question) -> list[Delta | End]:
        """The same, when it is complete."""
        return [event async for event in self._engine.submit(question)]

    async def methods(self) -> list[dict[str, Any]]:
        """See `Engine.methods`."""
        return await self._engine.methods()

    def check_health(self) -> None:
        """What Ray Serve asks; a replica that raises is replaced."""
        if not self._engine.alive:
            raise RuntimeError("the engine has stopped")


class Replicas:
    """An engine for `create_app` whose questions are answered by replicas.

    Args:
        spec: what each of them is made of.
        fleet: how many there are.

    Raises:
        FoveateError: Ray cannot be reached, or no replica could be started.
    """

    def __init__(self, spec: Spec, fleet: Fleet) -> None:
        self._ray = import_ray(OPTION)
        self._asked = 0  # questions of which nothing has come back
        self._running, self._closed = 0, threading.Event()
        with ExitStack() as opened:
            cpus = (fleet.most or fleet.replicas) * fleet.cpus + 1
            opened.enter_context(connected(self._ray, fleet.address, cpus))
            opened.callback(self._stop)
            self._handle = self._deploy(spec, fleet)
            self._open = opened.pop_all()
        self._look()
        threading.Thread(target=self._watch, name="foveate-replicas", daemon=True).start()

    async def submit(self, question: Question) -> AsyncIterator[Delta | End]:
        """Answer a question: text as it comes, then the end. Closing the iterator cancels it.

        Raises:
            FoveateError: see `Engine.submit`; or replicas died, and the answer was begun or had
                been tried `TRIES` times.
        """
        ends, begun = time.monotonic() + question.seconds, False
        for number in range(TRIES):
            left = ends - time.monotonic()
            if left <= 0:
                raise too_late()
            try:
                async with aclosing(self._send(replace(question, seconds=left))) as events:
                    async for event in events:
                        begun = True
                        yield event
                return
            except self._ray.exceptions.RayActorError:
                if begun:
                    raise ServerError(
                        "the process that was answering died; try again", 500
                    ) from None
            await asyncio.sleep(min(PAUSE * 2**number, left))
        raise ServerError(f"{TRIES} processes died one after the other over this request", 500)

    async def methods(self) -> list[dict[str, Any]]:
        """See `Engine.methods`."""
        found: list[dict[str, Any]] = await self._handle.methods.remote()
        return found

    @property
    def waiting(self) -> int:
        """Questions of which nothing has come back."""
        return self._asked

    @property
    def alive(self) -> bool:
        """Whether a replica runs, as of a moment ago."""
        return self._running > 0 and not self._closed.is_set()

    def close(self) -> None:
        """Stop the replicas, and a Ray of our own."""
        if not self._closed.is_set():
            self._closed.set()
            self._open.close()

    # -- sending

    async def _send(self, question: Question) -> AsyncGenerator[Delta | End, None]:
        """Events of one replica."""
        self._asked += 1
        first = True
        try:
            async with aclosing(self._events(question)) as events:
                async for event in events:
                    self._asked -= first
                    first = False
                    yield event
        except asyncio.TimeoutError:
            raise too_late() from None
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FoveateError):
                raise error.cause from None
            raise
        finally:
            self._asked -= first

    async def _events(self, question: Question) -> AsyncGenerator[Delta | End, None]:
        """Events as they come if the client is sent a stream, else when there are all."""
        ends = time.monotonic() + question.seconds + LATE
        if not question.streamed:
            response = self._handle.answer.remote(question)
            with _cancelling(response):
                for event in await asyncio.wait_for(response, question.seconds + LATE):
                    yield event
            return
        response = self._handle.options(stream=True).stream.remote(question)
        with _cancelling(response):
            while True:
                try:
                    coming = response.__anext__()
                    yield await asyncio.wait_for(coming, ends - time.monotonic())
                except StopAsyncIteration:
                    return

    # -- running

    def _deploy(self, spec: Spec, fleet: Fleet) -> Any:
        """Start the replicas; their handle."""
        from ray import serve

        quiet = {"log_level": "ERROR"}
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # in this process
        scale: dict[str, Any] = {"num_replicas": fleet.replicas}
        if fleet.most is not None:
            limits = {"min_replicas": fleet.replicas, "max_replicas": fleet.most}
            scale = {"autoscaling_config": {**limits, "target_ongoing_requests": spec.max_batch}}
        kind: Any = serve.deployment(Replica)
        deployment = kind.options(
            ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
            max_ongoing_requests=2 * spec.max_batch,  # a batch, and the next one
            health_check_period_s=2.0, health_check_timeout_s=30.0,
            graceful_shutdown_timeout_s=fleet.patience, max_constructor_retry_count=3,
            **scale,
        )  # fmt: skip
        try:
            serve.start(proxy_location="Disabled", logging_config=quiet)
            return serve.run(
                deployment.bind(spec), name=NAME, route_prefix=None, logging_config=quiet
            )
        except RuntimeError as error:
            raise FoveateError(f"the replicas do not start: {shown(error, 300)}") from None

    def _stop(self) -> None:
        from ray import serve

        with suppress(Exception):  # a cluster that is gone has no replicas
            serve.delete(NAME)

    def _watch(self) -> None:
        while not self._closed.wait(WATCH):
            self._look()

    def _look(self) -> None:
        """Count the replicas that run."""
        from ray import serve

        try:
            found: Any = serve.status().applications[NAME].deployments[Replica.__name__]
            self._running = found.replica_states.get("RUNNING", 0)
        except Exception:  # the cluster cannot be asked
            self._running = 0


@contextmanager
def _cancelling(response: Any) -> Iterator[None]:
    """Tell a replica to stop if nobody waits for its answer any more."""
    try:
        yield
    except BaseException:
        response.cancel()
        raise
