"""How files are generated, by the command line and the web page alike."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from loomvideo.model.guidance import Guidance
from loomvideo.model.shortcuts import Shortcuts
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError


@dataclass
class Settings:
    """How to generate; zero and null take the task's or the source's own."""

    buckets: list[int] = option([640], "resolution classes for sources and references")
    width: int = option(0, "width; 0 takes the source's bucket, or default_size")
    height: int = option(0, "height")
    default_size: list[int] = option([832, 480], "width and height where neither a source nor width and height say")
    num_frames: int = option(97, "frames of a video, at most the source's; 4k+1 with a codec of temporal stride 4")
    whole: bool = option(
        False, "edit the whole of a video, in windows of num_frames, at its own frame rate and size, its sound kept"
    )
    overlap: int = option(17, "whole: frames that neighbouring windows share, of the same form as num_frames")
    steps: int = option(50, "denoising steps")
    scale: float | None = option(None, "guidance scale; null takes the task's (2.5 for edits, 5 otherwise)")
    visual_scale: float | None = option(None, "guidance scale of media; null takes 1.5")
    negative_prompt: str | None = option(
        None, "what the unconditional branch is told; null takes the model size's own (5b: the published text)"
    )
    batch_branches: bool = option(False, "run the guidance branches in one pass: faster for small videos, more memory")
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
        if len(self.default_size) != 2:
            raise UserError(f"default_size={self.default_size}: give width and height")
        self.shortcuts.check()

    def guidance(self, task: str) -> Guidance:
        """The task's guidance with what was set."""
        default = Guidance.default(task)
        visual = default.visual_scale
        if visual is not None and self.visual_scale is not None:
            visual = self.visual_scale
        return Guidance(default.scale if self.scale is None else self.scale, visual)

    def size(self) -> tuple[int, int]:
        """Width and height of what has no source."""
        return self.width or self.default_size[0], self.height or self.default_size[1]

    def facts(self) -> dict[str, Any]:
        """Everything here that determines a result, as plain values."""
        return asdict(Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)}))
