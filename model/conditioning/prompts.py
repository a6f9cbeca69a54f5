"""What the MLLM is told: one user message a sample, worded by task (:mod:`loomvideo.model.tasks`)."""

from typing import Literal

from loomvideo.model.tasks import wording
from loomvideo.platform.errors import UserError

Variant = Literal["full", "visual", "spans", "null"]
Part = Literal["text", "image", "video"]


NEGATIVE_OPENING = "generate an image: "
"""What the published sampler says before a negative prompt, whatever the task."""

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (
    "<|endoftext|>",
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)


def compose(task: str, text: str, num_references: int, variant: Variant = "full") -> list[tuple[Part, str]]:
    """The parts of the message, in order: ``("text", words)``, ``("image", "")`` or ``("video", "")``.

    The source comes first among the media, then ``num_references`` images.

    Args:
        task: One of :data:`loomvideo.model.tasks.WORDINGS`.
        text: Instruction, caption or prompt; special tokens in it are refused.
        num_references: Reference images of the sample.
        variant: ``full``; ``visual`` and ``spans`` empty every text; ``null`` has neither text nor media.
    """
    kind = wording(task)
    if variant == "null":
        return [("text", "")]
    check_text(text)
    media: list[tuple[Part, str]] = [(kind.source, "")] if kind.source else []
    if kind.needs_references:
        media += [("image", "")] * num_references
    if variant != "full":
        return media or [("text", "")]
    if kind.text_first:
        return [("text", kind.opening + text), *media]
    return [("text", kind.opening), *media, ("text", text)]


def negative(prompt: str | None) -> str:
    """What the unconditional branch is told: the published words for a negative prompt, nothing for None.

    Guidance dropout trains this branch on an empty message; the published sampler never sends one, its words stand
    before an empty negative prompt too.

    Args:
        prompt: What the result must not look like; None for the message that training drops to.

    Raises:
        UserError: if it contains a special token.
    """
    if prompt is None:
        return ""
    check_text(prompt)
    return NEGATIVE_OPENING + prompt


def check_text(text: str) -> None:
    """Refuse text that would forge the structure of a message.

    Raises:
        UserError: naming the special token.
    """
    for token in SPECIAL_TOKENS:
        if token in text:
            raise UserError(f"text contains the special token {token}: remove it")


def chat(content: str) -> str:
    """The chat text around the content of one user message, ready for the answer."""
    return f"{IM_START}user\n{content}{IM_END}\n{IM_START}assistant\n"
