"""Well-known checkpoints by name: facts of their configs, so that counting needs no download."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.errors import UnsupportedModelError

PATH = Path(__file__).with_name("checkpoints.json")


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
