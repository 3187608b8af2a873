"""Stock trainers, adapters and a bare loop train a prepared model as they train any other."""

import copy

import pytest
import torch

import foveate
from foveate.methods import PyramidDrop
from foveate.training.prepare import session_of
from tests.training.batches import Llava, batch, called, conversation
from tests.training.test_compact import METHOD, compare, expected, gradients

KIND = Llava()
PIECES = ([3, "i", 4, "a5", 2, "a3"], [2, "i", 3, "a4"], [6, "a3"], [2, "i", 1, "i", 2, "a2"])


class Talks(torch.utils.data.Dataset):
    """Supervised conversations."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        pieces = PIECES[i % len(PIECES)]
        ids, labels = conversation(KIND, pieces, generator)
        pixels = KIND.visual(pieces.count("i"), i)["pixel_values"]
        return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def collate(items):
    width = max(len(item["input_ids"]) for item in items)

    def padded(name, value):
        rows = (item[name] for item in items)
        return torch.stack(
            [torch.nn.functional.pad(r, (0, width - len(r)), value=value) for r in rows]
        )

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    pixels = torch.cat([item["pixel_values"] for item in items])
    inputs = {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}
    return inputs | ({"pixel_values": pixels} if len(pixels) else {})


def arguments(kind, folder, **more):
    return kind(
        str(folder), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        remove_unused_columns=False, logging_steps=1, save_steps=3, learning_rate=1e-3,
        lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, disable_tqdm=True,
        save_strategy="steps", save_only_model=True, dataloader_drop_last=True, **more,
    )  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def bare_loop(model, accumulate=1, rate=1e-3):
    """Three steps over the data in order, each with the mean over all its labels."""
    talks, seen = Talks(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    for step in range(3):
        first = step * accumulate
        batches = [
            collate([talks[(2 * (first + i) + j) % len(talks)] for j in (0, 1)])
            for i in range(accumulate)
        ]
        items = torch.tensor(sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches))
        total = 0.0
        for inputs in batches:
            loss = model(**inputs, num_items_in_batch=items).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(total)
    return seen


class InOrder:
    """A Trainer that does not shuffle."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def stock(folder, model, **more):
    from transformers import Trainer, TrainingArguments

    kind = type("InOrder", (InOrder, Trainer), {})
    args = arguments(TrainingArguments, folder, **more)
    return kind(model=model, args=args, train_dataset=Talks(), data_collator=collate)


@pytest.mark.parametrize("head", ["all", "labels"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_stock_trainer_does_what_a_bare_loop_does(tmp_path, accumulate, head):
    model = KIND.build().train()
    other = foveate.prepare(KIND.build().train(), METHOD)
    foveate.prepare(model, METHOD, head=head)
    trainer = stock(tmp_path, model, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert losses(trainer) == pytest.approx(bare_loop(other, accumulate), abs=2e-5)
    for (name, got), want in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6, msg=name)
    assert session_of(model).kept


def test_a_trainers_checkpoint_loads_with_its_methods(tmp_path):
    model = foveate.prepare(KIND.build().train(), METHOD, head="labels")
    trainer = stock(tmp_path, model)
    trainer.train()
    again = foveate.load(tmp_path / "checkpoint-3")
    assert session_of(again).methods == (METHOD,)
    inputs = called(batch(KIND)[0])
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("mixed", [False, True])
def test_trls_sft_trainer_trains_a_prepared_model(tmp_path, mixed):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    numbers = Dataset.from_dict({"input_ids": [[i] for i in range(12)]})
    model = foveate.prepare(KIND.build().train(), METHOD, head="labels")
    other = foveate.prepare(KIND.build().train(), METHOD)
    args = arguments(
        trl.SFTConfig, tmp_path, bf16=mixed, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    kind = type("InOrder", (InOrder, trl.SFTTrainer), {})
    trainer = kind(
        model=model, args=args, train_dataset=numbers, processing_class=tokenizer(),
        data_collator=lambda items: collate([Talks()[item["input_ids"][0]] for item in items]),
    )  # fmt: skip
    trainer.train()
    assert losses(trainer) == pytest.approx(bare_loop(other), abs=0.05 if mixed else 2e-5)


def tokenizer():
    """A tokenizer that TRL asks for its special tokens."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(128)}, unk_token="3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2")


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    wrapped = get_peft_model(
        model,
        LoraConfig(
            r=4, target_modules=r".*(q_proj|k_proj|v_proj|down_proj)", init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    return wrapped.train()


@pytest.mark.parametrize("first", ["prepare", "peft"])
def test_adapters_train_whether_put_on_before_or_after(first):
    pytest.importorskip("peft")
    plain = KIND.build()
    adapted(plain)
    inputs, talks = batch(KIND, "turns", "left")

    def leaves(model):
        named = model.named_parameters()
        # No gradient reaches what selection alone reads, so all of the adapter is compared.
        return {n: p for n, p in named if "lora" in n and "vision" not in n}

    kind = copy.copy(KIND)
    kind.leaves = lambda model, inputs: leaves(model)
    want = expected(kind, plain, inputs, talks)
    model = KIND.build()
    if first == "prepare":
        model = adapted(foveate.prepare(model, METHOD))
    else:
        model = foveate.prepare(adapted(model), METHOD)
    loss = model(**called(inputs)).loss
    got = gradients(loss, leaves(model))
    compare((loss, got), (want[0], {n.removeprefix(""): g for n, g in renamed(want[1], got)}))


@pytest.mark.parametrize("name", ["fastervlm", "cls-drop"])
def test_adapters_in_the_encoder_take_part_in_its_signals(name):
    pytest.importorskip("peft")
    inputs = called(batch(KIND, "images")[0])
    kept = []
    for first in ("prepare", "peft", "neither"):
        model = KIND.build()
        if first == "prepare":
            model = adapted(foveate.prepare(model, name, keep=0.25))
        elif first == "peft":
            model = foveate.prepare(adapted(model), name, keep=0.25)
        else:
            foveate.prepare(model, name, keep=0.25)
        model(**inputs)
        kept.append([[k.tolist() for k in image.values()] for image in session_of(model).kept])
    assert kept[0] == kept[1] != kept[2]


def renamed(want, got):
    """Gradients of the bare model under the names that PEFT's wrapper gives."""
    for name in got:
        (same,) = [w for w in want if name.endswith(w)]
        yield name, want[same]


@pytest.mark.parametrize("first", ["prepare", "peft"])
def test_adapters_are_saved_and_loaded_with_the_methods(tmp_path, first):
    pytest.importorskip("peft")
    KIND.build().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    if first == "prepare":
        model = adapted(foveate.prepare(base, METHOD))
    else:
        model = foveate.prepare(adapted(base), METHOD)
    foveate.save(model, tmp_path / "adapters")
    again = foveate.load(tmp_path / "adapters", trainable=True)
    inputs = called(batch(KIND)[0])
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert session_of(again).methods == (METHOD,)


def test_a_bare_loop_learns():
    model = foveate.prepare(KIND.build().train(), PyramidDrop(), head="labels")
    inputs = called(batch(KIND, "turns")[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = []
    for _ in range(8):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < seen[0] / 2
