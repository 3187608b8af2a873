"""Processor: what vLLM makes of a request before its engine sees it.

Checks what is asked for, sends it to the model beside the pixels, and reserves as many placeholders
as tokens survive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from foveate.errors import InputError, UnsupportedModelError
from foveate.integrations.vllm.context import as_client_error, without_defaults
from foveate.integrations.vllm.plans import Plans, check_question
from foveate.integrations.vllm.request import KEY, PREFIX, Request, pack, parse, split
from foveate.integrations.vllm.site import Site
from foveate.integrations.vllm.versions import check_version, is_known


class FoveateProcessor:
    """Stands before a multimodal processor of vLLM in a class's bases."""

    site: ClassVar[Site]
    info: Any
    dummy_inputs: Any

    @functools.cached_property
    def plans(self) -> Plans:
        """Plans of methods on the model."""
        return Plans(self.info.get_hf_config(), self.site.whole_tower)

    # -- the request

    def check_default(self) -> None:
        """Refuse a server's default that the model cannot serve, before there are requests.

        Raises:
            VLLMValidationError: it cannot.
        """
        with as_client_error():
            request = parse(self.info.foveate_defaults, {})
            if request is not None:
                self.site.check(self.info.get_hf_config())
                self.plans.of(request.method)

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a prompt and its images, as vLLM does, if no method is asked for."""
        with as_client_error():
            given, rest = split(inputs.hf_processor_mm_kwargs)
            request = parse(given, self.info.foveate_defaults)
            if request is not None:
                rest[KEY] = self._checked(request, inputs).to_text()
            made = super().apply(  # type: ignore[misc]
                replace(inputs, hf_processor_mm_kwargs=rest), timing_ctx
            )
            if request is not None:
                _check_end(made)
        return made

    def _checked(self, request: Request, inputs: Any) -> Request:
        """A request that the model can serve, with its question as tokens."""
        self.site.check(self.info.get_hf_config())
        plan = self.plans.of(request.method)
        self._check_sharing(plan, request)
        check_question(request, plan)
        for modality, items in inputs.mm_data_items.items():
            if modality not in self.site.modalities:
                continue
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                raise InputError(
                    f"{request.method.slug} was asked for, but the {modality} comes as embeddings, "
                    "of which foveate has no tokens to choose from; send the image itself"
                )
        if not plan.asks_embeddings:
            return Request(request.method)
        ids = self.info.get_tokenizer().encode(request.question, add_special_tokens=False)
        return Request(request.method, token_ids=tuple(ids))

    def _check_sharing(self, plan: Any, request: Request) -> None:
        """Refuse to read a tower of which each worker runs a part of the items."""
        mode = self.info.ctx.get_mm_config().mm_encoder_tp_mode
        if plan.encoder_signals and self.site.shares_items and mode == "data":
            raise UnsupportedModelError(
                f"{request.method.slug!r} reads the vision tower while it runs, but with "
                "mm_encoder_tp_mode=data each worker sees only some of the images; start vLLM "
                "with mm_encoder_tp_mode=weights, or use a method that reads features alone"
            )

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs by which vLLM measures memory: with all tokens, whatever the server's default."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={"foveate_method": None})

    # -- the way to the model

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        text, rest = _taken(hf_kwargs)
        data = super()._apply_hf_processor_main(mm_items, rest)  # type: ignore[misc]
        if text is not None:
            for modality, count in mm_items.get_all_counts().items():
                if modality in self.site.modalities and count:
                    data[f"{KEY}_{modality}"] = pack(text, count)
        return data

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        _, rest = _taken(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, rest))  # type: ignore[misc]
        for modality in self.site.modalities:
            if f"{KEY}_{modality}" in hf_inputs:
                fields[f"{KEY}_{modality}"] = MultiModalFieldConfig.batched(
                    modality, keep_on_cpu=True
                )
        return fields

    # -- placeholders

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        text, rest = _taken(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        if text is None:
            return updates
        method = Request.from_text(text).method
        return [
            replace(update, replacement=self._fewer(update, method, out_mm_kwargs))
            if update.modality in self.site.modalities
            else update
            for update in updates
        ]

    def _fewer(self, update: Any, method: Any, out_mm_kwargs: Any) -> Callable[[int], Any]:
        """The replacement of an update, with as many placeholders as tokens survive."""

        def replacement(item: int) -> Any:
            content = update.content
            content = content(item) if callable(content) else content
            if not isinstance(content, PromptUpdateDetails):
                content = PromptUpdateDetails(content)
            full = list(content.full)
            embeds = torch.ones(len(full), dtype=torch.bool)
            if content.is_embed is not None:
                embeds = content.is_embed(full)
            made = out_mm_kwargs[update.modality][item]
            layout = self.site.layout(update.modality, {} if made is None else made.get_data())
            shapes = self.site.shapes(self.plans.family, update.modality, int(embeds.sum()), layout)
            stays = ~embeds
            start, places = 0, embeds.nonzero()[:, 0]
            for shape, kept in zip(shapes, self.plans.kept(method, shapes), strict=True):
                stays[places[start : start + kept]] = True
                start += shape.total
            shorter = [token for token, stay in zip(full, stays.tolist(), strict=True) if stay]
            if self.site.interleaved(update.modality):
                content = replace(content, is_embed=None)
            return replace(content, full=shorter)

        return replacement


def _taken(kwargs: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The checked request among a processor's arguments, and the others."""
    rest = dict(kwargs)
    return rest.pop(KEY, None), rest


