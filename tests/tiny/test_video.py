"""The packaged model takes videos, as one stream of tokens, and answers about them."""

import pytest
import torch

import foveate
from foveate import tiny
from foveate.errors import InputError
from foveate.tiny.sequences import draw_order
from foveate.tiny.video import VIDEO_TOKEN


@pytest.fixture(scope="module")
def loaded():
    return tiny.load_video()


def inputs_of(processor, frames, question):
    content = [{"type": "video", "video": frames}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip


def answer(model, processor, inputs):
    out = model.generate(**inputs)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def questions(seed, frames):
    """A video, and questions about what its last frame shows."""
    film = draw_order(seed, frames, objects=(2, 3))
    asked = [(f"what color is the {o.kind} ?", o.colour) for o in film.objects[-1]]
    return list(film.images), asked


def test_a_video_of_one_frame_is_an_image(loaded):
    model, processor = loaded
    scene = tiny.draw_scene(12)
    text = scene.questions[0].text
    image_model, image_processor = tiny.load()
    inputs = image_processor(images=scene.image, text=f"<image> {text}", return_tensors="pt")
    with torch.no_grad():
        want = image_model(**inputs).logits
        got = model(**inputs_of(processor, [scene.image], text)).logits
    assert torch.equal(got[..., : want.shape[-1]], want)
    assert (got.argmax(-1) == want.argmax(-1)).all(), "the video's own token is never answered"


@pytest.mark.parametrize("frames", [3, 6])
def test_answers_about_the_last_frame_are_right(loaded, frames):
    model, processor = loaded
    right = []
    for seed in range(2):
        images, asked = questions(seed, frames)
        for text, truth in asked:
            right.append(answer(model, processor, inputs_of(processor, images, text)) == truth)
    assert sum(right) / len(right) > 0.85


@pytest.mark.parametrize("method", ["evs", "fastvid", "holitom", "vidcom2"])
def test_methods_of_videos_see_frames(loaded, method):
    model, processor = loaded
    images, ((text, _), *_) = questions(1, 4)
    inputs = inputs_of(processor, images, text)
    with foveate.use(model, method, keep=0.25) as run, torch.no_grad():
        model(**inputs)
    (seen,) = run.record.images
    assert (seen.frames, seen.grid, seen.total) == (4, (16, 16), 4 * 256)
    assert 0.2 * seen.total < seen.left < 0.3 * seen.total
    assert run.show([images])[0].height > 4 * 320


def test_a_batch_of_videos_is_what_each_is_alone(loaded):
    model, processor = loaded
    films = [questions(seed, 3) for seed in (1, 2)]
    texts = [f"<video> {asked[0][0]}" for _, asked in films]
    both = processor(
        text=texts, videos=[images for images, _ in films], padding=True, return_tensors="pt"
    )
    assert both["pixel_values_videos"].shape == (2, 3, 3, 128, 128)
    with torch.no_grad():
        together = model(**both).logits[:, -1]
        for row, (text, (images, _)) in enumerate(zip(texts, films, strict=True)):
            alone = model(**processor(text=text, videos=images, return_tensors="pt")).logits[0, -1]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_text_alone_needs_no_video(loaded):
    _, processor = loaded
    assert "pixel_values_videos" not in processor(text="what is there ?", return_tensors="pt")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("images", "takes no images"),
        ("places of images", "takes no images"),
        ("none", "equal"),
        ("no frames", "equal"),
        ("uneven", "equal"),
        ("array", "images of Pillow"),
        ("arrays", "images of Pillow"),
        ("no text", "come with a text"),
    ],
)
def test_what_the_processor_cannot_take_is_refused(loaded, given, why):
    frame = tiny.draw_scene(1).image
    _, processor = loaded
    more = {
        "images": {"text": "<video> ?", "images": [frame]},
        "places of images": {"text": "<image> ?"},
        "none": {"text": "<video> ?"},
        "no frames": {"text": "<video> ?", "videos": [[]]},
        "uneven": {"text": ["<video> ?"] * 2, "videos": [[frame], [frame, frame]]},
        "array": {"text": "<video> ?", "videos": torch.rand(1, 2, 3, 128, 128)},
        "arrays": {"text": "<video> ?", "videos": [torch.rand(2, 3, 128, 128)]},
        "no text": {"videos": [[frame]]},
    }[given]
    with pytest.raises(InputError, match=why):
        processor(**more)


@pytest.mark.parametrize("rows", [[1, 0], [0, 1], [0, 0], [2, 0, 1]])
def test_some_conversations_of_a_batch_have_no_video(loaded, rows):
    _, processor = loaded
    frames = [tiny.draw_scene(seed).image for seed in range(2)]
    seen = {"type": "video", "video": frames}
    text = {"type": "text", "text": "what number is red ?"}
    asked = [[{"role": "user", "content": [seen] * count + [text]}] for count in rows]
    made = processor.apply_chat_template(
        asked, tokenize=True, return_dict=True, processor_kwargs={"padding": True}
    )
    counts = [ids.count(processor.tokenizer.vocab[VIDEO_TOKEN]) for ids in made["input_ids"]]
    assert counts == [512 * count for count in rows]
    assert len(made.get("pixel_values_videos", ())) == sum(rows)


@pytest.mark.parametrize("load", [tiny.load, tiny.load_video])
def test_sizes_that_do_not_exist_are_refused(load):
    with pytest.raises(InputError, match="size must be tiny or small, got 'large'"):
        load(size="large")
