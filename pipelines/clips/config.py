"""The configuration of ``loomvideo data cut``."""

from dataclasses import dataclass
from typing import Any

from loomvideo.pipelines.clips.cutter import CutOptions
from loomvideo.pipelines.prepare.curation.options import SHOT_DETECTORS, ShotOptions
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class CutWorkers:
    """The pool of workers that cut films. Nothing here changes what is written."""

    count: int = option(0, "workers at most; 0: as many as the cluster has, or gets, room for")
    cpus: float = option(1.0, "CPUs a worker reserves; it decodes and encodes in one thread")
    piece_timeout_s: float = option(60.0, "longest time without progress in one film")


@dataclass
class CutConfig:
    """Films to clips."""

    input: str = option("???", "samples.jsonl or a dataset in a known layout; a local path or URL")
    format: str = option("auto", "layout of the input; `auto` recognises it, see docs/sources.md")
    source_options: dict[str, Any] = option({}, "options of the layout, for example {videos: /data/films}")
    output: str = option("???", "folder of clips/, samples.jsonl and cut.parquet; a local path or URL")
    height: int = option(
        0, "pixels of the shorter side of clips at most, frames encoded anew; 0: as in the film, copied where possible"
    )
    crf: int = option(16, "x264's constant rate factor of clips that are encoded; 16 is visually lossless, 0 lossless")
    shots: ShotOptions = option(ShotOptions, "")
    workers: CutWorkers = option(CutWorkers, "")

    @property
    def options(self) -> CutOptions:
        """How clips are written."""
        return CutOptions(self.height, self.crf, self.shots)

    def check(self) -> None:
        """Check values that types cannot.

        Raises:
            UserError: naming the key and the fix.
        """
        if self.shots.detector not in SHOT_DETECTORS:
            raise UserError(f"shots.detector={self.shots.detector}: choose one of {', '.join(SHOT_DETECTORS)}")
        if self.shots.detector != "off" and self.shots.max_duration_s <= 0:
            raise UserError("shots.max_duration_s=0: give a limit; what is held of a film grows with its longest shot")
        if self.height < 0 or 0 < self.height < 16:
            raise UserError(f"height={self.height}: at least 16, or 0 for the film's own")
        if not 0 <= self.crf <= 51:
            raise UserError(f"crf={self.crf}: must lie in 0..51")
        if self.workers.piece_timeout_s <= 0:
            raise UserError(f"workers.piece_timeout_s={self.workers.piece_timeout_s}: must be above 0")
