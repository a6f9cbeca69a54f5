"""Requests of the page through the real pipeline, tiny and untrained: sizes, lengths, file types, the same seed."""

import io

import av
import numpy as np
import pytest
from fixtures.untrained import untrained_pipeline
from PIL import Image

from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.serving.model_generator import PageGenerator
from loomvideo.pipelines.serving.requests import GenerationRequest
from loomvideo.pipelines.serving.uploads import Upload, UploadLimits, UploadReader
from loomvideo.platform.errors import UserError

RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def generator():
    defaults = Settings(buckets=[64], default_size=[64, 64], num_frames=9, steps=2)
    generator = PageGenerator(FileGenerator(untrained_pipeline(), defaults, {"name": "random"}))
    yield generator
    generator.close()


@pytest.fixture(scope="module")
def reader():
    reader = UploadReader(UploadLimits())
    yield reader
    reader.close()


@pytest.fixture(scope="module")
def picture(reader) -> Upload:
    buffer = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 256, (80, 60, 3), np.uint8)).save(buffer, "PNG")
    return reader.check(buffer.getvalue())


@pytest.fixture(scope="module")
def clip(reader, tmp_path_factory) -> Upload:
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(file, RANDOM.integers(0, 256, (7, 64, 100, 3), np.uint8), fps=12)
    return reader.check(file.read_bytes())


def generate(generator, **values):
    steps = []
    result = generator.generate(GenerationRequest(**values), lambda step, of: steps.append((step, of)))
    if result.media_type == "image/png":
        return steps, np.asarray(Image.open(io.BytesIO(result.content)))[None]
    with av.open(io.BytesIO(result.content)) as container:
        assert container.streams.video[0].average_rate == (12 if "source" in values else 24)
        return steps, np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("task", "shape"), [("t2i", (1, 64, 64, 3)), ("t2v", (9, 64, 64, 3))])
def test_from_words(generator, task, shape):
    steps, frames = generate(generator, task=task, prompt="a red dress")
    assert frames.shape == shape
    assert steps == [(1, 2), (2, 2)]


def test_edits_take_shape_and_length_of_the_source(generator, clip, picture):
    assert generate(generator, task="edit", prompt="a red dress", source=clip)[1].shape == (7, 64, 100, 3)
    assert generate(generator, task="edit", prompt="a red dress", source=picture)[1].shape == (1, 80, 60, 3)
    parts = {"source": clip, "references": [picture]}
    assert generate(generator, task="ref_edit", prompt="wear @Image 1", **parts)[1].shape == (7, 64, 100, 3)
    settings = {"width": 96, "height": 64, "num_frames": 5}
    assert generate(generator, task="edit", prompt="a red dress", source=clip, **settings)[1].shape == (5, 64, 96, 3)


def test_a_video_is_edited_to_its_end_where_that_is_asked(generator, clip):
    asked = {"task": "edit", "prompt": "a red dress", "source": clip, "num_frames": 5}
    assert len(generate(generator, **asked)[1]) == 5
    steps, frames = generate(generator, **asked, whole=True)
    assert (len(frames), steps[-1]) == (7, (4, 4))


def test_references_to_video_with_settings(generator, picture):
    settings = {"width": 96, "height": 64, "num_frames": 7, "steps": 1, "guidance_scale": 3.0}
    steps, frames = generate(generator, task="mi2v", prompt="@Image 1 walks", references=[picture], **settings)
    assert frames.shape == (5, 64, 96, 3)
    assert steps == [(1, 1)]


def test_the_same_seed_gives_the_same_file(generator):
    request = {"task": "t2i", "prompt": "a coat"}
    first, again, other = (generate(generator, **request, seed=seed)[1] for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()


def test_sizes_the_model_cannot_make(generator, picture):
    with pytest.raises(UserError, match="multiples of 8"):
        generate(generator, task="t2i", prompt="a coat", width=100, height=64)
    with pytest.raises(UserError, match="set both, or neither"):
        generate(generator, task="edit", prompt="a coat", source=picture, width=64)


def test_a_callback_can_stop_it(generator):
    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate(GenerationRequest(task="t2i", prompt="a coat"), stop)
