"""HoT in encoders of videos: layers by hand, choices by a loop, batches, accounts, training."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    Trainer,
    TrainingArguments,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    VivitConfig,
    VivitModel,
    VJEPA2Config,
    VJEPA2Model,
)

import foveate
from foveate.core import VisualTokens
from foveate.errors import BudgetError, FoveateError, InputError, LayerError, UnsupportedModelError
from foveate.families import find_family
from foveate.measure.account import account
from foveate.methods import HoT, ToMe
from foveate.methods.hot import Frames
from foveate.ops.frames import FrameRecovery
from foveate.training.prepare import session_of
from tests.mixste import MixSTE, Sizes
from tests.tinies import tiny_llava
from tests.vision.encoders import ENCODERS, images, row_of
from tests.vision.encoders import build as build_named

FRAMES, CELLS, WIDTH = 8, 4, 32
SIZES = {
    "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8,
    "initializer_range": 0.2,
}  # fmt: skip
MODELS = {
    "videomae": lambda **more: VideoMAEModel(
        VideoMAEConfig(
            **SIZES, image_size=16, num_frames=2 * FRAMES, intermediate_size=48,
            use_mean_pooling=False, **more,
        )
    ),
    "vivit": lambda **more: VivitModel(
        VivitConfig(
            **SIZES, image_size=16, num_frames=2 * FRAMES, tubelet_size=[2, 8, 8],
            intermediate_size=48, **more,
        )
    ),
    "vjepa2": lambda **more: VJEPA2Model(
        VJEPA2Config(
            **SIZES, crop_size=16, frames_per_clip=2 * FRAMES, mlp_ratio=2, pred_hidden_size=24,
            pred_num_attention_heads=4, pred_num_hidden_layers=2, pred_mlp_ratio=2, **more,
        )
    ),
}  # fmt: skip
METHODS = {
    "hourglass": HoT(layer=2, frames=3),
    "share": HoT(layer=1, keep=0.5, k=3),
    "cluster": HoT(layer=2, frames=3, recover=False),
}


def build(name, attention="sdpa", **more):
    torch.manual_seed(0)
    model = MODELS[name](**more).eval()
    model.set_attn_implementation(attention)
    return model


def clips(name, count=3, seed=0, frames=2 * FRAMES):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, frames, 3, 16, 16, generator=generator)
    if name == "vjepa2":
        return {"pixel_values_videos": pixels, "skip_predictor": True}
    return {"pixel_values": pixels}


def trained(session, seed=0):
    """A session whose new parameters say something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in session.learned.parameters():
            parameter.normal_(std=0.3)
    return session


def chosen_by_hand(x, count, k, middle=None):
    """Frames of (F, D) at the peaks of density; of equally dense ones the earlier is denser."""
    x, total = x.double(), len(x)
    far = [[float((a - b).norm()) / math.sqrt(x.shape[1]) for b in x] for a in x]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in far]
    score = []
    for i in range(total):
        denser = [
            far[i][j]
            for j in range(total)
            if density[j] > density[i] + 1e-12 or (j < i and density[j] > density[i] - 1e-12)
        ]
        score.append(density[i] * min(denser, default=max(map(max, far))))
    if middle is not None:
        score[middle] = math.inf
    return sorted(sorted(range(total), key=lambda i: -score[i])[:count])


def recovered_by_hand(learned, x):
    """(F, D) one place in all frames, from (K, D) of those that were kept: head by head."""
    query, key = learned.query(learned.queries), learned.key(x)
    value, parts = learned.value(x), []
    size = WIDTH // learned.heads
    for start in range(0, WIDTH, size):
        head = slice(start, start + size)
        scores = query[:, head] @ key[:, head].T / math.sqrt(size)
        parts.append(scores.softmax(-1) @ value[:, head])
    return learned.queries + learned.output(torch.cat(parts, -1))


