"""What LoomVideo does, each task once: what it makes and needs, how the MLLM is told, how far guidance pushes.

A task is added here and nowhere else: prompts, guidance, samples, sources, requests, the page and the suites read this
table. The words in front of a sample and the guidance scales are the published ones.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from loomvideo.platform.errors import UserError

Medium = Literal["image", "video"]
FULL, VISUAL, UNCONDITIONAL = "full", "visual", "unconditional"
"""Guidance branches: everything; media without text; neither (negative prompt, no source, no references)."""
EDIT = "edit"
"""What people ask for: an edit of a video or of a picture, as the source is."""


@dataclass(frozen=True)
class Task:
    """One thing the model is trained to do.

    Attributes:
        name: The name in samples, requests and suites.
        makes: The medium of the result; a source is of the same.
        needs_source: Whether something is edited.
        needs_references: Whether reference pictures belong to it.
        opening: What the MLLM is told first.
        scale: Published guidance scale of text.
        visual_scale: Published guidance scale of media; None without media.
        own_name: False for what is only a way to word another task's samples.
        words_last: Whether the text comes after the media although nothing is edited.
    """

    name: str
    makes: Medium
    needs_source: bool
    needs_references: bool
    opening: str
    scale: float
    visual_scale: float | None = None
    own_name: bool = True
    words_last: bool = False

    @property
    def is_image(self) -> bool:
        """Whether it makes a picture."""
        return self.makes == "image"

    @property
    def source(self) -> Medium | None:
        """The medium of its source."""
        return self.makes if self.needs_source else None

    @property
    def has_media(self) -> bool:
        """Whether anything but text belongs to it."""
        return self.needs_source or self.needs_references

    @property
    def text_first(self) -> bool:
        """Whether the sample's text joins the opening words; an instruction comes after the media instead."""
        return not self.needs_source and not self.words_last

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that a generation may run."""
        return (FULL, UNCONDITIONAL) if self.visual_scale is None else (FULL, VISUAL, UNCONDITIONAL)


_GENERATE, _EDIT, _VISUAL = 5.0, 2.5, 1.5

WORDINGS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("t2i", "image", False, False, "Generate an image: ", _GENERATE),
        Task("t2v", "video", False, False, "Generate a video: ", _GENERATE),
        Task("image_edit", "image", True, False, "Edit this image: ", _EDIT, _VISUAL),
        Task("video_edit", "video", True, False, "Edit this video: ", _EDIT, _VISUAL),
        Task("ref_edit", "video", True, True, "Edit this video with reference images: ", _EDIT, _VISUAL),
        Task("mi2i", "image", False, True, "Generate an image with reference images: ", _GENERATE, _VISUAL, False),
        Task("mi2v", "video", False, True, "Generate a video with reference images: ", _GENERATE, _VISUAL),
        Task("reconstruct_image", "image", True, False, "Reconstruct this image: ", _EDIT, _VISUAL, False),
        Task("reconstruct_video", "video", True, False, "Reconstruct this video: ", _EDIT, _VISUAL, False),
    )
}
"""Every way to tell the MLLM a sample."""

PUBLISHED_EVALUATION: dict[str, Task] = {
    "ref_edit": Task("ref_edit, as evaluated", "video", True, True, "Edit this video: ", _EDIT, _VISUAL, False),
    "mi2v": dataclasses.replace(WORDINGS["mi2v"], name="mi2v, as evaluated", own_name=False, words_last=True),
}
"""Tasks that LoomVideo's own evaluation words otherwise than its training: RefVIE-Bench and IntelligentVBench."""

_ALL_WORDINGS = WORDINGS | {kind.name: kind for kind in PUBLISHED_EVALUATION.values()}

TASKS: dict[str, Task] = {name: task for name, task in WORDINGS.items() if task.own_name}
"""The tasks, by name."""

_EDIT_OF: dict[Medium, str] = {"image": "image_edit", "video": "video_edit"}
REQUESTED = tuple(dict.fromkeys(EDIT if name in _EDIT_OF.values() else name for name in TASKS))
"""What people are offered: :data:`TASKS` with one name for the edits that the source tells apart."""


def wording(name: str) -> Task:
    """How the MLLM is told a kind of sample.

    Raises:
        UserError: if there is no such kind.
    """
    return _find(name, _ALL_WORDINGS, tuple(WORDINGS))


def evaluation_wording(name: str) -> str:
    """The wording of a task's samples in LoomVideo's own evaluation."""
    return PUBLISHED_EVALUATION[name].name if name in PUBLISHED_EVALUATION else name


def task(name: str) -> Task:
    """A task by its name.

    Raises:
        UserError: if there is none.
    """
    return _find(name, TASKS, tuple(TASKS))


def requested_task(name: str, source: Medium | None = None) -> Task:
    """The task of a request, ``edit`` being that of its source's medium.

    Args:
        name: A task, or ``edit``.
        source: Medium of the source that came along; None where it is not known yet, which counts as a video.

    Raises:
        UserError: if there is no such task, or it edits another medium.
    """
    if name == EDIT:
        name = _EDIT_OF[source or "video"]
    found = _find(name, TASKS, (EDIT, *TASKS))
    if found.source == "video" and source == "image":
        raise UserError(f"task={name}: the source is a picture; use task=edit or task=image_edit")
    return found


def meant(name: str) -> tuple[str, ...]:
    """The tasks that a requested name stands for: both edits, or itself."""
    return tuple(_EDIT_OF.values()) if name == EDIT else (name,)


def _find(name: str, table: dict[str, Task], names: tuple[str, ...]) -> Task:
    if name not in table:
        raise UserError(f"task={name}: choose one of {', '.join(names)}")
    return table[name]
