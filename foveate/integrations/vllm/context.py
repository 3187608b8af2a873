"""Context: vLLM's processing context, without foveate's part of the server's defaults.

vLLM hands all of `--mm-processor-kwargs` to the processor of transformers, which must not see ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMValidationError

from foveate.errors import FoveateError
from foveate.integrations.vllm.request import split


def without_defaults(make_info: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The factory of a model's processing info, which notes foveate's defaults in the info.

    Args:
        make_info: vLLM's factory, called with a processing context.
    """

    def make(context: Any) -> Any:
        config = copy.copy(context.model_config)
        multimodal = copy.copy(config.multimodal_config)
        with as_client_error():
            defaults, rest = split(multimodal.mm_processor_kwargs or {})
        multimodal.mm_processor_kwargs = rest or None
        config.multimodal_config = multimodal
        info = make_info(type(context)(config, context.tokenizer))
        info.foveate_defaults = defaults
        return info

    return make


class as_client_error:  # noqa: N801
    """Context manager: refusals of foveate become the client's errors of vLLM (HTTP 400)."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, FoveateError):
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from None
