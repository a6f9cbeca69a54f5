"""What is asked to be generated: one request, or a file of them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loomvideo.model.tasks import requested_task
from loomvideo.platform.errors import UserError

IMAGE_SUFFIXES, VIDEO_SUFFIXES = (".png", ".webp"), (".mp4",)
MAX_REFERENCES = 6
MAX_PROMPT_CHARACTERS = 4000


@dataclass(frozen=True)
class Request:
    """What to generate."""

    task: str
    prompt: str
    out: str
    source: str = ""
    refs: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    seed: int = 0

    def check(self) -> None:
        """Check everything that needs no file.

        Raises:
            UserError: naming the key and the fix.
        """
        task = requested_task(self.task)
        if not self.prompt.strip():
            raise UserError("prompt: must not be empty")
        for key, text in (("prompt", self.prompt), ("negative_prompt", self.negative_prompt)):
            if len(text) > MAX_PROMPT_CHARACTERS:
                raise UserError(f"{key}: {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are accepted")
        if task.needs_source != bool(self.source):
            raise UserError(f"task={self.task}: {'set source=' if task.needs_source else 'takes no source'}")
        if task.needs_references != bool(self.refs):
            raise UserError(f"task={self.task}: {'set refs=[…]' if not self.refs else 'takes no refs'}")
        if len(self.refs) > MAX_REFERENCES:
            raise UserError(f"refs: {len(self.refs)} references, at most {MAX_REFERENCES} are accepted")
        if Path(self.out).suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            raise UserError(f"out={self.out}: name a {', '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)} file")


def read_requests(path: Path) -> Iterator[Request]:
    """Requests of a JSONL file, one object a line; paths are relative to the file.

    Raises:
        UserError: naming the file, the line and the field.
    """
    if not path.is_file():
        raise UserError(f"batch={path}: no such file")
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
            request = Request(**values)
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{where}: {error}; fields are {', '.join(Request.__dataclass_fields__)}") from error
        request = Request(
            **{
                **asdict(request),
                "out": str(path.parent / request.out),
                "source": str(path.parent / request.source) if request.source else "",
                "refs": [str(path.parent / ref) for ref in request.refs],
            }
        )
        try:
            request.check()
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if request.out in seen:
            raise UserError(f"{where}: out={request.out} is named twice")
        seen.add(request.out)
        yield request
