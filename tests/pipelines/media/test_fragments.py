"""Media fragments: parts of files named in their paths."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest

from loomvideo.pipelines.media.decode import DecodeError, open_media
from loomvideo.pipelines.media.files import content_hash, local_copies, media_stamp
from loomvideo.pipelines.media.fragments import Fragment, FragmentMedia, split_fragment, with_fragment
from loomvideo.pipelines.sample_data.media import write_clip


@dataclass(frozen=True)
class Info:
    kind: str
    width: int
    height: int
    num_frames: int
    fps: float


class Numbered:
    """A video whose frame i has the value i, and columns that count."""

    info = Info("video", 40, 20, 50, 25.0)

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            frame = np.full((1, 20, 40, 3), index, np.uint8)
            frame[..., 1] = np.arange(40)
            yield frame


@pytest.mark.parametrize(
    "path",
    ["a.mp4#t=1.5,3", "a.mp4#t=,3", "s3://b/a #1.mp4#frames=4,9&xywh=percent:10,0,50,100", "a.mp4#at=0.25",
     "a.mp4#frame=7&xywh=pixel:1,2,3,4&side=768"],
)  # fmt: skip
def test_round_trip(path):
    file, fragment = split_fragment(path)
    assert fragment is not None
    assert with_fragment(file, fragment) == path


@pytest.mark.parametrize("path", ["look #3.mp4", "a.mp4", "a#t=.mp4", "a.mp4#t=x,2", "a.mp4#volume=3"])
def test_other_hashes_are_part_of_the_name(path):
    assert split_fragment(path) == (path, None)


def test_a_second_fragment_refines_the_first():
    assert with_fragment("a.mp4#t=1,2", Fragment(frame=3)) == "a.mp4#t=1,2&frame=3"
    assert with_fragment("a.mp4#t=1,2", Fragment(seconds=(0.0, 9.0))) == "a.mp4#t=0,9"


def test_a_span_of_seconds():
    part = FragmentMedia(Numbered(), split_fragment("x#t=0.4,1")[1])
    assert part.info.num_frames == 15
    values = [int(chunk[0, 0, 0, 0]) for chunk in part.read([0, 14])]
    assert values == [10, 24]


def test_a_cropped_frame_is_a_picture():
    part = FragmentMedia(Numbered(), split_fragment("x#at=0.5&xywh=percent:25,50,25,50")[1])
    assert (part.info.kind, part.info.width, part.info.height, part.info.num_frames) == ("image", 10, 10, 1)
    (chunk,) = part.read([0])
    assert chunk.shape == (1, 10, 10, 3)
    assert chunk[0, 0, 0].tolist() == [25, 10, 25]


def test_pixels_of_a_scaled_frame():
    assert Fragment(box=(10, 0, 10, 10), box_unit="pixel", side=20).crop(40, 20) == (20, 0, 40, 20)
    assert Fragment(box=(90, 90, 50, 50)).crop(40, 20) == (36, 18, 40, 20)


def test_outside_the_file_is_an_error():
    with pytest.raises(ValueError, match="no frame at #t=3,4"):
        FragmentMedia(Numbered(), Fragment(seconds=(3.0, 4.0)))


def test_decoding_a_part_of_a_file(tmp_path):
    frames = [np.full((32, 48, 3), 8 * i, np.uint8) for i in range(24)]
    path = tmp_path / "clip #1.mp4"
    write_clip(path, frames)
    part = open_media(f"{path}#t=0.25,0.5&xywh=percent:0,0,50,100")
    shown = np.concatenate(list(part.read(range(part.info.num_frames))))
    assert shown.shape == (6, 32, 24, 3)
    assert np.abs(shown[:, 16, 12].mean(1) - 8 * np.arange(6, 12)).max() < 3
    assert open_media(f"{path}#frame=3").info.kind == "image"
    with pytest.raises(DecodeError, match="no frame at") as error:
        open_media(f"{path}#t=2,3")
    assert error.value.reason == "outside_file"


def test_parts_of_one_file_have_their_own_hash_and_one_stamp(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"abc")
    whole, part = str(tmp_path / "a.mp4"), str(tmp_path / "a.mp4#frame=1")
    assert content_hash(whole) != content_hash(part) != content_hash(whole + "#frame=2")
    assert media_stamp(whole) == media_stamp(part)


def test_a_remote_part_is_downloaded_as_a_whole():
    fsspec.filesystem("memory").pipe_file("/films/a.mp4", b"abc")
    url = "memory://films/a.mp4#t=1,2"
    with local_copies([url]) as copies:
        name, fragment = split_fragment(copies[url])
        assert Path(name).read_bytes() == b"abc"
        assert fragment == Fragment(seconds=(1.0, 2.0))
