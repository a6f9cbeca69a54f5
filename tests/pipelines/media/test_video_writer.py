"""Videos written in pieces: the same file as at once, encoded while the next piece is made, no file after an error."""

import threading

import numpy as np
import pytest

from loomvideo.pipelines.media import video_writer as video_files
from loomvideo.pipelines.media.video_writer import write_video_stream, write_while_made

# Sides that are multiples of 16: at other heights x264 itself gives now and then another file for the same frames.
VIDEO = np.random.default_rng(0).integers(0, 255, (11, 48, 64, 3), dtype=np.uint8)


def test_pieces_do_not_change_the_file(tmp_path):
    write_video_stream(tmp_path / "whole.mp4", [VIDEO], metadata={"comment": "c"})
    pieces = [VIDEO[:1], VIDEO[1:5], VIDEO[5:]]
    write_video_stream(tmp_path / "pieces.mp4", pieces, metadata={"comment": "c"})
    write_while_made(tmp_path / "while.mp4", iter(pieces), metadata={"comment": "c"})
    whole = (tmp_path / "whole.mp4").read_bytes()
    assert (tmp_path / "pieces.mp4").read_bytes() == whole
    assert (tmp_path / "while.mp4").read_bytes() == whole


def test_encoding_runs_while_the_next_piece_is_made(tmp_path, monkeypatch):
    encoded = threading.Event()
    pad = np.pad

    def seen(*arguments, **options):
        encoded.set()
        return pad(*arguments, **options)

    monkeypatch.setattr(video_files.np, "pad", seen)

    def pieces():
        yield VIDEO[:1]
        assert encoded.wait(10), "the first piece is not encoded before the second one is asked for"
        yield VIDEO[1:]

    write_while_made(tmp_path / "video.mp4", pieces())


def test_an_error_while_making_leaves_no_file(tmp_path):
    def pieces():
        yield VIDEO[:5]
        raise MemoryError

    with pytest.raises(MemoryError):
        write_while_made(tmp_path / "video.mp4", pieces())
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_encoder_ends_the_making(tmp_path):
    made = []

    def pieces():
        yield VIDEO[:1].astype(np.float32)
        for index in range(10_000):
            made.append(index)
            yield VIDEO[:1]

    with pytest.raises(ValueError, match=r"dtype|float32|uint8"):
        write_while_made(tmp_path / "video.mp4", pieces())
    assert len(made) < 10_000
    assert list(tmp_path.iterdir()) == []
