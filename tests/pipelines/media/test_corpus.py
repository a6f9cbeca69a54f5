"""What a person sees in a viewer or player is what the model gets; anything else has a reason."""

import os
import struct
import unicodedata
from fractions import Fraction

import numpy as np
import pytest
from fixtures import media_corpus as corpus
from fixtures.media import write_picture

from loomvideo.pipelines.evaluation.suites.items import file_digest
from loomvideo.pipelines.media.decode import DecodeError, open_media
from loomvideo.pipelines.media.decode_process import IsolatedDecoder
from loomvideo.pipelines.media.files import content_hash, local_copies
from loomvideo.platform.shards import storage

UPRIGHT = list(corpus.QUARTERS)
Q = corpus.quarters()


def all_frames(path):
    media = open_media(str(path))
    return media.info, np.concatenate(list(media.read(range(media.info.num_frames))))


def reason(path):
    with pytest.raises(DecodeError) as caught:
        all_frames(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations(tmp_path, orientation):
    info, frames = all_frames(corpus.oriented(tmp_path / "p.jpg", orientation))
    assert (info.kind, info.width, info.height) == ("image", corpus.WIDTH, corpus.HEIGHT)
    assert corpus.seen(frames[0]) == UPRIGHT


def test_a_phone_jpeg_with_a_second_picture_and_a_scan_of_pages_are_pictures(tmp_path):
    from PIL import Image

    for name in ("p.mpo", "p.tiff"):
        pages = [Image.fromarray(Q), Image.fromarray(Q[::-1].copy())]
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        (tmp_path / name).rename(tmp_path / "p.jpg")
        info, frames = all_frames(tmp_path / "p.jpg")
        assert (info.kind, len(frames)) == ("image", 1)
        assert corpus.seen(frames[0]) == UPRIGHT


def test_colour_profiles_are_followed(tmp_path):
    from skimage.color import deltaE_ciede2000, rgb2lab

    linear = ((Q / 255.0 + 0.055) / 1.055) ** 2.4
    stored = np.clip(linear ** (1 / 1.8) * 255 + 0.5, 0, 255).astype(np.uint8)
    _, frames = all_frames(corpus.jpeg_with_profile(tmp_path / "p.jpg", stored, 1.8))
    for y in (16, 48):
        for x in (24, 72):
            assert deltaE_ciede2000(rgb2lab(frames[0][y, x] / 255), rgb2lab(Q[y, x] / 255)) < 2


def test_a_broken_profile_is_taken_as_srgb(tmp_path):
    from PIL import Image

    Image.fromarray(Q).save(tmp_path / "p.png", icc_profile=b"nonsense")
    assert np.array_equal(all_frames(tmp_path / "p.png")[1][0], Q)


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "P", "1", "I;16", "RGBA", "PA", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    from PIL import Image

    image = Image.fromarray(Q).convert("L") if mode == "I;16" else Image.fromarray(Q).convert(mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    path = tmp_path / ("p.tif" if mode in ("CMYK", "PA", "YCbCr", "LAB") else "p.png")
    if mode == "PA":
        path = tmp_path / "p.png"
        image = Image.fromarray(Q).convert("P")
        image.info["transparency"] = 0
    image.save(path)
    _, frames = all_frames(path)
    assert frames.shape == (1, corpus.HEIGHT, corpus.WIDTH, 3)
    grey = np.abs(frames[0].astype(int).mean(axis=-1) - np.asarray(Image.fromarray(Q).convert("L")))
    assert mode == "1" or np.median(grey) < 40


def test_transparency_is_white(tmp_path):
    rgba = np.dstack((Q, np.zeros(Q.shape[:2], np.uint8)))
    for name in ("p.png", "p.webp"):
        write_picture(tmp_path / name, rgba)
        assert (all_frames(tmp_path / name)[1] == 255).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize(("duration", "seconds"), [(100, 0.4), (10, 0.4), (0, 0.4), (40, 0.16)])
def test_animations_play_at_the_speed_of_browsers(tmp_path, format, duration, seconds):
    info, frames = all_frames(corpus.animation(tmp_path / "p.bin", duration, format))
    assert (info.kind, info.num_frames) == ("video", 4)
    assert info.num_frames / info.fps == pytest.approx(seconds)
    assert corpus.numbers(frames) == [0, 1, 2, 3]


def test_odd_pictures(tmp_path):
    write_picture(tmp_path / "long.png", np.zeros((10, 30000, 3), np.uint8))
    assert all_frames(tmp_path / "long.png")[0].width == 30000
    write_picture(tmp_path / "p.avif", Q)
    assert corpus.seen(all_frames(tmp_path / "p.avif")[1][0]) == UPRIGHT
    write_picture(tmp_path / "dot.png", Q[:1, :1])
    assert reason(tmp_path / "dot.png") == "too_small"
    (tmp_path / "bomb.png").write_bytes(corpus.bomb())
    assert reason(tmp_path / "bomb.png") == "too_large"
    (tmp_path / "cut.jpg").write_bytes(write_picture(tmp_path / "p.jpg", Q).read_bytes()[:700])
    assert reason(tmp_path / "cut.jpg") in ("corrupt_frame", "unreadable")


@pytest.mark.parametrize("format", ["ICO", "JPEG2000", "PSD"])
def test_pictures_of_other_programs(tmp_path, format):
    from PIL import Image

    path = tmp_path / "p.png"
    if format == "PSD":  # one layer of three planes, as they are
        planes = np.ascontiguousarray(Q.transpose(2, 0, 1)).tobytes()
        head = b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, corpus.HEIGHT, corpus.WIDTH, 8, 3)
        path.write_bytes(head + bytes(12) + b"\0\0" + planes)
    else:
        Image.fromarray(Q).save(path, format, **({"sizes": [(corpus.WIDTH, corpus.HEIGHT)]} if format == "ICO" else {}))
    info, frames = all_frames(path)
    assert (info.kind, frames.shape) == ("image", (1, corpus.HEIGHT, corpus.WIDTH, 3))
    assert corpus.seen(frames[0]) == UPRIGHT


def test_what_has_no_end_is_not_read(tmp_path):
    """A pipe that nobody writes to, and a device that always gives more."""
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "zeros.mp4").symlink_to("/dev/zero")
    for name in ("pipe.mp4", "zeros.mp4"):
        assert reason(tmp_path / name) == "not_media"
        with pytest.raises(DecodeError, match="a pipe, a socket or a device"):
            content_hash(str(tmp_path / name))
        with pytest.raises(OSError, match="no file"):
            file_digest(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty_file"),
        (b"<!DOCTYPE html><html>404</html>", "not_media"),
        (b"\n <HTML><body>", "not_media"),
        (b'{"error": "gone"}', "not_media"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not_media"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_media"),
        (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "not_media"),
        (b"#EXTM3U\n", "not_media"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "not_media"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "unsupported"),
        (b"just words, and more words", "unreadable"),
        (bytes(5000), "unreadable"),
    ],
)
def test_what_is_no_media_says_what_it_is(tmp_path, content, expected):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    assert reason(path) == expected


