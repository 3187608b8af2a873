"""`foveate serve`: its arguments."""

from __future__ import annotations

from typing import Annotated

import typer

from foveate.cli.options import (
    Adaptive,
    Device,
    Dtype,
    Keep,
    Model,
    RayAddress,
    Settings,
)
from foveate.errors import InputError

HELP = """Serve a model through an OpenAI-compatible HTTP API, with a method that removes visual tokens.

MODEL is a hub id, a local folder, or [bold]tiny[/]. Requests are answered in batches; each may set
its own `method`, `keep`, `keep_total` and `fields` in its body. A `keep` of 1 means all tokens. By
default the server is reachable only from this machine; see --host and docs/serving.md. Its web page
compares the answer from all tokens with the answer from a method, and shows the kept tokens.

[bold]Examples[/]

  foveate serve tiny --method pyramiddrop --keep 0.25

  foveate serve llava-hf/llava-1.5-7b-hf -m divprune --keep 0.25 --device cuda --max-batch 16

  foveate serve llava-hf/llava-1.5-7b-hf -m divprune --keep 0.25 --device cuda --replicas 2
  --max-replicas 8 --gpus-per-replica 1 --ray-address auto

  foveate serve llava-hf/llava-1.5-7b-hf -m divprune --keep 0.25 --keep-total 576

  foveate serve llava-hf/llava-1.5-7b-hf --adaptive tuned/policy.json

  FOVEATE_API_KEY=secret foveate serve tiny -m fastv --host 0.0.0.0 --allow-host images.example.org
"""  # noqa: E501
TOTAL = (
    "Most visual tokens of a request with all earlier turns that it repeats; if its images would "
    "have more, all shrink alike. A request may ask for fewer. The last method before the language "
    "model must have a budget."
)
METHOD = "As in `foveate run`, for requests that name none; by default they keep all tokens."


def serve(
    model: Model,
    method: Annotated[list[str] | None, typer.Option("--method", "-m", help=METHOD)] = None,
    keep: Keep = None,
    keep_total: Annotated[int | None, typer.Option(min=1, help=TOTAL)] = None,
    setting: Settings = None,
    adaptive: Adaptive = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")
    ] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Model name for clients; by default MODEL.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FOVEATE_API_KEY",
            show_envvar=True,
            help="Key that clients must send. Others can read a key on the command line.",
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests answered together.")] = 8,
    max_wait: Annotated[
        float, typer.Option(min=0, help="Milliseconds to wait for more requests.")
    ] = 10.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Most pending requests; further ones get status 503.")
    ] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    deadline: Annotated[
        float, typer.Option(min=0.1, help="Time limit for a request, in seconds.")
    ] = 300.0,
    max_body: Annotated[
        float, typer.Option(min=0.001, help="Largest request, in megabytes.")
    ] = 20.0,
    max_images: Annotated[int, typer.Option(min=0, help="Most images per request.")] = 8,
    max_image: Annotated[
        float, typer.Option(min=0.001, help="Largest image, in megabytes.")
    ] = 10.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Most pixels in all images of a request.")
    ] = 20_000_000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A host from which images may be fetched over https; may be repeated."),
    ] = None,
    show_kept: Annotated[
        bool, typer.Option("--show-kept", help="Always send drawings of the kept tokens.")
    ] = False,
    replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Replicas under Ray, each with a model; by default none."),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Most replicas, if their number should follow the load."),
    ] = None,
    gpus_per_replica: Annotated[
        float, typer.Option(min=0, help="GPUs per replica; a fraction shares one.")
    ] = 0,
    cpus_per_replica: Annotated[float, typer.Option(min=0, help="CPUs per replica.")] = 1,
    ray_address: RayAddress = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model."""
    if replicas is None and (max_replicas or gpus_per_replica or ray_address):
        raise InputError("--max-replicas, --gpus-per-replica and --ray-address need --replicas")
    if replicas and max_replicas and max_replicas < replicas:
        raise InputError(f"--max-replicas {max_replicas} is less than --replicas {replicas}")
    from foveate.cli.inputs import limit_of
    from foveate.cli.serve import Limits
    from foveate.cli.serve import serve as start
    from foveate.core.from_text import make_saved
    from foveate.core.saving import Saved

    if not method and (keep or setting):
        raise InputError("--keep and --set need a --method")
    every = ["1.0" if text.strip() == "1" else text for text in keep or ()]
    saved = make_saved(method, every, setting or ()) if method else Saved(())
    policy = None
    if adaptive is not None:
        if method:
            raise InputError("--adaptive chooses the method; leave --method out")
        from foveate.tune.policy import adaptive as read_policy

        policy = read_policy(adaptive)
    limits = Limits(
        deadline=deadline,
        max_held=max_queue,
        max_body=round(max_body * 1_000_000),
        max_images=max_images,
        max_image_bytes=round(max_image * 1_000_000),
        max_pixels=max_pixels,
        max_tokens=max_tokens,
        allow_hosts=frozenset(allow_host or ()),
        show_kept=show_kept,
        api_key=api_key or None,
    )
    fleet = None
    if replicas is not None:
        from foveate.serve.replicas import Fleet

        fleet = Fleet(
            replicas, max_replicas, gpus_per_replica, cpus_per_replica, ray_address, deadline
        )
    start(
        model, saved.methods, limits, (host, port), name, (max_batch, max_wait), (device, dtype),
        fleet, policy, limit_of(saved, keep_total),
    )  # fmt: skip
