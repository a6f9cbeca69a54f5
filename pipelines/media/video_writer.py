"""H.264 files written piece by piece, if wanted while the next piece is still being made."""

import contextlib
import queue
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from loomvideo.pipelines.media.sound import ColourTags
from loomvideo.platform.errors import full_disk_named

PIECES_AHEAD = 2


def write_video(
    path: Path, video: np.ndarray, fps: float = 24.0, crf: int = 16, metadata: Mapping[str, str] | None = None
) -> None:
    """Write an mp4 (H.264, yuv420p, faststart) that MLflow and every browser play, through a temporary name.

    Odd sides, which yuv420p cannot hold, are padded by repeating the last row or column.

    Args:
        path: The file to write; its folder is made.
        video: ``[frames, height, width, 3]`` uint8.
        fps: Frames a second.
        crf: x264 constant rate factor; 16 is visually lossless, so that codec loss is no part of a judgement.
        metadata: Tags of the container, such as ``{"comment": …}``.
    """
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or video.size == 0:
        raise ValueError(f"expected uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}")
    write_video_stream(path, [video], fps, crf, metadata)


def write_video_stream(
    path: Path,
    pieces: Iterable[np.ndarray],
    fps: float = 24.0,
    crf: int = 16,
    metadata: Mapping[str, str] | None = None,
    colours: ColourTags | None = None,
) -> None:
    """Write an mp4 (H.264, yuv420p, faststart) through a temporary name.

    How the frames are cut into pieces does not change the file, and the same frames give the same file where sides are
    multiples of 16, as all generated ones are (at other heights x264 varies). Odd sides, which yuv420p cannot hold, are
    padded by repeating the last row or column.

    Args:
        path: The file to write; its folder is made.
        pieces: ``[frames, height, width, 3]`` uint8 each, at least one; all of one size.
        fps: Frames a second.
        crf: x264 constant rate factor.
        metadata: Tags of the container, such as ``{"comment": …}``.
        colours: What red, green and blue mean; None states nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.tmp.mp4")
    with full_disk_named(path, partial):
        with av.open(str(partial), "w", options={"movflags": "+faststart"}) as container:
            container.metadata.update(metadata or {})
            options = {"crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "colormatrix=bt709"}
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.pix_fmt = "yuv420p"
            stream.codec_context.color_range = 1
            stream.codec_context.colorspace = 1
            if colours is not None:
                stream.codec_context.color_primaries = colours.primaries
                stream.codec_context.color_trc = colours.transfer
            reformatter = av.video.reformatter.VideoReformatter()
            for piece in pieces:
                _, height, width, _ = piece.shape
                piece = np.pad(piece, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if not stream.codec_context.is_open:
                    stream.width, stream.height = piece.shape[2], piece.shape[1]
                    if stream.width % 32 or stream.height % 32:
                        # x264's macroblock tree then reads memory that nobody wrote, and files differ now and then.
                        params = f"{options['x264-params']}:mbtree=0"
                        stream.codec_context.options = options | {"x264-params": params}
                for pixels in piece:
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    yuv = reformatter.reformat(frame, format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                    container.mux(stream.encode(yuv))
            container.mux(stream.encode(None))
        partial.replace(path)


def write_while_made(path: Path, pieces: Iterable[np.ndarray], **options: object) -> None:
    """:func:`write_video_stream` in a thread, while this one makes the next pieces.

    An error of either side ends both, and leaves no file.
    """
    waiting: queue.Queue[np.ndarray | BaseException | None] = queue.Queue(PIECES_AHEAD)
    with ThreadPoolExecutor(1, thread_name_prefix="video-encoder") as pool:
        writing = pool.submit(write_video_stream, path, _received(waiting), **options)
        try:
            for piece in pieces:
                _put(waiting, piece, writing)
                if writing.done():
                    break
        except BaseException as error:
            _put(waiting, error, writing)
            raise
        _put(waiting, None, writing)
        writing.result()


def _put(waiting: queue.Queue, item: np.ndarray | BaseException | None, writing: Future) -> None:
    """Hand an item over, unless the writer has ended."""
    while not writing.done():
        with contextlib.suppress(queue.Full):
            waiting.put(item, timeout=0.1)
            return


def _received(waiting: queue.Queue) -> Iterator[np.ndarray]:
    while (item := waiting.get()) is not None:
        if isinstance(item, BaseException):
            raise item
        yield item
