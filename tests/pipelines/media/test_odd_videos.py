"""Videos that are long, have two pictures at once, are still written, or change between two reads."""

import time

import av
import numpy as np
import pytest
from fixtures import media_corpus as corpus

from loomvideo.pipelines.media import decode
from loomvideo.pipelines.media.decode import DecodeError, open_media
from loomvideo.pipelines.media.decode_process import IsolatedDecoder


def test_of_two_video_streams_the_default_one_is_shown_as_in_players(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for width, height in ((corpus.WIDTH, corpus.HEIGHT), (48, 32)):
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "4", "preset": "ultrafast"}
            streams.append(stream)
        for pixels in corpus.numbered(9):
            for stream in streams:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[: stream.height, : stream.width]))
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    media = open_media(str(path))
    assert (media.info.width, media.info.num_frames) == (corpus.WIDTH, 9)
    assert corpus.numbers(np.concatenate(list(media.read(range(9))))) == list(range(9))


def test_an_edit_list_hides_what_players_hide(tmp_path):
    """A cut without encoding: packets before its start are in the file for later ones, and are not shown."""

    def groups(stream):
        stream.options = {"crf": "4", "bf": "2", "g": "8", "sc_threshold": "0"}

    whole, cut = corpus.video(tmp_path / "s.mp4", corpus.numbered(24), prepare=groups), tmp_path / "cut.mp4"
    options = {"use_editlist": "1", "avoid_negative_ts": "disabled"}
    with av.open(str(whole)) as given, av.open(str(cut), "w", options=options) as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(given.streams.video[0]):
            if packet.size:
                before = 5 * round(1 / 24 / packet.time_base)
                packet.stream, packet.pts, packet.dts = stream, packet.pts - before, packet.dts - before
                container.mux(packet)
    media = open_media(str(cut))
    assert (media.info.num_frames, media.info.fps) == (19, 24.0)
    assert corpus.numbers(np.concatenate(list(media.read(range(19))))) == list(range(5, 24))
    assert corpus.numbers(np.concatenate(list(media.read([0, 9, 18])))) == [5, 14, 23]


def test_three_hours_are_read_where_they_are_asked_for(tmp_path):
    """10,800 s at two frames a second: packets of one group of pictures again and again."""

    def groups(stream):
        stream.options = {"crf": "4", "preset": "ultrafast", "g": "8", "bf": "0"}

    short, long = corpus.video(tmp_path / "s.mp4", corpus.numbered(8), rate=2, prepare=groups), tmp_path / "l.mp4"
    with av.open(str(short)) as given, av.open(str(long), "w") as container:
        stream = container.add_stream_from_template(given.streams.video[0])
        packets = [packet for packet in given.demux(given.streams.video[0]) if packet.size]
        step = packets[1].dts - packets[0].dts
        for number in range(2 * 10_800):
            packet = av.Packet(bytes(packets[number % 8]))
            packet.stream, packet.is_keyframe, packet.time_base = stream, number % 8 == 0, packets[0].time_base
            packet.pts = packet.dts = number * step
            container.mux(packet)
    media = open_media(str(long))
    assert media.info.num_frames / media.info.fps == pytest.approx(10_800)
    assert corpus.numbers(np.concatenate(list(media.read([21_586, 21_590, 21_599])))) == [2, 6, 7]


@pytest.mark.parametrize("whole", [True, False])
def test_a_file_that_grows_while_it_is_opened_has_its_reason(tmp_path, monkeypatch, whole):
    path = corpus.video(tmp_path / "v.mkv", corpus.numbered(9))
    content = path.read_bytes()
    if not whole:
        path.write_bytes(content[: len(content) // 8])
    opened = decode.open_video

    def grow(*arguments):
        with path.open("ab") as out:
            out.write(bytes(100))
        return opened(*arguments)

    monkeypatch.setattr(decode, "open_video", grow)
    with pytest.raises(DecodeError, match="still written") as caught:
        open_media(str(path))
    assert caught.value.reason == "growing"


def test_a_file_that_is_written_anew_is_opened_anew(tmp_path):
    path = corpus.video(tmp_path / "v.mkv", corpus.numbered(4))
    decoder = IsolatedDecoder(timeout_s=60)
    try:
        assert decoder.probe(str(path)).num_frames == 4
        time.sleep(0.02)
        corpus.video(path, corpus.numbered(7))
        assert decoder.probe(str(path)).num_frames == 7
    finally:
        decoder.close()
