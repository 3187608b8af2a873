"""GTP-ViT, Zero-TPrune and Token Transforming inside encoders: an oracle that runs modules by hand.

Attention is an explicit softmax, and each reduction a matrix that is filled entry by entry.
"""

import pytest
import torch

import foveate
from foveate.errors import FoveateError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.methods import BiFormer, FastVGGT, GTPViT, ToC3D, TokenTransforming, ZeroTPrune
from tests.vision.encoders import ENCODERS, PATCHES, SIDE, SPECIAL, build, images, row_of
from tests.vision.oracle import NAMES

TOLERANCE = 2e-5  # relative to the mean size of the values
METHODS = {
    "gtp": GTPViT(r=5),
    "gtp-schedule": GTPViT(r=(0, 9, 0, 4), alpha=0.4),
    "gtp-spatial": GTPViT(r=4, graph="spatial", score="received-mean"),
    "gtp-semantic": GTPViT(r=4, graph="semantic", neighbours=3, score="diagonal-max"),
    "gtp-sparse": GTPViT(r=4, sparsity=0.6, score="sum-max", token_scale=True),
    "gtp-scale": GTPViT(r=6, alpha=0.5, token_scale=True, score="cosine-mean"),
    "gtp-keep": GTPViT(keep=0.5),
    "zero": ZeroTPrune(layers=(0, 2), keep=(24, 11)),
    "zero-votes": ZeroTPrune(layers=(1,), keep=10, similar=0.0, iterations=(7,)),
    "zero-alike": ZeroTPrune(layers=(1,), keep=20, similar=1.0, start="uniform"),
    "zero-heads": ZeroTPrune(layers=(0,), keep=9, variance=(0.05, 0.2), start="uniform"),
    "transforming": TokenTransforming(
        layers=(1, 3), keep=(20, 9), temperature=0.05, prop_attn=True
    ),
    "transforming-even": TokenTransforming(layers=(2,), keep=12, temperature=0.3, prop_attn=False),
}
NAMED = ("vit", "deit", "dinov2-registers", "siglip")


