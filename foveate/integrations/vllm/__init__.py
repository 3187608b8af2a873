"""foveate inside vLLM: methods that act after the encoder, for each request.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in each of its
processes. It puts subclasses in the place of the models of `architectures.SERVED`. They do what
vLLM's own do, unless a request or the server's defaults name a method:

    vllm serve MODEL --mm-processor-kwargs '{"foveate_method": "divprune", "foveate_keep": 0.25}'

Modules here import vLLM, so this one imports none of them before it is called.
"""

from __future__ import annotations


def register() -> None:
    """Offer foveate's subclasses to vLLM; to call it twice does no harm."""
    from foveate.integrations.vllm.architectures import register_all

    register_all()