def _check_end(made: Any) -> None:
    """Refuse a prompt whose next token is read from an image's last token, which may be removed."""
    length = len(made["prompt_token_ids"])
    places = [at for of in made["mm_placeholders"].values() for at in of]
    last = [at for at in places if at.offset + at.length == length]
    if any(at.is_embed is None or bool(at.is_embed[-1]) for at in last):
        raise InputError(
            "the prompt ends in its image, whose last token may be removed; put text after it"
        )


class RefusingProcessor:
    """Stands before a processor that is vLLM's own in all else: a request or a default that asks
    for foveate is refused. `why` raises the reason.
    """

    why: ClassVar[Callable[[], None]]
    info: Any

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Process a prompt and its images as vLLM does, if no method is asked for."""
        multimodal = getattr(self.info.ctx.model_config, "multimodal_config", None)
        default = getattr(multimodal, "mm_processor_kwargs", None) or {}
        given = getattr(inputs, "hf_processor_mm_kwargs", None) or {}
        if any(name.startswith(PREFIX) for name in (*default, *given)):
            with as_client_error():
                type(self).why()
        return super().apply(inputs, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _foveated(kind: Any, site: Any) -> Any:
    """The subclass of a processor of vLLM that serves foveate's requests."""
    return type(f"Foveate{kind.__name__}", (FoveateProcessor, kind), {"site": site})


@functools.cache
def refusing(kind: Any, why: Callable[[], None]) -> Any:
    """The subclass of a processor of vLLM that refuses them, for a reason that `why` raises."""
    members = {"why": staticmethod(why)}
    return type(f"Refusing{kind.__name__}", (RefusingProcessor, kind), members)


def register_processor(model: type, site: Site) -> None:
    """Give a model's class the processor of the class before it, with foveate's requests.

    Args:
        model: a subclass of a model of vLLM.
        site: where things are in it.
    """
    from vllm.multimodal import MULTIMODAL_REGISTRY

    stock: Any = model._processor_factory  # type: ignore[attr-defined]
    known = is_known()

    def make(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        kind: Any = type(stock.processor(info, dummy_inputs, **kwargs))
        if not known:
            return refusing(kind, check_version)(info, dummy_inputs, **kwargs)
        made = _foveated(kind, site)(info, dummy_inputs, **kwargs)
        made.check_default()
        return made

    MULTIMODAL_REGISTRY.register_processor(
        make,
        info=without_defaults(stock.info) if known else stock.info,
        dummy_inputs=stock.dummy_inputs,
    )(model)