class Hand:
    """One image: rows `x` (N, D), of which patches stand at `at`; `undo` takes them back."""

    def __init__(self, model, states, special):
        self.config, self.special, self.x = model.config, special, states
        self.names = NAMES[model.config.model_type]
        self.at, self.mass = list(range(len(states) - special)), torch.ones(len(states) - special)
        self.counted, self.undo, self.kept = False, [], []

    def attend(self, layer, change=lambda weights: weights):
        norm1, attention, _, out = self.names
        module, heads = getattr(layer, attention), self.config.num_attention_heads
        normed = getattr(layer, norm1)(self.x)
        q, k, v = (
            getattr(module, name)(normed).view(len(normed), heads, -1).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if self.counted:
            scores = scores + torch.cat((torch.ones(self.special), self.mass)).log()
        self.weights, self.keys = change(scores.softmax(-1)), k
        mixed = getattr(module, out)((self.weights @ v).transpose(0, 1).flatten(1))
        if hasattr(layer, "layer_scale1"):
            mixed = mixed * layer.layer_scale1.lambda1
        self.x = self.x + mixed

    def feed(self, layer):
        fed = layer.mlp(getattr(layer, self.names[2])(self.x))
        if hasattr(layer, "layer_scale2"):
            fed = fed * layer.layer_scale2.lambda1
        self.x = self.x + fed

    def reduce(self, index, matrix, back, mass):
        """Survivors stand where tokens `index` did; `back` @ survivors undoes `matrix` @ tokens."""
        patches = self.x[self.special :]
        self.x = torch.cat((self.x[: self.special], matrix @ patches))
        self.at, self.mass = [self.at[i] for i in index], mass
        self.undo.append(back)
        self.kept.append(sorted(self.at))

    def whole(self, states):
        """All patches: a row of `back` that is zero stands for a token that nothing is left of."""
        patches = states[self.special :]
        # tokens that were dropped get the mean of those that survive
        mean = (patches * self.mass[:, None]).sum(0) / self.mass.sum()
        for back in reversed(self.undo):
            patches = torch.where((back == 0).all(1)[:, None], mean, back @ patches)
        return torch.cat((states[: self.special], patches))


def gtp(method, hand, layers):
    links = None
    schedule = [method.r] * len(layers) if isinstance(method.r, int) else list(method.r)
    total = PATCHES - round(PATCHES * method.keep) if method.keep else 0
    for number, layer in enumerate(layers):
        r = schedule[number]
        if method.keep:
            r = total * (number + 1) // len(layers) - total * number // len(layers)
        if not r:
            hand.attend(layer)
            hand.feed(layer)
            continue
        if links is None:
            links = by_hand(method, hand.x[hand.special :])
        hand.attend(layer, lambda weights: thinned(weights, method.sparsity))
        values = scored(method.score, hand.weights, hand.special)
        order = sorted(range(len(values)), key=lambda i: -float(values[i]))
        kept, gone = sorted(order[: len(order) - r]), sorted(order[len(order) - r :])
        matrix, back = torch.zeros(len(kept), len(values)), torch.zeros(len(values), len(kept))
        for row, i in enumerate(kept):
            matrix[row, i], back[i, row] = 1.0, 1.0
            for j in gone:
                matrix[row, j] = back[j, row] = method.alpha * links[hand.at[i], hand.at[j]]
        back = back / back.sum(1, keepdim=True).clamp(min=1e-30)
        mass = matrix @ hand.mass if method.token_scale else hand.mass[kept]
        hand.reduce(kept, matrix, back, mass)
        hand.counted = method.token_scale
        hand.feed(layer)


def thinned(weights, share):
    zeros = int(weights.shape[1] ** 2 * (1 - share))
    if not zeros:
        return weights
    least = weights.flatten(1).sort(dim=1).values[:, zeros - 1]
    return weights.masked_fill(weights < least[:, None, None], 0.0)


def by_hand(method, x):
    linked = torch.zeros(PATCHES, PATCHES)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)
    for i in range(PATCHES):
        near = sorted((j for j in range(PATCHES) if j != i), key=lambda j: -float(cosine[i, j]))
        for j in range(PATCHES):
            apart = max(abs(i // SIDE - j // SIDE), abs(i % SIDE - j % SIDE))
            spatial = method.graph != "semantic" and apart == 1
            semantic = method.graph != "spatial" and j in near[: method.neighbours]
            linked[i, j] = float(spatial or semantic)
    degree = linked.sum(1)
    return linked / (degree[:, None] * degree[None]).sqrt()


def scored(score, weights, special):
    kind, how = score.split("-")
    over = (lambda v: v.max(0).values) if how == "max" else (lambda v: v.mean(0))
    if kind == "cosine":
        rows = over(weights)[special:]
        alike = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        return -alike.sum(1)
    itself = over(weights.diagonal(dim1=1, dim2=2))[special:]
    received = over(weights.sum(1))[special:]
    return {"diagonal": itself, "received": received, "sum": itself + received,
            "mixed": itself * received}[kind]  # fmt: skip


def zero(method, hand, layers):
    for number, layer in enumerate(layers):
        hand.attend(layer)
        hand.feed(layer)
        if number not in method.layers:
            continue
        count = method.keep if isinstance(method.keep, int) else None
        count = count or method.keep[method.layers.index(number)]
        here = len(hand.at)
        alike = min(int((here - count) * method.similar), here // 2)
        rounds = {0: 30, 1: 5, 2: 5, 3: 1}[number]
        rounds = method.iterations[method.layers.index(number)] if method.iterations else rounds
        first = hand.special > 0 and method.start != "uniform"
        start = torch.ones(here + hand.special)
        if first:
            start[0] = len(start) ** 0.5
        value = heads(method, [vote(w, start, 1)[hand.special :] for w in hand.weights])
        order = sorted(range(here), key=lambda i: -float(value[i]))
        more, less = order[: here - here // 2], order[here - here // 2 :]
        keys = hand.keys.mean(0)[hand.special :]
        best = {
            i: max(float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in more)
            for i in less
        }
        gone = sorted(less, key=lambda i: -best[i])[:alike]
        stays = [True] * hand.special + [i not in gone for i in range(here)]
        votes = []
        for w in hand.weights:
            short = w[stays][:, stays]
            full = torch.zeros(len(stays))
            full[torch.tensor(stays)] = vote(
                short / short.sum(1, keepdim=True), start[torch.tensor(stays)], rounds
            )
            votes.append(full[hand.special :])
        value = heads(method, votes)
        order = sorted((i for i in range(here) if i not in gone), key=lambda i: -float(value[i]))
        kept = sorted(order[:count])
        matrix = torch.eye(here)[kept]
        hand.reduce(kept, matrix, matrix.T, torch.ones(count))


def vote(weights, start, rounds):
    votes = start / start.sum()
    for _ in range(rounds):
        votes = torch.stack([(votes * weights[:, j]).sum() for j in range(len(votes))])
    return votes


def heads(method, votes):
    spread = [float((v / v.mean()).var(correction=0)) for v in votes]
    least, most = method.variance
    good = [v for v, s in zip(votes, spread, strict=True) if least <= s <= most]
    good = good or votes
    return (sum(v**2 for v in good) / len(good)) ** 0.5


def transforming(method, hand, layers):
    whole = torch.eye(PATCHES)
    for number, layer in enumerate(layers):
        if number in method.layers:
            keep = method.keep if isinstance(method.keep, int) else None
            count = keep or method.keep[method.layers.index(number)]
            special, x = hand.special, hand.x[hand.special :]
            weights = hand.weights.mean(0)
            value = weights[0, special:] if special else weights.mean(0)
            kept = sorted(sorted(range(len(value)), key=lambda i: -float(value[i]))[:count])
            shares = torch.zeros(count, len(x))
            for j in range(len(x)):
                cosine = torch.cosine_similarity(x[kept], x[j][None], dim=-1)
                shares[:, j] = (cosine / method.temperature).softmax(0) * hand.mass[j]
            matrix = shares / shares.sum(1, keepdim=True)
            back = matrix.T / matrix.T.sum(1, keepdim=True)
            whole = matrix @ whole
            spread = whole.T / whole.T.sum(1, keepdim=True)
            hand.reduce(kept, matrix, back, spread.sum(0))
            hand.undo = [spread]  # of all that was done, at once
            hand.counted = method.prop_attn
        hand.attend(layer)
        hand.feed(layer)


ORACLES = {"gtp": gtp, "zero": zero, "transforming": transforming}


def layers_of(model):
    return find_family(model).encoder.layers


def distance(a, b):
    return ((a - b).abs().max() / b.abs().mean().clamp(min=1)).item()


@torch.no_grad()
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", NAMED)
def test_equals_modules_run_by_hand(name, case):
    model, inputs, method = build(ENCODERS, name), images(2, name=name), METHODS[case]
    plain = model(**inputs, output_hidden_states=True)
    with foveate.use(model, method) as run:
        got = model(**inputs)
    norm = getattr(model, "layernorm", getattr(model, "post_layernorm", None))
    for row in range(2):
        hand = Hand(model, plain.hidden_states[0][row], SPECIAL.get(name, 0))
        ORACLES[case.split("-")[0]](method, hand, layers_of(model))
        want = hand.whole(norm(hand.x))
        assert [kept.tolist() for kept in run.kept[row].values()] == hand.kept
        assert distance(got.last_hidden_state[row], want) <= TOLERANCE
        assert distance(plain.last_hidden_state[row], want) > 0.1, "the test does not bite"


@torch.no_grad()
@pytest.mark.parametrize("case", METHODS)
def test_a_batch_equals_its_rows(case):
    for name in ("deit", "siglip"):
        model, inputs = build(ENCODERS, name), images(4, name=name)
        with foveate.use(model, METHODS[case]) as run:
            together, kept = model(**inputs).last_hidden_state, run.kept
            for row in range(4):
                alone = model(**row_of(inputs, row)).last_hidden_state[0]
                assert distance(together[row], alone) <= TOLERANCE
                assert all(map(torch.equal, run.kept[0].values(), kept[row].values()))


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [GTPViT(r=0), GTPViT(keep=1.0), ZeroTPrune(keep=1.0), TokenTransforming(keep=1.0)],
)
def test_keeping_everything_changes_no_bit(method):
    for name in NAMED:
        model, inputs = build(ENCODERS, name), images(name=name)
        want = model(**inputs).last_hidden_state
        with foveate.use(model, method):
            got = model(**inputs).last_hidden_state
        assert torch.equal(got, want)


@pytest.mark.parametrize("iterations", [(), (3,)])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_rounds_are_given_with_their_layers(iterations, layers):
    with pytest.raises(LayerError, match="iterations must have one entry for each of the layers"):
        ZeroTPrune(layers=layers, keep=9, iterations=iterations)


@pytest.mark.parametrize("case", ["gtp-sparse", "gtp-scale", "zero", "transforming"])
def test_gradients_flow(case):
    model, inputs = build(ENCODERS, "vit").train(), images()
    with foveate.use(model, METHODS[case]):
        model(**inputs).last_hidden_state.square().mean().backward()
    grads = [p.grad for n, p in model.named_parameters() if "pooler" not in n]
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)
    assert all(bool(g.abs().sum() > 0) for g in grads if g.dim() > 1)


@torch.no_grad()
def test_images_are_looked_at_a_few_at_a_time(monkeypatch):
    """However few maps are held, the result is the same."""
    from foveate.ops import map_attention

    model, inputs = build(ENCODERS, "vit"), images(5)
    for case in ("gtp-sparse", "zero"):
        with foveate.use(model, METHODS[case]):
            want = model(**inputs).last_hidden_state
            monkeypatch.setitem(map_attention.HELD, "cpu", 1)
            one = model(**inputs).last_hidden_state
            monkeypatch.setitem(map_attention.HELD, "cpu", 1 << 30)
            all_at_once = model(**inputs).last_hidden_state
        for got in (one, all_at_once):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["gtp", "zero"])
def test_weights_are_dropped_in_training_as_the_kernel_would(case):
    model, inputs = build(ENCODERS, "vit", "eager"), images()
    for layer in layers_of(model):
        layer.attention.attention_dropout = 1.0  # nothing is left of any value

    def state(model):
        with torch.no_grad(), foveate.use(model, METHODS[case]):
            return model(**inputs).last_hidden_state

    plain, nothing = state(model.eval()), state(model.train())
    assert distance(nothing, plain) > 0.1
    for layer in layers_of(model):
        layer.attention.v_proj.weight.data.zero_()
        layer.attention.v_proj.bias.data.zero_()
    model.eval()
    torch.testing.assert_close(state(model), nothing, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["gtp-scale", "transforming", "zero"])
@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_checkpointing_changes_no_gradient_or_is_refused(name, case):
    found = []
    for checkpointing in (False, True):
        model, inputs = build(ENCODERS, name).train(), images(name=name)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with foveate.use(model, METHODS[case]):
            if checkpointing and case == "zero":  # whose looks are inside layers that run again
                with pytest.raises(UnsupportedModelError, match="gradient checkpointing runs a"):
                    model(**inputs)
                return
            model(**inputs).last_hidden_state.square().mean().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "method", [*METHODS.values(), FastVGGT(), BiFormer(regions=3, topk=2), ToC3D()]
)
def test_half_precision_keeps_as_many_and_stays_half(method, dtype):
    model, inputs = build(ENCODERS, "vit"), images()
    with foveate.use(model, method) as run:
        model(**inputs)
        want = run.record.encoder_tokens
        got = model.to(dtype)(inputs["pixel_values"].to(dtype)).last_hidden_state
        assert run.record.encoder_tokens == want
    assert got.dtype == dtype
    assert got.isfinite().all()


@pytest.mark.parametrize(
    "fields", [{"iterations": ()}, {"iterations": (2,)}, {"iterations": (2,), "layers": (1, 2, 3)}]
)
def test_rounds_are_given_for_each_layer(fields):
    with pytest.raises(LayerError, match="iterations must have one entry for each"):
        ZeroTPrune(**fields)


def test_the_range_of_variances_ascends():
    with pytest.raises(FoveateError, match=r"variance must be the least and the most, got \(0\.7"):
        ZeroTPrune(variance=(0.7, 0.01))