def layers_by_hand(model, name, states, first, rows):
    """(N, D) output of the layers from one on; rows are the numbers of patches among all."""
    for layer in find_family(model).encoder.layers[first:]:
        told = {"position_mask": rows[None]} if name == "vjepa2" else {}
        out = layer(states[None], **told)
        states = (out if isinstance(out, torch.Tensor) else out[0])[0]
    return states


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_states_are_those_of_the_layers_by_hand(name, case):
    model, inputs, method = build(name), clips(name), METHODS[case]
    special = int(name == "vivit")
    plain = model(**inputs, output_hidden_states=True)
    session = trained(foveate.use(model, method))
    with session as run:
        got = model(**inputs).last_hidden_state
        kept = [next(iter(video.values())) for video in run.kept]
    assert (got - plain.last_hidden_state).abs().max() > 0.05, "the test does not bite"
    count = method.frames or 4
    for row, before in enumerate(plain.hidden_states[method.layer]):
        patches = before[special:].unflatten(0, (FRAMES, CELLS))
        middle = None if method.recover else (FRAMES - 1) // 2
        chosen = chosen_by_hand(patches.mean(1), count, method.k, middle)
        rows = torch.arange(FRAMES * CELLS).view(FRAMES, CELLS)[chosen].flatten()
        assert torch.equal(kept[row], rows)
        now = patches[chosen]
        if method.recover:
            now = now + session.learned["0"].positions[:, None]
        states = torch.cat((before[:special], now.flatten(0, 1)))
        states = layers_by_hand(model, name, states, method.layer, rows)
        norm = getattr(model, "layernorm", None) or model.encoder.layernorm
        late = not method.recover and name != "vjepa2"  # whose rows come back after the norm
        states = norm(states) if late else states
        now = states[special:].unflatten(0, (count, CELLS))
        if method.recover:
            learned = session.learned["0"]
            every = torch.stack([recovered_by_hand(learned, now[:, n]) for n in range(CELLS)], 1)
        else:
            every = now.mean((0, 1)).expand(FRAMES, CELLS, -1).clone()
            every[chosen] = now
        want = torch.cat((states[:special], every.flatten(0, 1)))
        want = want if late else norm(want)
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=5e-5)


