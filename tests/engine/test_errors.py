"""What cannot be honoured says what, where and what to do, at the earliest point."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicLayer

import foveate
from foveate.errors import (
    AttachError,
    BudgetError,
    CacheError,
    InputError,
    LayerError,
    UnknownMethodError,
    UnsupportedModelError,
)
from foveate.methods import VTCCLS, DivPrune, FastV, PyramidDrop
from tests.conformance.batches import batch_of
from tests.conformance.test_pixels import model_of
from tests.conformance.zoo import MEMBERS
from tests.conformance.zoo.member import fresh
from tests.methods_for_tests import EveryThird
from tests.tinies import prompts, tiny_llava


def test_unknown_method_names_near_matches(llava):
    with pytest.raises(UnknownMethodError, match="did you mean pyramiddrop"):
        foveate.use(llava, "pyramid-drop")


def test_unknown_field_names_the_fields(llava):
    with pytest.raises(foveate.FoveateError, match="fastv takes the fields layer, keep, positions"):
        foveate.use(llava, "fastv", ratio=0.5)


def test_fields_beside_a_method_are_refused(llava):
    with pytest.raises(foveate.FoveateError, match="fields go with a method's name"):
        foveate.use(llava, FastV(), keep=0.5)


@pytest.mark.parametrize(
    "keep", [0, 0.0, -1, 1.7, True, "half", (), (0.5, 2.0), float("nan"), None]
)
def test_keep_out_of_range_is_refused_at_construction(keep):
    with pytest.raises(BudgetError):
        DivPrune(keep=keep)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: PyramidDrop(keep=(0.25, 0.5)), "cannot grow"),
        (lambda: PyramidDrop(layers=(2, 4), keep=(0.5, 0.25, 0.1)), "has 3 entries.* 2 steps"),
        (lambda: FastV(keep=(0.5, 0.25)), "has 2 entries.* 1 steps"),
        (lambda: foveate.per_request([]), "one keep for each row"),
        (lambda: foveate.per_request([0.5, (0.5, 0.25)]), "equal lengths"),
        (lambda: DivPrune(keep=36.0), "write 36"),
    ],
)
def test_budgets_of_the_wrong_form_are_refused_at_construction(make, match):
    with pytest.raises(BudgetError, match=match):
        make()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (FastV(layer=6), "before decoder layer 6, but this llava has layers 0 to 5"),
        (PyramidDrop(layers=(2, 9), keep=(0.5, 0.25)), "layer 9"),
        (VTCCLS(layers=(7,)), "layer"),
        ([PyramidDrop(layers=(2,), keep=0.5), FastV(layer=1)], "list methods in stream order"),
        ([FastV(), DivPrune()], "list methods in stream order"),
    ],
)
def test_layers_outside_the_model_are_refused_before_attaching(llava, method, match):
    with pytest.raises(LayerError, match=match):
        foveate.use(llava, method)


def test_layers_that_do_not_ascend_are_refused_at_construction():
    with pytest.raises(LayerError, match="ascending"):
        PyramidDrop(layers=(4, 2), keep=(0.5, 0.25))


def test_a_second_session_is_refused(llava):
    with foveate.use(llava, FastV()), pytest.raises(AttachError, match="already carries"):
        foveate.apply(llava, DivPrune())


def test_unsupported_models_are_named():
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=32,
    ))  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"'llama' is not supported.*\bllava\b"):
        foveate.use(model, "fastv")


def test_old_releases_of_transformers_are_refused(llava, monkeypatch):
    """In which recorded outputs were not met; vLLM may bring one."""
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(UnsupportedModelError, match=r"transformers 5.18 or newer, got 5.17.0"):
        foveate.use(llava, "fastv")


class OtherLayer(DynamicLayer):
    pass


@pytest.mark.parametrize("method", [FastV(), EveryThird()], ids=str)
def test_caches_that_cannot_be_pruned_are_refused(llava, method):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, method):
        with pytest.raises(CacheError, match="OtherLayer"):
            llava(**inputs, past_key_values=Cache(layer_class_to_replicate=OtherLayer))
        cache = DynamicCache(config=llava.config.text_config)
        cache.offloading = True
        with pytest.raises(CacheError, match="offloaded"):
            llava(**inputs, past_key_values=cache)


def test_a_static_cache_with_windows_is_not_sent_to_static_caches():
    """`static` makes such layers on models with windows, so it is no way out for them."""
    model = tiny_llava("mistral", window=20)
    inputs = prompts([[5, 7]])
    with foveate.use(model, FastV()), pytest.raises(CacheError, match=r"where no layer .* window"):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")


def test_chunked_prefill_is_refused_for_methods_that_ask_the_prompt(llava):
    inputs = prompts([[5, 7]])
    with foveate.use(llava, FastV()), pytest.raises(InputError, match="chunked prefill"):
        llava.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)


def test_a_chunk_that_ends_in_a_removed_token_says_so():
    """Later layers of Gemma 4 compute the last token of a forward alone."""
    member = MEMBERS["gemma4"]()
    inputs, _ = batch_of(member, model_of("gemma4"), (1,))
    with (
        foveate.use(model_of("gemma4"), EveryThird(6)),
        pytest.raises(InputError, match=r"with the last 1 tokens alone.*prefill_chunk_size=None"),
    ):
        model_of("gemma4").generate(**fresh(inputs), max_new_tokens=2, prefill_chunk_size=5)


@pytest.mark.parametrize("kernel", ["paged|sdpa", "flex_attention"])
def test_kernels_that_cannot_be_served_are_refused(kernel):
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = kernel
    with pytest.raises(UnsupportedModelError, match=r"continuous batching|flex_attention"):
        foveate.apply(model, FastV())


def test_continuous_batching_is_refused(llava):
    """`generate_batch` switches the model to a paged kernel behind a session's back."""
    ids = prompts([[5, 7]])["input_ids"]
    with foveate.use(llava, FastV()):
        before = llava.model.language_model.config._attn_implementation
        llava.model.language_model.config._attn_implementation = "paged|sdpa"
        try:
            with pytest.raises(UnsupportedModelError, match="continuous batching"):
                llava(input_ids=ids)
        finally:
            llava.model.language_model.config._attn_implementation = before


