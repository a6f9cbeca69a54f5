"""Questions to a vision-language model about a sample, and the proof of which sample they are about."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loomvideo.model.tasks import TASKS
from loomvideo.pipelines.captions import schema
from loomvideo.pipelines.sources.samples import Sample
from loomvideo.pipelines.vlm.requests import FrameSampling, VLMMedia, VLMRequest, encode_media, labelled

# Part of every request's digest: raise a mode's when its wording below or its schema changes.
PROMPT_VERSIONS = {"caption": 1, "fashion": 2, "instruction": 1, "verify": 1}

TASK_WORDS = {
    "caption": "Describe what is shown in one or two plain sentences: who or what, clothes, place, motion of the "
    "subject and of the camera. Say only what can be seen.",
    "fashion": "List the garments that are worn or shown, the main one first, with the closest words of the "
    "vocabulary, then the background, the motion, what of the subject is in the picture and the light, then one fluent "
    "sentence that says all of it. Say only what can be seen.",
    "instruction": "The first pictures show a video or picture before editing, the second after. Write the instruction "
    "that a person would give to get from the first to the second: one imperative sentence, as specific as what can be "
    "seen, without naming the pictures.",
    "verify": "The first pictures show a video or picture before editing, the second after. Somebody says that this "
    "instruction leads from the first to the second: {text}\nLook for what it asks for, and for changes that it does "
    "not ask for. Say in one sentence what is missing, wrong or not asked for, then judge: yes, when the second "
    "pictures are what the instruction asks for; partly, when something is missing or something else changed too; no, "
    "when they are not.",
}

_WORDINGS = (
    "Then write {count} other wordings of the same, each complete by itself, as others would say it: the first in "
    "a few words, the others longer, the last in several sentences. None says what the others contradict."
)
_REFERENCES = (
    "The pictures called Reference were given to whoever made it: where what they show is used, say so in words that a "
    "person understands who sees them in this order, such as 'the dress in the first picture'."
)


@dataclass(frozen=True)
class CaptionRequest(VLMRequest):
    """One question about one sample, in the form that clients send.

    Attributes:
        sample_key: The sample.
        mode: ``caption``, ``fashion``, ``instruction`` or ``verify``.
        digest: Hash of the mode, the wording and the pictures: of all that the answer depends on.
        wordings: Other wordings that are asked for.
    """

    sample_key: str = ""
    mode: str = "caption"
    digest: str = field(default="")
    wordings: int = 0

    @property
    def code(self) -> str:
        """What the model has to send back; differs between samples even if they show the same."""
        return request_code(self.sample_key, self.digest)

    def schema(self) -> dict[str, Any]:
        """JSON schema of the answer."""
        return schema.answer_schema(self.mode, self.code, self.wordings)

    def parse(self, text: str) -> dict[str, Any]:
        """The answer's fields without the id.

        Raises:
            InvalidAnswerError: naming the field that breaks the schema.
        """
        return schema.parse_answer(text, self.mode, self.code, self.wordings)


def request_code(sample_key: str, digest: str) -> str:
    """Eight characters that tie an answer to a sample and its pictures."""
    return hashlib.sha256(f"{sample_key}/{digest}".encode()).hexdigest()[:8]


def caption_request(
    sample: Sample,
    mode: str,
    target: np.ndarray,
    source: np.ndarray | None,
    sampling: FrameSampling,
    structured: bool = True,
    references: Sequence[np.ndarray] = (),
    text: str = "",
    wordings: int = 0,
) -> CaptionRequest:
    """Ask about a sample.

    Args:
        sample: The sample whose text is asked for.
        mode: What is asked.
        target: uint8 [frames, height, width, 3].
        source: The source of an edit; needed for instructions.
        sampling: Which frames are shown, how large.
        structured: Whether the server takes a JSON schema; the wording asks for JSON in any case.
        references: uint8 [1, height, width, 3] each.
        text: The instruction that ``verify`` is about.
        wordings: Other wordings that are asked for with the text.

    Raises:
        ValueError: for an instruction of a sample that is no edit.
    """
    media: tuple[VLMMedia, ...] = ()
    if mode in ("instruction", "verify"):
        if source is None or not TASKS[sample.task].needs_source:
            raise ValueError(f"{sample.key}: an instruction needs source and target")
        media += (encode_media("Before editing", source, sampling),)
    media += (encode_media("After editing" if media else "Shown", target, sampling),)
    media += tuple(
        encode_media(f"Reference {number}", picture, sampling) for number, picture in enumerate(references, 1)
    )
    hashed = [PROMPT_VERSIONS[mode], mode, [(m.label, m.digest) for m in media], *([text] if text else [])]
    if wordings:
        hashed.append(wordings)
    digest = hashlib.sha256(json.dumps(hashed).encode()).hexdigest()
    form = schema.answer_schema(mode, request_code(sample.key, digest), wordings)
    asked = TASK_WORDS[mode].replace("{text}", json.dumps(text, ensure_ascii=False))
    asked += f" {_REFERENCES}" if references and mode != "verify" else ""
    asked += f" {_WORDINGS.replace('{count}', str(wordings))}" if wordings else ""
    question = f"{asked}\nAnswer with nothing but JSON of this schema: {json.dumps(form)}"
    parts = labelled(question, media)
    return CaptionRequest(
        parts, tuple(form["properties"]), structured, sample_key=sample.key, mode=mode, digest=digest, wordings=wordings
    )