@torch.no_grad()
def test_of_frames_that_are_alike_the_earlier_stands_for_the_later():
    """With k = 2 each of two is the other's nearest, and both are equally dense."""
    frames = torch.randn(1, 4, 16).repeat_interleave(2, 1)
    for method in (HoT(), HoT(k=1)):
        assert HoT.scores(method, frames).topk(4).indices.sort().values.tolist() == [[0, 2, 4, 6]]
    found = {
        tuple(HoT(seed=seed).scores(frames).topk(4).indices.sort().values[0].tolist())
        for seed in range(5)
    }
    assert len(found) > 1, "a seed draws which"
    assert all([n // 2 for n in chosen] == [0, 1, 2, 3] for chosen in found)
    again = HoT(seed=3).scores(frames)
    assert torch.equal(again, HoT(seed=3).scores(frames))


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_batch_equals_rows(name, case):
    model, inputs = build(name), clips(name, 4)
    with trained(foveate.use(model, METHODS[case])):
        together = model(**inputs).last_hidden_state
        for row in range(4):
            one = {k: v[row : row + 1] if torch.is_tensor(v) else v for k, v in inputs.items()}
            alone = model(**one).last_hidden_state[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("method", [HoT(keep=1.0), HoT(frames=FRAMES), HoT(99, 99, recover=False)])
@torch.no_grad()
def test_keeping_all_frames_changes_no_bit(method):
    layer = 3 if method.layer == 99 else method.layer
    method = HoT(layer=layer, frames=method.frames, recover=method.recover, keep=method.keep)
    model, inputs = build("videomae"), clips("videomae")
    want = model(**inputs).last_hidden_state
    with trained(foveate.use(model, method)):
        assert torch.equal(model(**inputs).last_hidden_state, want)


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("name", ["videomae", "vivit"])
@torch.no_grad()
def test_predicted_flops_equal_the_ones_torch_counts(name, case):
    model, inputs = build(name, "eager"), clips(name, 2)
    with foveate.use(model, METHODS[case]) as run:
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
        distances = 2 * 2 * FRAMES**2 * WIDTH  # a method's own arithmetic is not counted
        found = account(run.record, run.family, run.methods).total
    assert found == counter.get_total_flops() - distances


def test_published_frames_are_a_third_from_three_eighths_of_the_layers_on():
    assert HoT().kept_of(243) == 81
    family = find_family(build("videomae", num_channels=3))
    (step,) = HoT().steps(family)
    assert (step.layer, step.frames, step.site) == (1, FRAMES, "vision:1")
    assert HoT().count(32, 32, step, 0) == 2 * CELLS
    assert HoT(keep=0.01).count(32, 32, step, 0) == CELLS
    assert HoT(recover=False).learned(family) is None
    assert isinstance(HoT().learned(family), FrameRecovery)


def weights_alone(run):
    """FLOPs of products with weights, as the release's counter sees them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    return sum(n for name, n in counts.items() if "bmm" not in str(name))


def test_savings_of_the_pose_model_are_the_published_ones():
    """Nearly 40 %: here queries are projected once, where the release does so for each joint."""
    sizes = Sizes()
    with torch.device("meta"):
        model, learned = MixSTE(sizes), FrameRecovery(sizes.width, sizes.frames, 81, 8)
        poses = torch.empty(1, sizes.frames, sizes.joints, 2)
        index = torch.arange(sizes.frames * sizes.joints)[None]
    step = Frames("vision", 3, frames=sizes.frames)

    def shown(x):
        grid, frames = (1, sizes.joints), sizes.frames
        flat = x.flatten(1, 2)
        return VisualTokens(lambda: flat, index, grid, step=step, frames=frames, learned=learned)

    whole = weights_alone(lambda: model(poses))
    saved = {}
    for recover in (False, True):
        method = HoT(layer=3, frames=81, recover=recover)
        ours = weights_alone(lambda method=method: model(poses, method, shown))
        saved[recover] = 100 * (1 - ours / whole)
    queries = 2 * sizes.frames * (sizes.joints - 1) * sizes.width**2
    assert saved[False] == pytest.approx(41.7, abs=0.05)
    assert saved[True] - 100 * queries / whole == pytest.approx(39.6, abs=0.05)


# -- training


class Brightest(torch.utils.data.Dataset):
    """Videos whose class is in which half they are bright."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(count, 2 * FRAMES, 3, 16, 16, generator=generator) * 0.3
        self.labels = torch.arange(count) % 2
        for video, label in zip(self.pixels, self.labels.tolist(), strict=True):
            video[:, :, :, 8 * label : 8 * label + 8] += 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, number):
        return {"pixel_values": self.pixels[number], "labels": self.labels[number]}


def test_a_stock_trainer_trains_it_and_it_is_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    config = build("videomae").config
    config.use_mean_pooling, config.num_labels = True, 2
    model, data = VideoMAEForVideoClassification(config), Brightest(16)
    method = METHODS["hourglass"]
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
    changed = {k for k, v in model.foveate.named_parameters() if not torch.equal(v, start[k])}
    assert changed >= set(start) - {k for k in start if k.endswith("key.bias")}
    foveate.save(model.eval(), tmp_path / "out")
    again = foveate.load(tmp_path / "out")
    assert session_of(again).methods == (method,)
    inputs = {"pixel_values": data.pixels[:3]}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_reports_say_that_what_brings_frames_back_is_to_be_trained():
    for method, said in ((METHODS["hourglass"], True), (METHODS["cluster"], False)):
        model = build("videomae")
        with foveate.use(model, method) as run:
            model(**clips("videomae"))
        assert ("to be trained" in " ".join(str(run.report()).split())) == said


# -- refusals


def test_what_cannot_be_served_is_refused_with_the_reason():
    video = build("videomae")
    with pytest.raises(UnsupportedModelError, match=r"'hot' chooses among the frames .* 'vit' enc"):
        foveate.use(build_named(ENCODERS, "vit"), HoT())
    with pytest.raises(UnsupportedModelError, match=r"'hot' is for encoders alone, but"):
        foveate.use(tiny_llava(), HoT(layer=1))
    with pytest.raises(LayerError, match=r"tome acts at vision:0 of an encoder that hot lets"):
        foveate.use(video, [ToMe(r=2), HoT(layer=2)])
    with pytest.raises(FoveateError, match="heads of hot must divide the encoder's width 32"):
        foveate.use(video, HoT(heads=5))
    with pytest.raises(BudgetError, match="keep must be one share"):
        HoT(keep=9)
    longer = build("vjepa2")
    with (
        pytest.raises(InputError, match=r"set up for the 8 frames .* but one has 4"),
        foveate.use(longer, HoT()),
    ):
        longer(**clips("vjepa2", frames=FRAMES))
    assert set(row_of(images(2), 0)) == {"pixel_values"}
