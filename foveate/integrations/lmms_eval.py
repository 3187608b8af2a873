"""foveate as a model of lmms-eval: any of its tasks, on any family, with any method.

    pip install 'foveate[lmms-eval]'
    lmms-eval --model foveate --model_args pretrained=MODEL,method=pyramiddrop --tasks TASK

lmms-eval finds the model by the entry point `lmms_eval.models`; nothing of it is changed. Tasks
that generate use `FoveateChat`; tasks that compare likelihoods need `--force_simple`, which selects
`FoveateSimple`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from foveate.core import Method
from foveate.core.from_text import make_methods
from foveate.errors import FoveateError, InputError
from foveate.integrations.chat import ChatModel, Conversation
from foveate.loading import load_model

try:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise FoveateError(
        f"lmms-eval cannot be imported ({error}); pip install 'foveate[lmms-eval]'"
    ) from error

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")


def manifest() -> Any:
    """What the entry point gives to lmms-eval."""
    return ModelManifest(
        model_id="foveate",
        simple_class_path=f"{__name__}.FoveateSimple",
        chat_class_path=f"{__name__}.FoveateChat",
    )


def method_of(
    name: str | None, keep: Any = None, fields: dict[str, Any] | None = None
) -> Method | tuple[Method, ...] | None:
    """A method from model arguments, whose commas lmms-eval has split; or several methods.

    Args:
        name: of the method, or names with `+` between; `None` or `none` for all tokens.
        keep: a share, a count, or a schedule with slashes: `0.5/0.25/0.125`; of several methods,
            one for each with `+` between.
        fields: hyper-parameters; lists with slashes too. Of several methods, `method.field`.

    Raises:
        FoveateError: a name, field or value is not known, or there is no method that would take it.
    """
    given = {} if fields is None else fields
    if name in (None, "", "none"):
        if keep is not None or given:
            extra = ", ".join([*(["keep"] if keep is not None else []), *given])
            raise InputError(f"unknown model_args without method=NAME: {extra}")
        return None
    settings = [f"{key}={_spelled(value)}" for key, value in given.items()]
    names = [part.strip() for part in str(name).split("+")]
    keeps = [] if keep is None else _spelled(keep).split("+")
    made = make_methods(names, keeps, settings)
    return made if len(made) > 1 else made[0]


def _spelled(value: Any) -> str:
    return str(value).replace("/", ",")


class _Foveate(lmms):
    """What both classes share.

    Args:
        pretrained: hub id, folder, or `tiny`.
        method: name of the method; without it, all tokens.
        keep: see `method_of`.
        device: by default a CUDA device if there is one.
        dtype: auto, float32, bfloat16 or float16.
        batch_size: requests that are answered together.
        max_num_frames: frames of a video.
        max_batch_size: not used; batches have one size.
        max_pixels: most pixels of a file's image, see `foveate.io.images.load_image`.
        keep_total: most visual tokens of a request, all rounds of it included; see `foveate.use`.
        **fields: hyper-parameters of the method.
    """

    def __init__(
        self,
        pretrained: str,
        method: str | None = None,
        keep: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_num_frames: int = 32,
        max_batch_size: int | None = None,
        max_pixels: int | None = None,
        keep_total: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise FoveateError(
                "foveate runs lmms-eval in one process; start it without accelerate launch or "
                "torchrun"
            )
        if not str(batch_size).isdigit():
            raise InputError(f"batch_size must be a number, got {batch_size!r}")
        import torch

        chosen = method_of(method, keep, fields)
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load_model(pretrained, where, dtype)
        self.chat = ChatModel(model, processor, chosen, max_num_frames, max_pixels, keep_total)
        self.batch_size = int(batch_size)

    def clean(self) -> None:
        """Let go of the model."""
        del self.chat
        super().clean()

    # -- requests

    def _document(self, task: str, split: str, number: int) -> Any:
        return self.task_dict[task][split][number]

    def _answer_all(
        self, conversations: Sequence[Conversation], settings: Sequence[dict[str, Any]]
    ) -> list[Any]:
        """Answers in order, in batches of neighbours with equal settings."""
        results = []
        for members in _batches(settings, self.batch_size):
            answers = self.chat.answer([conversations[i] for i in members], **settings[members[0]])
            results += [
                GenerationResult(text=text, token_counts=TokenCounts(output_tokens=count))
                for text, count in answers
            ]
        return results

    def _rounds(self, first: Conversation, settings: dict[str, Any], more: Any) -> list[str]:
        """Answers of one document, round by round, until the task has no more to ask."""
        conversation: Conversation | None = first
        answers: list[str] = []
        state = None
        while conversation is not None:
            answers.append(self.chat.answer([conversation], **settings)[0][0])
            conversation, state = more(len(answers), list(answers), state)
        return answers


class FoveateChat(_Foveate):
    """Tasks that hand over messages, or that lmms-eval turns into messages."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests (context, messages of a document, settings, document...)."""
        given = [request.args for request in requests]
        conversations = [
            to_messages(messages(self._document(task, split, number)))
            for _, messages, _, number, task, split in given
        ]
        return self._answer_all(conversations, [arguments[2] for arguments in given])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers of each document, round by round."""
        results = []
        for request in requests:
            _, messages, settings, number, task, split = request.args
            document = self._document(task, split, number)

            def more(
                round_: int, answers: list[str], state: Any, ask: Any = messages, of: Any = document
            ) -> Any:
                found = ask(
                    of, round_idx=round_, previous_output=answers, previous_round_info=state
                )
                if not (isinstance(found, tuple) and len(found) == 4) or found[1]:
                    return None, None
                return to_messages(found[0]), found[3]

            results.append(self._rounds(to_messages(messages(document)), settings, more))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for messages; lmms-eval itself stops before."""
        raise FoveateError("tasks that compare likelihoods need --force_simple")


