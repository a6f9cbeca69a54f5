"""How files are generated, by the command line and the web page alike."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from loomvideo.model.guidance import Guidance
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

MIN_FPS, MAX_FPS = 1.0, 240.0


@dataclass
class Settings:
    """How to generate; zero and null take the task's or the source's own."""

    buckets: list[int] = option([640], "resolution classes for sources and references")
    width: int = option(0, "width; 0 takes the source's bucket, or default_size")
    height: int = option(0, "height")
    default_size: list[int] = option([832, 480], "width and height where neither a source nor width and height say")
    num_frames: int = option(97, "frames of a video, at most the source's; 4k+1 with a codec of temporal stride 4")
    keep: bool = option(
        True,
        "edits play like their source: its size, frame rate, colour tags and sound; "
        "false: as training saw clips, cropped to the bucket, 24 frames a second, silent",
    )
    fps: float = option(0.0, "frames a second of a video; 0 takes an edit's from its source, else 24")
    whole: bool = option(False, "edits of videos: the whole of them, in windows of num_frames")
    overlap: int = option(
        0, "whole: frames that neighbouring windows share, of the same form as num_frames; 0 takes about a sixth"
    )
    steps: int = option(50, "denoising steps")
    scale: float | None = option(
        None, "guidance scale; null takes the model size's of the task (tiny: 1 for edits, 2 otherwise; else 2.5 and 5)"
    )
    visual_scale: float | None = option(
        None, "guidance scale of media; null takes the model size's (tiny: 1, else 1.5)"
    )
    negative_prompt: str | None = option(
        None, "what the unconditional branch is told; null takes the model size's own (5b: the published text)"
    )
    batch_branches: bool = option(False, "run the guidance branches in one pass: faster for small videos, more memory")
    batch_seeds: int = option(1, "seeds that are denoised in one pass: faster for small videos, more memory")
    shortcuts: Shortcuts = option(Shortcuts, "")

    def check(self) -> None:
        """Refuse what cannot be generated.

        Raises:
            UserError: naming the key.
        """
        if self.num_frames < 1:
            raise UserError(f"num_frames={self.num_frames}: must be at least 1")
        if self.steps < 1:
            raise UserError(f"steps={self.steps}: must be at least 1")
        if self.batch_seeds < 1:
            raise UserError(f"batch_seeds={self.batch_seeds}: must be at least 1")
        if len(self.default_size) != 2:
            raise UserError(f"default_size={self.default_size}: give width and height")
        if self.fps and not MIN_FPS <= self.fps <= MAX_FPS:
            raise UserError(f"fps={self.fps:g}: choose {MIN_FPS:g} to {MAX_FPS:g}, or 0")
        if self.whole and not self.keep:
            raise UserError("whole=true: plays like its source; leave keep=true")
        self.shortcuts.check()

    def guidance(self, default: Guidance) -> Guidance:
        """A task's guidance with what was set."""
        visual = default.visual_scale
        if visual is not None and self.visual_scale is not None:
            visual = self.visual_scale
        return Guidance(default.scale if self.scale is None else self.scale, visual)

    def size(self) -> tuple[int, int]:
        """Width and height of what has no source."""
        return self.width or self.default_size[0], self.height or self.default_size[1]

    def asked_size(self) -> tuple[int, int] | None:
        """Width and height that were asked for; None where they are a source's.

        Raises:
            UserError: if one is set without the other.
        """
        if bool(self.width) != bool(self.height):
            raise UserError("width and height: set both, or neither to keep the source's shape")
        return (self.width, self.height) if self.width else None

    def facts(self) -> dict[str, Any]:
        """Everything here that determines a result, as plain values."""
        return asdict(Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)}))
