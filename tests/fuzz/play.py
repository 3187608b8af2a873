"""Playing a cell: every way of running a model, and what must be so of what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.models import MROPE
from tests.fuzz.oracle import Row
from tests.fuzz.prompts import LETTERS, Images, Prompt
from tests.fuzz.scene import GREEDY, Claim, Scene, Told, nearest, slots_of
from tests.fuzz.train import train


def play(scene: Scene) -> list[Claim]:
    """Run the model as the cell says, and gather what must be so."""
    return PLAYS[scene.cell.mode](scene)


# -- ways of running


def forward(scene: Scene) -> list[Claim]:
    cell, batch = scene.cell, scene.batch
    real = scene.prompt.batch(cell.side)["attention_mask"].bool()
    keep = {"logits_to_keep": cell.logits_to_keep} if cell.logits_to_keep else {}
    out = scene.model(
        **batch, use_cache=cell.steps % 2 == 0, output_hidden_states=cell.hidden_states, **keep
    )
    logits = out.logits
    first = real.shape[1] - logits.shape[1]
    checks = []
    for row in range(len(real)):
        columns = real[row].nonzero()[:, 0]
        shown = columns >= first
        states = [h[row, columns] for h in out.hidden_states or []]
        checks.append(_prefill(logits[row, columns[shown] - first], shown, states))
    claims = scene.claims([[]] * len(checks), checks)
    for claim, unseen in zip(claims, scene.unseen, strict=True):
        claim.unseen = unseen
    return claims


def _prefill(logits: Tensor, shown: Tensor, states: list[Tensor]) -> Callable[[Row], float]:
    """Compare (N, vocabulary) logits at shown columns of a row, and (T, D) hidden states."""

    def check(row: Row) -> float:
        want = row.logits[nearest(row.alive[-1])][shown]
        far = [(want - logits).abs().max()] if len(want) else []
        for mine, theirs, given in zip(row.hidden, states, row.given, strict=bool(states)):
            there = nearest(given)
            far.append((mine[there] - theirs).abs().max())
        return torch.stack(far).max().item() if far else 0.0  # a NaN stays one

    return check


def _after(prompt: int, logits: Tensor) -> Callable[[Row], float]:
    """Compare (N, vocabulary) logits from the last prompt token on."""
    return lambda row: (row.logits[prompt - 1 :][: len(logits)] - logits).abs().max().item()


def decode(scene: Scene) -> list[Claim]:
    """Tokens that a seed decides, one or two at a time."""
    cell, batch = scene.cell, scene.batch
    generator = torch.Generator().manual_seed(cell.number)
    out = scene.model(**batch, use_cache=True, past_key_values=scene.cache())
    told, mask = scene.said(), batch["attention_mask"]
    logits, more = [out.logits[:, -1:]], []
    for step in range(cell.steps):
        size = 2 if step == 1 else 1
        ids = torch.randint(*LETTERS, (len(mask), size), generator=generator)
        mask = torch.cat((mask, torch.ones_like(ids)), 1)
        out = scene.model(
            input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values,
            use_cache=True, **_positions(scene, mask, size),
        )  # fmt: skip
        logits.append(out.logits)
        more.append(ids)
    scene.slots = slots_of(out.past_key_values), sum(ids.shape[1] for ids in more)
    return _continued(scene, torch.cat(more, 1), torch.cat(logits, 1), told)


def _positions(scene: Scene, mask: Tensor, size: int) -> dict[str, Tensor]:
    """Positions of the last tokens, where a model called by itself does not find them."""
    if scene.prompt.member.name not in MROPE:
        return {}
    deltas = scene.model.model.rope_deltas
    positions = (mask.long().cumsum(1) - 1)[:, -size:] + (0 if deltas is None else deltas)
    return {"position_ids": positions.expand(3, -1, -1)}


def _continued(scene: Scene, more: Tensor, logits: Tensor, told: Any = None) -> list[Claim]:
    """Claims about (B, N) ids after the prompts and the (B, N + 1) logits of which they are."""
    prompts = [len(ids) for ids in scene.prompt.rows]
    checks = [_after(prompt, logits[row]) for row, prompt in enumerate(prompts)]
    return scene.claims(more.tolist(), checks, told=told)


def generate(scene: Scene, **options: Any) -> list[Claim]:
    return _continued(scene, *_generated(scene, **options))


def _generated(scene: Scene, **options: Any) -> tuple[Tensor, Tensor]:
    """(B, N) ids that greedy search says, without the last, and the (B, N + 1) logits."""
    cell, batch = scene.cell, scene.batch
    steps = cell.steps + 1
    if cell.static:
        options["cache_implementation"] = "static"
    out = scene.model.generate(
        **batch, **GREEDY, max_new_tokens=steps, min_new_tokens=steps, output_logits=True,
        **options,
    )  # fmt: skip
    if options.get("use_cache", True):
        scene.slots = slots_of(out.past_key_values), steps - 1
    more = out.sequences[:, batch["input_ids"].shape[1] :]
    return more[:, :-1], torch.stack(out.logits, 1)


def chunked(scene: Scene) -> list[Claim]:
    """A prefill in pieces, each of which is a record of its own: what was kept is asked before."""
    scene.model(**scene.batch)
    told = scene.said()
    more, logits = _generated(scene, prefill_chunk_size=scene.cell.width)
    return _continued(scene, more, logits, told)


def no_cache(scene: Scene) -> list[Claim]:
    """Every step reads the whole row, and its newest token ranks."""
    more, logits = _generated(scene, use_cache=False)
    steps, told = scene.cell.steps, scene.said()
    found = []
    for step in range(steps + 1):
        known = told if step == steps else [[_untold(one) for one in row] for row in told]
        for row, ids in enumerate(scene.prompt.rows):
            newest = len(ids) - 1 + step
            found.append(
                Claim(
                    row, scene.prompt, more[row, :step].tolist(), known[row],
                    [(newest,)] * len(known[row]), _one(newest, logits[row, step]),
                )
            )  # fmt: skip
    return found


def _untold(told: Told | None) -> Told | None:
    """What is known at a step of which no record is left: the choice at the entrance."""
    if told is None:
        return None
    kept = {place: kept for place, kept in told.kept.items() if not place.startswith("llm")}
    return Told(told.total, told.grid, kept, told.frames)


def _one(column: int, logits: Tensor) -> Callable[[Row], float]:
    """Compare the (vocabulary) logits of one column."""
    return lambda row: (row.logits[column] - logits).abs().max().item()


def beams(scene: Scene) -> list[Claim]:
    cell, batch = scene.cell, scene.batch
    steps = cell.steps + 1
    options = {"cache_implementation": "static"} if cell.static else {}
    out = scene.model.generate(
        **batch, **GREEDY, max_new_tokens=steps, min_new_tokens=steps, num_beams=cell.width,
        output_scores=True, length_penalty=0.0, **options,
    )  # fmt: skip
    more = out.sequences[:, batch["input_ids"].shape[1] :]
    checks = [
        _scored(len(ids), more[row], out.sequences_scores[row])
        for row, ids in enumerate(scene.prompt.rows)
    ]
    return scene.claims(more.tolist(), checks, beams=cell.width)


def _scored(prompt: int, said: Tensor, score: Tensor) -> Callable[[Row], float]:
    """Compare the sum of log-probabilities of what was said."""

    def check(row: Row) -> float:
        steps = row.logits[prompt - 1 :][: len(said)].log_softmax(-1)
        return (steps.gather(1, said[:, None]).sum() - score).abs().item()

    return check


def sample(scene: Scene) -> list[Claim]:
    """Several answers of each row, drawn at random."""
    cell, batch = scene.cell, scene.batch
    steps = cell.steps + 1
    torch.manual_seed(cell.number)
    out = scene.model.generate(
        **batch, max_new_tokens=steps, min_new_tokens=steps, do_sample=True,
        num_return_sequences=cell.width, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    more = out.sequences[:, batch["input_ids"].shape[1] : -1]
    logits, told = torch.stack(out.logits, 1), scene.said(cell.width)
    claims = []
    for turn in range(cell.width):
        mine = slice(turn, None, cell.width)
        claims += _continued(scene, more[mine], logits[mine], told)
    return claims


def packed(scene: Scene) -> list[Claim]:
    """All rows after one another in one, told apart by their positions."""
    prompt = scene.prompt
    lengths = [len(ids) for ids in prompt.rows]
    ids = torch.tensor([[i for row in prompt.rows for i in row]])
    number = sum(prompt.numbers)
    inputs = {"input_ids": ids, "position_ids": torch.cat([*map(torch.arange, lengths)])[None]}
    inputs |= prompt.member.extras(ids, number) | prompt.images.given(0, number, [number])
    logits = scene.model(**inputs, use_cache=False).logits[0].split(lengths)
    images = iter([image for row in scene.said() for image in row])
    told = [[next(images) for _ in range(n)] for n in prompt.numbers]
    return scene.claims([[]] * len(lengths), [_left(one) for one in logits], told=told)


def _left(logits: Tensor) -> Callable[[Row], float]:
    """Compare (T, vocabulary) logits at what is left of a row."""

    def check(row: Row) -> float:
        left = row.alive[-1]
        return (row.logits[left] - logits[left]).abs().max().item()

    return check


def lookup(scene: Scene) -> list[Claim]:
    """Drafts from the prompt: what is said must be what greedy search says."""
    cell, batch = scene.cell, scene.batch
    steps = cell.steps + 2
    out = scene.model.generate(
        **batch, **GREEDY, max_new_tokens=steps, min_new_tokens=steps,
        prompt_lookup_num_tokens=cell.width, max_matching_ngram_size=1,
    )  # fmt: skip
    more = out.sequences[0, batch["input_ids"].shape[1] :]
    prompt = len(scene.prompt.rows[0])
    suppressed = scene.model.generation_config.suppress_tokens

    def check(row: Row) -> float:
        steps = row.logits[prompt - 1 :][: len(more)].clone()
        steps[:, suppressed] = -torch.inf
        return (steps.max(1).values - steps.gather(1, more[:, None])[:, 0]).max().item()

    return scene.claims([more.tolist()], [check])


def turn(scene: Scene) -> list[Claim]:
    """A second question after an answer, on the cache that was kept."""
    cell, batch = scene.cell, scene.batch
    options = {"cache_implementation": "static"} if cell.static else {}
    if cell.static:
        options = {"past_key_values": scene.cache()}
    first = scene.model.generate(**batch, **GREEDY, max_new_tokens=2, min_new_tokens=2, **options)
    told, width = scene.said(), batch["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(cell.number)
    question = torch.randint(*LETTERS, (len(cell.rows), cell.new[1]), generator=generator)
    ids = torch.cat((first.sequences, question), 1)
    inputs = {"input_ids": ids, "attention_mask": torch.nn.functional.pad(
        batch["attention_mask"], (0, ids.shape[1] - width), value=1)}  # fmt: skip
    inputs |= _later(scene, ids, sum(scene.prompt.numbers), width)
    steps = cell.steps
    out = scene.model.generate(
        **inputs, **GREEDY, past_key_values=first.past_key_values, max_new_tokens=steps,
        min_new_tokens=steps, output_logits=True,
    )  # fmt: skip
    said = out.sequences[:, width:-1]
    scene.slots = slots_of(out.past_key_values), said.shape[1]
    logits = torch.stack(out.logits, 1)
    checks = [
        _after(len(ids) + said.shape[1] - steps + 1, logits[row])
        for row, ids in enumerate(scene.prompt.rows)
    ]
    return scene.claims(said.tolist(), checks, told=told)


def _later(scene: Scene, ids: Tensor, images: int, width: int) -> dict[str, Any]:
    """Other arguments of a later turn: those of the whole conversation, without pixels."""
    member = scene.prompt.member
    extras = member.extras(ids, images)
    given = scene.prompt.images.given(0, images)
    extras |= {name: value for name, value in given.items() if name.endswith("grid_thw")}
    if member.name.startswith("paligemma"):
        extras["token_type_ids"][:, width:] = 1
    return extras


def new_image(scene: Scene) -> list[Claim]:
    """A second question with an image of its own, on the cache that was kept."""
    cell, prompt, member = scene.cell, scene.prompt, scene.prompt.member
    batch, before = scene.batch, sum(scene.prompt.numbers)
    first = scene.model.generate(**batch, **GREEDY, max_new_tokens=2, min_new_tokens=2)
    told = scene.said()[0]
    rest = Prompt.draw(member, [list(cell.new)], _only(prompt.images, before), cell.number + 1)
    said = first.sequences[0, len(prompt.rows[0]) :].tolist()
    whole = Prompt(
        member, [prompt.rows[0] + said + rest.rows[0]], prompt.images, [list(range(before + 1))],
        [prompt.spans[0] + [rest.spans[0][0] + len(prompt.rows[0]) + len(said)]],
    )  # fmt: skip
    ids = torch.tensor(whole.rows)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= _later(scene, ids, before + 1, 0)
    new = prompt.images.given(before, before + 1)
    if member.name in MROPE:
        new.pop("mm_token_type_ids", None)
        made = scene.model.get_image_features(**new, return_dict=True)
        new = {"mm_encoder_outputs": {"image": made}}
    steps = cell.steps
    out = scene.model.generate(
        **inputs, **new, **GREEDY, past_key_values=first.past_key_values, max_new_tokens=steps,
        min_new_tokens=steps, output_logits=True,
    )  # fmt: skip
    then = scene.said()[0]
    if scene.run is None:
        then = [None]
    more = out.sequences[0, ids.shape[1] : -1].tolist()
    check = _after(ids.shape[1], torch.stack(out.logits, 1)[0])
    asks = [(len(prompt.rows[0]) - 1,)] * before + [(ids.shape[1] - 1,)]
    return [Claim(0, whole, more, told + then, asks, check, [0] * before + [1])]


def _only(images: Images, number: int) -> Images:
    """One of the images; only its size matters."""
    return Images(images.member, [images.counts[number]])


PLAYS: dict[str, Callable[[Scene], list[Claim]]] = {
    "forward": forward, "decode": decode, "generate": generate, "no-cache": no_cache,
    "beams": beams, "turn": turn, "new-image": new_image, "lookup": lookup, "train": train,
    "chunked": chunked, "sample": sample, "packed": packed,
}  # fmt: skip
