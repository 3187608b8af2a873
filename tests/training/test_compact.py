"""A prepared model's loss and gradients are those of the short sequences that samples become."""

import pytest
import torch

import foveate
from foveate.errors import InputError
from foveate.methods import PyramidDrop
from foveate.training.prepare import session_of
from tests.training.batches import ROWS, batch, called, kinds, samples
from tests.training.oracle import Schedule, loss_of

LAYERS, KEEP = (1, 3, 4), (0.5, 0.25, 0.125)
METHOD = PyramidDrop(layers=LAYERS, keep=KEEP)
LOSS, GRADIENTS = 1e-6, 1e-5  # absolute; relative to the largest entry of all gradients


def schedule(kind):
    return Schedule(dict(zip(LAYERS, KEEP, strict=True)), kind.renumber)


def gradients(loss, leaves):
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }


def expected(kind, model, inputs, talks, items=None):
    """Loss, gradients and kept indices of the oracle."""
    loss, kept = loss_of(
        model.model.language_model,
        model.lm_head,
        samples(kind, model, inputs, talks),
        schedule(kind),
        items,
    )
    return loss, gradients(loss, kind.leaves(model, inputs)), kept


def compare(got, want):
    """Losses and gradients, by name."""
    assert abs(got[0].item() - want[0].item()) <= LOSS * max(1.0, want[0].item())
    assert list(got[1]) == list(want[1])
    scale = max(float(gradient.abs().max()) for gradient in want[1].values())
    worst = max(float((got[1][n] - want[1][n]).abs().max()) for n in want[1])
    assert scale > 0
    assert worst <= GRADIENTS * scale


def kept_of(model):
    """For each image, indices that are left at each place."""
    return [[k.tolist() for k in image.values()] for image in session_of(model).kept]


def chosen_of(want):
    """The same, as the oracle has chosen."""
    return [[k.tolist() for k in image] for row in want[2] for image in zip(*row, strict=True)]


@pytest.fixture(params=kinds(), ids=lambda kind: kind.name)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return kind.build().train()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
def test_loss_and_gradients_are_those_of_short_sequences(kind, model, rows, side):
    if rows == "adjacent" and not kind.renumber:
        pytest.skip("M-RoPE models find images by the text between them")
    inputs, talks = batch(kind, rows, side)
    plain = float(model(**called(inputs)).loss.detach())
    want = expected(kind, model, inputs, talks)
    foveate.prepare(model, METHOD)
    loss = model(**called(inputs)).loss
    compare((loss, gradients(loss, kind.leaves(model, inputs))), want)
    assert abs(plain - float(loss.detach())) > 1e-4  # something was dropped
    assert kept_of(model) == chosen_of(want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("head", ["all", "labels"])
def test_checkpointing_and_the_short_head_change_nothing(kind, model, head, reentrant):
    inputs, talks = batch(kind, "turns", "left")
    want = expected(kind, model, inputs, talks)
    foveate.prepare(model, METHOD, head=head)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss = model(**called(inputs), use_cache=False).loss
    leaves = kind.leaves(model, inputs)
    loss.backward()  # reentrant checkpoints serve no other way
    grads = {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()}
    compare((loss, grads), want)


@pytest.mark.parametrize("head", ["all", "labels"])
def test_the_sum_is_divided_by_the_items_of_all_batches(kind, model, head):
    inputs, talks = batch(kind, "images", "left")
    want = expected(kind, model, inputs, talks, items=37)
    foveate.prepare(model, METHOD, head=head)
    loss = model(**called(inputs), num_items_in_batch=torch.tensor(37)).loss
    compare((loss, gradients(loss, kind.leaves(model, inputs))), want)


def test_the_short_head_makes_logits_at_labels_alone(kind, model):
    inputs, _ = batch(kind, "text", "right")
    foveate.prepare(model, METHOD, head="labels")
    out = model(**called(inputs))
    assert len(out.logits) == int((inputs["labels"][:, 1:] != -100).sum())
    model.eval()
    assert model(**called(inputs)).logits.shape[:2] == inputs["input_ids"].shape


def test_under_autocast_the_loss_is_near_that_of_short_sequences(kind, model):
    inputs, talks = batch(kind, "turns", "left")
    foveate.prepare(model, METHOD)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**called(inputs)).loss
    kept = kept_of(model)
    grads = gradients(loss, kind.leaves(model, inputs))
    session_of(model).remove()
    want, other, _ = oracle = expected(kind, model, inputs, talks)
    same = kept == chosen_of(oracle)
    assert abs(loss.item() - want.item()) < (0.02 if same else 0.2)
    assert all(bool(gradient.isfinite().all()) for gradient in grads.values())
    flat, wanted = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, other))
    assert torch.cosine_similarity(flat, wanted, dim=0) > (0.99 if same else 0.9)