# Display matrices as containers hold them: x' = a x + c y, y' = b x + d y, in 16.16.
ONE = 1 << 16
TURNS = {
    "none": (ONE, 0, 0, ONE),
    "90": (0, ONE, -ONE, 0),
    "180": (-ONE, 0, 0, -ONE),
    "270": (0, -ONE, ONE, 0),
    "mirror": (-ONE, 0, 0, ONE),
    "flip": (ONE, 0, 0, -ONE),
    "transpose": (0, ONE, ONE, 0),
    "transverse": (0, -ONE, -ONE, 0),
}


def stored_for(turn, shown):
    """The pixels that a display matrix turns into ``shown``."""
    a, b, c, d = (value // ONE for value in TURNS[turn])
    height, width = shown.shape[:2]
    stored = np.zeros((width, height, 3) if b else shown.shape, np.uint8)
    for y in range(stored.shape[0]):
        for x in range(stored.shape[1]):
            to_x, to_y = a * x + c * y, b * x + d * y
            stored[y, x] = shown[to_y % height, to_x % width]
    return stored


@pytest.mark.parametrize("turn", TURNS)
def test_display_matrices(tmp_path, turn):
    a, b, c, d = TURNS[turn]
    matrix = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = corpus.video(tmp_path / "v.mp4", stored_for(turn, Q)[None].repeat(3, 0), matrix=matrix)
    info, frames = all_frames(path)
    assert (info.width, info.height) == (corpus.WIDTH, corpus.HEIGHT)
    assert [corpus.seen(frame) for frame in frames] == [UPRIGHT] * 3


@pytest.mark.parametrize("turn", ["90", "270", "flip"])
def test_a_turned_video_that_is_cropped_keeps_its_edges(tmp_path, turn):
    """H.264 codes blocks of 16 and hides the rest: here four columns and ten rows, on the side that is turned."""
    a, b, c, d = TURNS[turn]
    quarters = corpus.quarters(92, 70)
    stored = stored_for(turn, quarters)[None].repeat(3, 0)
    path = corpus.video(tmp_path / "v.mp4", stored, matrix=(a, b, 0, c, d, 0, 0, 0, 1 << 30))
    info, frames = all_frames(path)
    assert (info.width, info.height) == (92, 70)
    assert np.abs(frames[1].astype(int) - quarters)[[2, 2, -3, -3], [2, -3, 2, -3]].max() < 24


@pytest.mark.parametrize(
    ("aspect", "size"), [("2", (192, 64)), ("1/2", (96, 128)), ("64/45", (137, 64)), ("1", (96, 64)), ("100", (96, 64))]
)
def test_pixels_are_square(tmp_path, aspect, size):
    def squeeze(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)

    info, frames = all_frames(corpus.video(tmp_path / "v.mp4", Q[None].repeat(3, 0), prepare=squeeze))
    assert (info.width, info.height) == size
    assert frames.shape[1:3] == size[::-1]
    assert corpus.seen(frames[1]) == UPRIGHT


@pytest.mark.parametrize(("skip", "format"), [(5, "mp4"), (5, "mpegts"), (0, "mpegts"), (9, "matroska"), (5, "mov")])
def test_cuts_that_start_off_a_key_frame_begin_at_the_next(tmp_path, skip, format):
    def group_of_eight(stream):
        stream.options = {"crf": "4", "bf": "2", "g": "8", "sc_threshold": "0"}

    source = corpus.video(tmp_path / "s.mp4", corpus.numbered(24), prepare=group_of_eight)
    info, frames = all_frames(corpus.stream_copy(source, tmp_path / f"v.{format}", skip, format))
    first = 0 if skip == 0 else 8 if skip == 5 else 16
    assert corpus.numbers(frames) == list(range(first, 24))
    assert info.fps == pytest.approx(24, rel=0.01)  # Matroska counts milliseconds
    # The same frames when reading starts in the middle, at pictures that need what came before.
    for start in range(0, info.num_frames, 3):
        part = np.concatenate(list(open_media(str(tmp_path / f"v.{format}")).read(range(start, info.num_frames))))
        assert corpus.numbers(part) == list(range(first + start, 24))


@pytest.mark.parametrize(
    ("name", "format"), [("v.h264", "h264"), ("v.avi", "avi"), ("v.mkv", "matroska"), ("v.flv", "flv")]
)
def test_frames_come_in_the_order_shown_with_and_without_timestamps(tmp_path, name, format):
    path = corpus.video(tmp_path / name, corpus.numbered(20), container_format=format,
                        prepare=lambda s: setattr(s, "options", {"crf": "4", "bf": "2", "g": "8"}))  # fmt: skip
    info, frames = all_frames(path)
    assert corpus.numbers(frames) == list(range(20))
    assert info.fps in (pytest.approx(24, rel=0.01), pytest.approx(25))
    assert corpus.numbers(np.concatenate(list(open_media(str(path)).read([7, 7, 12])))) == [7, 7, 12]


def test_a_fragmented_file_and_one_that_starts_late(tmp_path):
    path = corpus.video(tmp_path / "f.mp4", corpus.numbered(12), options={"movflags": "frag_keyframe+empty_moov"})
    assert corpus.numbers(all_frames(path)[1]) == list(range(12))
    info, frames = all_frames(corpus.video(tmp_path / "t.ts", corpus.numbered(12), container_format="mpegts"))
    assert corpus.numbers(frames) == list(range(12))
    assert info.fps == pytest.approx(24)


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("libx264", "yuv420p10le", "mp4"),
        ("libx264", "yuv444p", "mp4"),
        ("libx264", "yuv422p", "mp4"),
        ("libx265", "yuv420p10le", "mp4"),
        ("libsvtav1", "yuv420p", "mp4"),
        ("mpeg2video", "yuv420p", "mpg"),
        ("mjpeg", "yuvj420p", "avi"),
        ("prores_ks", "yuv422p10le", "mov"),
        ("ffv1", "bgr0", "mkv"),
    ],
)
def test_codecs_and_formats_show_the_same_colours(tmp_path, codec, pixel_format, suffix):
    path = corpus.video(tmp_path / f"v.{suffix}", Q[None].repeat(4, 0), codec, pixel_format)
    info, frames = all_frames(path)
    assert info.num_frames == 4
    assert os.sched_getscheduler(0) == os.SCHED_OTHER  # whatever an encoder did, the tests after it are ordinary
    error = np.abs(frames[1, 8::16, 8::16].astype(int) - Q[8::16, 8::16]).max()
    assert error < 24, error


