"""What may be asked for: one generation, and the limits on it."""

import re
from dataclasses import dataclass, field, fields

from loomvideo.model.codec import LatentGrid
from loomvideo.model.tasks import requested_task
from loomvideo.pipelines.serving.uploads import Upload
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

MENTION = re.compile(r"@image\s*(\d+)", re.IGNORECASE)


@dataclass
class RequestLimits:
    """What one request may ask for, how many may wait, and how long anything may take."""

    max_prompt_characters: int = option(2000, "characters of a prompt at most")
    max_references: int = option(6, "reference pictures at most")
    max_steps: int = option(100, "denoising steps at most")
    max_frames: int = option(121, "frames at most")
    max_side: int = option(1472, "pixels of a side at most")
    max_pixels: int = option(960 * 960, "pixels of a frame at most")
    max_waiting: int = option(32, "requests that may wait")
    max_run_s: float = option(3600.0, "seconds that a generation may run")
    max_attempts: int = option(3, "starts of a generation whose server stopped in the middle")
    max_active_per_user: int = option(0, "requests of one person that may wait or run; 0 for no limit")
    max_per_day_per_user: int = option(0, "requests of one person in 24 hours; 0 for no limit")
    kept_results: int = option(200, "finished generations kept")
    kept_bytes: int = option(2**30, "bytes of results kept")
    kept_s: float = option(3600.0, "seconds that a finished generation is kept")


@dataclass(frozen=True)
class GenerationRequest:
    """One generation; unset numbers are the checkpoint's and the task's defaults."""

    task: str
    prompt: str
    negative_prompt: str | None = None
    source: Upload | None = None
    references: list[Upload] = field(default_factory=list)
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    num_frames: int | None = None
    width: int | None = None
    height: int | None = None
    whole: bool = False
    """Edit a video to its end, and not its first frames alone."""
    deadline_s: float | None = None
    """Seconds from the request after which nobody wants the result any more."""

    def identity(self) -> tuple:
        """What tells requests apart; of files, which they are."""
        files = (self.source.id if self.source else None, tuple(reference.id for reference in self.references))
        rest = (getattr(self, field.name) for field in fields(self) if field.name not in ("source", "references"))
        return (*files, *rest)


def check_request(request: GenerationRequest, limits: RequestLimits, grid: LatentGrid | None = None) -> None:
    """Refuse what cannot be generated.

    Args:
        request: What is asked for.
        limits: What may be.
        grid: Which sizes the model can make; None leaves that to the generator.

    Raises:
        UserError: one line that says what to change.
    """
    task = requested_task(request.task, request.source.info.kind if request.source else None)
    if not request.prompt.strip():
        raise UserError("the prompt is empty: say what to make or change")
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt or "")):
        if len(text) > limits.max_prompt_characters:
            raise UserError(f"the {name} has {len(text)} characters: at most {limits.max_prompt_characters}")
    if task.needs_source != (request.source is not None):
        needs = "editing needs a source video or picture"
        raise UserError(needs if task.needs_source else "this task takes no source")
    if task.needs_references and not request.references:
        raise UserError("this task needs at least one reference picture")
    if not task.needs_references and request.references:
        raise UserError("this task takes no reference pictures")
    if len(request.references) > limits.max_references:
        raise UserError(f"{len(request.references)} reference pictures: at most {limits.max_references}")
    if any(reference.info.kind != "image" for reference in request.references):
        raise UserError("a reference is a video: references are pictures")
    if request.whole and (request.source is None or request.source.info.kind != "video"):
        raise UserError("whole: is for edits of videos")
    for number in map(int, MENTION.findall(request.prompt)):
        if not 1 <= number <= len(request.references):
            raise UserError(f"the prompt mentions @Image {number}, but there are {len(request.references)} references")
    for name, value, most in (
        ("steps", request.steps, limits.max_steps),
        ("frames", request.num_frames, limits.max_frames),
    ):
        if value is not None and not 1 <= value <= most:
            raise UserError(f"{name}={value}: choose 1 to {most}")
    width, height = request.width, request.height
    if (width is None) != (height is None):
        raise UserError("width and height: give both, or neither")
    if width is None or height is None:
        return
    for name, side in (("width", width), ("height", height)):
        if not 1 <= side <= limits.max_side:
            raise UserError(f"{name}={side}: choose 1 to {limits.max_side}")
    if width * height > limits.max_pixels:
        raise UserError(f"{width}x{height}: {width * height} pixels, at most {limits.max_pixels}")
    if grid is not None:
        grid.check_size("size", width, height)
