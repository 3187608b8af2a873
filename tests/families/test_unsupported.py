"""Families that are refused say why, and no family is both served and refused."""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import transformers
from packaging.version import Version
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from foveate.engine.cache_argument import CACHE
from foveate.errors import UnsupportedModelError
from foveate.families import find_family, list_families, unsupported_families
from tests.conformance.zoo import MEMBERS

NEWER = {"hy_v4_vl": "5.24", "inkling2_loop": "5.24"}
"""Model types that came with a release later than the oldest that is supported."""


def there(model_types):
    """Those that the installed transformers has."""
    here = Version(transformers.__version__)
    return [each for each in model_types if here >= Version(NEWER.get(each, "0"))]


@pytest.mark.parametrize("model_type", unsupported_families())
def test_refusal_names_the_reason_and_what_works(model_type):
    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    with pytest.raises(UnsupportedModelError) as error:
        find_family(model)
    message = str(error.value)
    assert message.startswith(f"model type {model_type!r} is not supported: its ")
    assert unsupported_families()[model_type] in message
    assert "supported: " + ", ".join(list_families()) in message


def test_types_are_those_of_configs():
    """A misspelt type would refuse nothing."""
    remote = {"kimi_vl"}  # code that comes with the checkpoint
    for model_type in there(set(unsupported_families()) - remote):
        assert AutoConfig.for_model(model_type).model_type == model_type


@pytest.mark.skipif(Version(transformers.__version__) != Version("5.24.0"), reason="of 5.24.0")
def test_what_a_release_is_skipped_for_it_does_by_itself():
    """Without a session; `BROKEN` of tests/conftest.py skips the tests of this family there."""
    member = MEMBERS["llama4"]()
    with pytest.raises(AttributeError, match="no attribute 'image_outputs'"):
        member.build()(**member.inputs([[3, 4]]))


def test_no_family_is_served_and_refused():
    assert not set(unsupported_families()) & set(list_families())


def test_every_type_that_transformers_reads_images_with_is_served_or_refused():
    """A type that a newer transformers brings is to be looked at, and named."""
    known = {*list_families(), *unsupported_families()}
    assert sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known) == []


# What the reasons say of models, looked up in transformers: a release that changes it shows here.


def default(model_type):
    return AutoConfig.for_model(model_type)


def source(folder, name):
    """The source of a class or function of a model."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return inspect.getsource(getattr(module, name))


def arguments(folder, name):
    """What the forward of a class takes."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return set(inspect.signature(getattr(module, name).forward).parameters)


@pytest.mark.parametrize(
    ("folder", "layer"),
    [
        ("blip", "BlipTextLayer"),
        ("idefics", "IdeficsGatedCrossAttentionLayer"),
        ("mllama", "MllamaCrossAttentionDecoderLayer"),
        ("pix2struct", "Pix2StructTextBlock"),
        ("pp_formulanet", "PPFormulaNetDecoderLayer"),
    ],
)
def test_images_are_read_by_cross_attention(folder, layer):
    name = "blip_text" if folder == "blip" else folder
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{name}")
    taken = inspect.signature(getattr(module, layer).forward).parameters
    assert {"encoder_hidden_states", "cross_attention_states", "image_hidden_states"} & set(taken)


def test_the_images_of_any_encoder_are_read_by_cross_attention():
    text = source("vision_encoder_decoder", "VisionEncoderDecoderModel")
    assert "add_cross_attention" in text
    assert "encoder_hidden_states=encoder_hidden_states" in text


@pytest.mark.parametrize("model_type", ["blip-2", "instructblip", "instructblipvideo"])
def test_a_q_former_makes_32_tokens(model_type):
    assert default(model_type).num_query_tokens == 32


def test_a_video_of_instructblip_has_four_frames_and_a_text_model_with_a_head():
    text = source("instructblipvideo", "InstructBlipVideoForConditionalGeneration")
    assert "video has frames=4 always" in text
    assert "AutoModelForCausalLM.from_config" in text


