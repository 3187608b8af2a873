"""Tags: what is known of an encoder's output besides its features, when it is made.

Shapes: `V` visual tokens of an image, `C` channels of a signal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from foveate.core.tokens import Shape
from foveate.engine import features
from foveate.engine.features import EncoderOutputInfo
from foveate.engine.inputs import of_shapes
from foveate.engine.plan import Plan
from foveate.engine.planning import offering, working_methods
from foveate.engine.survivors import survivors
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.forward import Encoding
from foveate.errors import InputError, UnsupportedModelError
from foveate.families import Family
from foveate.families.projection import project
from foveate.io.quoting import each_of, listed
from foveate.signals.encoder_hooks import EncoderSignals, signal_of
from foveate.signals.packed import PackedSignals


class Tags:
    """Tags encoder output with its signals, survivors and places.

    Args:
        plan: what to do where.
        family: the model.
        state: what each thread is doing with the model.
    """

    def __init__(self, plan: Plan, family: Family, state: ThreadState) -> None:
        self.plan, self.family, self.state = plan, family, state
        self.signals: EncoderSignals | None = None
        if plan.encoder_signals:
            assert family.encoder is not None  # the plan has checked it
            known = family.encoder, plan.encoder_signals, lambda: state.encoding
            threshold = plan.global_threshold
            if family.encoder.packed is None:
                self.signals = EncoderSignals(*known, threshold)
            else:
                side = family.side("image")
                self.signals = PackedSignals(*known, threshold, side, lambda: state.now.read)

    def tag(
        self,
        modality: str,
        output: Any,
        arguments: Mapping[str, Any],
        rows: dict[tuple[str, int], Tensor],
        passes: list[Encoding],
        given: Tensor | None = None,
        made_outside: bool = False,
    ) -> None:
        """Make encoder output carry what is known of its images.

        Args:
            modality: `image` or `video`.
            output: the output.
            arguments: what it was made from.
            rows: (signal, layer) -> what was collected of it.
            passes: passes through an encoder in which tokens were removed.
            given: what the projector was given, if methods merge that.
            made_outside: whether features were handed in.

        Raises:
            UnsupportedModelError: signals or survivors cannot be told for its tokens.
        """
        shapes = self.family.shapes(modality, features.pooled(output), arguments)
        lengths = [shape.total for shape in shapes]
        pixels = self.family.pixels(len(lengths), arguments) if modality == "image" else None
        signals = {
            (name, layer): self._per_token(modality, lengths, name, row, arguments)
            for (name, layer), row in rows.items()
        }
        kept = survivors(self.family, modality, passes, lengths, arguments)
        placed = {n: arguments[n] for n in self.family.placed_by if arguments.get(n) is not None}
        encoded = EncoderOutputInfo(
            shapes,
            signals,
            pixels,
            kept,
            placed,
            fed={} if made_outside else of_shapes(self.family.fed(arguments, len(shapes))),
            encoder_tokens=passes[-1].layer_rows if passes else (),
            encoder_bounds=passes[-1].layer_bounds if passes else (),
        )
        features.tag(output, self._with_projector(encoded, modality, given, arguments))

    def tag_audio(self, output: Any, arguments: Mapping[str, Any], lengths: Sequence[int]) -> None:
        """The same of audio: each clip is an image of one row.

        Args:
            output: the output.
            arguments: what it was made from.
            lengths: tokens of each clip.
        """
        shapes = [Shape(length, (1, length)) for length in lengths]
        features.tag(output, EncoderOutputInfo(shapes, {}, fed=of_shapes(arguments)))

    def _with_projector(
        self,
        encoded: EncoderOutputInfo,
        modality: str,
        given: Tensor | None,
        arguments: Mapping[str, Any],
    ) -> EncoderOutputInfo:
        """What is known of images, and what the projector was given of them if methods merge it."""
        projector = self.family.projector(modality)
        if projector is None or given is None:
            return encoded
        unprojected = self.family.unprojected(modality, given, encoded.lengths, arguments)
        mixes = torch.stack([image.isnan().any() for image in unprojected]).any()
        return replace(encoded, projector=projector, unprojected=unprojected, mixes=mixes)

    def _per_token(
        self,
        modality: str,
        lengths: Sequence[int],
        name: str,
        rows: Tensor,
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        """(C, V) of each image; refuse what would rank the wrong tokens."""
        images = self.family.per_token(modality, rows, arguments, signal_of(name).newline)
        if [row.shape[-1] for row in images] != list(lengths):
            raise self.unmapped(modality)
        return images

    def notes(self, outputs: Mapping[str, Any]) -> list[str]:
        """What a record says of how the tokens of encoder output, by modality, were merged."""
        names = ", ".join(self.plan.before_projector)
        return [
            f"{names} merged {modality} tokens after the projector where this "
            f"{self.family.model_type} makes or mixes several of them together"
            for modality, output in outputs.items()
            if names and not features.is_slice(output) and self._mixes(output.encoded)
        ]

    def _mixes(self, encoded: EncoderOutputInfo) -> bool:
        mixes = encoded.mixes
        return bool(self.state.now.read.of(mixes) if isinstance(mixes, Tensor) else mixes)

    def unmapped(self, modality: str) -> UnsupportedModelError:
        """That signals of the encoder cannot be told for tokens of a modality."""
        error = UnsupportedModelError(
            f"{self._readers('read')} {', '.join(self.plan.encoder_signals)} of the encoder, which "
            f"cannot be told for the {modality} tokens of this {self.family.model_type}"
        )
        return offering(error, working_methods(self.family, encoder=False))

    def _readers(self, verb: str) -> str:
        """Methods that read signals of the encoder, and that they do: `a reads`, `a and b read`."""
        signals = self.plan.encoder_signals
        found = [
            s.method.slug for s in self.plan.pre_llm for n in s.step.needs if n.name in signals
        ]
        return f"{listed(found)} {verb}{'s' if len({*found}) == 1 else ''}"

    def adopt(
        self, modality: str, encoded: ModelOutput, arguments: Mapping[str, Any]
    ) -> ModelOutput:
        """Tag features that were made outside the session, in a copy.

        Raises:
            InputError: methods need what only the encoder knows.
        """
        if self.plan.vision:
            who = each_of(s.method.slug for s in self.plan.vision)
            raise InputError(
                f"{who} acts inside the encoder, but the image features in mm_encoder_outputs were "
                "made outside the session; pass pixel_values, or call get_image_features within "
                "the session"
            )
        if self.plan.encoder_signals:
            raise InputError(
                f"{self._readers('need')} {', '.join(self.plan.encoder_signals)} of the encoder, "
                "but the image features in mm_encoder_outputs were made outside the session; pass "
                "pixel_values, or call get_image_features within the session"
            )
        copy = type(encoded)(**encoded)
        project(self.family, modality, copy)
        self.tag(modality, copy, {**arguments, "pixel_values": None}, {}, [], made_outside=True)
        return copy
