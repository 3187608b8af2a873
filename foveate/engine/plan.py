"""Plan: which step of which method acts where on a model; `planning.make_plan` makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from foveate.core import Learning, Method, Need, PartialCompute, PerRequest, Step
from foveate.core.budget import Total
from foveate.errors import BudgetError, UnsupportedModelError
from foveate.signals import SIGNALS, DecoderSignal


@dataclass(frozen=True)
class PlannedStep:
    """One step of one method.

    Args:
        method: the method.
        method_number: which of the session's methods it is.
        number: which of the method's steps it is.
        step: where it acts and what it needs.
        renumber: whether survivors get consecutive positions.
        suspends: whether what it takes out comes back at the method's next step.
        learned: parameters of the method, if it learns.
        entry: its name in records, which no other step of the plan has.
        audio: whether it acts on audio alone, or on all but audio; `None` for everything.
    """

    method: Method
    method_number: int
    number: int
    step: Step
    renumber: bool
    suspends: bool = False
    learned: nn.Module | None = None
    entry: str = ""
    audio: bool | None = None

    def sees(self, audio: bool) -> bool:
        """Whether it acts on audio, or on images and videos."""
        return self.audio is None or self.audio == audio

    def count(self, tokens: int, start: int, request: int = 0) -> int:
        """Tokens of an image that survive.

        Args:
            tokens: how many it has.
            start: how many it had where the method began.
            request: its entry of a per-request budget.
        """
        return self.method.count(tokens, start, self.step, self.number, request)


Wanted = Mapping[DecoderSignal, Sequence[PlannedStep]]  # signal -> steps that need it


@dataclass(frozen=True)
class Due:
    """What is due before a decoder layer.

    Args:
        steps: the steps there, in stream order.
        signals: signal of the layer -> steps that need it as it is before they act: those there,
            and of what is told of the input of the language model, all.
        later: signal of what the layer will see -> steps before later layers that need it.
    """

    steps: tuple[PlannedStep, ...]
    signals: Wanted
    later: Wanted

    @classmethod
    def of(cls, number: int, steps: Iterable[PlannedStep], wanted: Wanted) -> Due | None:
        """What is due before a decoder layer, if anything is.

        Args:
            number: the layer.
            steps: all steps between decoder layers.
            wanted: signals of the layer.
        """

        def asked(by: Callable[[DecoderSignal, int], object]) -> Wanted:
            asking = {
                signal: [s for s in found if by(signal, s.step.layer)]
                for signal, found in wanted.items()
            }
            return {signal: found for signal, found in asking.items() if found}

        here = tuple(s for s in steps if s.step.layer == number)
        now = asked(lambda signal, at: signal.of_input or (signal.before_layer and at == number))
        later = asked(lambda signal, at: signal.before_layer and at > number)
        return cls(here, now, later) if here or now or later else None


@dataclass(frozen=True)
class Plan:
    """All steps of a session in stream order.

    Args:
        methods: the methods, in stream order.
        vision: steps inside the encoder, by layer.
        pre_llm: steps on image features.
        llm: steps between decoder layers, by layer.
        work: decoder layer -> what it computes of visual tokens, where that is not everything.
        decode_step: the step that acts on decoding, if there is one.
        extensions: classes of what forwards over a prompt do beyond dropping tokens.
        cached_extensions: the same of forwards after a pruned cache.
        total: visual tokens that each row of a batch may hold together with its earlier turns, see
            `foveate.use`; `None` for any number.
    """

    methods: tuple[Method, ...]
    vision: tuple[PlannedStep, ...]
    pre_llm: tuple[PlannedStep, ...]
    llm: tuple[PlannedStep, ...]
    work: Mapping[int, PartialCompute] = field(default_factory=dict)
    decode_step: PlannedStep | None = None
    extensions: tuple[type, ...] = ()
    cached_extensions: tuple[type, ...] = ()
    total: Total | None = None

    @cached_property
    def learned(self) -> nn.ModuleDict:
        """Number of a method -> its parameters, of methods that learn."""
        steps = (*self.vision, *self.pre_llm, *self.llm)
        return nn.ModuleDict({str(s.method_number): s.learned for s in steps if s.learned})

    @property
    def learns(self) -> bool:
        """Whether a method does something else in training."""
        return any(isinstance(method, Learning) for method in self.methods)

    @property
    def passes(self) -> int:
        """Forwards of one training step."""
        return max(m.passes if isinstance(m, Learning) else 1 for m in self.methods)

    @cached_property
    def asks_text(self) -> tuple[str, ...]:
        """Methods whose choice depends on what the prompt asks."""
        steps = (
            (s.method.slug, need.name) for s in (*self.pre_llm, *self.llm) for need in s.step.needs
        )
        return tuple(dict.fromkeys(slug for slug, name in steps if SIGNALS[name].depends_on_prompt))

    @property
    def asks_embeddings(self) -> bool:
        """Whether a step compares image features with the text after them."""
        return any(SIGNALS[n.name].text for s in self.pre_llm for n in s.step.needs)

    @cached_property
    def without_text(self) -> tuple[str, ...]:
        """Methods that rank by the text after an image, or else by the prompt's last token."""
        steps = [(s.method.slug, n.name) for s in (*self.pre_llm, *self.llm) for n in s.step.needs]
        return tuple(dict.fromkeys(slug for slug, name in steps if SIGNALS[name].text))

    @cached_property
    def visual_blind(self) -> dict[int, PartialCompute]:
        """Of `work`, layers in which some heads read visual tokens, or what they weigh, and others
        do not.
        """
        layers = self.work.items()
        return {
            number: work
            for number, work in layers
            if work.visual_blind and not work.text_only_cache
        }

    @cached_property
    def text_only_layers(self) -> tuple[int, ...]:
        """Decoder layers whose caches hold text alone, as no head reads visual tokens there."""
        return tuple(number for number, work in self.work.items() if work.text_only_cache)

    @property
    def marks(self) -> bool:
        """Whether image features may come with removed rows marked."""
        return bool(self.vision or self.pre_llm)

    @cached_property
    def encoder_signals(self) -> dict[str, tuple[int, ...]]:
        """Signal -> encoder layers at which a step after the encoder needs it."""
        return _encoder_layers(need for planned in self.pre_llm for need in planned.step.needs)

    @cached_property
    def earlier_signals(self) -> dict[str, tuple[int, ...]]:
        """Signal -> encoder layers at which a step before a later layer needs it."""
        return _encoder_layers(
            need for s in self.vision for need in s.step.needs if need.layers != (s.step.layer,)
        )

    @property
    def global_threshold(self) -> float:
        """What patches must receive of the mean to be global, where a step asks of that."""
        needs = (need for planned in self.pre_llm for need in planned.step.needs)
        return next(
            (need.global_threshold for need in needs if SIGNALS[need.name].global_threshold), 0.0
        )

    @cached_property
    def decoder_signals(self) -> dict[int, dict[DecoderSignal, list[PlannedStep]]]:
        """Decoder layer -> signal collected there -> steps that need it."""
        found: dict[int, dict[DecoderSignal, list[PlannedStep]]] = {}
        for planned in self.llm:
            for need in planned.step.needs:
                signal = SIGNALS[need.name]
                assert isinstance(signal, DecoderSignal)  # as checked when it was planned
                for layer in need.layers if signal.layered else (0,):
                    found.setdefault(layer, {}).setdefault(signal, []).append(planned)
        return found

    @cached_property
    def due(self) -> dict[int, Due]:
        """Decoder layer -> what is due before it, of layers where anything is."""
        return self._due([s for s in self.llm if "training" not in s.step.effects])

    @cached_property
    def training_due(self) -> dict[int, Due]:
        """The same in training, in which some steps act alone."""
        return self._due(self.llm)

    def _due(self, steps: Sequence[PlannedStep]) -> dict[int, Due]:
        wanted = {
            layer: {signal: [s for s in asking if s in steps] for signal, asking in signals.items()}
            for layer, signals in self.decoder_signals.items()
        }
        layers = sorted({s.step.layer for s in steps} | set(wanted))
        found = {number: Due.of(number, steps, wanted.get(number, {})) for number in layers}
        return {number: due for number, due in found.items() if due is not None}

    @property
    def watched_layers(self) -> tuple[int, ...]:
        """Decoder layers whose modules are watched while they run."""
        layers = self.decoder_signals.items()
        return tuple(sorted(n for n, signals in layers if any(s.of_module for s in signals)))

    @cached_property
    def waits(self) -> bool:
        """Whether image features can only be reduced once the prompt is known."""
        needs = (need for planned in self.pre_llm for need in planned.step.needs)
        if self.total is not None:
            return True
        return bool(self.per_request) or any(SIGNALS[n.name].source == "prompt" for n in needs)

    @property
    def asks_clip(self) -> tuple[str, ...]:
        """Methods that compare patches with the question in CLIP's space."""
        needs = ((s.method.slug, n.name) for s in self.pre_llm for n in s.step.needs)
        return tuple(dict.fromkeys(slug for slug, name in needs if SIGNALS[name].clip))

    @cached_property
    def before_projector(self) -> tuple[str, ...]:
        """Methods that merge what the projector is given."""
        names = (s.method.slug for s in self.pre_llm if s.step.before_projector)
        return tuple(dict.fromkeys(names))

    @property
    def renumber_features(self) -> bool:
        """Whether survivors of the steps before the language model get consecutive positions: if
        all methods there want it.
        """
        return all(s.renumber for s in (*self.vision, *self.pre_llm))

    @property
    def per_request(self) -> tuple[PerRequest, ...]:
        """Budgets given for each row of the batch."""
        return tuple(m.keep for m in self.methods if isinstance(m.keep, PerRequest))

    def check_untotalled(self) -> None:
        """Refuse to train with a total.

        Raises:
            BudgetError: there is one.
        """
        if self.total is not None:
            raise BudgetError(
                "keep_total shrinks images from turn to turn, but a training step reads all turns "
                "at once, in which each image has one size; train without it, and give it to "
                "foveate.load, foveate.load_adapter or foveate.use afterwards"
            )

    def check_training(self) -> None:
        """Refuse to train with methods that would do nothing, or not what they say.

        Raises:
            UnsupportedModelError: a method acts on decoding alone.
            BudgetError: a budget is given for each row of a batch, or for all its images.
        """
        self.check_untotalled()
        if self.per_request:
            raise BudgetError(
                "per_request gives a keep for each row of a batch, but in training rows come in "
                "batches of any size and order; give one keep for all"
            )
        repeating = [m.slug for m in self.methods if isinstance(m, Learning) and m.passes > 1]
        if len(repeating) > 1:
            raise UnsupportedModelError(
                f"{' and '.join(repeating)} each run the model several times in a step of "
                "training; use one of them"
            )
        acting = {s.method_number for s in (*self.vision, *self.pre_llm, *self.llm)}
        for number, method in enumerate(self.methods):
            if number not in acting and not self.work:
                raise UnsupportedModelError(
                    f"{method.slug} acts on the tokens that are generated, and training generates "
                    "none; train without it, and attach it for inference"
                )


def _encoder_layers(needs: Iterable[Need]) -> dict[str, tuple[int, ...]]:
    """Signal -> layers, of signals that encoder layers give."""
    found: dict[str, set[int]] = {}
    for need in needs:
        if SIGNALS[need.name].source == "encoder":
            found.setdefault(need.name, set()).update(need.layers)
    return {name: tuple(sorted(layers)) for name, layers in found.items()}
