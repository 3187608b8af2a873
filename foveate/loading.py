"""Loading what a name stands for: a model, its processor, its skeleton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForPreTraining,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as READ,
)
from transformers.utils import logging

from foveate.errors import FoveateError, InputError, UnsupportedModelError
from foveate.families import FAMILIES
from foveate.io.quoting import quoted, shown
from foveate.measure.checkpoints import EMBEDDED, check_name, checkpoints
from foveate.tiny import PACKAGED, VIDEO, Size, load_video
from foveate.tiny import load as load_packaged

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, device: str = "cpu", dtype: str = "auto") -> tuple[Any, Any]:
    """Load a model and its processor.

    Args:
        name: a hub id, a local folder, or the name of an embedded model: `tiny`, `small`, or
            `small-video` for the latter as a model that takes videos.
        device: where to put it, such as `cpu` or `cuda:0`.
        dtype: one of `DTYPES`; `auto` takes the checkpoint's, but float32 on a CPU.

    Raises:
        FoveateError: it cannot be loaded; the message says why and what to do.
    """
    where = check_device(device)
    kind: Any = read_dtype(dtype) or "auto"
    if dtype == "auto" and where.type == "cpu":
        kind = torch.float32
    model: Any
    with _loading(name):
        if name in EMBEDDED:
            model, processor = _packaged(name)
            model = model if kind == "auto" else model.to(kind)
        else:
            from transformers import AutoProcessor  # may fail; explained here

            config = AutoConfig.from_pretrained(check_name(name))
            if _holds_another(config):
                raise UnsupportedModelError(
                    f"{quoted(name)} is a {config.model_type}, which answers with embeddings or "
                    "actions and not with text; call it from Python, in a foveate.use block"
                )
            processor = AutoProcessor.from_pretrained(name)
            model = _auto_class(config).from_pretrained(name, config=config, dtype=kind)
    return model.to(where).eval(), processor


def _packaged(name: str) -> tuple[Any, Any]:
    """An embedded model and its processor."""
    return load_video(size="small") if name == VIDEO else load_packaged(size=cast(Size, name))


def load_skeleton(name: str) -> Any:
    """The model without its weights, on the meta device; only its config is read, and of
    well-known checkpoints not even that.

    Raises:
        FoveateError: there is no such config, or it is not a vision-language model's.
    """
    if name in checkpoints() and not Path(name).is_dir():
        return checkpoints()[name].skeleton()
    with _loading(name):
        name = str(PACKAGED.get(name, name))
        config = (
            _packaged(name)[0].config
            if name == VIDEO
            else AutoConfig.from_pretrained(check_name(name))
        )
        embeds = _holds_another(config) and config.model_type not in READ
        with torch.device("meta"):
            return (AutoModelForPreTraining if embeds else _auto_class(config)).from_config(config)


def _holds_another(config: Any) -> bool:
    """Whether a model makes something else than text of a whole vision-language model within."""
    return hasattr(config, "vlm_config")


def _auto_class(config: Any) -> Any:
    """The auto class of a family's model: some are to transformers causal language models alone."""
    if config.model_type in FAMILIES and config.model_type not in READ:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def load_image_processor(name: str) -> Any:
    """The image processor of a model; that of well-known checkpoints needs no download.

    Raises:
        FoveateError: there is none.
    """
    if name in checkpoints() and not Path(name).is_dir():
        return checkpoints()[name].image_processor()
    with _loading(name):
        if name == VIDEO:
            raise InputError(
                f"`{VIDEO}` takes videos and no images; `small` is the same model for images"
            )
        from transformers import AutoImageProcessor  # may fail; explained here

        name = str(PACKAGED.get(name, name))
        return AutoImageProcessor.from_pretrained(check_name(name))


def read_dtype(name: str) -> torch.dtype | None:
    """The type that one of `DTYPES` names; `None` for `auto`.

    Raises:
        InputError: it is none of them.
    """
    if name not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {quoted(name)}")
    return None if name == "auto" else getattr(torch, name)


def check_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: torch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {quoted(name)}; try cpu, cuda or cuda:0") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {quoted(name)} was asked for, but torch sees no CUDA device here")
    return device


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Keep loading quiet, and turn what goes wrong into errors that say what to do."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except FoveateError:
        raise
    except Exception as error:
        raise _explain(error, name) from error
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def _explain(error: Exception, name: str) -> FoveateError:
    """The error of a failed load as a user should see it."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if any("torchvision::nms" in str(link) for link in chain):
        return UnsupportedModelError(
            "the installed torchvision does not fit the installed torch (a CUDA build beside CPU "
            "torch), so transformers cannot load image processors; run `pip uninstall torchvision` "
            "(it is not needed), or install the build that matches torch"
        )
    reason = shown((str(error).strip() or type(error).__name__).splitlines()[0], 140)
    if isinstance(error, OSError):
        return InputError(
            f"cannot load {quoted(name)}: neither a folder here nor a hub model that can be "
            f"reached ({reason})"
        )
    return UnsupportedModelError(f"cannot load {quoted(name)} as a vision-language model: {reason}")
