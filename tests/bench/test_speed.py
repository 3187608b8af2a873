"""The speed benchmark measures what it says, keeps its results, and reports losses."""

import gc
import json
from contextlib import nullcontext

import pytest
import torch
from typer.testing import CliRunner

import foveate
from foveate.bench.speed import ALL, Bench, Rounds, Stopwatch, contenders, measure_cell
from foveate.bench.sweep import Sweep, losses, run_sweep
from foveate.bench.workload import fit_images, random_config, random_model, random_prompt
from foveate.cli import bench_speed as command
from foveate.cli.commands import app
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.measure import flops
from foveate.measure.memory import peak_memory
from foveate.methods import FastV, Random
from tests.tinies import LAYERS, PATCHES, prompts

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METHODS = [FastV(layer=2, keep=0.25), Random(keep=0.5)]


@pytest.fixture
def bench(llava):
    return Bench(llava, new_tokens=2, cpu_time=True)


@pytest.fixture
def made(llava):
    """Makes prompts, and notes of what size."""
    seen = []

    def make(tokens, batch):
        seen.append((tokens, batch))
        return {k: v for k, v in prompts([[4, 3]] * batch).items() if k != "attention_mask"}

    make.seen = seen
    return make


def test_a_cell_holds_every_measure(bench, made):
    cell = measure_cell(
        bench, made(36, 2), contenders(bench.model, METHODS), Rounds(3), tick=lambda: None
    )
    assert cell["repeats"] == 3
    assert list(cell["rows"]) == [ALL, "fastv", "random"]
    plain, fastv, random = cell["rows"].values()
    assert json.loads(json.dumps(cell)) == cell
    for row in cell["rows"].values():
        assert row["ttft_ms"]["median"] >= row["prefill_ms"]["median"] > 0
        assert row["vision_ms"]["median"] > 0
        assert row["decode_tokens_per_s"]["median"] > 0
    assert set(fastv["speed_up"]) == {"ttft", "prefill", "decode", "throughput"}
    assert fastv["visual_tokens"] == (2 * PATCHES + (LAYERS - 2) * 9) / LAYERS
    config = bench.model.config
    tokens = [PATCHES + 7] * 2 + [9 + 7] * (LAYERS - 2)
    assert plain["kv_bytes"] == flops.kv_bytes(config, [PATCHES + 7] * LAYERS, 2, torch.float32)
    assert fastv["kv_bytes"] == flops.kv_bytes(config, tokens, 2, torch.float32)
    assert random["peak_bytes"] < plain["peak_bytes"]
    assert plain["peak_bytes"] > plain["kv_bytes"]


