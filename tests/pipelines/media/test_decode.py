"""Decoders: frame-exact, as shown, isolated; every unusable file has a reason."""

import os
import signal
import threading
from importlib.util import find_spec

import numpy as np
import pytest
from fixtures.media import bad_files, moving_frames, write_picture, write_video
from PIL import Image

from loomvideo.pipelines.media.decode import DecodeError, open_media
from loomvideo.pipelines.media.decode_process import IsolatedDecoder


def read(media, indices=None):
    return np.concatenate(list(media.read(range(media.info.num_frames) if indices is None else indices)))


def red_levels(frames):
    return [round(float(frame[..., 0].mean()) / 8) for frame in frames]


needs_decord = pytest.mark.skipif(find_spec("decord") is None, reason="decord has wheels for x86-64 alone")


@pytest.mark.parametrize("backend", [pytest.param("decord", marks=needs_decord), "pyav"])
def test_frames_by_index(tmp_path, backend):
    path = write_video(tmp_path / "a.mp4", moving_frames(30, 96, 64))
    media = open_media(str(path), backend)
    info = media.info
    assert (info.width, info.height, info.num_frames, info.fps, info.backend) == (96, 64, 30, 24.0, backend)
    assert red_levels(read(media)) == list(range(30))
    assert red_levels(read(media, [3, 3, 10, 29])) == [3, 3, 10, 29]
    assert red_levels(read(media, [20, 21])) == [20, 21]
    assert red_levels(read(media, [0])) == [0]


@needs_decord
def test_decord_and_pyav_agree_bit_for_bit(tmp_path):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(20, 130, 98)))
    assert np.array_equal(read(open_media(path, "decord")), read(open_media(path, "pyav")))


@needs_decord
def test_decord_reads_plain_files_only(tmp_path):
    frames = moving_frames(12, 96, 96)
    assert open_media(str(write_video(tmp_path / "auto.mp4", frames))).info.backend == "pyav"
    assert open_media(str(write_video(tmp_path / "plain.mp4", frames)), "decord").info.backend == "decord"
    narrow = open_media(str(write_video(tmp_path / "narrow.mp4", moving_frames(12, 48, 32))), "decord")
    assert narrow.info.backend == "pyav"
    assert red_levels(read(narrow)) == list(range(12))
    assert open_media(str(write_video(tmp_path / "r.mp4", frames, rotation=90)), "decord").info.backend == "pyav"
    assert (
        open_media(str(write_video(tmp_path / "ten.mp4", frames, pixel_format="yuv420p10le")), "decord").info.backend
        == "pyav"
    )
    times = [0, 40, 80, 300, 340, 380, 420, 460, 500, 900, 940, 980]
    assert open_media(str(write_video(tmp_path / "v.mp4", frames, times_ms=times)), "decord").info.backend == "pyav"


def test_rotation_is_applied(tmp_path):
    frames = moving_frames(5, 96, 64)
    frames[:, :32, :, 1] = 255
    media = open_media(str(write_video(tmp_path / "r.mp4", frames, rotation=90)))
    shown = read(media)
    assert (media.info.width, media.info.height, media.info.rotation) == (64, 96, 90)
    assert shown.shape == (5, 96, 64, 3)
    # 90 degrees counter-clockwise: what was at the top is at the left.
    assert shown[0, :, :28, 1].mean() > 250
    assert shown[0, 40:, 40:, 1].mean() < 60


def test_variable_rate_is_read_by_time(tmp_path):
    # 8 frames in the first 0.4 s, one still for 1.2 s, then 4 more.
    times = [0, 50, 100, 150, 200, 250, 300, 350, 400, 1600, 1650, 1700, 1750]
    media = open_media(str(write_video(tmp_path / "v.mp4", moving_frames(13), times_ms=times)))
    assert media.info.variable_rate
    levels = red_levels(read(media))
    step_s = 1.75 / 12
    expected = [max(i for i, t in enumerate(times) if t <= n * step_s * 1000 + 1) for n in range(13)]
    assert levels == expected
    assert levels.count(8) >= 7


def test_ten_bit_close_to_eight_bit(tmp_path):
    frames = moving_frames(5)
    eight = read(open_media(str(write_video(tmp_path / "8.mp4", frames))))
    ten = read(open_media(str(write_video(tmp_path / "10.mp4", frames, pixel_format="yuv420p10le"))))
    assert np.abs(eight.astype(int) - ten).mean() < 3


