"""Well-known checkpoints by name: facts of their configs, so that counting needs no download."""

from __future__ import annotations

import difflib
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import InputError, UnsupportedModelError
from foveate.io.quoting import quoted, shown

PATH = Path(__file__).with_name("checkpoints.json")
EMBEDDED = ("tiny", "small", "small-video")
"""Names of the models that come with the package; see `foveate.tiny`."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint.

    Args:
        id: on the model hub.
        name: as papers call it.
        billions: of parameters, to check the facts by.
        model_type: the config's.
        config: fields of the config that differ from the family's defaults, as far as they decide
            how much is computed.
        processor: the same of its image processor.
        remark: what is left out, or was not compared with the checkpoint.
    """

    id: str
    name: str
    billions: float
    model_type: str
    config: dict[str, Any]
    processor: dict[str, Any]
    remark: str = ""

    def skeleton(self) -> Any:
        """The model without weights, on the meta device."""
        import torch  # late: names are checked without it
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers import AutoModelForImageTextToText as Reader

        config = AutoConfig.for_model(self.model_type, **self.config)
        kind = Reader if hasattr(config, "text_config") else AutoModelForImageClassification
        with torch.device("meta"):
            return kind.from_config(config)

    def image_processor(self) -> Any:
        """Its image processor.

        Raises:
            UnsupportedModelError: it needs torchvision, which is not installed.
        """
        import transformers
        from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

        names: Any = IMAGE_PROCESSOR_MAPPING_NAMES[self.model_type]
        # The form that needs no torchvision, if there is one; older releases have a tuple of slow
        # and fast.
        if isinstance(names, dict):
            names = [names.get("pil") or names["torchvision"]]
        name: str = names[0]
        try:
            return getattr(transformers, name)(**self.processor)
        except ImportError as error:
            raise UnsupportedModelError(
                f"the image processor of {self.id} needs torchvision, which is not installed; "
                "install the build that matches torch"
            ) from error


@functools.cache
def checkpoints() -> dict[str, Checkpoint]:
    """Hub id -> checkpoint, of all that are bundled."""
    facts = json.loads(PATH.read_text(encoding="utf-8"))
    return {name: Checkpoint(id=name, **fact) for name, fact in facts.items()}


def check_name(name: str) -> str:
    """Tell a mistyped name from a hub id, before the hub is asked at length.

    Args:
        name: hub id, local folder, `tiny` or `small`.

    Raises:
        InputError: the folder is not there, or holds no model; or the hub has no such model or
            cannot be reached.
    """
    if name in EMBEDDED:
        return name
    if os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise InputError(f"cannot load {quoted(name)}: the folder has no config.json")
    elif len(name) > 200 or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise InputError(
            f"cannot load {quoted(name)}: there is no such folder, and it is not a hub id"
        )
    elif "/" not in name:
        raise InputError(
            f"cannot load {quoted(name)}: there is no such folder, and a hub id names its owner; "
            f"{_near(name)}"
        )
    else:
        _check_hub(name)
    return name


def check_config_name(name: str) -> None:
    """As `check_name`, for what reads a config alone: those of well-known checkpoints are bundled.

    Raises:
        InputError: see there.
    """
    if name not in checkpoints():
        check_name(name)


def _near(name: str) -> str:
    """Names that a mistyped one may mean, and the one that always works."""
    known = {known.rpartition("/")[2].lower(): known for known in (*checkpoints(), *EMBEDDED)}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), known, n=3, cutoff=0.6)
    if close and close[0] in EMBEDDED:
        return f"did you mean `{close[0]}`, an embedded model?"
    near = [known[each] for each in close if known[each] not in (*EMBEDDED, name)]
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}`tiny`, `small` and `small-video` are the embedded models"


def _check_hub(name: str) -> None:
    """Ask the hub once whether it has a model; transformers asks many times when it cannot."""
    from huggingface_hub import HfApi, try_to_load_from_cache  # late: only hub ids need it
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import RepositoryNotFoundError

    if HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=5)
    except RepositoryNotFoundError:
        raise InputError(
            f"cannot load {quoted(name)}: the hub has no such model, or you have no access to it; "
            f"{_near(name)}"
        ) from None
    except Exception as error:
        reason = shown((str(error).strip() or type(error).__name__).splitlines()[0], 90)
        raise InputError(
            f"cannot load {quoted(name)}: neither a folder here nor a hub model that can be "
            f"reached ({reason}); {_near(name)}"
        ) from None