@pytest.mark.parametrize("model_type", ["evolla", "mistral4"])
def test_models_without_images_have_no_vision_encoder(model_type):
    assert not any("vision" in name or "image" in name for name in default(model_type).to_dict())


@pytest.mark.parametrize("model_type", ["florence2", "t5gemma2", "udop"])
def test_images_stand_in_an_encoder_that_a_decoder_reads(model_type):
    assert default(model_type).is_encoder_decoder


@pytest.mark.parametrize(
    ("folder", "name"),
    [("kosmos2", "Kosmos2TextTransformer"), ("kosmos2_5", "Kosmos2_5TextTransformer")],
)
def test_text_models_put_images_in_the_sequence(folder, name):
    assert "image_embeds" in arguments(folder, name)


def test_images_of_git_have_no_placeholders():
    assert not hasattr(default("git"), "image_token_id")
    text = source("git", "GitModel")
    assert "torch.cat((projected_visual_features, embedding_output), dim=1)" in text


def test_patches_of_udop_are_added_to_words():
    text = source("udop", "combine_image_text_embeddings")
    assert "inputs_embeds += repeated_vision_embeds" in text


def test_caches_are_read_by_other_models():
    assert CACHE in arguments("diffusion_gemma", "DiffusionGemmaDecoderModel")


def test_indexers_read_more_than_the_slots_that_are_left():
    assert "current_length = cache_layer.get_seq_length()" in source(
        "glm5_next", "Glm5NextTextIndexer"
    )
    assert "indexer_position_ids" in source("qwen4_exp", "Qwen4ExpTextModel")
    taken = arguments("mistral_large4", "MistralLarge4TextAttention")
    assert {"shared_kv_states", "prev_topk_indices"} <= taken
    if there(["hy_v4_vl"]):
        assert "prev_topk_indices" in arguments("hy_v4_vl", "HYV4VLAttention")


@pytest.mark.parametrize("folder", there(["inkling", "inkling2", "inkling2_loop"]))
def test_positions_come_from_the_length_of_a_cache_layer(folder):
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    text = inspect.getsource(module)
    assert f"{CACHE}.get_mask_sizes(q_length, " in text
    assert "sconv(" in text


def test_features_and_projections_are_elsewhere():
    assert "(last_hidden_state=patch_embeddings)" in source("fuyu", "FuyuModel")
    assert "query_key_value" in source("persimmon", "PersimmonAttention")


@pytest.mark.parametrize(
    ("folder", "layer", "text"),
    [
        ("sam", "SamVisionLayer", "self.window_partition(hidden_states, self.window_size)"),
        ("vitdet", "VitDetLayer", "window_partition(hidden_states, self.window_size)"),
        ("swin", "SwinLayer", "window_partition(self.cyclic_shift(hidden_states)"),
        ("swin", "SwinRelativePositionBias", "view(self.window_area, self.window_area, -1)"),
        ("swin", "SwinPatchMerging", "input_feature[:, row::2, col::2, :]"),
        ("swinv2", "Swinv2Layer", "window_partition(shifted_hidden_states, self.window_size)"),
        ("segformer", "SegformerSequenceReduction", "nn.Conv2d("),
        ("segformer", "SegformerDepthWiseConv", "nn.Conv2d("),
        ("timesformer", "TimesformerLayer", "num_patch_height, num_patch_width, num_frames"),
    ],
)
def test_patches_lie_in_a_map(folder, layer, text):
    assert text in source(folder, layer)


def test_maps_are_those_of_the_default():
    assert default("vitmatte").backbone_config.model_type == "vitdet"
    assert default("timesformer").attention_type == "divided_space_time"


def test_code_that_comes_with_a_checkpoint_is_unknown():
    with pytest.raises(ValueError, match="kimi_vl"):
        default("kimi_vl")
