"""Films and pictures of results."""

import av
import numpy as np
import pytest
from PIL import Image

from loomvideo.pipelines.evaluation import media, metrics
from loomvideo.pipelines.media.video_writer import write_video
from loomvideo.pipelines.vlm.requests import spread_frames


def gradient_video(frames, height, width):
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 200 // width, y * 200 // height, np.full_like(x, 90)], -1)
    return np.stack([np.clip(base + 4 * i, 0, 255) for i in range(frames)]).astype(np.uint8)


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 48, 64), (9, 33, 47), (1, 32, 32)])
def test_video_file_is_browser_playable_and_close_to_the_input(tmp_path, frames, height, width):
    video = gradient_video(frames, height, width)
    path = tmp_path / "deep" / "v.mp4"
    write_video(path, video, fps=24)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 24
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert decoded.shape == (frames, height + height % 2, width + width % 2, 3)
    assert metrics.psnr_db(decoded[:, :height, :width], video) > 35
    content = path.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    assert [p.name for p in path.parent.iterdir()] == ["v.mp4"]


def test_strip_takes_first_and_last_frame():
    video = gradient_video(9, 16, 16)
    frames = spread_frames(video, 3)
    assert np.array_equal(frames, video[[0, 4, 8]])
    assert len(spread_frames(video[:2], 5)) == 2
    assert media.filmstrip(video, count=3, height=32, gap=2).size == (32 * 3 + 4, 32)


def test_stacked_filmstrips_keep_to_the_width():
    videos = {"source": gradient_video(9, 48, 80), "edited": gradient_video(9, 48, 80)}
    assert media.stacked_filmstrips(videos, count=5, height=128, max_width=400).width <= 400


def test_contact_sheet_places_panels_under_their_columns():
    red, green = (np.zeros((3, 32, 32, 3), np.uint8) for _ in range(2))
    red[..., 0], green[..., 1] = 255, 255
    rows = [
        media.SheetRow("make it green " * 30, {"source": red, "edited": green}, note="edit 24.1 dB"),
        media.SheetRow("a green square", {"edited": green}),
    ]
    sheet = np.asarray(media.contact_sheet(rows, title="held out", frames=3, height=32))
    reds = np.argwhere((sheet == (255, 0, 0)).all(-1))
    greens = np.argwhere((sheet == (0, 255, 0)).all(-1))
    assert reds[:, 1].max() < greens[:, 1].min()
    assert len(greens) == 2 * len(reds) == 2 * 3 * 32 * 32


def test_contact_sheet_needs_a_known_column():
    with pytest.raises(ValueError, match="columns"):
        media.contact_sheet([media.SheetRow("x", {"result": gradient_video(1, 16, 16)})])


def test_png_and_thumbnail(tmp_path):
    media.save_png(media.thumbnail(gradient_video(3, 40, 20), height=10), tmp_path / "a" / "t.png")
    assert Image.open(tmp_path / "a" / "t.png").size == (5, 10)
