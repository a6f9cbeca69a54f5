"""What the MLLM is told: one user message a sample, worded by kind.

The words in front of a sample are the published ones; the network was trained with exactly these.
"""

from typing import Literal, NamedTuple

from loomvideo.platform.errors import UserError

Variant = Literal["full", "visual", "spans", "null"]
Medium = Literal["text", "image", "video"]


class Kind(NamedTuple):
    """How the message of one instruction kind is composed.

    ``source`` is the medium of the source frames, ``references`` whether reference images follow, and ``text_first``
    whether the sample's text joins the opening words or comes after the media.
    """

    opening: str
    source: Literal["image", "video"] | None
    references: bool
    text_first: bool


KINDS: dict[str, Kind] = {
    "t2i": Kind("Generate an image: ", None, False, True),
    "t2v": Kind("Generate a video: ", None, False, True),
    "image_edit": Kind("Edit this image: ", "image", False, False),
    "video_edit": Kind("Edit this video: ", "video", False, False),
    "ref_edit": Kind("Edit this video with reference images: ", "video", True, False),
    "mi2i": Kind("Generate an image with reference images: ", None, True, True),
    "mi2v": Kind("Generate a video with reference images: ", None, True, True),
    "reconstruct_image": Kind("Reconstruct this image: ", "image", False, False),
    "reconstruct_video": Kind("Reconstruct this video: ", "video", False, False),
}

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


def kind_of(task: str) -> Kind:
    """The message composition of a task.

    Raises:
        UserError: if there is no such task.
    """
    if task not in KINDS:
        raise UserError(f"task {task!r}: choose one of {', '.join(KINDS)}")
    return KINDS[task]


def compose(task: str, text: str, num_references: int, variant: Variant = "full") -> list[tuple[Medium, str]]:
    """The parts of the message, in order: ``("text", words)``, ``("image", "")`` or ``("video", "")``.

    The source comes first among the media, then ``num_references`` images.

    Args:
        task: One of :data:`KINDS`.
        text: Instruction, caption or prompt; special tokens in it are refused.
        num_references: Reference images of the sample.
        variant: ``full``; ``visual`` and ``spans`` empty every text; ``null`` has neither text nor media.
    """
    kind = kind_of(task)
    if variant == "null":
        return [("text", "")]
    check_text(text)
    media: list[tuple[Medium, str]] = [(kind.source, "")] if kind.source else []
    if kind.references:
        media += [("image", "")] * num_references
    if variant != "full":
        return media or [("text", "")]
    if kind.text_first:
        return [("text", kind.opening + text), *media]
    return [("text", kind.opening), *media, ("text", text)]


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
