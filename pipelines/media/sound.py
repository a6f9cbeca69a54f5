"""What a made video takes over from its source beside pictures: sound, and what its colours mean."""

from dataclasses import dataclass
from pathlib import Path

import av
from av.audio.stream import AudioStream

from loomvideo.pipelines.media.videos import video_stream

COPIED = ("aac", "mp3", "ac3", "eac3", "alac", "opus")
"""Codecs that an mp4 holds as they are; others are encoded anew."""
NEW_CODEC, NEW_BIT_RATE = "aac", 192_000
_UNSPECIFIED = 2


@dataclass(frozen=True)
class ColourTags:
    """Numbers of ITU-T H.273 for what red, green and blue mean; frames are always written with BT.709's matrix."""

    primaries: int = _UNSPECIFIED
    transfer: int = _UNSPECIFIED


def colour_tags(path: str) -> ColourTags:
    """Of the stream that players show; unspecified where it states none."""
    with av.open(path) as container:
        context = video_stream(container, path).codec_context
        primaries, transfer = int(context.color_primaries), int(context.color_trc)
    return ColourTags(primaries or _UNSPECIFIED, transfer or _UNSPECIFIED)


def add_sound(video: Path, source: str) -> None:
    """Give a silent mp4 all sound tracks of its source, cut to its length; without any nothing changes.

    Packets are copied where mp4 can hold them, so that sound loses nothing. Sound keeps its place beside the pictures
    where those of the source begin later than its clock.

    Args:
        video: The file, replaced when the new one is whole.
        source: The video that its pictures were made of.
    """
    partial = video.with_name(f".{video.stem}.sound.mp4")
    try:
        with av.open(source) as sounds, av.open(str(video)) as pictures:
            if not sounds.streams.audio:
                return
            with av.open(str(partial), "w", options={"movflags": "+faststart"}) as made:
                made.metadata.update(pictures.metadata)
                _join(made, pictures, sounds)
        partial.replace(video)
    finally:
        partial.unlink(missing_ok=True)


def _join(made: av.container.OutputContainer, pictures: av.container.InputContainer, sounds) -> None:
    shown = pictures.streams.video[0]
    length_s = float(shown.duration * shown.time_base)
    first = video_stream(sounds, sounds.name)
    start_s = float((first.start_time or 0) * first.time_base)
    copy = made.add_stream_from_template(shown)
    tracks = {track.index: (track, _track(made, track)) for track in sounds.streams.audio}
    packets = (packet for packet in pictures.demux(shown) if packet.dts is not None)
    waiting = next(packets, None)
    for packet in sounds.demux([track for track, _ in tracks.values()]):
        track, target = tracks[packet.stream.index]
        _earlier(packet, start_s)
        at_s = float(packet.pts * track.time_base) if packet.pts is not None else None
        if at_s is not None and (at_s >= length_s or (start_s and _ends_s(packet) <= 0)):
            continue
        # Pictures up to here first: players want both in the order of their times.
        while waiting is not None and at_s is not None and float(waiting.dts * shown.time_base) <= at_s:
            waiting.stream = copy
            made.mux(waiting)
            waiting = next(packets, None)
        for piece in _pieces(packet, track, target):
            made.mux(piece)
    while waiting is not None:
        waiting.stream = copy
        made.mux(waiting)
        waiting = next(packets, None)


def _earlier(packet: av.Packet, seconds: float) -> None:
    ticks = round(seconds / packet.time_base)
    if packet.pts is not None:
        packet.pts -= ticks
    if packet.dts is not None:
        packet.dts -= ticks


def _ends_s(packet: av.Packet) -> float:
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _track(made: av.container.OutputContainer, track: AudioStream) -> AudioStream:
    if track.codec_context.name in COPIED:
        return made.add_stream_from_template(track)
    return made.add_stream(NEW_CODEC, rate=track.codec_context.sample_rate, bit_rate=NEW_BIT_RATE)


def _pieces(packet: av.Packet, track: AudioStream, target: AudioStream) -> list[av.Packet]:
    """A packet for the new file; at a track's end those that its encoder still holds."""
    if track.codec_context.name in COPIED:
        if packet.dts is None:
            return []
        packet.stream = target
        return [packet]
    frames = packet.decode() if packet.dts is not None else [*packet.decode(), None]
    return [made for frame in frames for made in target.encode(frame)]
