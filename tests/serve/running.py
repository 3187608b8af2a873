"""A server in a thread, on a free port."""

import base64
import io
import threading
import time
from contextlib import contextmanager

import uvicorn
from openai import AsyncOpenAI

from foveate.serve import Settings, create_app


@contextmanager
def running(engine, **settings):
    """Serve an engine; gives the address. The engine is closed afterwards."""
    app = create_app(engine, Settings("tiny", **settings))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client(address, key="none"):
    return AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def data_url(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def turn(question, *images):
    """A user's message of chat completions."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
