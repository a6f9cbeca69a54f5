"""Prompts, vocabulary and the MLLM's inputs."""

import json

import numpy as np
import pytest
import torch

from loomvideo.model import tasks
from loomvideo.model.conditioning import prompts, vocabulary
from loomvideo.model.conditioning.config import ProcessorConfig
from loomvideo.model.conditioning.inputs import (
    MLLMInputs,
    build_inputs,
    read_processor_config,
    smart_resize,
    text_inputs,
)
from loomvideo.model.conditioning.mllm import prompt_positions
from loomvideo.model.conditioning.tokenizer import MLLMTokenizer
from loomvideo.platform.errors import UserError

TOKENIZER = MLLMTokenizer()
SMALL_IMAGES = ProcessorConfig(image_min_pixels=4096)


def pictures(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(task: str, variant: str = "full", frames: int = 9, references: int = 2, text: str = "a red dress"):
    kind = tasks.wording(task)
    source = pictures(frames, 64, 96, 3) if kind.source else None
    return build_inputs(
        task,
        text,
        source[:1] if kind.source == "image" else source,
        [pictures(70, 64, 3)] * references if kind.needs_references else [],
        variant,
        TOKENIZER,
        SMALL_IMAGES,
    )


def words(inputs: MLLMInputs) -> str:
    """The prompt with runs of pads written once."""
    text = TOKENIZER.decode(inputs.input_ids.tolist())
    for pad in (prompts.IMAGE_PAD, prompts.VIDEO_PAD):
        while pad + pad in text:
            text = text.replace(pad + pad, pad)
    return text


IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = (
    "<0.1 seconds><|vision_start|><|video_pad|><|vision_end|><0.3 seconds><|vision_start|><|video_pad|><|vision_end|>"
)


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("t2i", "Generate an image: a red dress"),
        ("t2v", "Generate a video: a red dress"),
        ("image_edit", f"Edit this image: {IMAGE}a red dress"),
        ("video_edit", f"Edit this video: {CLIP}a red dress"),
        ("ref_edit", f"Edit this video with reference images: {CLIP}{IMAGE}{IMAGE}a red dress"),
        ("mi2i", f"Generate an image with reference images: a red dress{IMAGE}{IMAGE}"),
        ("mi2v", f"Generate a video with reference images: a red dress{IMAGE}{IMAGE}"),
        ("reconstruct_image", f"Reconstruct this image: {IMAGE}a red dress"),
        ("reconstruct_video", f"Reconstruct this video: {CLIP}a red dress"),
    ],
)
def test_the_nine_kinds(task, content):
    assert words(build(task)) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("task", "content"),
    [
        ("video_edit", f"Edit this video: {CLIP}a red dress"),
        ("ref_edit", f"Edit this video: {CLIP}{IMAGE}{IMAGE}a red dress"),
        ("mi2v", f"Generate a video with reference images: {IMAGE}{IMAGE}a red dress"),
    ],
)
def test_how_the_published_evaluation_words_references(task, content):
    assert content in words(build(tasks.evaluation_wording(task)))


def test_variants_of_an_edit():
    frames = words(build("ref_edit", "visual"))
    assert frames == f"<|im_start|>user\n{CLIP}{IMAGE}{IMAGE}<|im_end|>\n<|im_start|>assistant\n"
    spans = words(build("ref_edit", "spans"))
    assert "seconds" not in spans
    assert spans.count("<|vision_start|>") == 4
    null = build("ref_edit", "null")
    assert null.pixel_values is null.pixel_values_videos is None
    assert null.input_ids.equal(text_inputs("", TOKENIZER).input_ids)
    assert build("t2v", "visual").input_ids.equal(null.input_ids)


def test_variants_share_their_pictures():
    full, visual = build("ref_edit"), build("ref_edit", "visual")
    assert full.pixel_values.equal(visual.pixel_values)
    assert full.pixel_values_videos.equal(visual.pixel_values_videos)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 16, 33, 61, 121])
def test_pads_match_merged_patches(frames):
    inputs = build("video_edit", frames=frames)
    pads = (inputs.input_ids == TOKENIZER.token_id(prompts.VIDEO_PAD)).sum()
    assert pads * 4 == inputs.video_grid_thw.prod() == len(inputs.pixel_values_videos)
    assert inputs.video_grid_thw[0, 0] == (1 if frames in (1, 2, 16, 33) else 2)


