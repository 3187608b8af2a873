"""Semantic tokens in an encoder: layers by hand, batches, accounts, a Trainer, saving, refusals."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import foveate
from foveate.errors import FoveateError, InputError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import STViT, ToMe
from foveate.ops.semantic import semantic_tokens
from foveate.training.prepare import session_of
from tests.tinies import tiny_llava
from tests.vision import dense
from tests.vision.encoders import ENCODERS, HEADS, PATCHES, SPECIAL, SQUARE, build, images, row_of

METHODS = {
    "grid": STViT(layer=2, side=3),
    "windows": STViT(layer=1, side=4, window=3),
    "recover": STViT(layer=2, side=3, recover=True),
}


def trained(session, seed=0):
    """A session whose new parameters say something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in session.learned.parameters():
            parameter.normal_(std=0.3)
    return session


def tokens_by_hand(learned, x, method):
    """(G, S, D) semantic tokens: seeds and keys of each window by plain loops over 6 x 6 tokens."""
    cells = x.unflatten(1, (6, 6))
    window = method.window or 6
    count, step = 6 // window, window * method.side // 6
    found = torch.zeros(len(x), method.side, method.side, x.shape[-1])
    for i in range(count):
        for j in range(count):
            inner = cells[:, i * window : (i + 1) * window, j * window : (j + 1) * window]
            part = torch.nn.functional.adaptive_max_pool2d(inner.permute(0, 3, 1, 2), step)
            rows, columns = (slice(n * step, (n + 1) * step) for n in (i, j))
            seeds = (
                part.permute(0, 2, 3, 1)
                + learned.centres.unflatten(0, (method.side, -1))[rows, columns]
            )
            seeds = seeds.flatten(1, 2)
            keys = torch.cat((seeds, cells.flatten(1, 2)), 1)  # 3 + 3 rows are the whole grid
            made = learned.attend(seeds, keys)
            found[:, rows, columns] = made.unflatten(1, (step, step))
    return found.flatten(1, 2)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", SQUARE)
def test_states_are_those_of_the_layers_by_hand(name, case):
    model, inputs, method = build(ENCODERS, name), images(), METHODS[case]
    special, family = SPECIAL.get(name, 0), find_family(model)
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        session = trained(foveate.use(model, method))
        learned = session.learned["0"]
        with session as run:
            got = model(**inputs).last_hidden_state
            kept = [next(iter(image.values())).tolist() for image in run.kept]
        before = plain.hidden_states[method.layer]
        made = tokens_by_hand(learned, before[:, special:], method)
        states = torch.cat((before[:, :special], made), 1)
        for layer in family.encoder.layers[method.layer :]:
            states = layer(states, None)
            states = states if isinstance(states, torch.Tensor) else states[0]
        places = torch.arange(6) * method.side // 6
        cell = (places[:, None] * method.side + places).flatten()
        if method.recover:
            patches = learned.recover(before[:, special:], states[:, special:])
        else:
            patches = states[:, special:][:, cell]
        want = torch.cat((states[:, :special], patches), 1)
        norm = getattr(model, "layernorm", getattr(model, "post_layernorm", None))
        want = want if name == "clip" else norm(want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=5e-5)
    assert all(len(index) == method.side**2 for index in kept)
    assert [cell[n].item() for n in kept[0]] == list(range(method.side**2))


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", ["deit", "dinov2", "siglip"])
def test_batch_equals_rows(name, case):
    model, inputs = build(ENCODERS, name), images(4)
    with torch.no_grad(), trained(foveate.use(model, METHODS[case])):
        together = model(**inputs)
        alone = [model(**row_of(inputs, row)) for row in range(4)]
    for key in ("last_hidden_state", "pooler_output"):
        want = torch.cat([of[key] for of in alone])
        torch.testing.assert_close(together[key], want, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("recover", [False, True])
def test_as_many_tokens_as_patches_change_no_bit(recover):
    model, inputs = build(ENCODERS, "vit"), images()
    with torch.no_grad():
        want = model(**inputs).last_hidden_state
        with foveate.use(model, STViT(side=6)):
            assert torch.equal(model(**inputs).last_hidden_state, want)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "clip"])
def test_predicted_flops_equal_the_ones_torch_counts(name, case):
    model, inputs = build(ENCODERS, name, "eager"), images(2)
    with foveate.use(model, METHODS[case]) as run, torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        assert account(run.record, run.family, run.methods).total == counter.get_total_flops()


