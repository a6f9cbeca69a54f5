"""An ordinary edit plays like its source: upright, as large, as fast, in its colours, with its sound in step."""

import dataclasses
from fractions import Fraction

import av
import numpy as np
import pytest
from fixtures import media
from fixtures.untrained import untrained_pipeline
from PIL import Image

from loomvideo.model.codec import LatentGrid
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.playback import Playback
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.media_info import MediaInfo
from loomvideo.pipelines.media.sound import add_sound
from loomvideo.platform.errors import UserError

RATE = Fraction(30000, 1001)
SETTINGS = Settings(buckets=[64], num_frames=9, steps=1, scale=1, visual_scale=1)
P3, SRGB = 12, 13  # primaries of a phone's screen, the transfer that goes with them
CLICK_S = 0.2


@pytest.fixture(scope="module")
def generator():
    generator = FileGenerator(untrained_pipeline(), SETTINGS, {"name": "random"})
    yield generator
    generator.close()


def phone_clip(path, num_frames=10, width=80, height=48, rotation=90, start_s=0):
    """Held upright: stored lying, shown turned; Display P3; a click in the sound 0.2 s after the first picture."""
    tone = np.zeros(int(48000 * num_frames / RATE), np.int16)
    tone[int(48000 * CLICK_S) :][:480] = 20000
    with av.open(str(path), "w") as made:
        video = made.add_stream("libx264", rate=RATE)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.codec_context.color_primaries, video.codec_context.color_trc = P3, SRGB
        if rotation:
            video.set_display_rotation(rotation)
        sound = made.add_stream("aac", rate=48000)
        sound.layout = "mono"
        packets = []
        for number, pixels in enumerate(media.moving_frames(num_frames, width, height)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + round(start_s * RATE), 1 / RATE
            packets += video.encode(frame)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, round(48000 * start_s), Fraction(1, 48000)
        packets += [*video.encode(None), *sound.encode(frame), *sound.encode(None)]
        for packet in packets:
            made.mux(packet)
    return path


def click_s(path):
    """When the click is heard, in seconds after the first picture."""
    with av.open(str(path)) as container:
        video = container.streams.video[0]
        first = float((video.start_time or 0) * video.time_base)
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()[0]) > 0.2)
            if len(loud):
                return frame.time + loud[0] / frame.sample_rate - first
    return None


def test_an_edit_of_a_phones_clip(generator, tmp_path):
    source, out = phone_clip(tmp_path / "clip.mov"), tmp_path / "out.mp4"
    assert open_media(str(source)).info.rotation in (90, 270)
    prepared = generator.prepare(Request("edit", "blue", str(out), str(source)))
    assert prepared.frames_left_out == 1
    generator.write(prepared, generator.sample(prepared))
    with av.open(str(out)) as made:
        video = made.streams.video[0]
        context = video.codec_context
        assert (video.average_rate, video.frames, context.width, context.height) == (RATE, 9, 48, 80)
        assert (context.color_primaries, context.color_trc) == (P3, SRGB)
        assert next(made.decode(video=0)).rotation == 0
    assert abs(click_s(out) - CLICK_S) < 0.03


def test_the_frames_are_where_the_sources_are(generator, tmp_path, monkeypatch):
    """With a model that only copies: upright, uncropped, each frame in its place, none past the end."""
    source, out = phone_clip(tmp_path / "clip.mov", 7, rotation=270), tmp_path / "out.mp4"
    monkeypatch.setattr(
        generator.pipeline, "sample", lambda conditions, *rest, **keys: conditions.branches["full"].source
    )
    generator.generate(Request("edit", "blue", str(out), str(source)))
    given, made = (np.concatenate(list(open_media(str(path)).read(range(7)))) for path in (source, out))
    assert given.shape == made.shape == (7, 80, 48, 3)
    assert open_media(str(out)).info.num_frames == 7
    distances = [[np.abs(a.astype(int) - b).mean() for b in given] for a in made]
    assert all(abs(int(np.argmin(row)) - number) <= 1 for number, row in enumerate(distances))  # the codec is coarse
    assert np.argmin([np.abs(given[0].astype(int) - way).mean() for way in (made[0], made[0][::-1, ::-1])]) == 0


def test_sound_stays_in_step_where_pictures_begin_late(tmp_path):
    source = phone_clip(tmp_path / "late.ts", rotation=0, start_s=2)
    assert open_media(str(source)).info.num_frames == 10
    made = media.write_video(tmp_path / "made.mp4", media.moving_frames(10), 30)
    add_sound(made, str(source))
    assert abs(click_s(source) - click_s(made)) < 0.03
    assert abs(click_s(made) - CLICK_S) < 0.05


def test_what_is_asked_for_is_given(generator, tmp_path, monkeypatch):
    source, out = phone_clip(tmp_path / "clip.mov"), tmp_path / "out.mp4"
    for changes, shape, rate in (
        ({"fps": 15.0}, (5, 80, 48), 15),
        ({"width": 96, "height": 64}, (9, 64, 96), RATE),
        ({"keep": False}, (5, 96, 64), 24),
        ({"keep": False, "fps": 30.0}, (5, 96, 64), 30),
    ):
        monkeypatch.setattr(generator, "settings", dataclasses.replace(SETTINGS, **changes))
        generator.generate(Request("edit", "blue", str(out), str(source)))
        with av.open(str(out)) as made:
            video = made.streams.video[0]
            assert (video.frames, video.height, video.width) == shape, changes
            assert video.average_rate == rate
            assert bool(made.streams.audio) == changes.get("keep", True)


def test_a_picture_keeps_its_size_as_shown(generator, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(media.moving_frames(1, 90, 50)[0]).save(tmp_path / "photo.jpg", exif=exif)
    made = generator.generate(Request("edit", "blue", str(tmp_path / "blue.png"), str(tmp_path / "photo.jpg")))
    with Image.open(made) as picture:
        assert picture.size == (50, 90)


@pytest.mark.parametrize(("own", "asked"), [(30.0, 0.0), (29.97, 0.0), (60.0, 30.0), (24.0, 60.0), (25.0, 24.0)])
def test_rates_show_what_is_on_screen(own, asked):
    info = MediaInfo("video", 64, 64, 100, own, "pyav")
    playback = Playback.of("x.mp4", info, dataclasses.replace(SETTINGS, fps=asked), "video")
    indices = playback.indices(0, playback.num_frames)
    assert abs(playback.num_frames / playback.fps - 100 / own) <= 0.5 / playback.fps
    for number, index in enumerate(indices):
        assert index / own <= number / playback.fps + 1e-6
        assert index == 99 or (index + 1) / own > number / playback.fps - 1e-6
    if not asked:
        assert indices == list(range(100))


def test_grids_cover():
    grid = LatentGrid(4, 16)
    assert [grid.covering_frames(count) for count in (1, 2, 5, 6)] == [1, 5, 5, 9]
    with pytest.raises(UserError, match="set both, or neither"):
        dataclasses.replace(SETTINGS, width=64).asked_size()
