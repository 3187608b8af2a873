"""What is only so in one family: a classifier around a model, routes, views, counts of images."""

import pytest
import torch
from transformers import ShieldGemma2ForImageClassification

import foveate
from foveate.core.tokens import Shape
from foveate.errors import InputError
from foveate.families import find_family
from foveate.record.boxes import cells
from tests.conformance import oracle
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import TOLERANCE, model_of, prompt
from tests.conformance.test_pixels_grids import model_of as grids_model
from tests.conformance.test_pixels_grids import prompt as on_grids
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh, loud
from tests.methods_for_tests import EveryThird
from tests.oracle import Spec


def test_the_classifier_of_shieldgemma_is_served_by_the_model_within():
    inputs, _ = prompt("shieldgemma2")
    config = MEMBERS["shieldgemma2"]().config()
    config.yes_token_index, config.no_token_index = 11, 13
    torch.manual_seed(0)
    model = ShieldGemma2ForImageClassification._from_config(config).eval()
    with torch.no_grad():
        plain = model(**fresh(inputs)).logits
        with foveate.use(model, EveryThird(1.0)):
            assert torch.equal(model(**fresh(inputs)).logits, plain)
        with foveate.use(model, EveryThird(3)) as run:
            pruned = model(**fresh(inputs)).logits
            want = model.model(**fresh(inputs)).logits[:, -1, [11, 13]]
        assert all(len(image["pre_llm"]) == 3 for image in run.kept)
        assert torch.equal(pruned, want)
        assert not torch.equal(pruned, plain)
        assert torch.equal(model(**fresh(inputs)).logits, plain)


def test_the_fine_route_of_granite_docling_has_four_times_as_many_tokens():
    member, model = MEMBERS["granite_docling"](), model_of("granite_docling")
    pixels = member.pixels(2) | {"tile_fine_mask": torch.ones(1, dtype=torch.bool)}
    ids = torch.tensor([[5, 7, *[member.image_id] * 64, 8, *[member.image_id] * 64, 9, 11]])
    inputs = {"input_ids": ids, **pixels}
    with torch.no_grad(), foveate.use(model, EveryThird(8)) as run:
        got = model.model(**fresh(inputs)).last_hidden_state[0, -1]
        model.generate(**fresh(inputs), max_new_tokens=2, do_sample=False)
    assert [image.grid for image in run.record.images] == [(8, 8)] * 2
    spec = Spec(kept=[torch.arange(0, 24, 3)] * 2)
    eager = model_of("granite_docling", "eager")
    want, _ = oracle.run(member, eager, fresh(inputs), spec, ids.shape[1], [64, 64])
    torch.testing.assert_close(got, want[-1], rtol=0, atol=TOLERANCE)


def test_the_last_view_of_step_is_the_whole_image():
    family = find_family(model_of("step3p7"))
    boxes = family.boxes("image", 0, Shape(48, (1, 48)), {})
    assert boxes[:32].isnan().all()
    assert torch.equal(boxes[32:], cells(4, 4))
    assert family.boxes("image", 0, Shape(9, (1, 9)), {}).isnan().all()


def test_boxes_of_hunyuan_leave_newlines_out():
    family = find_family(model_of("hunyuan_vl"))
    grids = {"image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 6]])}
    boxes = family.boxes("image", -1, Shape(10, (1, 10)), grids)
    assert boxes[:, 0].isnan().tolist() == [True, *[False] * 3, True, *[False] * 3, True, True]
    assert torch.equal(boxes[5:8], cells(2, 3)[3:])
    with pytest.raises(foveate.FoveateError, match=r"2 x 2 visual tokens.*8, but there are 7"):
        family.shapes("image", [torch.zeros(7, 4)], {"image_grid_thw": grids["image_grid_thw"][:1]})


class CountsThrough(MEMBERS["hunyuan_vl"]):
    """HunyuanVL as it is: images are counted through all rows of a batch."""

    by_row = False


def test_rows_of_hunyuan_have_the_positions_that_transformers_gives_them_in_the_batch():
    """Without a session too, a row after one with images differs from the row alone."""
    member = CountsThrough()
    model, eager = loud(member.build()), loud(member.build("eager"))
    inputs, rows = batch_of(member, model, (2, 0, 1))
    (_, _, last) = rows
    with torch.no_grad():
        native = model.model(**fresh(inputs)).last_hidden_state[2, -1]
        alone = model.model(**fresh(last)).last_hidden_state[0, -1]
        assert (native - alone).abs().max() > 1e-3
        with foveate.use(model, EveryThird(4)):
            got = model.model(**fresh(inputs)).last_hidden_state[2, -1]
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"],
        inputs["attention_mask"],
    )  # fmt: skip
    length = last["input_ids"].shape[1]
    whole = fresh(last) | {"position_ids": positions[:, 2:, -length:]}
    (count,) = member.counts(model, member.take(member.pixels(3), 2, 3))
    spec = Spec(kept=[torch.arange(0, 12, 3)])
    want, _ = oracle.run(member, eager, whole, spec, length, [count])
    torch.testing.assert_close(got, want[-1], rtol=0, atol=TOLERANCE)


def test_frames_that_video_llama_has_compressed_are_refused():
    """A mask of the processor leaves tokens out after the encoder; one that leaves none is fine."""
    model, (inputs, (count,), _) = grids_model("video_llama_3"), on_grids("video_llama_3", "video")
    (ids,), mask = inputs["input_ids"], torch.ones(count, dtype=torch.bool)
    with torch.no_grad(), foveate.use(model, EveryThird(4)) as run:
        model.model(**fresh(inputs), video_compression_mask=mask)
        assert [image.total for image in run.record.images] == [count]
        mask[9:16] = False
        left = torch.ones_like(ids, dtype=torch.bool)
        left[(ids == model.config.video_token_id).nonzero()[9:16, 0]] = False
        given = {"input_ids": ids[left][None], "video_compression_mask": mask}
        with pytest.raises(InputError, match=r"17 image placeholders.*24 visual tokens"):
            model.model(**{**fresh(inputs), **given, "attention_mask": None})


def test_codes_of_emu3_have_places_and_ends_of_rows_have_none():
    family = find_family(model_of("emu3"))
    given = {"image_sizes": torch.tensor([[24, 32], [32, 16]])}
    boxes = family.boxes("image", -1, Shape(12, (1, 12)), given).view(4, 3, 4)
    torch.testing.assert_close(boxes[:, :2].flatten(0, 1), cells(4, 2))
    assert boxes[:, 2].isnan().all()
    assert family.boxes("image", 0, Shape(12, (1, 12)), {}).isnan().all()
    with pytest.raises(InputError, match=r"says 4 x 2 visual tokens, with ends of rows 12, .* 11"):
        family.shapes("image", [torch.zeros(11, 64)], given)
