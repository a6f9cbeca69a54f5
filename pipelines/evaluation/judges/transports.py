"""How a benchmark's own code asks its judge, as data: ``transports.yaml`` read, checked and turned into requests.

These send whole files as they are (the original source, the finished film), unlike our own rubrics, which show every
judge the same few frames.
"""

import mimetypes
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from loomvideo.pipelines.evaluation.suites.items import EvalItem, file_digest
from loomvideo.pipelines.media.decode import DecodeError, open_media
from loomvideo.pipelines.vlm.requests import VLMMedia, VLMRequest

FILE = Path(__file__).with_name("transports.yaml")
ORDINALS = ("first", "second", "third", "fourth")


@dataclass(frozen=True)
class Transport:
    """One way of asking; the file's head explains the fields.

    Attributes:
        name: ``suite/mode``.
        code: What is described: repository, commit and file.
        api: ``openai`` or ``gemini``.
        model: The judge that the code names.
        parts: The user message, in order.
        system: System instruction.
        references: Words before the first reference, a later subject and a background.
        strip: Whether white space around the rubric is cut.
        image_mime: Stated form of pictures; empty for the one of the file's name.
        film_part: Kind of part that carries a film in the OpenAI dialect.
        temperature: Sampling temperature; None leaves the provider's.
        max_tokens: Most output tokens; None leaves the provider's.
        attempts: Calls before a failure counts.
        wait_s: Seconds between them.
        asks: Questions before an unreadable answer counts.
    """

    name: str
    code: str
    api: str
    model: str
    parts: tuple[str, ...]
    system: str = ""
    references: dict[str, str] = field(default_factory=dict)
    strip: bool = False
    image_mime: str = ""
    film_part: str = "video_url"
    temperature: float | None = None
    max_tokens: int | None = None
    attempts: int = 1
    wait_s: float = 2.0
    asks: int = 1

    def request(
        self, text: str, item: EvalItem, root: Path, result: Path, system: str = "", repeat: int = 0
    ) -> VLMRequest:
        """The request about one sample.

        Args:
            text: The rubric or the questions, filled in.
            item: The sample.
            root: Folder that its media paths start from.
            result: The finished film or picture.
            system: What ``{system}`` stands for.
            repeat: Which of k independent judgements this is.
        """
        words = text.strip() if self.strip else text
        parts: list[str | VLMMedia] = []
        for part in self.parts:
            if part == "{rubric}":
                parts.append(words)
            elif part == "{source}":
                parts.append(self._file("Before editing", root / str(item.source)))
            elif part == "{references}":
                parts += self._references(item, root)
            elif part == "{result}":
                parts.append(self._file("After editing" if item.source else "Generated result", result))
            else:
                parts.append(part)
        instruction = self.system.replace("{rubric}", words).replace("{system}", system)
        return VLMRequest(tuple(parts), (), structured=False, system=instruction, repeat=repeat)

    def _references(self, item: EvalItem, root: Path) -> list[str | VLMMedia]:
        parts: list[str | VLMMedia] = []
        for number, path in enumerate(item.references):
            background = bool(item.extra.get("with_background")) and number == len(item.references) - 1
            kind = "background" if background else "subject" if number else "first"
            words = self.references.get(kind, "")
            if words:
                parts.append(words.replace("{ordinal}", ORDINALS[number]))
            parts.append(self._file(f"Reference picture {number + 1}", root / path))
        return parts

    def _file(self, label: str, path: Path) -> VLMMedia:
        mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        if mime.startswith("image/"):
            return VLMMedia(label, (path.read_bytes(),), None, file_digest(path), self.image_mime or mime)
        return VLMMedia(label, (), path.read_bytes(), file_digest(path), billed_frames=_seconds(path))

    def deviations(self, kind: str, model: str, temperature: float | None, repeats: int) -> list[str]:
        """What a configuration does otherwise than the code described, one line each."""
        found = []
        if kind != self.api:
            found.append(f"judge.kind={kind}, the code uses {self.api}")
        if model != self.model:
            found.append(f"judge.model={model}, the code names {self.model}")
        if temperature is not None and temperature != self.temperature:
            wanted = "the provider's default" if self.temperature is None else f"{self.temperature:g}"
            found.append(f"judge.temperature={temperature:g}, the code uses {wanted}")
        if repeats != 1:
            found.append(f"judge.repeats={repeats}, the code asks once")
        return found


@lru_cache
def transports(path: Path = FILE) -> dict[str, Transport]:
    """Every transport by name."""
    values: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: Transport(name=name, **entry | {"parts": tuple(entry["parts"])}) for name, entry in values.items()}


def _seconds(path: Path) -> int:
    """Frames that a provider which looks at one a second is taken to bill; 1 of a file that cannot be opened."""
    try:
        info = open_media(str(path)).info
    except (DecodeError, OSError):
        return 1
    return max(1, round(info.num_frames / max(info.fps, 1.0)))
