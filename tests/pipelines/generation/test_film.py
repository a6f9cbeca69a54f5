"""A whole video edited to a file that plays like its source."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from fixtures import media

from loomvideo.model.codec import build_codec
from loomvideo.model.conditioning.mllm import FrozenMLLM
from loomvideo.model.dit import LoomVideoDiT
from loomvideo.model.kernels import set_backend
from loomvideo.model.pipeline import LoomVideoPipeline
from loomvideo.model.sizes import model_size
from loomvideo.pipelines.generation.generator import FileGenerator
from loomvideo.pipelines.generation.requests import Request
from loomvideo.pipelines.generation.settings import Settings
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.sound import add_sound
from loomvideo.platform.errors import UserError

SIZE = model_size("tiny")
WINDOW, OVERLAP = SIZE.grid.frames(3), SIZE.grid.frames(2)
FPS = 30
NUM_FRAMES = 2 * WINDOW + 1


@pytest.fixture(scope="module")
def generator():
    set_backend("eager")
    torch.manual_seed(0)
    pipeline = LoomVideoPipeline(
        LoomVideoDiT(SIZE.dit), build_codec(SIZE.codec), FrozenMLLM.of_size(SIZE), SIZE.scheduler
    )
    settings = Settings(buckets=[64], num_frames=WINDOW, overlap=OVERLAP, steps=1, whole=True, scale=1, visual_scale=1)
    generator = FileGenerator(pipeline, settings, {"name": "random"})
    yield generator
    generator.close()


def with_sound(path, codec="aac"):
    """A film of 50x38 at 30 frames a second, tagged BT.470BG and SMPTE 170M, with a tone."""
    tone = (np.sin(np.arange(int(48000 * NUM_FRAMES / FPS)) / 20) * 12000).astype(np.int16)[None]
    with av.open(str(path), "w") as made:
        video = made.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 50, 38, "yuv420p"
        video.codec_context.color_primaries, video.codec_context.color_trc = 5, 6
        sound = made.add_stream(codec, rate=48000)
        sound.layout = "mono"
        for pixels in media.moving_frames(NUM_FRAMES, 50, 38):
            made.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        made.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
        made.mux(sound.encode(frame))
        made.mux(sound.encode(None))
    return path


def sounds(path):
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.dts is not None]


def test_the_film_plays_like_its_source(generator, tmp_path):
    source, out, seen = with_sound(tmp_path / "film.mp4"), tmp_path / "out" / "blue.mp4", []
    generator.generate(Request("edit", "blue", str(out), str(source)), lambda step, total: seen.append((step, total)))
    info = open_media(str(out)).info
    assert (info.width, info.height, info.num_frames, info.fps) == (50, 38, NUM_FRAMES, FPS)
    with av.open(str(out)) as made:
        context = made.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc) == (5, 6)
    assert sounds(out) == sounds(source)
    assert seen[-1][0] == seen[-1][1] == len(seen) > 1
    assert generator.is_done(Request("edit", "blue", str(out), str(source)))
    assert not list(out.parent.glob(".*"))


def test_sound_that_mp4_cannot_hold_is_encoded_anew(tmp_path):
    source = with_sound(tmp_path / "film.mov", "pcm_s16le")
    made = media.write_video(tmp_path / "made.mp4", media.moving_frames(15), FPS)
    add_sound(made, str(source))
    with av.open(str(made)) as container:
        assert container.streams.audio[0].codec_context.name == "aac"
        seconds = float(container.streams.audio[0].duration * container.streams.audio[0].time_base)
    assert abs(seconds - 0.5) < 0.05  # cut to the pictures' length


def test_a_source_without_sound_is_left_as_it_is(tmp_path):
    silent = media.write_video(tmp_path / "silent.mp4", media.moving_frames(9))
    made = media.write_video(tmp_path / "made.mp4", media.moving_frames(9))
    before = made.read_bytes()
    add_sound(made, str(silent))
    assert made.read_bytes() == before


def test_whole_changes_nothing_for_what_is_no_film(generator, tmp_path):
    media.write_picture(tmp_path / "a.png", media.moving_frames(1)[0])
    made = generator.generate(Request("edit", "x", str(tmp_path / "b.png"), str(tmp_path / "a.png")))
    assert open_media(str(made)).info.width == 64
    with pytest.raises(UserError, match="edit makes a video"):
        generator.generate(Request("edit", "x", str(tmp_path / "b.png"), str(with_sound(tmp_path / "film.mp4"))))