def test_the_prefill_prediction_is_of_the_language_model(bench, made):
    rows = measure_cell(bench, made(36, 1), contenders(bench.model, METHODS), Rounds(1))["rows"]
    config = bench.model.config
    full = flops.prefill_flops(config, [[PATCHES + 7]] * LAYERS)
    half = flops.prefill_flops(config, [[PATCHES // 2 + 7]] * LAYERS)
    assert rows["random"]["predicted"]["prefill"] == pytest.approx(full / half)
    with torch.inference_mode(), foveate.use(bench.model, "random", keep=0.5) as session:
        bench.model(**made(36, 1))
    tower = session.report()["flops"]["vision"]
    assert tower > 0
    assert rows["random"]["predicted"]["ttft"] == pytest.approx((full + tower) / (half + tower))


def test_nothing_is_left_on_the_model(bench, made):
    before = dict(vars(bench.model.model))
    frozen = gc.get_freeze_count()
    measure_cell(bench, made(36, 1), contenders(bench.model, METHODS), Rounds(1))
    assert vars(bench.model.model) == before
    with pytest.raises(ValueError, match="exactly one"):
        measure_cell(
            bench, {"input_ids": None, "nonsense": 1}, contenders(bench.model, []), Rounds(1)
        )
    assert vars(bench.model.model) == before
    assert gc.get_freeze_count() == frozen


def test_a_session_that_was_there_stays(bench, made):
    with foveate.use(bench.model, "random", keep=0.25) as session:
        with pytest.raises(FoveateError, match="already carries"):
            measure_cell(bench, made(36, 1), contenders(bench.model, METHODS), Rounds(1))
        bench.model(**made(36, 1))
        assert [len(kept["pre_llm"]) for kept in session.kept] == [9]


def test_a_cache_that_is_not_as_reported_is_an_error(bench, made, monkeypatch):
    monkeypatch.setattr("foveate.report.report.flops.kv_bytes", lambda *_: 12)
    with pytest.raises(FoveateError, match=r"fastv: the cache holds .* says 12"):
        measure_cell(bench, made(36, 1), contenders(bench.model, METHODS), Rounds(1))


def test_phases_are_the_times_between_marks():
    now = iter([1.0, 1.5, 3.5, 4.0])
    watch = Stopwatch(torch.device("cpu"), cpu_time=True)
    watch._clock = lambda: next(now)
    for name in ("start", "vision", "prefill", "decode"):
        watch.mark(name)
    assert watch.phases_ms() == {"vision": 500.0, "prefill": 2000.0, "decode": 500.0}
    now = iter([1.0, 2.0])
    watch.mark("start")
    watch.mark("prefill")
    assert watch.phases_ms() == {"vision": 0.0, "prefill": 1000.0, "decode": 0.0}


def test_on_cuda_events_are_timed(monkeypatch):
    class Event:
        now = iter([10.0, 12.0, 17.0, 18.0])

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(Event.now)

        def elapsed_time(self, other):
            return other.at - self.at

    synchronised = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronised.append)
    watch = Stopwatch(torch.device("cuda"), cpu_time=False)
    for name in ("start", "vision", "prefill", "decode"):
        watch.mark(name)
    assert synchronised == []
    assert watch.phases_ms() == {"vision": 2.0, "prefill": 5.0, "decode": 1.0}
    assert synchronised == [torch.device("cuda")]


def test_a_slow_method_is_found_and_listed(bench, made, monkeypatch):
    """Runs are replaced by known times: fastv takes longer to decode, random is at the edge."""
    entrants = contenders(bench.model, METHODS)
    order = iter([*entrants, *reversed(entrants)] * 9)
    times = {ALL: [10, 10, 10, 10], "fastv": [20, 20, 19, 21], "random": [11, 11, 10.5, 5]}
    numbers = {name: iter([10, *of]) for name, of in times.items()}

    def run(_):
        decode = next(numbers[next(order)])
        return {"vision": 1, "prefill": 5, "decode": decode, "ttft": 6, "total": 6 + decode}

    monkeypatch.setattr(Bench, "run", lambda self, inputs: run(inputs))
    sweep = Sweep("tiny", tokens=(36,), batches=(1,), repeats=4)
    result = run_sweep(sweep, bench, entrants, made)
    rows = result["cells"][0]["rows"]
    assert rows["fastv"]["slower"] == ["decode", "throughput"]
    assert rows["random"]["slower"] == []
    assert rows["random"]["perhaps_slower"] == ["decode", "throughput"]
    assert rows["fastv"]["speed_up"]["decode"]["median"] == 0.5
    assert losses(result)[0].startswith("fastv, 36 visual tokens, batch 1: decode 0.50x")
    assert len(losses(result)) == 2
    assert command._style(rows["fastv"]) == "red"
    assert command._style(rows["random"]) == "yellow"
    assert command._style(rows[ALL]) == ""


def test_finished_cells_are_kept_and_others_added(bench, made, tmp_path):
    path = tmp_path / "speed.json"
    entrants = contenders(bench.model, METHODS[:1])
    run_sweep(Sweep("m", (36,), (2, 1), repeats=1), bench, entrants, made, path)
    assert made.seen == [(36, 1), (36, 2)]
    first = json.loads(path.read_text())
    run_sweep(Sweep("m", (36,), (1, 2, 3), repeats=1), bench, entrants, made, path)
    assert made.seen[2:] == [(36, 3)]
    again = json.loads(path.read_text())
    assert again["cells"][:2] == first["cells"]
    assert [cell["batch"] for cell in again["cells"]] == [1, 2, 3]
    with pytest.raises(InputError, match=r"other settings \(repeats\)"):
        run_sweep(Sweep("m", (36,), (1,), repeats=2), bench, entrants, made, path)
    path.write_text("[]")
    with pytest.raises(InputError, match="holds no result"):
        run_sweep(Sweep("m", (36,), (1,), repeats=1), bench, entrants, made, path)


def test_a_cell_that_fails_leaves_the_others_saved(bench, made, tmp_path):
    path, entrants = tmp_path / "speed.json", contenders(bench.model, METHODS[:1])

    def broken(tokens, batch):
        if batch == 2:
            raise KeyboardInterrupt
        if batch == 3:
            raise torch.OutOfMemoryError
        return made(tokens, batch)

    ticks = []
    with pytest.raises(KeyboardInterrupt):
        run_sweep(Sweep("m", (36,), (1, 2), repeats=1), bench, entrants, broken, path)
    assert [cell["batch"] for cell in json.loads(path.read_text())["cells"]] == [1]
    sweep = Sweep("m", (36,), (1, 3), repeats=1)
    result = run_sweep(sweep, bench, entrants, broken, path, lambda *_: ticks.append(1))
    assert result["cells"][1]["error"] == "out of memory"
    assert len(ticks) == sweep.runs(2)


def test_a_time_limit_cuts_repeats_and_says_so(bench, made):
    entrants, ticks = contenders(bench.model, METHODS[:1]), []
    sweep = Sweep("m", (36,), (1,), repeats=500, minutes=1e-9)
    result = run_sweep(sweep, bench, entrants, made, say=lambda *_: ticks.append(1))
    assert result["cells"][0]["repeats"] == 3
    assert result["cells"][0]["cut"] == "3 of 500 repeats, to keep the time limit"
    assert len(ticks) == sweep.runs(2)


@pytest.mark.parametrize(
    "wrong",
    [{"tokens": ()}, {"batches": (0,)}, {"batches": (1, 1)}, {"repeats": 0}, {"minutes": 0}],
)
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(InputError):
        Sweep("m", **wrong)


def test_peak_memory_is_the_worst_moment():
    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + second

    assert 8000 <= peak_memory(call) < 9000


@needs_cuda
@pytest.mark.gpu
def test_peak_memory_on_cuda():
    assert peak_memory(lambda: torch.zeros(1 << 20, device="cuda").add(1), "cuda") >= 8 << 20


@needs_cuda
@pytest.mark.gpu
def test_a_cell_on_cuda():
    model = random_model("llama-64x4", "cuda", torch.bfloat16)
    cell = measure_cell(
        Bench(model, 2, cpu_time=False),
        random_prompt(model, 576, 2),
        contenders(model, METHODS),
        Rounds(3),
    )
    assert all(row["ttft_ms"]["median"] > 0 for row in cell["rows"].values())


@pytest.mark.parametrize(("tokens", "batch"), [(576, 1), (1100, 2)])
def test_random_llava_sees_images_of_576(tokens, batch):
    model = random_model("llama-64x4", "cpu", torch.float32)
    inputs = random_prompt(model, tokens, batch, text=10)
    count = {576: 576, 1100: 1152}[tokens]
    assert inputs["input_ids"].shape == (batch, count + 10)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [count] * batch
    with torch.inference_mode(), foveate.use(model, "random", keep=0.25) as run:
        model(**inputs, logits_to_keep=1)
    assert [image["after"]["pre_llm"] for image in run.report()["images"]] == [144] * (
        batch * count // 576
    )


@pytest.mark.parametrize(
    ("name", "tokens", "count"),
    [("llava-next-7b", 576, 1752), ("llava-next-7b", 2880, 2928), ("qwen3-vl-4b", 1920, 1920)],
)
def test_bundled_sizes_run_when_made_small(name, tokens, count):
    """The same configs, a few layers of small width, so that the prompts are checked."""
    from transformers import AutoModelForImageTextToText

    config = random_config(name)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.vocab_size, text.intermediate_size = 2, 1024, 32
    text.hidden_size, text.num_attention_heads, text.num_key_value_heads = 64, 2, 2
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:2]
    if name.startswith("qwen"):
        text.head_dim = 128
        vision.depth, vision.deepstack_visual_indexes, vision.out_hidden_size = 2, [0], 64
    else:
        text.head_dim = 32
        vision.num_hidden_layers = 2
    vision.hidden_size, vision.intermediate_size = 32, 32
    vision.num_heads = vision.num_attention_heads = 2
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs = random_prompt(model, tokens, 2, text=6)
    assert inputs["input_ids"].shape == (2, count + 6)
    with torch.inference_mode(), foveate.use(model, "fastv", layer=1, keep=0.25) as run:
        model(**inputs, logits_to_keep=1)
    assert [image["tokens"] for image in run.report()["images"]] == [count] * 2


def test_sizes_are_those_of_the_checkpoints():
    """Parameters of the published models: 7.06, 7.06 + newline and 4.44 billion."""
    from transformers import AutoModelForImageTextToText

    for name, billions in [("llava-7b", 7.06), ("llava-next-7b", 7.06), ("qwen3-vl-4b", 4.44)]:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(random_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("name", ["nope", "llama-100x8", "llama-64x1"])
def test_unknown_sizes_are_refused(name):
    with pytest.raises(InputError):
        random_config(name)


@pytest.mark.parametrize(
    ("count", "tokens", "want"),
    [
        (lambda side, number: 576 * number, 2880, (336, 5)),
        (lambda side, number: (side // 28) ** 2 * number, 576, (672, 1)),
        (lambda side, number: 256 * number, 100, (336, 1)),
    ],
    ids=["fixed tiles", "any size", "never none"],
)
def test_images_fit_the_wish(count, tokens, want):
    assert fit_images(count, tokens) == want


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(command, "warm_heap", lambda threads: None)


def test_command_measures_the_packaged_model(in_this_process, tmp_path):
    path = tmp_path / "out.json"
    line = (
        "bench --speed --model tiny --methods fastv,pyramiddrop --keep 0.25 --set "
        "pyramiddrop.keep=0.5,0.25,0.125 --set fastv.layer=3 --tokens 256 --batch 1 --repeats 2 "
        f"--new-tokens 1 --threads 1 --json {path}"
    )
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, done.output
    assert "256 visual tokens, batch 1, 2 repeats" in done.output
    result = json.loads(path.read_text())
    methods = result["settings"]["methods"]
    assert methods[0] == {"method": "fastv", "layer": 3, "keep": 0.25, "positions": None}
    assert methods[1]["keep"] == [0.5, 0.25, 0.125]
    assert result["settings"]["attention"] == "sdpa"
    assert result["machine"]["torch"] == torch.__version__


def test_a_result_that_cannot_be_saved_is_refused_first(in_this_process, tmp_path):
    line = f"bench --speed --model nowhere --json {tmp_path}/none/out.json"
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 2
    assert "there is no folder" in done.output


@pytest.mark.parametrize(
    ("names", "keep", "settings", "error"),
    [
        ("fastv,fastv", None, (), InputError),
        ("", None, (), InputError),
        ("fastv", None, ("layer=2",), InputError),
        ("fastv", None, ("random.seed=2",), InputError),
        ("fastv", "7.5", (), BudgetError),
    ],
)
def test_wrong_methods_are_refused(names, keep, settings, error):
    with pytest.raises(error):
        command.read_methods(names, keep, settings)


def test_a_method_that_the_model_cannot_serve_is_refused(llava):
    contenders(llava, [Random()])
    with pytest.raises(FoveateError):
        contenders(llava, [FastV(layer=99)])


def test_all_tokens_run_without_a_session(llava):
    assert contenders(llava, [])[ALL].setting is nullcontext