@pytest.mark.parametrize(
    ("codec", "pixel_format", "suffix"),
    [
        ("prores_ks", "yuva444p10le", "mov"),
        ("libvpx-vp9", "yuva420p", "webm"),
        ("qtrle", "argb", "mov"),
        ("png", "rgba", "mov"),
    ],
)
def test_alpha_is_laid_over_white(tmp_path, codec, pixel_format, suffix):
    rgba = np.dstack((Q, np.full(Q.shape[:2], 255, np.uint8)))
    rgba[:, : corpus.WIDTH // 2, 3] = 0
    path = corpus.video(tmp_path / f"v.{suffix}", rgba[None].repeat(3, 0), codec, pixel_format)
    _, frames = all_frames(path)
    assert (frames[:, :, : corpus.WIDTH // 2 - 8] >= 250).all()
    assert corpus.seen(frames[0])[1::2] == UPRIGHT[1::2]


def test_interlaced_video_shows_one_moment_a_frame(tmp_path):
    frames = np.zeros((6, 64, 96, 3), np.uint8)
    for number in range(6):
        frames[number, 0::2, 8 * number : 8 * number + 16] = 255
        frames[number, 1::2, 8 * number + 8 : 8 * number + 24] = 255

    def interlaced(stream):
        stream.options = {"crf": "1", "preset": "ultrafast", "x264-params": "tff=1"}

    info, shown = all_frames(corpus.video(tmp_path / "v.mp4", frames, prepare=interlaced))
    assert info.num_frames == 6
    for number, frame in enumerate(shown):
        assert (frame[8:56, 8 * number + 4 : 8 * number + 12] > 200).all()
        assert (frame[8:56, 8 * number + 18 : 8 * number + 24] < 60).all(), "the other field's moment"


@pytest.mark.parametrize("transfer", [16, 18])
def test_high_dynamic_range_has_its_reason(tmp_path, transfer):
    def hdr(stream):
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9

    path = corpus.video(tmp_path / "v.mp4", Q[None].repeat(3, 0), pixel_format="yuv420p10le", prepare=hdr)
    assert reason(path) == "hdr"


def test_high_definition_without_a_tag_is_bt709_as_players_take_it(tmp_path):
    import av

    frames = corpus.quarters(1280, 720)

    def write(path, size, matrix, tagged):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            stream.options = {"crf": "4", "preset": "ultrafast"}
            if tagged:
                stream.codec_context.colorspace = 1
            frame = av.VideoFrame.from_ndarray(corpus.quarters(*size), format="rgb24")
            yuv = av.video.reformatter.VideoReformatter().reformat(frame, format="yuv420p", dst_colorspace=matrix)
            container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
        return path

    cases = [((1280, 720), "ITU709", False), ((96, 64), "ITU601", False), ((96, 64), "ITU709", True)]
    for number, (size, matrix, tagged) in enumerate(cases):
        _, shown = all_frames(write(tmp_path / f"{number}.mp4", size, matrix, tagged))
        for y in (1, 3):
            for x in (1, 3):
                at = (y * size[1] // 4, x * size[0] // 4)
                there = frames[y * 180, x * 320].astype(int)
                assert np.abs(shown[0][at].astype(int) - there).max() <= 4, (size, matrix, tagged)


def test_speeds(tmp_path):
    for rate in (5, 240, Fraction(30000, 1001)):
        info, frames = all_frames(corpus.video(tmp_path / "v.mp4", corpus.numbered(10), rate=rate))
        assert info.fps == pytest.approx(float(rate), rel=1e-3)
        assert corpus.numbers(frames) == list(range(10))


def test_odd_sizes_and_one_frame(tmp_path):
    info, frames = all_frames(corpus.video(tmp_path / "v.mkv", corpus.numbered(1, 97, 65), "ffv1", "yuv444p"))
    assert (info.num_frames, frames.shape) == (1, (1, 65, 97, 3))


def test_cover_art_is_no_video_and_the_main_stream_is_shown(tmp_path):
    import av

    picture = write_picture(tmp_path / "c.png", Q).read_bytes()
    for name, with_video in (("song.mp4", False), ("film.mp4", True)):
        with av.open(str(tmp_path / name), "w") as container:
            cover = container.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = corpus.WIDTH, corpus.HEIGHT, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            stream = container.add_stream("libx264", rate=24) if with_video else None
            if stream:
                stream.width, stream.height, stream.pix_fmt = corpus.WIDTH, corpus.HEIGHT, "yuv420p"
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 24)
            container.start_encoding()
            container.mux(packet)
            if stream:
                for pixels in corpus.numbered(9):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                container.mux(stream.encode(None))
    assert reason(tmp_path / "song.mp4") == "no_video_stream"
    assert corpus.numbers(all_frames(tmp_path / "film.mp4")[1]) == list(range(9))


def test_a_name_in_another_unicode_form_is_found(tmp_path):
    composed, apart = (unicodedata.normalize(form, "kleid-é.png") for form in ("NFC", "NFD"))
    write_picture(tmp_path / apart, Q)
    assert all_frames(tmp_path / composed)[0].width == corpus.WIDTH
    with local_copies([str(tmp_path / composed)]) as names:
        assert names == {str(tmp_path / composed): str(tmp_path / apart)}


@pytest.mark.parametrize(
    "url", ["klingon://a/b.mp4", "dropbox://a/b.mp4", "github://a", "https://[bad/a.mp4", "http://127.0.0.1:1/a.mp4"]
)
def test_a_url_that_nothing_reads_costs_its_sample(url, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_DELAYS_S", (0.0,))
    with pytest.raises(DecodeError) as caught, local_copies([url]):
        pass
    assert caught.value.reason == "download_failed"
    assert str(caught.value).startswith(f"{url}: ")
    assert "\n" not in str(caught.value)


def test_a_remote_name_with_pattern_characters_is_one_file(tmp_path):
    import fsspec

    with fsspec.open("memory://media/a[1]*?.png", "wb") as out:
        out.write(write_picture(tmp_path / "p.png", Q).read_bytes())
    with local_copies(["memory://media/a[1]*?.png"]) as names:
        assert corpus.seen(all_frames(names["memory://media/a[1]*?.png"])[1][0]) == UPRIGHT


def test_the_isolated_decoder_gives_the_same(tmp_path):
    path = corpus.video(
        tmp_path / "v.mp4", stored_for("mirror", Q)[None].repeat(3, 0), matrix=(-ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    )
    decoder = IsolatedDecoder(timeout_s=60)
    try:
        assert decoder.probe(str(path)) == open_media(str(path)).info
    finally:
        decoder.close()