class FoveateSimple(_Foveate):
    """Tasks that hand over a text and images."""

    is_simple = True

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answers to requests (context, settings, images of a document, document...)."""
        given = [request.args for request in requests]
        conversations = [
            user_turn(visual(self._document(task, split, number)), context)
            for context, _, visual, number, task, split in given
        ]
        return self._answer_all(conversations, [arguments[1] for arguments in given])

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Answers of each document, round by round."""
        results = []
        for request in requests:
            context, settings, visual, text, number, task, split = request.args
            document = self._document(task, split, number)

            def more(
                round_: int, answers: list[str], state: Any, ask: Any = text, of: Any = document
            ) -> Any:
                visuals, context, last, _, state = ask(
                    of, previous_output=answers, round_idx=round_, previous_round_info=state
                )
                return (None, None) if last else (user_turn(visuals, context), state)

            results.append(self._rounds(user_turn(visual(document), context), settings, more))
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """(loss, greedy) of requests (context, continuation, images of a document, document...).

        The loss is the mean negative log-likelihood of a token, of which lmms-eval takes the
        smallest. A request without a document asks for the continuation alone. Pairs are wrapped,
        because lmms-eval 0.7.3 makes a text of every result that it does not know.
        """
        results = []
        for request in requests:
            context, target, *rest = request.args
            visuals = None
            if rest:
                visual, number, task, split = rest
                document = self._document(task, split, number)
                visuals = visual(document)
                target = target if isinstance(target, str) else target(document)
            pair = self.chat.loss(user_turn(visuals, context), str(target))
            results.append(GenerationResult(text=pair))
        return results


# -- messages


def to_messages(given: Any) -> list[dict[str, Any]]:
    """lmms-eval's messages as chat templates take them: `url` becomes the name of its kind."""
    result = []
    for message in given:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                part if part["type"] == "text" else _part(part["type"], part["url"])
                for part in content
            ]
        result.append({"role": message["role"], "content": content})
    return result


def user_turn(visuals: Any, text: str) -> list[dict[str, Any]]:
    """Images and videos, then a text, in one turn.

    Args:
        visuals: images, file names, or `None`.
        text: what is asked.
    """
    parts = [
        _part("image" if not isinstance(v, str) or v.lower().endswith(IMAGES) else "video", v)
        for v in visuals or ()
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _part(kind: str, value: Any) -> dict[str, Any]:
    if kind not in ("image", "video"):
        raise InputError(f"foveate gives a model images and videos in lmms-eval, and no {kind}")
    if isinstance(value, dict):
        raise InputError(
            f"a {kind} with {', '.join(sorted(value))} was given; only whole files are supported"
        )
    return {"type": kind, kind: value}


def _batches(settings: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Numbers of at most `size` neighbours with equal settings."""
    for _, run in groupby(range(len(settings)), key=lambda i: settings[i]):
        members = list(run)
        for start in range(0, len(members), size):
            yield members[start : start + size]
