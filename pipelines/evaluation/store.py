"""Results on disk, keyed by content: what exists under a key is complete and is never made again.

An entry is a folder that appears under its final name by one rename, so that a killed run leaves nothing half-written,
and runs on many machines may share the store.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from loomvideo.pipelines.evaluation.metrics import check_video
from loomvideo.platform.errors import full_disk_named
from loomvideo.platform.folders import give_name

RECORD = "record.json"


def content_key(*parts: Any) -> str:
    """Hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class Store:
    """Entries by kind and key under one folder."""

    folder: Path

    def entry(self, kind: str, key: str) -> Path:
        """Folder of an entry, whether or not it exists."""
        return self.folder / kind / key[:2] / key

    def record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record of a complete entry, or None."""
        path = self.entry(kind, key) / RECORD
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def kept(self, kind: str, key: str) -> Any:
        """The record of an entry that an earlier stage has made.

        Raises:
            RuntimeError: if it is gone.
        """
        record = self.record(kind, key)
        if record is None:
            raise RuntimeError(f"{self.entry(kind, key)}: an earlier stage made it, and it is gone; run again")
        return record

    def make(self, kind: str, key: str, fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The record under a key; when there is none, ``fill(folder)`` writes the files and returns it."""
        record = self.record(kind, key)
        if record is not None:
            return record
        final = self.entry(kind, key)
        partial = final.parent / f".{key}.{os.getpid()}-{uuid.uuid4().hex[:6]}"
        partial.mkdir(parents=True)
        try:
            with full_disk_named(final):
                record = fill(partial)
                (partial / RECORD).write_text(json.dumps(record, sort_keys=True), encoding="utf-8")
            try:
                give_name(partial, final, RECORD)
            except OSError:
                # Another worker made the same entry meanwhile; theirs stands.
                existing = self.record(kind, key)
                if existing is None:
                    raise
                record = existing
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return record


def pixel_digest(video: np.ndarray) -> str:
    """Hash of a video's shape and pixels."""
    digest = hashlib.sha256(repr(video.shape).encode())
    digest.update(np.ascontiguousarray(video).tobytes())
    return digest.hexdigest()[:32]


def write_lossless(path: Path, video: np.ndarray, fps: float) -> None:
    """Write exact pixels (FFV1 in Matroska), so that metrics see what the model made and not what a codec left."""
    check_video(video)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=round(fps))
        stream.width, stream.height, stream.pix_fmt = video.shape[2], video.shape[1], "bgr0"
        for pixels in video:
            # bgr0 holds the same eight bits a channel, so this only reorders bytes.
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode(None))


def read_lossless(path: Path) -> np.ndarray:
    """Read what :func:`write_lossless` wrote."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
