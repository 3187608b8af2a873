"""BaseSession: attach methods to a model, and restore the model exactly.

A session has a side for each part of the model that it touches: the text model, the vision encoder,
or both. Everything is done by hooks and a few instance attributes (`get_image_features` of the base
model, `generate` of the model, `forward` of the base and the text model, of decoder layers, of the
rotary embedding, of a projector that the base model calls itself, and of encoder layers within
which tokens are removed); nothing else on the model is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import PreTrainedModel

from foveate.core import Learning, Method
from foveate.core.budget import plain_total
from foveate.core.resolve import MethodLike, methods_of
from foveate.engine.attachment import Attachment
from foveate.engine.gate import Gate, is_within
from foveate.engine.plan import Plan
from foveate.engine.planning import make_plan
from foveate.engine.text import TextAttachment
from foveate.engine.thread_state import ThreadState
from foveate.engine.vision.hooks import VisionAttachment
from foveate.errors import AttachError, InputError, UnsupportedModelError
from foveate.families import find_family, unwrap
from foveate.io.quoting import each_of, none_of
from foveate.record.record import Record
from foveate.signals.clip import ClipQuestions

if TYPE_CHECKING:
    from typing import Self

OLDEST = Version("5.18")  # of transformers: caches and masks of earlier releases are others
LEARNED = "foveate"  # the name of what methods learn, among a model's modules


class BaseSession:
    """Methods on a model: attach them, remove them, and read what was recorded.

    `foveate.run.Session` adds reports and drawings, which stand above the engine.

    Args:
        model: a supported vision-language model or vision encoder, with or without its head.
        methods: one method, or several in stream order; see `use`.
        clip: what is asked, for methods with `relevance="clip"`.
        keep_total: most visual tokens of a conversation; see `use`.
        audio: whether methods act on audio too, or methods for it; see `use`.

    Raises:
        UnsupportedModelError: unknown family, or the model cannot serve what a method needs.
        LayerError: a layer lies outside the model, or methods are not in stream order.
        BudgetError: `keep` does not fit the method's steps, or `keep_total` not the methods.
        InputError: `clip` is missing, or no method uses it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        methods: MethodLike,
        clip: ClipQuestions | None = None,
        keep_total: int | Sequence[int] | None = None,
        audio: bool | MethodLike = False,
    ) -> None:
        _check_version()
        model = unwrap(model)
        self.family = find_family(model)
        if audio is not False:
            self.family.hear()
        heard = audio if isinstance(audio, bool) else methods_of(audio)
        self.audio = heard
        self.plan = make_plan(self.family, methods_of(methods), plain_total(keep_total), heard)
        _check_clip(self.plan, clip)
        self._model = model
        self._state, self._gate = ThreadState(clip), Gate()
        common = (self.plan, self.family, self._state, self._gate)
        with_text = bool(self.family.text_layers)
        with_vision = bool(self.plan.vision) or not with_text
        self.vision = VisionAttachment(*common) if with_vision else None
        self.text = TextAttachment(*common, self.vision) if with_text else None
        self._sides: list[Attachment] = [
            side for side in (self.vision, self.text) if side is not None
        ]
        for side in self._sides:
            side.session = self

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods, in stream order; then those for audio alone."""
        return self.plan.methods

    @property
    def shared_methods(self) -> tuple[Method, ...]:
        """The methods, without those for audio alone."""
        own = len(self.audio) if isinstance(self.audio, tuple) else 0
        return self.methods[: len(self.methods) - own]

    @property
    def clip(self) -> ClipQuestions | None:
        """What is asked of the images, for methods with `relevance="clip"`. Set it before each
        prompt that asks something else; it holds for the thread that sets it.
        """
        return self._state.clip

    @clip.setter
    def clip(self, questions: ClipQuestions) -> None:
        _check_clip(self.plan, questions)
        self._state.clip = questions

    # -- training

    def check_training(self) -> None:
        """Refuse what cannot be attached for training.

        Raises:
            UnsupportedModelError: a method has nothing to do in training, or does something else
                there on a model whose loss is an expert's.
            BudgetError: a budget is given for each request, or for a conversation.
        """
        self.plan.check_training()
        if self.plan.learns and self.family.expert is not None:
            who = each_of(m.slug for m in self.plan.methods if isinstance(m, Learning))
            raise UnsupportedModelError(
                f"{who} learns from labels of text, but the loss of this "
                f"{self.family.model_type} is that of actions; train it with a method that learns "
                "nothing"
            )

    @property
    def labelled_logits(self) -> bool:
        """Whether in training logits are made only where there are labels."""
        return self.text is not None and self.text.model.labelled_logits

    def label_logits(self) -> None:
        """Make logits in training only where there are labels.

        Raises:
            UnsupportedModelError: the model cannot.
        """
        forward = inspect.signature(self._model.forward).parameters
        if self.text is None or not {"labels", "logits_to_keep"} <= set(forward):
            raise UnsupportedModelError(
                f"head='labels' needs a model that makes logits of some tokens alone and says so, "
                f"by labels and logits_to_keep in its forward, which {type(self._model).__name__} "
                "does not; use head='all'"
            )
        if why := self.family.whole_head:
            raise UnsupportedModelError(
                f"head='labels' makes logits of tokens with labels alone, but {why}; use head='all'"
            )
        if Version(transformers.__version__) < Version("5.23"):
            raise UnsupportedModelError(
                f"head='labels' needs transformers 5.23 or newer, got {transformers.__version__}; "
                "use head='all'"
            )
        self.text.model.labelled_logits = True

    @property
    def learned(self) -> nn.ModuleDict:
        """Number of a method -> its parameters, of methods that learn."""
        return self.plan.learned

    def freeze_model(self) -> None:
        """Let no parameter of the model be trained. `remove()` lets them again."""
        frozen = [p for p in self._model.parameters() if p.requires_grad]
        self._sides[-1].undo(lambda: [p.requires_grad_(True) for p in frozen])
        for parameter in frozen:
            parameter.requires_grad_(False)

    def own_learned(self) -> None:
        """Make what methods learn a part of the attached model, as its module `foveate`.

        It is trained, moved and saved with the model. `remove()` takes it off again.
        """
        if not len(self.learned):
            return
        modules = self._model._modules
        self._sides[-1].undo(lambda: modules.pop(LEARNED, None))
        self._model.add_module(LEARNED, self.learned.to(self._model.device))
        self.learned.train(self._model.training)

    def around_saving(self, module: nn.Module, around: Callable[..., Any]) -> None:
        """Call `around(save_pretrained, ...)` in place of a module's `save_pretrained`, as long as
        the session is attached.
        """
        self._sides[-1].wrap(module, "save_pretrained", around)

    # -- attach and remove

    def attach(self) -> Self:
        """Put everything on, or nothing: whatever is raised, the model is as it was.

        What other threads are doing within the model goes on as it began.

        Raises:
            AttachError: the model already carries a session, or this is called within its forward.
            UnsupportedModelError: the attention kernel is not supported.
        """
        if any(map(is_within, (self.family.model, self.family.base, self._sides[0].root))):
            raise AttachError(
                "a foveate session cannot be attached within a forward of its model; attach it "
                "before the model is called"
            )
        claimed: list[Attachment] = []
        try:
            for side in self._sides:
                if not side.claim():
                    raise AttachError(self._taken)
                claimed.append(side)
            for side in claimed:
                side.check()
            if len(self.learned):
                self.learned.to(self._model.device)
            with self._gate.opening():
                for side in claimed:
                    side.attach()
        except BaseException:
            self._take_off(claimed)
            raise
        return self

    def remove(self) -> None:
        """Take everything off; the model is as it was. Removing twice does no harm.

        Waits for threads that are inside the model, and lets none in meanwhile.

        Raises:
            AttachError: this is called within a forward of the model.
        """
        entries = [entry for side in self._sides for entry in side.entries]
        self._gate.close(entries, lambda: self._take_off(self._sides))

    def _take_off(self, sides: Sequence[Attachment]) -> None:
        for side in reversed(sides):
            side.remove()

    @property
    def _taken(self) -> str:
        return (
            f"this {type(self._model).__name__} already carries a foveate session; remove it first "
            "(leave its `with` block, or call `remove()` on its handle), or pass both methods as a "
            "list"
        )

    def __enter__(self) -> Self:
        """Attach."""
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove, whatever happened."""
        self.remove()

    # -- what was done

    @property
    def record(self) -> Record | None:
        """The last forward over a prompt, or over images where there is no language model: this
        thread's, or else any thread's.
        """
        side = self.text or self.vision
        return None if side is None else side.record

    @property
    def kept(self) -> list[dict[str, Tensor]]:
        """For each image of the last forward, step -> (K,) raster positions that survive it.

        Steps come in stream order. Of several at one place, the last is `llm:8` and those before it
        `llm:8#1`, `llm:8#2`.
        """
        record = self.record
        return [] if record is None else [image.kept for image in record.images]


def _check_version() -> None:
    if Version(transformers.__version__) < OLDEST:
        raise UnsupportedModelError(
            f"methods are attached to models of transformers {OLDEST} or newer, got "
            f"{transformers.__version__}; inside vLLM older releases do"
        )


def _check_clip(plan: Plan, clip: ClipQuestions | None) -> None:
    if plan.asks_clip and clip is None:
        raise InputError(
            f"{each_of(plan.asks_clip)} compares patches with the question in CLIP's space, and "
            "needs the CLIP whose vision tower the model has: clip = foveate.ClipText."
            "from_pretrained(...), then use(model, method, clip=clip(question)); or set "
            "relevance='embeddings', which needs no other model"
        )
    if clip is not None and not plan.asks_clip:
        idle = none_of((method.slug for method in plan.methods), "ask")
        raise InputError(
            f"clip was given, but {idle} it; leave it out, or set relevance='clip' on a method "
            "that has this field"
        )
