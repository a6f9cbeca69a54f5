"""Clips out of films: the frames of each are those that the part of the film shows, and the film is read once."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from fixtures import media_corpus as corpus

from loomvideo.pipelines.clips.cutter import CutClip, CutOptions, Part, Reading, cut_film
from loomvideo.pipelines.media.decode import open_media
from loomvideo.pipelines.media.fragments import split_fragment
from loomvideo.pipelines.prepare.curation.options import ShotOptions

PLAIN = CutOptions(height=0, crf=4, shots=ShotOptions())


def film(path: Path, num_frames: int = 24, **options) -> Path:
    """24 numbered frames, a key frame every eighth, pictures of both kinds between."""

    def groups(stream):
        stream.options = {"crf": "4", "bf": "2", "g": "8", "sc_threshold": "0"}

    return corpus.video(path, corpus.numbered(num_frames), prepare=groups, **options)


def cut(path: Path, names: list[str], scratch: Path, options: CutOptions = PLAIN, detector=None) -> dict[str, CutClip]:
    scratch.mkdir(exist_ok=True)
    parts = [Part(name, split_fragment(f"x#{name}")[1]) for name in names]
    clips: dict[str, CutClip] = {}
    for clip in cut_film(str(path), parts, detector, options, scratch):
        clips = {} if clip is None else clips | {clip.part: clip}
    return clips


def numbers(clip: CutClip) -> list[int]:
    media = open_media(clip.file)
    return corpus.numbers(np.concatenate(list(media.read(range(media.info.num_frames)))))


def test_parts_show_what_the_film_shows_there(tmp_path):
    path = film(tmp_path / "film.mp4")
    names = [
        "frames=3,10",
        "frames=8,16",
        "frames=9,13",
        "frames=20,",
        "t=0.5,0.75",
        "frame=12",
        "at=0.5",
        "frames=30,40",
    ]
    clips = cut(path, names, tmp_path / "out")
    outside = clips.pop("frames=30,40")
    assert (outside.reason, outside.file) == ("outside_file", "")
    for name, clip in clips.items():
        media = open_media(f"{path}#{name}")
        assert numbers(clip) == corpus.numbers(np.concatenate(list(media.read(range(media.info.num_frames))))), name
    assert {name: clip.how for name, clip in clips.items() if clip.how != "encoded"} == {
        "frames=8,16": "copied", "frame=12": "picture", "at=0.5": "picture"
    }  # fmt: skip


def test_a_copied_clip_has_the_films_own_packets(tmp_path):
    path = film(tmp_path / "film.mp4")
    clip = cut(path, ["frames=8,16"], tmp_path / "out")["frames=8,16"]
    with av.open(str(path)) as whole, av.open(clip.file) as part:
        packets = [bytes(p) for p in whole.demux(video=0) if p.size]
        assert [bytes(p) for p in part.demux(video=0) if p.size] == packets[8:16]


def test_a_film_is_read_once_however_many_parts_are_wanted(tmp_path):
    path = film(tmp_path / "film.mkv", container_format="matroska")
    seen: list[Reading] = []
    parts = [Part(f"frames={i},{i + 2}", split_fragment(f"x#frames={i},{i + 2}")[1]) for i in range(22)]
    clips = list(cut_film(str(path), parts, None, PLAIN, tmp_path, lambda r: seen.append(Reading(**vars(r)))))
    assert len(clips) == 22
    assert all(clip.file for clip in clips)
    assert seen[-1].num_frames == 24
    # Also while clips are encoded, which takes minutes of long ones.
    assert len(seen) > 24
    # FFmpeg looks at a container's end, and goes back.
    assert seen[-1].num_bytes < 1.2 * path.stat().st_size + 65536


@pytest.mark.parametrize("height", [0, 32])
def test_a_turned_film_gives_upright_clips(tmp_path, height):
    frames = np.stack([corpus.quarters()] * 8)
    path = corpus.video(tmp_path / "film.mp4", frames, prepare=lambda stream: stream.set_display_rotation(90))
    shown = corpus.seen(next(open_media(str(path)).read([0]))[0])
    clip = cut(path, ["frames=0,8"], tmp_path / "out", CutOptions(height, 4, ShotOptions()))["frames=0,8"]
    assert clip.how == ("encoded" if height else "copied")
    media = open_media(clip.file)
    assert corpus.seen(next(media.read([0]))[0]) == shown
    assert (media.info.width, media.info.height) == ((32, 48) if height else (64, 96))


def test_a_film_of_variable_rate_is_cut_on_its_timeline(tmp_path):
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = corpus.WIDTH, corpus.HEIGHT, "yuv420p"
        stream.options = {"crf": "4", "g": "4", "bf": "0"}
        stream.codec_context.time_base = Fraction(1, 24)
        for number, pixels in enumerate(corpus.numbered(20)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
            frame.pts, frame.time_base = (
                number if number < 10 else 10 + 3 * (number - 10),
                stream.codec_context.time_base,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    whole = open_media(str(path))
    assert whole.info.variable_rate
    for name, clip in cut(path, ["frames=4,16", "t=0.2,0.9"], tmp_path / "out").items():
        media = open_media(f"{path}#{name}")
        assert numbers(clip) == corpus.numbers(np.concatenate(list(media.read(range(media.info.num_frames))))), name


def test_a_film_without_times_is_counted(tmp_path):
    path = film(tmp_path / "film.h264", container_format="h264")
    assert numbers(cut(path, ["frames=5,12"], tmp_path / "out")["frames=5,12"]) == list(range(5, 12))


def test_shots_are_cut_while_the_film_passes(tmp_path):
    class Jumps:
        def boundaries(self, thumbnails, fps):
            levels = thumbnails.mean((1, 2, 3))
            return [int(i) + 1 for i in np.flatnonzero(np.abs(np.diff(levels)) > 100)]

    frames = np.concatenate([np.full((12, 64, 96, 3), level, np.uint8) for level in (10, 240, 20, 230)])
    path = corpus.video(tmp_path / "film.mp4", frames)
    options = CutOptions(0, 4, ShotOptions(min_duration_s=0.1, margin_frames=1))
    clips = cut(path, [], tmp_path / "out", options, Jumps())
    assert list(clips) == ["frames=0,11", "frames=13,23", "frames=25,35", "frames=37,48"]
    for clip, level in zip(clips.values(), (10, 240, 20, 230), strict=True):
        media = open_media(clip.file)
        assert abs(np.concatenate(list(media.read(range(media.info.num_frames)))).astype(int) - level).max() < 4
