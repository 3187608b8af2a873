"""Plans: which methods vLLM can serve on a model, and how many tokens they leave.

What a model is to a method is asked of foveate's family of it, made around a model of transformers
without weights. Planning, counting and refusing are foveate's own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from foveate.core import Method, get_method, list_methods
from foveate.core.tokens import Shape
from foveate.engine.plan import Plan
from foveate.engine.planning import plain_plan
from foveate.errors import FoveateError, InputError, UnsupportedModelError
from foveate.families import Family, find_family
from foveate.integrations.vllm.reducing import rehearse
from foveate.integrations.vllm.request import Request


class Plans:
    """Plans of methods on a model.

    Args:
        config: the model's config, as transformers has it.
        whole_tower: whether vLLM loads all layers of the vision tower; else those whose output the
            language model sees.
    """

    def __init__(self, config: Any, whole_tower: bool = False) -> None:
        self._config, self._whole = config, whole_tower
        self._made: dict[Method, Plan] = {}
        self._kept: dict[tuple[Method, Shape], int] = {}

    @cached_property
    def family(self) -> Family:
        """The family of the model, which has no weights."""
        return skeleton(self._config)

    @property
    def loaded_layers(self) -> int:
        """Layers of the vision tower that vLLM loads."""
        return self.family.vision_layers if self._whole else self.family.feature_layer + 1

    def of(self, method: Method) -> Plan:
        """The plan of a method.

        Raises:
            FoveateError: vLLM cannot serve it; the message says why, and names methods that it can.
        """
        if method not in self._made:
            try:
                self._made[method] = self._checked(method)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(
                    f"{error}. Methods that foveate serves in vLLM here: {', '.join(self.served)}"
                ) from None
        return self._made[method]

    @cached_property
    def served(self) -> list[str]:
        """Names of the methods that vLLM serves with their default settings."""
        return [name for name in list_methods() if self.why_not(get_method(name)()) is None]

    def why_not(self, method: Method) -> str | None:
        """Why vLLM cannot serve a method, or `None` if it can."""
        try:
            self._checked(method)
        except FoveateError as error:
            return str(error)
        return None

    def kept(self, method: Method, shapes: Sequence[Shape]) -> list[int]:
        """How many tokens of images survive.

        Args:
            method: the method.
            shapes: the tokens of each image.

        Raises:
            FoveateError: the method cannot reduce such images so far.
        """
        plan, counts = self.of(method), []
        for shape in shapes:
            if (method, shape) not in self._kept:
                heads = self.family.encoder.heads if self.family.encoder is not None else 1
                (self._kept[method, shape],) = rehearse(plan, [shape], heads)
            counts.append(self._kept[method, shape])
        return counts

    def _checked(self, method: Method) -> Plan:
        """A plan that vLLM can carry out."""
        if method.stage == "vision":
            raise UnsupportedModelError(
                f"{method.slug!r} acts inside the vision tower, whose layers run whole in vLLM"
            )
        if method.stage == "llm":
            raise UnsupportedModelError(_BETWEEN.format(method.slug))
        plan = plain_plan(self.family, [method])
        if plan.llm or plan.work or plan.decode_step is not None:
            raise UnsupportedModelError(_BETWEEN.format(method.slug))
        if method.adaptive:
            raise UnsupportedModelError(
                f"{method.slug!r} chooses from the tokens how many of them survive, but vLLM "
                "needs the number before it encodes the image"
            )
        if len(plan.learned):
            raise UnsupportedModelError(
                f"{method.slug!r} chooses by what it has learned, which a checkpoint of vLLM does "
                "not hold; serve it with foveate.load_adapter on transformers"
            )
        if plan.asks_clip:
            raise UnsupportedModelError(
                f"{method.slug!r} compares patches with the question in CLIP's space, but vLLM "
                "holds no text tower of CLIP"
            )
        self._check_positions(method, plan)
        self._check_layers(method, plan)
        return plan

    def _check_positions(self, method: Method, plan: Plan) -> None:
        """Refuse positions that vLLM does not give."""
        if self.family.one_dimensional and not plan.renumber_features:
            raise UnsupportedModelError(
                f"{method.slug!r} leaves survivors at their positions, but vLLM numbers the tokens "
                'of a prompt one by one; give "positions": "renumbered" in foveate_fields'
            )

    def _check_layers(self, method: Method, plan: Plan) -> None:
        """Refuse signals of layers of the vision tower that vLLM does not load."""
        layers = [layer for found in plan.encoder_signals.values() for layer in found]
        if layers and max(layers) >= self.loaded_layers:
            raise UnsupportedModelError(
                f"{method.slug!r} reads layer {max(layers)} of the vision tower, but vLLM loads "
                f"those that the language model sees, 0 to {self.loaded_layers - 1}"
            )


_BETWEEN = (
    "{!r} removes tokens between layers of the language model, but the paged cache of vLLM has one "
    "length for all layers"
)


def check_question(request: Request, plan: Plan) -> None:
    """Refuse a method that reads the question without one.

    Raises:
        InputError: there is none.
    """
    if plan.asks_embeddings and not (request.question or "").strip():
        raise InputError(
            f"{request.method.slug} compares visual tokens with the question; give its text as "
            "foveate_question"
        )


def skeleton(config: Any) -> Family:
    """The family of a model, around a model of transformers that has no weights.

    Args:
        config: the model's config.

    Raises:
        UnsupportedModelError: foveate does not know the model.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            copy.deepcopy(config), attn_implementation="eager"
        )
    return find_family(model)