def pack(kind, model, inputs, talks):
    """All conversations after one another in one row, told apart by their positions."""
    ids = torch.cat([ids for ids, _ in talks])[None]
    packed = {"input_ids": ids, "labels": torch.cat([labels for _, labels in talks])[None]}
    orders = [torch.arange(len(ids))[None] for ids, _ in talks]
    packed["position_ids"] = torch.cat(orders, -1)
    names = ("pixel_values", "mm_encoder_outputs", "image_grid_thw")
    packed |= {name: inputs[name] for name in names if name in inputs}
    if not kind.renumber:
        grids = torch.cat([kind.positions(model, ids) for ids, _ in talks], -1)
        packed["position_ids"] = torch.cat((packed["position_ids"][None], grids))
        packed["mm_token_type_ids"] = (ids == kind.image).int()
    return packed


@pytest.mark.parametrize("rows", ["turns", "images", "text", "bare", "silent first"])
def test_packed_samples_get_what_they_get_alone(kind, model, rows):
    inputs, talks = batch(kind, rows, "right")
    want = expected(kind, model, inputs, talks)
    foveate.prepare(model, METHOD)
    loss = model(**called(pack(kind, model, inputs, talks)), use_cache=False).loss
    compare((loss, gradients(loss, kind.leaves(model, inputs))), want)
    assert kept_of(model) == chosen_of(want)


def test_packed_samples_count_their_positions_from_zero():
    kind = kinds()[0]
    model, seen = kind.build().train(), []
    inputs, talks = batch(kind, "turns", "right")
    foveate.prepare(model, METHOD)
    model.model.language_model.layers[-1].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0]), with_kwargs=True
    )
    model(**called(pack(kind, model, inputs, talks)), use_cache=False)
    gone = kind.patches - int(kind.patches * KEEP[-1])
    assert seen[0].tolist() == [i for ids, _ in talks for i in range(len(ids) - gone)]


def unpacking_flash(module, query, key, value, mask, scaling=None, position_ids=None, **kwargs):
    """Flash attention's convention in plain torch: in one row, a position 0 begins a sample."""
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if getattr(module, "is_causal", True):
        assert mask is None
        sample = (position_ids == 0).cumsum(1)[0]
        assert bool(((position_ids.diff() == 1) | (position_ids[:, 1:] == 0)).all())
        allowed = allowed.tril() & (sample[:, None] == sample)
    scores = (query @ key.transpose(2, 3)) * scaling
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def test_packed_samples_stay_apart_in_flash_kernels():
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    kind = kinds()[0]
    inputs, talks = batch(kind, "turns", "right")
    want = expected(kind, kind.build().train(), inputs, talks)
    name = "emulated_2d"
    AttentionInterface.register(name, unpacking_flash)
    AttentionMaskInterface.register(name, flash_attention_mask)
    try:
        model = kind.build().train()
        model.set_attn_implementation(name)
        foveate.prepare(model, METHOD)
        loss = model(**called(pack(kind, model, inputs, talks)), use_cache=False).loss
        compare((loss, gradients(loss, kind.leaves(model, inputs))), want)
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def test_samples_packed_by_lengths_alone_are_refused(kind, model):
    inputs, talks = batch(kind, "turns", "right")
    packed = called(pack(kind, model, inputs, talks))
    foveate.prepare(model, METHOD)
    with pytest.raises(InputError, match="cu_seq_lens_q tells the attention kernel"):
        model(**packed, cu_seq_lens_q=torch.tensor([0, 70, 120]), use_cache=False)


@pytest.mark.parametrize("after", [False, True])
def test_layers_within_checkpoint_wrappers_are_recomputed_alike(kind, model, after):
    """As FSDP's activation checkpointing wraps them, around their hooks."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inputs, talks = batch(kind, "turns", "left")
    want = expected(kind, model, inputs, talks)
    leaves = list(kind.leaves(model, inputs).values())
    layers = model.model.language_model.layers
    if not after:
        foveate.prepare(model, METHOD)
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    if after:
        foveate.prepare(model, METHOD)
    replays = session_of(model).text.forward.replays
    loss = model(**called(inputs), use_cache=False).loss
    assert len(replays) == (0 if after else 1)
    named = dict(zip(want[1], leaves, strict=True))
    torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    compare((loss, gradients(loss, named)), want)  # the second time too
    assert not len(replays)  # nothing is kept after the backward pass


@pytest.mark.parametrize("how", ["layers", "model"])
def test_compiled_models_train_alike(how):
    kind = kinds()[1]
    inputs, talks = batch(kind, "turns", "left")
    model = kind.build().train()
    want = expected(kind, model, inputs, talks)
    operations = 0  # that ran compiled

    def backend(graph, _):
        count = sum(node.op == "call_function" for node in graph.graph.nodes)

        def run(*args):
            nonlocal operations
            operations += count
            return graph.forward(*args)

        return run

    def compiled_loss():
        nonlocal operations
        operations = 0
        torch._dynamo.reset()
        return model(**called(inputs), use_cache=False).loss

    for module in model.model.language_model.layers if how == "layers" else [model]:
        module.compile(backend=backend, dynamic=True)
    compiled_loss()
    plain = operations
    foveate.prepare(model, METHOD)
    torch._dynamo.utils.counters.clear()
    loss = compiled_loss()
    compare((loss, gradients(loss, kind.leaves(model, inputs))), want)
    assert operations > 0.95 * plain > 200  # all that layers do
    if how == "layers":
        assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
