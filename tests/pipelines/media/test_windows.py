"""One window for encoding, generation and evaluation: the same frames of a file, at the same size."""

import numpy as np
import pytest
import torch

from loomvideo.model.codec import LatentGrid
from loomvideo.pipelines.evaluation.inputs import InputOptions, load_item
from loomvideo.pipelines.evaluation.suites.items import EvalItem
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.media_info import MediaInfo
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.media.windows import in_step, media_window, picture_window, window_indices
from loomvideo.pipelines.prepare.config import ClipOptions
from loomvideo.pipelines.prepare.geometry import plan_clips
from loomvideo.pipelines.sources.samples import Sample

GRID = LatentGrid(4, 16)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    file = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(file, np.random.default_rng(0).integers(0, 255, (31, 48, 80, 3), dtype=np.uint8), 30.0)
    return file


def test_generation_evaluation_and_encoding_see_the_same(clip):
    media = open_media(str(clip))
    window = media_window(media.info, "video", [64], 17, GRID)
    assert (len(window.indices), window.size) == (17, (96, 64))
    frames = window.fit(torch.from_numpy(np.concatenate(list(media.read(window.indices)))))
    item = load_item(EvalItem("s", "k", "video_edit", "c", "x", clip.name), clip.parent,
                     InputOptions((64,), (64,), GRID, 17))  # fmt: skip
    assert item.frame_indices == window.indices
    assert np.array_equal(item.source, frames.numpy())
    sample = Sample("k", "video_edit", "d", clip.name, clip.name, instruction="x")
    clips = plan_clips(sample, media.info, media.info, [], ClipOptions(num_frames=17, buckets=[64]), 0, GRID)
    assert clips.bucket == window.size
    assert clips.source == (window_indices(media.info, 17, clips.starts[0], GRID, 24.0),)


def test_pictures_are_the_first_frame(clip):
    info = open_media(str(clip)).info
    assert picture_window(info, [64]) == media_window(info, "image", [64], 17, GRID)
    assert picture_window(info, [64]).indices == (0,)


def video_info(num_frames: int, fps: float) -> MediaInfo:
    return MediaInfo("video", 96, 96, num_frames, fps, "pyav")


def shown_seconds(info: MediaInfo, indices: tuple[int, ...]) -> np.ndarray:
    return np.array(indices) / info.fps


@pytest.mark.parametrize("window", [0, 1, 2])
def test_pairs_of_one_length_in_seconds_are_cut_at_the_same_seconds(window):
    target, source = video_info(64, 16.0), video_info(120, 30.0)
    sample = Sample("k", "video_edit", "d", "t.mp4", "s.mp4", instruction="x")
    clips = plan_clips(sample, target, source, [], ClipOptions(num_frames=17, buckets=[64], windows=3), 0, GRID)
    seconds = [shown_seconds(i, part[window]) for i, part in ((target, clips.target), (source, clips.source))]
    # No further apart than a frame of the slower one.
    assert np.abs(seconds[0] - seconds[1]).max() <= 1 / 16
    assert len(clips.target) == 3
    assert clips.target[2][-1] > 40


def test_pairs_of_the_same_frames_are_cut_frame_by_frame_whatever_their_rates():
    sample = Sample("k", "video_edit", "d", "t.mp4", "s.mp4", instruction="x")
    options = ClipOptions(num_frames=49, buckets=[64])
    clips = plan_clips(sample, video_info(81, 16.0), video_info(81, 30.0), [], options, 0, GRID)
    assert clips.target == clips.source
    # At the source's rate, which is that of the world.
    assert clips.source == plan_clips(sample, *[video_info(81, 30.0)] * 2, [], options, 0, GRID).source


def test_pairs_of_one_rate_are_cut_as_ever():
    sample = Sample("k", "video_edit", "d", "t.mp4", "s.mp4", instruction="x")
    media = [video_info(50, 24.0), video_info(60, 24.0)]
    assert in_step(media) == [(media[0], 50), (media[1], 50)]
    clips = plan_clips(sample, *media, [], ClipOptions(num_frames=17, buckets=[64]), 0, GRID)
    assert clips.target == clips.source