def test_untrained_tokens_are_nearly_pooled_and_the_same_each_time():
    model, inputs = build(ENCODERS, "vit"), images()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    learned = foveate.use(model, STViT()).learned["0"]
    again = foveate.use(model, STViT()).learned["0"]
    assert torch.equal(torch.rand(1), expected), "the caller's random numbers went on"
    for one, other in zip(learned.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    x = model(**inputs).last_hidden_state[:, 1:]
    pooled = torch.nn.functional.adaptive_max_pool2d(x.mT.unflatten(-1, (6, 6)), 4).flatten(2).mT
    torch.testing.assert_close(learned(x, (6, 6)), pooled, rtol=0, atol=1e-3)


def test_windows_that_overlap_read_what_is_around_them():
    """On 14 x 14 tokens in windows of 7, as in the release, each window reads 10 x 10."""
    seen = []

    class Block(torch.nn.Module):
        def forward(self, x, others):
            seen.append(others)
            return x

    grid = torch.arange(196.0).view(1, 196, 1)
    semantic_tokens(Block(), grid, (14, 14), 6, 7)
    (others,) = seen
    assert others.shape == (4, 9 + 100, 1)
    corners = others[:, 9:, 0].view(4, 10, 10)[:, 0, 0].tolist()
    assert corners == [0, 4, 4 * 14, 4 * 14 + 4]


@pytest.mark.parametrize("name", dense.DENSE)
def test_dense_models_read_what_is_recovered(name):
    model = dense.build(dense.DENSE[name])
    given = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    key = "logits" if name.startswith("upernet") else "predicted_depth"
    with torch.no_grad():
        plain = model(given)[key]
        found = []
        for method in (METHODS["grid"], METHODS["recover"]):
            with trained(foveate.use(model, method)):
                found.append(model(given)[key])
    assert plain.shape == found[0].shape == found[1].shape
    assert not torch.equal(*found)
    assert all(of.isfinite().all() for of in found)


def test_reports_say_that_it_is_to_be_trained():
    model, inputs = build(ENCODERS, "vit"), images()
    with foveate.use(model, STViT()) as run:
        model(**inputs)
    assert "to be trained" in " ".join(str(run.report()).split())


# -- training


class Stripes(torch.utils.data.Dataset):
    """Images whose class is where they are bright."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 3, 48, 48, generator=generator) * 0.3
        self.labels = torch.arange(count) % 5
        for image, label in zip(self.pixels, self.labels.tolist(), strict=True):
            image[:, 8 * label : 8 * label + 8] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"pixel_values": self.pixels[number], "labels": self.labels[number]}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_stock_trainer_trains_it_and_it_is_saved_and_loaded(name, case, tmp_path):
    model, method, data = build(HEADS, name), METHODS[case], Stripes(40)
    foveate.prepare(model.train(), method)
    start = {key: value.detach().clone() for key, value in model.foveate.named_parameters()}
    args = TrainingArguments(
        tmp_path / "runs", max_steps=12, per_device_train_batch_size=8, learning_rate=3e-3,
        logging_steps=1, report_to=[], use_cpu=True, save_strategy="no", seed=0, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert all(0 < norm < float("inf") for norm in norms)
    changed = {k for k, v in model.foveate.named_parameters() if not torch.equal(v, start[k])}
    unread = {k for k in start if ".recover." in k and name == "vit"}  # its head reads row 0 alone
    assert changed >= set(start) - unread - {k for k in start if k.endswith("key_value.bias")}
    inputs = {"pixel_values": data.pixels[:3]}
    foveate.save(model.eval(), tmp_path / "out")
    again = foveate.load(tmp_path / "out")
    assert session_of(again).methods == (method,)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


# -- refusals


def test_what_cannot_be_served_is_refused_with_the_reason():
    vit, inputs = build(ENCODERS, "vit"), images()
    with pytest.raises(LayerError, match=r"stvit reads whole grids .* tome removes tokens"):
        foveate.use(vit, [ToMe(r=2), STViT(layer=2)])
    with pytest.raises(UnsupportedModelError, match=r"'stvit' is for encoders alone, but"):
        foveate.use(tiny_llava(), STViT(layer=1))
    padded = images(name="siglip2")
    padded["pixel_attention_mask"][1, 30:] = 0
    siglip2 = build(ENCODERS, "siglip2")
    with (
        pytest.raises(UnsupportedModelError, match="stvit does not act on images that the encoder"),
        foveate.use(siglip2, STViT()),
    ):
        siglip2(**padded)
    with (
        pytest.raises(LayerError, match="cannot cut 6 x 6 tokens into windows of 4"),
        foveate.use(vit, STViT(side=3, window=4)),
    ):
        vit(**inputs)
    with (
        pytest.raises(InputError, match=r"to 5 x 5 tokens, but an image has 4 x 16"),
        foveate.use(build(ENCODERS, "dinov2"), STViT(side=5)) as run,
    ):
        run._model(torch.randn(1, 3, 32, 128))
    with pytest.raises(FoveateError, match="side must be at least 1"):
        STViT(side=0)
    assert PATCHES == 36