@pytest.mark.parametrize("count", [1, 4])
def test_per_request_needs_one_entry_per_row(llava, count):
    inputs = prompts([[5, 7], [4], [2, 3, 9]])
    for method in (FastV(keep=foveate.per_request([0.5] * count)),
                   EveryThird(keep=foveate.per_request([0.5] * count))):  # fmt: skip
        with foveate.use(llava, method), pytest.raises(BudgetError, match=f"has {count} entries"):
            llava(**inputs)


def test_foreign_features_lack_the_encoders_attention(llava):
    inputs = prompts([[5, 7]])
    encoded = llava.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with foveate.use(llava, "fastervlm"), pytest.raises(InputError, match="outside the session"):
        llava(**inputs, mm_encoder_outputs={"image": encoded})


def test_foreign_features_serve_methods_that_need_only_features(llava):
    inputs = prompts([[5, 7]])
    pixels = inputs.pop("pixel_values")
    encoded = llava.get_image_features(pixels, return_dict=True)
    before = encoded.pooler_output[0].clone()
    with foveate.use(llava, "divprune", keep=9) as run:
        got = llava(**inputs, mm_encoder_outputs={"image": encoded}).logits
        want = llava(**inputs, pixel_values=pixels).logits
    assert torch.equal(got, want)
    assert len(run.kept[0]["pre_llm"]) == 9
    assert torch.equal(encoded.pooler_output[0], before), "the caller's features were changed"


def test_embeddings_need_to_say_which_rows_are_visual(llava):
    inputs = prompts([[5, 7]])
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    with foveate.use(llava, FastV()):
        with pytest.raises(InputError, match="pass input_ids"):
            llava(inputs_embeds=embeds)
        got = llava(inputs_embeds=embeds, pixel_values=inputs["pixel_values"]).logits
        want = llava(**inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_offloaded_weights_cannot_be_scored(llava):
    model = tiny_llava()
    layer = model.model.language_model.layers[1]
    weight = layer.self_attn.k_proj.weight
    with foveate.use(model, FastV(layer=2)):
        layer.self_attn.k_proj.weight = torch.nn.Parameter(weight.to("meta"))
        with pytest.raises(UnsupportedModelError, match="offloaded"):
            model(**prompts([[5, 7]]))