def test_patches_hold_the_picture():
    picture = pictures(64, 96, 3)
    patches = build_inputs("image_edit", "", picture[None], [], "full", TOKENIZER, SMALL_IMAGES).pixel_values
    # Patch 2 of the first merge block is the one below patch 0; its values run over (colour, frame, row, column).
    below = patches[2].reshape(3, 2, 16, 16)
    torch.testing.assert_close(below[:, 0], picture[16:32, :16].permute(2, 0, 1) / 127.5 - 1)
    assert below[:, 0].equal(below[:, 1])


def test_numpy_and_torch_agree():
    frames = pictures(5, 64, 64, 3)
    ours = build_inputs("video_edit", "x", frames, [], "full", TOKENIZER, SMALL_IMAGES)
    theirs = build_inputs("video_edit", "x", np.asarray(frames), [], "full", TOKENIZER, SMALL_IMAGES)
    assert ours.pixel_values_videos.equal(theirs.pixel_values_videos)


def test_tensors_round_trip():
    inputs = build("video_edit")
    assert set(inputs.tensors()) == {"input_ids", "pixel_values_videos", "video_grid_thw"}
    assert MLLMInputs.from_tensors(inputs.tensors()).tensors().keys() == inputs.tensors().keys()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 288), (256, 288)), ((100, 180), (192, 352)), ((480, 832), (480, 832)), ((10_000, 10_000), (4096, 4096))],
)
def test_smart_resize(size, expected):
    assert smart_resize(*size, 32, 65_536, 16_777_216) == expected


@pytest.mark.parametrize("size", [(1, 150), (17, 3000), (33, 33), (5000, 4999)])
@pytest.mark.parametrize("num_frames", [1, 4])
def test_smart_resize_stays_within_limits(size, num_frames):
    height, width = smart_resize(*size, 32, 65_536, 1 << 20, num_frames)
    assert height % 32 == width % 32 == 0
    assert 65_536 <= height * width * num_frames <= 1 << 20


def test_refusals():
    with pytest.raises(UserError, match="200 times"):
        smart_resize(1, 300, 32, 65_536, 1 << 24)
    with pytest.raises(UserError, match="choose one of t2i"):
        build_inputs("inpaint", "", None, [], "full", TOKENIZER, SMALL_IMAGES)
    with pytest.raises(UserError, match="needs a source"):
        build_inputs("video_edit", "", None, [], "full", TOKENIZER, SMALL_IMAGES)
    with pytest.raises(UserError, match="takes no references"):
        build_inputs("t2v", "", None, [pictures(64, 64, 3)], "full", TOKENIZER, SMALL_IMAGES)
    with pytest.raises(UserError, match="im_end"):
        build("t2v", text="a dress<|im_end|>")


@pytest.mark.parametrize(
    "text",
    [
        "replace the jacket with a red striped dress",
        "Ünïcode 漢字 👗 tabs\t and  spaces \n\n",
        "<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>",
        "",
    ],
)
def test_vocabulary_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_listed_words_are_one_token():
    for word in vocabulary.WORDS_FILE.read_text().split():
        assert [len(TOKENIZER.encode(form)) for form in (word, " " + word, word.capitalize())] == [1, 1, 1], word


def test_shipped_vocabulary_is_what_build_makes():
    ours, shipped = json.loads(vocabulary.build().to_str()), json.loads(vocabulary.TOKENIZER_FILE.read_text())
    assert ours["model"]["vocab"] == shipped["model"]["vocab"]
    assert ours["model"]["merges"] == shipped["model"]["merges"]


def test_tokenizer_refusals(tmp_path):
    with pytest.raises(UserError, match="not found"):
        MLLMTokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer file"):
        MLLMTokenizer.from_pretrained(tmp_path)
    shipped = json.loads(vocabulary.TOKENIZER_FILE.read_text())
    shipped["added_tokens"] = shipped["added_tokens"][:-1]
    del shipped["model"]["vocab"]["<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(shipped))
    with pytest.raises(UserError, match="video_pad"):
        MLLMTokenizer.from_pretrained(tmp_path)


def test_processor_config_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        read_processor_config(tmp_path)
    image = {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}, "patch_size": 16, "merge_size": 2}
    video = {"size": {"shortest_edge": 4_096, "longest_edge": 25_165_824}, "fps": 2, "min_frames": 4}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image | {"image_mean": [0.5] * 3}))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    assert read_processor_config(tmp_path) == ProcessorConfig()


def test_positions_of_text_image_text():
    ids = torch.tensor([7, 7, 1, 1, 1, 1, 1, 1, 7, 2, 2, 7])
    positions = prompt_positions(ids, [[1, 4, 6]], [[2, 2, 2]], image_token=1, video_token=2, merge_size=2)
    assert positions[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8]
    assert positions[1].tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 7, 8]
    assert positions[2].tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8]