def test_pictures_of_all_modes(tmp_path):
    colour = moving_frames(1, 40, 30)[0]
    alpha = np.dstack([colour, np.zeros((30, 40), np.uint8)])
    alpha[:, :20, 3] = 255
    shown = read(open_media(str(write_picture(tmp_path / "alpha.png", alpha))))
    assert (shown[0, :, 20:] == 255).all()
    assert np.array_equal(shown[0, :, :20], colour[:, :20])
    grey = read(open_media(str(write_picture(tmp_path / "grey.png", colour[..., 2]))))
    assert np.array_equal(grey[0], np.repeat(colour[..., 2:], 3, axis=2))
    deep = read(open_media(str(write_picture(tmp_path / "deep.png", colour[..., 2].astype(np.uint16) * 257))))
    assert np.array_equal(deep, grey)
    Image.fromarray(colour).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=98)
    cmyk = read(open_media(str(tmp_path / "cmyk.jpg")))
    assert np.abs(cmyk[0].astype(int) - colour).mean() < 12
    Image.fromarray(colour).convert("P").save(tmp_path / "palette.gif")
    assert open_media(str(tmp_path / "palette.gif")).info.kind == "image"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(colour).save(tmp_path / "turned.jpg", exif=exif, quality=98)
    turned = open_media(str(tmp_path / "turned.jpg"))
    assert (turned.info.width, turned.info.height) == (30, 40)
    assert read(turned).shape == (1, 40, 30, 3)


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_are_videos(tmp_path, suffix):
    frames = [Image.fromarray(frame) for frame in moving_frames(6)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100] * 6, loop=0)
    media = open_media(str(path))
    assert (media.info.kind, media.info.num_frames, media.info.fps) == ("video", 6, 10.0)
    assert read(media).shape == (6, 64, 64, 3)


def test_frame_folder_in_natural_order(tmp_path):
    for number, frame in enumerate(moving_frames(12)):
        write_picture(tmp_path / "clip" / f"frame{number}.png", frame)
    media = open_media(str(tmp_path / "clip"), folder_fps=12.0)
    assert (media.info.num_frames, media.info.fps) == (12, 12.0)
    assert red_levels(read(media, [2, 9, 10])) == [2, 9, 10]


def test_content_decides_not_the_name(tmp_path):
    write_video(tmp_path / "a.mp4", moving_frames(9))
    (tmp_path / "a.mp4").rename(tmp_path / "a.png")
    assert open_media(str(tmp_path / "a.png")).info.num_frames == 9
    write_picture(tmp_path / "b.png", moving_frames(1)[0])
    (tmp_path / "b.png").rename(tmp_path / "-b ü.mp4")
    assert open_media(str(tmp_path / "-b ü.mp4")).info.kind == "image"


def test_unusable_files_have_reasons(tmp_path):
    for name, reasons in bad_files(tmp_path).items():
        with pytest.raises(DecodeError) as caught:
            read(open_media(str(tmp_path / name)))
        assert caught.value.reason in reasons, (name, caught.value.reason, str(caught.value))


def test_truncated_with_index_in_front_is_found(tmp_path):
    import av

    whole = write_video(tmp_path / "whole.mp4", moving_frames(60, 128, 128))
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as front,
    ):
        stream = source.streams.video[0]
        copy = front.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                front.mux(packet)
    data = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DecodeError) as caught:
        read(open_media(str(tmp_path / "cut.mp4")))
    assert caught.value.reason in ("truncated", "corrupt_frame", "unreadable")


@pytest.fixture
def decoder():
    decoder = IsolatedDecoder(timeout_s=30)
    yield decoder
    decoder.close()


def test_isolated_decoder_gives_the_same_frames(tmp_path, decoder):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(40)))
    assert decoder.probe(path) == open_media(path).info
    assert np.array_equal(np.concatenate(list(decoder.read(path, range(40)))), read(open_media(path)))
    with pytest.raises(DecodeError, match="no such file") as caught:
        decoder.probe(str(tmp_path / "b.mp4"))
    assert caught.value.reason == "missing_file"
    assert decoder.probe(path).num_frames == 40


def test_a_crash_costs_one_request(tmp_path, decoder):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(9)))
    decoder.probe(path)
    os.kill(decoder.start().pid, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (decoder.start().pid, signal.SIGKILL)).start()
    with pytest.raises(DecodeError) as caught:
        decoder.probe(path)
    assert caught.value.reason == "decoder_crash"
    assert decoder.probe(path).num_frames == 9


def test_a_hang_ends_at_the_time_limit(tmp_path, decoder):
    path = str(write_video(tmp_path / "a.mp4", moving_frames(9)))
    decoder.probe(path)
    decoder.timeout_s = 1.0
    os.kill(decoder.start().pid, signal.SIGSTOP)
    with pytest.raises(DecodeError) as caught:
        decoder.probe(path)
    assert caught.value.reason == "timeout"
    decoder.timeout_s = 30
    assert decoder.probe(path).num_frames == 9
